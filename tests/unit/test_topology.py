"""Which hosts the lab has."""

from ipaddress import IPv4Address

import pytest

from lab import topology


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LAB_HOSTS", raising=False)
    monkeypatch.delenv("LAB_CPU", raising=False)


def names() -> list[str]:
    return [host.name for host in topology.hosts()]


def test_three_gpu_hosts_and_one_cpu_host_by_default() -> None:
    assert names() == ["h20-01", "h20-02", "h20-03", "cpu-01"]


def test_environment_decides_the_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAB_HOSTS", "1")
    monkeypatch.setenv("LAB_CPU", "0")

    assert names() == ["h20-01"]


def test_empty_variables_are_as_good_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAB_HOSTS", "")
    monkeypatch.setenv("LAB_CPU", "")

    assert len(names()) == 4


@pytest.mark.parametrize("text", ["three", "-1", "255", "2.0", "²"])
def test_a_number_that_is_none_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAB_HOSTS", text)

    with pytest.raises(ValueError, match=r"LAB_HOSTS: .* is not a number of hosts; use 0 to 254"):
        topology.hosts()


def test_a_switch_that_is_neither_on_nor_off_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAB_CPU", "yes")

    with pytest.raises(ValueError, match="LAB_CPU: 'yes' is neither 0 nor 1"):
        topology.hosts()


def test_addresses_are_distinct_and_on_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAB_HOSTS", str(topology.MAX_GPU_HOSTS))

    everyone = [topology.site(), *topology.hosts()]
    addresses = {IPv4Address(host.address) for host in everyone}

    assert len(addresses) == len(everyone)
    assert topology.CONTROL_ADDRESS.ip not in addresses
    assert all(address in topology.NETWORK for address in addresses)


def test_the_site_is_in_no_inventory_group() -> None:
    assert topology.site().group is None
    assert topology.site() not in topology.hosts()
