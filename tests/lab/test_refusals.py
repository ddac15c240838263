"""What pyinfra lets pass is refused by the very command that users type, before any host is asked."""

from __future__ import annotations

import pytest

from tests.lab.conftest import H20
from tests.lab.site import Site, main_pids, written

BAD_INPUT = 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inventories/none.py", "deploy.py"], "no such inventory file; selects 0 hosts"),
        (["inventories/lab.py", "deploy.py", "--limit", "h2O"], "did you mean 'h20'?"),
        (["inventories/lab.py", "deploy.py", "--exclude", "*"], "selects 0 hosts"),
        (["inventories/lab.py", "deploy.py", "--no-wait"], "--no-wait: not with this deploy"),
        (["inventories/lab.py", "deploy.py", "--serial"], "--serial: not with this deploy"),
    ],
)
def test_b1_zero_hosts_are_refused(served: Site, arguments: list[str], message: str) -> None:
    run = served.pyinfra("-y", *arguments)

    assert run.exit_code == BAD_INPUT
    assert message in run.output
    assert "Traceback" not in run.output
    assert "Connecting" not in run.output


def test_b3_group_data_of_no_group_is_refused(site: Site) -> None:
    site.write("h2O", "gpu_count = 8\n")

    run = site.roll_out()

    assert run.exit_code == BAD_INPUT
    assert "group_data/h2O.py: no inventory group 'h2O'; did you mean 'h20'?" in run.output


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("unknown", "No host key for 10.86.1.1 found in known_hosts"),
        ("changed", "Host key for 10.86.1.1 does not match."),
    ],
)
def test_f18_a_host_whose_key_is_not_the_known_one_is_refused(
    site: Site, change: str, reason: str
) -> None:
    host = H20[0]
    before = main_pids(host), written(host)
    known = (site.folder / ".lab" / "known_hosts").read_text().splitlines()
    other = next(line for line in known if not line.startswith("10.86.1.1 "))
    lines = [line for line in known if "10.86.1.1 " not in f"{line} "]
    if change == "changed":
        lines.append(f"10.86.1.1 {other.split(maxsplit=1)[1]}")
    (site.folder / "known_hosts").write_text("\n".join(lines) + "\n")
    site.edit("lab", r'"\.lab/known_hosts"', '"known_hosts"')
    site.set_in_services("h20", '"max_model_len": 4096')

    run = site.roll_out("--limit", "h20")

    assert run.exit_code == 1
    said = [line for line in run.output.splitlines() if f"[{host}]" in line]
    assert any(reason in line for line in said), run.output
    assert (main_pids(host), written(host)) == before
