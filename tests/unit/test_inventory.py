"""What a site says is read as pyinfra reads it, and refused where pyinfra would stay silent."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fleet.errors import SiteError
from fleet.inventory import Site, load

REVISION = "f710177d938eff80b684d42c5aa84b382612f21f"
H20 = f"""
gpu = "h20-141"
gpu_count = 8
vllm = {{"version": "0.33.0"}}
services = [
    {{
        "name": "m25",
        "model": "MiniMaxAI/MiniMax-M2.5",
        "revision": "{REVISION}",
        "recipe": "tp4",
        "gpus": [0, 1, 2, 3],
        "port": 8000,
    }},
]
"""
MakeSite = Callable[..., Callable[..., Site]]


@pytest.fixture
def make_site(tmp_path: Path) -> MakeSite:
    """Writes an inventory and group data, and gives the function that loads it."""

    def make(inventory: str = 'h20 = ["a", "b"]', **group_data: str) -> Callable[..., Site]:
        (tmp_path / "inventories").mkdir()
        (tmp_path / "group_data").mkdir()
        (tmp_path / "inventories" / "h20.py").write_text(inventory)
        for group, text in ({"h20": H20} | group_data).items():
            (tmp_path / "group_data" / f"{group}.py").write_text(text)
        return lambda **options: load(tmp_path / "inventories" / "h20.py", cwd=tmp_path, **options)

    return make


def refusal(load_site: Callable[..., Site], **options: object) -> str:
    with pytest.raises(SiteError) as refused:
        load_site(**options)
    return str(refused.value)


def test_a_sound_site_is_planned_host_by_host(make_site: MakeSite) -> None:
    site = make_site()()

    assert list(site.plans) == ["a", "b"]
    assert site.plans["a"].group == "h20"
    assert site.plans["b"].services[0].port == 8000


def test_b1_a_missing_inventory_selects_no_host(tmp_path: Path) -> None:
    message = refusal(lambda: load(tmp_path / "none.py", cwd=tmp_path))

    assert message == f"{tmp_path}/none.py: no such inventory file; selects 0 hosts"


@pytest.mark.parametrize("option", ["limit", "exclude"])
def test_b1_a_pattern_that_matches_nothing_is_refused(make_site: MakeSite, option: str) -> None:
    message = refusal(make_site(), **{option: ["h2O"]})

    assert f"--{option} h2O: selects 0 hosts" in message
    assert "did you mean 'h20'?" in message


def test_b1_excluding_everybody_is_refused(make_site: MakeSite) -> None:
    assert "selects 0 hosts" in refusal(make_site(), exclude=["*"])


def test_b1_an_inventory_without_hosts_is_refused(make_site: MakeSite) -> None:
    assert "selects 0 hosts" in refusal(make_site("h20 = []"))


@pytest.mark.parametrize("value", ['{"a": {}}', '"a"', '{"a", "b"}'])
def test_b2_a_group_must_be_a_list_of_hosts(make_site: MakeSite, value: str) -> None:
    got = type(eval(value)).__name__

    message = refusal(make_site(f"h20 = {value}"))

    assert message.endswith(f"h20: expected a list of hosts, got {got}")


def test_b3_group_data_of_no_group_is_refused(make_site: MakeSite) -> None:
    message = refusal(make_site(h2O="gpu_count = 8"))

    assert message == "group_data/h2O.py: no inventory group 'h2O'; did you mean 'h20'?"


def test_b3_group_data_of_a_neighbouring_inventory_is_not_refused(
    make_site: MakeSite, tmp_path: Path
) -> None:
    load_site = make_site(h800="gpu_count = 8")
    (tmp_path / "inventories" / "h800.py").write_text('h800 = ["c"]')

    assert list(load_site().plans) == ["a", "b"]


def test_b4_an_imported_value_is_refused(make_site: MakeSite, tmp_path: Path) -> None:
    (tmp_path / "common.py").write_text("gpu_count = 8")
    data = H20.replace("gpu_count = 8", f"import sys; sys.path.append({str(tmp_path)!r})")

    message = refusal(make_site(h20=f"{data}\nfrom common import gpu_count\n"))

    assert "group_data/h20.py: gpu_count is imported; assign it" in message


def test_b5_a_key_of_two_groups_names_both(make_site: MakeSite) -> None:
    load_site = make_site('h20 = ["a"]\nspare = ["a"]', spare="gpu_count = 4")

    message = refusal(load_site)

    assert "a: gpu_count: set by groups 'h20' (group_data/h20.py)" in message
    assert "and 'spare' (group_data/spare.py); keep one" in message


def test_b5_all_is_a_default_that_a_group_may_override(make_site: MakeSite) -> None:
    site = make_site(all="gpu_count = 4")()

    assert site.plans["a"].spec.gpu_count == 8


def test_b6_two_names_of_one_address_are_named(make_site: MakeSite) -> None:
    inventory = 'h20 = [("a", {"ssh_hostname": "192.0.2.1"}), ("b", {"ssh_hostname": "192.0.2.1"})]'

    message = refusal(make_site(inventory))

    assert message.endswith("'a' and 'b' are one address, 192.0.2.1; list a machine once")


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (
            '"port": 8000',
            '"prot": 8000',
            "services[0].prot: unknown key; did you mean 'port'?",
        ),
        ('"version"', '"verison"', "vllm.verison: unknown key; did you mean 'version'?"),
        ("gpu_count", "gpu_cuont", "gpu_cuont: unknown key; did you mean 'gpu_count'?"),
    ],
    ids=["B7 in a service", "B7 in a dict", "B7 at the top"],
)
def test_b7_a_mistyped_key_is_named_with_the_nearest(
    make_site: MakeSite, before: str, after: str, message: str
) -> None:
    assert f"group_data/h20.py: {message}" in refusal(make_site(h20=H20.replace(before, after)))


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('"port": 8000', '"port": "8000"', "services[0].port: expected int, got str"),
        ('"gpus": [0, 1, 2, 3]', '"gpus": "0,1,2,3"', "services[0].gpus: expected list, got str"),
        ('{"version": "0.33.0"}', '"0.33.0"', "vllm: expected dict, got str"),
        ('"version": "0.33.0"', '"version": 0.33', "vllm.version: expected str, got float"),
    ],
)
def test_b8_a_value_of_the_wrong_type_is_not_converted(
    make_site: MakeSite, before: str, after: str, message: str
) -> None:
    error = refusal(make_site(h20=H20.replace(before, after)))

    assert error == f"group_data/h20.py: {message}"


def test_b12_a_percentage_is_not_a_fraction(make_site: MakeSite) -> None:
    data = H20.replace('"port": 8000', '"port": 8000, "gpu_memory_utilization": 95.0')

    message = refusal(make_site(h20=data))

    assert "services[0].gpu_memory_utilization: 95 is not in (0, 1]; did you mean 0.95?" in message


def test_b13_a_branch_is_not_a_revision(make_site: MakeSite) -> None:
    message = refusal(make_site(h20=H20.replace(REVISION, "main")))

    assert "services[0].revision: 'main' is not a commit; pin it" in message


def test_b16_a_secret_literal_is_refused_and_not_echoed(make_site: MakeSite) -> None:
    token = "hf_" + "abcdefghijklmnopqrstuvwxyz"

    message = refusal(make_site(h20=H20 + f'\nnotes = "{token}"\n'))

    assert "group_data/h20.py: notes: holds what looks like a secret" in message
    assert token not in message


@pytest.mark.parametrize(
    ("inventory", "message"),
    [
        ("h20 = [", "h20.py:1: SyntaxError"),
        ("import nowhere_to_be_found", "ModuleNotFoundError"),
        ("h20 = [1]", "expected a host name or (name, data), got int"),
    ],
)
def test_a_broken_inventory_is_one_line(make_site: MakeSite, inventory: str, message: str) -> None:
    error = refusal(make_site(inventory))

    assert message in error
    assert "\n" not in error


def test_every_problem_is_told_at_once(make_site: MakeSite) -> None:
    data = H20.replace('"port": 8000', '"prot": 8000').replace("gpu_count = 8", 'gpu_count = "8"')

    message = refusal(make_site(h20=data))

    assert "gpu_count: expected int, got str" in message
    assert "prot: unknown key" in message
    assert "services[0].port: missing" in message


def test_data_given_on_the_command_line_comes_first(make_site: MakeSite) -> None:
    site = make_site()(overrides={"gpu_count": 4})

    assert site.plans["a"].spec.gpu_count == 4


def test_hosts_of_a_group_share_one_plan_but_their_names(make_site: MakeSite) -> None:
    site = make_site('h20 = [f"h{n}" for n in range(50)]')()

    assert site.plans["h49"].name == "h49"
    assert site.plans["h49"].services is site.plans["h0"].services


LATIN = "# -*- coding: latin-1 -*-\n# caf\xe9\n".encode("latin-1")
KEYED = 'mirrors = {"apt": {"nvidia": {"url": "http://192.0.2.1", "key": "key.gpg"}}}\n'


def test_a_key_that_is_no_text_is_one_line_with_its_cure(
    make_site: MakeSite, tmp_path: Path
) -> None:
    load_site = make_site(h20=H20 + KEYED)
    (tmp_path / "key.gpg").write_bytes(b"\x99\x01\x0d\x04\xff")

    message = refusal(load_site)

    assert message.startswith("key.gpg: is not text (UTF-8)")
    assert "gpg --no-default-keyring --keyring ./key.gpg --export --armor" in message
    assert "\n" not in message


def test_a_secret_that_is_no_text_is_one_line(make_site: MakeSite, tmp_path: Path) -> None:
    key = '"api_key": {"file": "token"}, "port": 8000'
    load_site = make_site(h20=H20.replace('"port": 8000', key))
    (tmp_path / "token").write_bytes(b"\xff\xfe")

    assert refusal(load_site).startswith("token: is not text (UTF-8)")


def test_a_file_that_may_not_be_read_is_one_line(
    make_site: MakeSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_site = make_site(h20=H20 + KEYED)
    (tmp_path / "key.gpg").write_text("key")
    read = Path.read_text

    def forbidden(path: Path, *arguments: Any, **options: Any) -> str:
        if path.name == "key.gpg":
            raise PermissionError(13, "Permission denied")
        return read(path, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", forbidden)

    assert refusal(load_site) == "key.gpg: cannot be read: Permission denied"


def test_group_data_that_ends_python_is_one_line(make_site: MakeSite) -> None:
    message = refusal(make_site(h20=H20 + "import sys\nsys.exit(3)\n"))

    assert "SystemExit: 3" in message
    assert "\n" not in message


def test_group_data_in_an_encoding_of_its_own_is_read(make_site: MakeSite, tmp_path: Path) -> None:
    load_site = make_site()
    (tmp_path / "group_data" / "h20.py").write_bytes(LATIN + H20.encode())

    assert list(load_site().plans) == ["a", "b"]


def test_the_keys_of_pyinfras_connector_are_those_that_it_reads() -> None:
    from pyinfra.connectors.ssh import ConnectorData

    from fleet.inventory import CONNECTION_KEYS

    assert set(ConnectorData.__annotations__) == CONNECTION_KEYS


def test_b7_a_mistyped_connection_key_would_connect_to_another_place(make_site: MakeSite) -> None:
    message = refusal(make_site('h20 = [("a", {"ssh_hostnam": "192.0.2.1"})]'))

    assert message.endswith("ssh_hostnam: unknown key; did you mean 'ssh_hostname'?")


def test_b8_a_port_that_is_text(make_site: MakeSite) -> None:
    message = refusal(make_site('h20 = [("a", {"ssh_port": "22"})]'))

    assert message.endswith("inventories/h20.py: a: ssh_port: expected int, got str")


def test_b16_a_secret_beside_a_host(make_site: MakeSite) -> None:
    token = "hf_" + "a" * 24

    message = refusal(make_site(f'h20 = [("a", {{"note": "{token}"}})]'))

    assert "a: note: holds what looks like a secret" in message
    assert token not in message


def test_a_fault_is_one_line_whatever_it_names(make_site: MakeSite) -> None:
    message = refusal(make_site('h20 = [("a", {"x\\ny": 1})]'))

    assert message.count("\n") == 0
    assert "x\\ny" in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('vllm = {"version": "v0.33.0"}', "'v0.33.0' is no version; write for example '0.33.0'"),
        ('driver = {"version": "580"}', "'580' is no exact driver version; write for example"),
        ('packages = ["A B"]', "'A B' is no name of a distribution package"),
    ],
)
def test_what_a_pattern_wants_is_said_in_words(make_site: MakeSite, text: str, words: str) -> None:
    site = make_site(h20=f"{H20}\n{text}\n")

    assert words in refusal(site)
