"""What somebody changed by hand is put right by the next roll-out; what goes wrong on the way is undone."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import requests

from fleet.plan import ServicePlan
from lab import hosts as lab
from tests.lab.conftest import H20
from tests.lab.site import Site, argv_of, main_pids, unit_text, wait_for

HOST = H20[0]
UNIT = "minimax-m25-a.service"
OTHER = "minimax-m25-b.service"
PROXY = "minimax-proxy.service"
NGINX_CONF = "/etc/minimax/proxy/nginx.conf"
CHANGE = '"max_model_len": 131072'


def on_host(command: str) -> str:
    return lab.ssh(HOST, command, check=True).stdout


def public(site: Site, service: ServicePlan, path: str = "/v1/models") -> int:
    """HTTP status at a service's public port."""
    url = f"http://{site.plans().addresses[HOST]}:{service.port}{path}"
    return requests.get(url, timeout=10).status_code


def restored(site: Site) -> bool:
    """Whatever systemd and nginx read is the plan's, and a second run finds nothing."""
    plan = site.plans().plans[HOST]
    for service in plan.services:
        assert unit_text(HOST, service.unit) == service.unit_text
        assert on_host(f"systemctl is-enabled {service.unit}").strip() == "enabled"
        assert on_host(f"systemctl show -p DropInPaths --value {service.unit}").strip() == ""
        assert on_host(f"systemctl show -p NeedDaemonReload --value {service.unit}").strip() == "no"
    for file in plan.proxy_files:
        assert lab.read_file(HOST, file.path) == file.content
    return site.roll_out_well("--limit", HOST).changed == 0


def test_edits_that_no_process_knows_are_put_right_without_a_restart(served: Site) -> None:
    before = main_pids(HOST)
    on_host(f"echo '# by hand' >>/etc/systemd/system/{UNIT} && systemctl daemon-reload")
    on_host(
        f"mkdir -p /etc/systemd/system/{OTHER}.d && cd /etc/systemd/system/{OTHER}.d &&"
        " printf '[Service]\\nLimitNOFILE=1024\\n' >override.conf && systemctl daemon-reload"
    )
    on_host(f"systemctl disable {OTHER} {PROXY}")
    on_host(f"sed -i 's/return 404;/return 200;/' {NGINX_CONF} && systemctl reload {PROXY}")
    service = served.plans().plans[HOST].services[0]
    wait_for(lambda: public(served, service, "/metrics") == 200, 10, "nginx has what was changed")

    run = served.roll_out_well("--limit", HOST)

    assert [*run.changed_operations().values()] == [[HOST]], run.changed_operations()
    assert main_pids(HOST) == before
    assert public(served, service, "/metrics") == 404
    assert restored(served)


def serve_edited(service: ServicePlan) -> None:
    """Somebody adds an option to a unit and restarts it."""
    text = service.unit_text.replace("    --port ", "    --max-num-seqs 1 \\\n    --port ")
    lab.write_file(HOST, f"/etc/systemd/system/{service.unit}", text)
    on_host(f"systemctl daemon-reload && systemctl restart {service.unit}")


def test_a_process_that_came_out_of_an_edit_is_exchanged_and_its_neighbour_is_not(
    served: Site,
) -> None:
    service = served.plans().plans[HOST].services[0]
    serve_edited(service)
    before = main_pids(HOST)
    assert "--max-num-seqs" in argv_of(HOST, before[UNIT])

    served.roll_out_well("--limit", HOST)

    after = main_pids(HOST)
    assert tuple(argv_of(HOST, after[UNIT])[-len(service.argv) :]) == service.argv
    assert after[OTHER] == before[OTHER]
    assert restored(served)


def test_a_unit_that_was_put_back_under_an_edited_process_hides_nothing(served: Site) -> None:
    service = served.plans().plans[HOST].services[0]
    serve_edited(service)
    lab.write_file(HOST, f"/etc/systemd/system/{UNIT}", service.unit_text)
    on_host("systemctl daemon-reload")

    served.roll_out_well("--limit", HOST)

    assert "--max-num-seqs" not in argv_of(HOST, main_pids(HOST)[UNIT])
    assert restored(served)


def test_a_unit_that_is_on_no_record_and_in_no_plan_is_removed(served: Site) -> None:
    """As a first installation leaves it that lost power in its gate, when its service is then renamed."""
    before = main_pids(HOST)
    text = (
        "# Written by minimax-fleet for old-name; changes made here are overwritten.\n[Service]\n"
    )
    text += "ExecStart=/bin/sleep infinity\n[Install]\nWantedBy=multi-user.target\n"
    lab.write_file(HOST, "/etc/systemd/system/minimax-old-name.service", text)
    on_host("systemctl daemon-reload && systemctl enable --now minimax-old-name.service")

    served.roll_out_well("--limit", HOST)

    assert main_pids(HOST) == before
    assert (
        on_host("ls -d /etc/systemd/system/*old-name* /etc/systemd/system/*/*old-name* || true")
        == ""
    )
    assert restored(served)


@pytest.fixture
def squatter() -> Iterator[str]:
    """A command that takes port 9000 on the host."""
    yield "systemd-run --quiet --unit=squatter python3 -m http.server 9000"
    lab.ssh(HOST, "systemctl stop squatter")


def test_a_port_that_is_taken_while_the_run_goes_on_undoes_the_cut_over(
    gpu_site: Site, squatter: str
) -> None:
    old = gpu_site.plans().plans[HOST].services[0]
    gpu_site.edit("h20", r'"port": 8000', '"port": 9000')
    process = gpu_site.start("-y", "inventories/lab.py", "deploy.py", "--limit", HOST)
    assert process.stdout is not None
    printed = []
    for line in process.stdout:
        printed.append(line)
        if "Starting operation: runtime" in line and not any(
            "runtime" in one for one in printed[:-1]
        ):
            on_host(squatter)
    output = "".join(printed)

    assert process.wait() == 1, output
    assert "minimax-proxy.service does not take its configuration" in output
    assert "Address already in use" in output
    assert "the cut-over failed and was undone" in output
    assert public(gpu_site, old) == 200

    on_host("systemctl stop squatter")
    gpu_site.roll_out_well("--limit", HOST)
    assert public(gpu_site, gpu_site.plans().plans[HOST].services[0]) == 200


@pytest.fixture
def records_that_cannot_be_written() -> Iterator[None]:
    folder = "/var/lib/minimax-fleet/services"
    on_host(f"mount --bind {folder} {folder} && mount -o remount,bind,ro {folder}")
    yield
    lab.ssh(HOST, f"umount {folder}")


def test_an_error_that_is_no_failed_gate_undoes_the_cut_over_too(
    gpu_site: Site, records_that_cannot_be_written: None
) -> None:
    old = gpu_site.plans().plans[HOST].services
    gpu_site.set_in_services("h20", CHANGE)

    run = gpu_site.pyinfra("-y", "inventories/lab.py", "deploy.py", "--limit", HOST)

    assert run.exit_code == 1
    assert (
        "the cut-over failed and was undone: OSError: [Errno 30] Read-only file system"
        in run.output
    )
    assert "Traceback" not in run.output
    pids = main_pids(HOST)
    for service in old:
        assert tuple(argv_of(HOST, pids[service.unit])[-len(service.argv) :]) == service.argv
        assert public(gpu_site, service) == 200


def test_a_cut_over_that_is_killed_keeps_nobody_out(gpu_site: Site) -> None:
    lab.misbehave(HOST, load_seconds=10)
    gpu_site.set_in_services("h20", CHANGE)
    gpu_site.kill_when("started m25-a", "--limit", HOST)

    on_host("systemctl kill --signal=KILL 'minimax-job-cutover-*'")

    # No roll-out since: what was started becomes public as soon as it answers.
    service = gpu_site.plans().plans[HOST].services[0]
    wait_for(lambda: public(gpu_site, service) == 200, 30, "the service is public")
    pids = main_pids(HOST)
    assert pids[service.unit] > 0

    run = gpu_site.roll_out_well("--limit", HOST)

    assert run.changed == 1, run.changed_operations()
    assert main_pids(HOST) == pids
    record = json.loads(lab.read_file(HOST, "/var/lib/minimax-fleet/services/m25-a.json"))
    assert record["stamp"] == service.stamp
