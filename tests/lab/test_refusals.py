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


M1 = {
    "name": "m1",
    "model": "MiniMaxAI/MiniMax-M1-40k",
    "revision": "2d1d1c2f00c97fc1245bfce7648649b76e0a8e6e",
    "recipe": "m1-tp8",
    "gpus": [0, 1, 2, 3, 4, 5, 6, 7],
    "port": 8000,
}
L40S = {"name": "NVIDIA L40S", "memory_mib": 46068, "compute_capability": "8.9", "nvswitch": False}


@pytest.mark.parametrize(
    ("lines", "messages"),
    [
        (
            ['vllm = {"version": "0.33.0", "channel": "nightly"}'],
            ["channel 'nightly' with no commit: pin it, give commit as 40 hex digits"],
        ),
        (
            ['vllm = {"version": "0.33.0", "channel": "source", "commit": "main"}'],
            ["channel 'source' with 'main': pin it, give commit as 40 hex digits"],
        ),
        (
            ['services[0] = {**services[0], "revision": "main"}'],
            ["services[0].revision: 'main' is not a commit; pin it"],
        ),
        (
            ['driver = {"version": "570.172.08"}'],
            ["driver.version: 570.172.08 is too old for vLLM 0.33.0", "CUDA 13", "580 or later"],
        ),
        (
            [
                f"gpu = {L40S!r}",
                'services[0] = {**services[0], "env": {"VLLM_USE_DEEP_GEMM": "1"}}',
            ],
            ["VLLM_USE_DEEP_GEMM=1 needs compute capability 9.0", "NVIDIA L40S has 8.9"],
        ),
        (
            [f"services = [{M1!r}]"],
            ["0.33.0 does not serve MiniMaxAI/MiniMax-M1-40k: supported 0.9.2 to 0.23.0"],
        ),
    ],
    ids=["B13 nightly", "B13 source", "B13 revision", "B18 driver", "B18 DeepGEMM", "B19"],
)
def test_what_cannot_work_is_refused_with_both_sides(
    site: Site, lines: list[str], messages: list[str]
) -> None:
    before = main_pids(H20[0])
    for line in lines:
        site.append("h20", line)

    run = site.roll_out()

    assert run.exit_code == BAD_INPUT
    for message in messages:
        assert message in run.output
    assert "group_data/h20.py" in run.output
    assert "Traceback" not in run.output
    assert "Connecting" not in run.output
    assert main_pids(H20[0]) == before
