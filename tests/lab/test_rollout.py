"""Waves, gate and going back: F2, F3, F4, and what a change of one group restarts."""

from __future__ import annotations

import threading
import time

import requests

from fleet.plan import QUESTION
from lab import hosts as lab
from lab.hardware import Mode, Rule
from tests.lab.conftest import CPU, H20
from tests.lab.site import Site, argv_of, main_pids, unit_text

CHANGE = '"max_model_len": 131072'
LENGTH = "131072"
NEXT = "0.33.1"


def started(host: str, unit: str) -> int:
    """When a unit became active, in the machine's own monotonic microseconds."""
    value = lab.ssh(host, f"systemctl show -p ActiveEnterTimestampMonotonic --value {unit}").stdout
    return int(value)


def test_a_changed_flag_restarts_that_groups_services_wave_by_wave(gpu_site: Site) -> None:
    units = [service.unit for service in gpu_site.plans().plans["h20-01"].services]
    before = {host: main_pids(host) for host in (*H20, CPU)}
    gpu_site.set_in_services("h20", CHANGE)

    run = gpu_site.roll_out_well()

    after = {host: main_pids(host) for host in (*H20, CPU)}
    assert after[CPU] == before[CPU]
    for host in H20:
        for unit in units:
            assert after[host][unit] != before[host][unit]
            assert LENGTH in argv_of(host, after[host][unit])
    waves = [hosts for name, hosts in run.changed_operations().items() if "Wave" in name]
    assert waves == [["h20-01"], ["h20-02"], ["h20-03"]]
    # The hosts share one kernel, so their monotonic clocks are one: no wave begins before the last ended.
    times = [(min(started(h, u) for u in units), max(started(h, u) for u in units)) for h in H20]
    assert times[0][1] < times[1][0]
    assert times[1][1] < times[2][0]
    assert gpu_site.roll_out_well().changed == 0


def state_of(host: str) -> tuple[dict[str, int], dict[str, str], set[str]]:
    """Processes, units and the releases that the processes run from, of one host."""
    pids = main_pids(host)
    units = {unit: unit_text(host, unit) for unit in pids}
    services = [pid for unit, pid in pids.items() if unit != "minimax-proxy.service"]
    return pids, units, {argv_of(host, pid)[0] for pid in services}


def test_f2_an_unhealthy_canary_is_put_back_and_nothing_else_is_touched(gpu_site: Site) -> None:
    canary, *others = H20
    gpu_site.roll_out_well("--limit", "h20")
    before, pids = state_of(canary), {host: state_of(host) for host in others}
    text = "RuntimeError: CUDA error: an illegal memory access was encountered"
    lab.misbehave(canary, Rule(Mode.DIE_LOADING, version=NEXT, text=text))
    gpu_site.edit("h20", r'"version": "0.33.0"', f'"version": "{NEXT}"')

    run = gpu_site.pyinfra("-y", "inventories/lab.py", "deploy.py", "--limit", "h20")

    assert run.exit_code == 1
    assert text in run.output
    assert "gate, process: expected minimax-m25-a.service running" in run.output
    assert "m25-a was put back and serves" in run.output
    assert {host: state_of(host) for host in others} == pids
    units, release = state_of(canary)[1:]
    assert (units, release) == before[1:]
    assert '"0.33.0"' in lab.ssh(canary, "curl -s http://127.0.0.1:18000/version").stdout
    answered = gpu_site.pyinfra("-y", "inventories/lab.py", "tasks.health.check", "--limit", "h20")
    assert answered.exit_code == 0, answered.output


def test_f3_a_server_that_is_healthy_and_never_answers_fails_by_the_deadline(
    gpu_site: Site,
) -> None:
    lab.misbehave(H20[0], Rule(Mode.HANG, version=NEXT))
    gpu_site.edit("h20", r'"version": "0.33.0"', f'"version": "{NEXT}"')

    run = gpu_site.pyinfra("-y", "inventories/lab.py", "deploy.py", "--limit", "h20-01")

    assert run.exit_code == 1
    assert (
        "gate, answer: expected an answer that matches /Dodgers/ within 6 s, got none" in run.output
    )
    assert "was put back and serves" in run.output


def test_f4_a_foreign_process_on_the_port_is_named_before_anything_is_changed(
    gpu_site: Site,
) -> None:
    host = H20[0]
    lab.ssh(host, "systemd-run --unit=squatter python3 -m http.server 9000", check=True)
    pid = lab.ssh(host, "systemctl show -p MainPID --value squatter").stdout.strip()
    before = main_pids(host)
    gpu_site.edit("h20", r'"port": 8000', '"port": 9000')

    run = gpu_site.pyinfra("-y", "inventories/lab.py", "deploy.py", "--limit", "h20")
    lab.ssh(host, "systemctl stop squatter")

    assert run.exit_code == 1
    assert f"port 9000 for m25-a is held by PID {pid} (python3)" in run.output
    del before["minimax-proxy.service"]
    assert before.items() <= main_pids(host).items()


def test_f4_a_server_with_another_model_fails_the_gate(gpu_site: Site) -> None:
    lab.misbehave(H20[0], Rule(Mode.WRONG_MODEL, version=NEXT))
    gpu_site.edit("h20", r'"version": "0.33.0"', f'"version": "{NEXT}"')

    run = gpu_site.pyinfra("-y", "inventories/lab.py", "deploy.py", "--limit", "h20-01")

    assert run.exit_code == 1
    assert "gate, model: expected MiniMaxAI/MiniMax-M2.5, got " in run.output


def test_garbled_answers_fail_the_gate(gpu_site: Site) -> None:
    lab.misbehave(H20[0], Rule(Mode.GARBAGE, version=NEXT))
    gpu_site.edit("h20", r'"version": "0.33.0"', f'"version": "{NEXT}"')

    run = gpu_site.pyinfra("-y", "inventories/lab.py", "deploy.py", "--limit", "h20-01")

    assert run.exit_code == 1
    assert "gate, answer: expected an answer that matches /Dodgers/" in run.output


def test_health_check_names_a_service_that_hangs_with_its_journal(gpu_site: Site) -> None:
    gpu_site.roll_out_well("--limit", "h20")
    lab.misbehave(H20[1], Rule(Mode.HANG))
    # Something that only this service's journal can say: which process of which start it is.
    pid = main_pids(H20[1])["minimax-m25-a.service"]

    run = gpu_site.pyinfra("-y", "inventories/lab.py", "tasks.health.check", "--limit", "h20")

    assert run.exit_code == 1
    journal = lab.ssh(H20[1], f"journalctl _PID={pid} -o cat -n 1", check=True).stdout.strip()
    assert journal
    assert f"    {journal}" in run.output
    assert "[h20-02] m25-a: http://10.86.1.2:8000/v1/chat/completions: expected" in run.output
    assert "within 6 s, got none" in run.output


def test_nothing_that_is_accepted_is_lost_while_a_service_is_exchanged(gpu_site: Site) -> None:
    gpu_site.roll_out_well("--limit", H20[0])
    url = f"http://{gpu_site.plans().addresses[H20[0]]}:8000/v1/chat/completions"
    body = {"model": "MiniMaxAI/MiniMax-M2.5", **QUESTION}
    statuses: list[int] = []
    stop = threading.Event()

    def ask_all_the_time() -> None:
        while not stop.is_set():
            statuses.append(requests.post(url, json=body, timeout=60).status_code)
            time.sleep(0.05)

    client = threading.Thread(target=ask_all_the_time)
    client.start()
    gpu_site.set_in_services("h20", CHANGE)
    gpu_site.roll_out_well("--limit", H20[0])
    stop.set()
    client.join()

    # 503 is the proxy's word while the service is out; a 500 or 502 would be an accepted request lost.
    assert set(statuses) == {200, 503}
    assert statuses[0] == statuses[-1] == 200


def test_a_service_that_left_the_plan_is_retired_and_its_neighbour_serves_on(
    gpu_site: Site,
) -> None:
    host = H20[0]
    gpu_site.roll_out_well("--limit", host)
    before = main_pids(host)
    second = gpu_site.plans().plans[host].services[1]
    gpu_site.append("h20", "services = services[:1]")

    gpu_site.roll_out_well("--limit", host)

    after = main_pids(host)
    assert after["minimax-m25-a.service"] == before["minimax-m25-a.service"]
    assert second.unit not in after
    left = f"ls -d /etc/systemd/system/{second.unit} /etc/systemd/system/*.wants/{second.unit} "
    left += f"/var/lib/minimax-fleet/services/{second.name}.json"
    assert lab.ssh(host, left).stdout == ""
    # What was staged with it is the way back.
    assert lab.ssh(host, f"ls {second.stage_dir}/unit.service").returncode == 0
    listening = lab.ssh(host, "ss --listening --tcp --numeric --no-header", check=True).stdout
    assert f":{second.port} " not in listening
    assert f":{second.engine_port} " not in listening
    assert gpu_site.roll_out_well("--limit", host).changed == 0
