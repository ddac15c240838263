"""The lab's hosts for a whole test session, and a site for each test.

The hosts are shared: a test leaves them serving what the shipped group data says, which its `site`
fixture sees to. That costs nothing where the test changed nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import LabError, hosts
from lab.demo import wait_for_servers
from tests.lab import progress
from tests.lab.site import Site

H20 = ("h20-01", "h20-02", "h20-03")
CPU = "cpu-01"


def pytest_configure(config: pytest.Config) -> None:
    progress.use(config)


def pytest_runtest_logstart(nodeid: str, location: tuple[str, int | None, str]) -> None:
    if location[0].startswith("tests/lab/"):
        progress.say(f"{Path(location[0]).stem}: {location[2]}")


@pytest.fixture(scope="session", autouse=True)
def lab_is_up() -> None:
    """Three simulated 8-GPU hosts and the one with the real vLLM; they stay up afterwards."""
    try:
        hosts.up(len(H20), progress=progress.say)
    except LabError as error:
        pytest.exit(f"lab: {error}", returncode=1)


@pytest.fixture(scope="session")
def served(lab_is_up: None, tmp_path_factory: pytest.TempPathFactory) -> Site:
    """The shipped lab site, rolled out."""
    site = Site(tmp_path_factory.mktemp("shipped"))
    for host in (*H20, CPU):
        hosts.behave(host)
    wait_for_servers(site.plans(), progress.say)
    site.roll_out_well()
    return site


@pytest.fixture
def site(served: Site, tmp_path: Path) -> Iterator[Site]:
    """A site that the test may edit; the shipped one is rolled out again afterwards."""
    folder = tmp_path / "site"
    folder.mkdir()
    yield Site(folder)
    for host in (*H20, CPU):
        hosts.behave(host)
    served.roll_out_well()


@pytest.fixture
def gpu_site(site: Site) -> Site:
    """The same with quick gates, for the simulated hosts only: use it with `--limit h20`."""
    site.set_in_services("h20", '"gate": {"ready_timeout_s": 25, "answer_timeout_s": 6}')
    return site
