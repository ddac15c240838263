"""Building the site: its parts side by side, failures of any of them reported."""

from pathlib import Path

import pytest

from lab import LabError, base, paths
from lab.site import apt, build, containers, hub, index, sources
from lab.tinymodel import build as tinymodel


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was made, in order, with nothing really made."""
    made: list[str] = []
    monkeypatch.setattr(paths, "CACHE", tmp_path)
    monkeypatch.setattr(paths, "SITE_ROOT", tmp_path / "site")
    monkeypatch.setattr(base, "ensure", lambda progress: tmp_path / "base")
    monkeypatch.setattr(apt, "ensure", lambda root, tree, progress: made.append("apt"))
    monkeypatch.setattr(containers, "ensure", lambda root, tree, progress: made.append("image"))

    def index_ensure(root: Path, progress: object, *, cpu_builds: bool) -> None:
        made.append(f"index, cpu_builds={cpu_builds}")

    def tiny_ensure(wheels: Path, progress: object) -> Path:
        made.append("tiny model")
        return tmp_path / "tiny"

    def hub_ensure(root: Path, progress: object, *, tiny_model: Path | None) -> None:
        made.append(f"hub, tiny_model={tiny_model and tiny_model.name}")

    monkeypatch.setattr(index, "ensure", index_ensure)
    monkeypatch.setattr(tinymodel, "ensure", tiny_ensure)
    monkeypatch.setattr(hub, "ensure", hub_ensure)
    monkeypatch.setattr(sources, "ensure", lambda root, progress: made.append("sources"))
    return made


def test_all_parts_are_made(made: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LAB_CPU", raising=False)

    build.ensure(lambda _: None)

    assert sorted(made) == [
        *("apt", "hub, tiny_model=tiny", "image", "index, cpu_builds=True"),
        *("sources", "tiny model"),
    ]


def test_without_the_cpu_host_nothing_is_made_for_it(
    made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAB_CPU", "0")

    build.ensure(lambda _: None)

    assert sorted(made) == [
        "apt",
        "hub, tiny_model=None",
        "image",
        "index, cpu_builds=False",
        "sources",
    ]


@pytest.mark.parametrize("part", [apt, hub, index])
def test_a_part_that_fails_is_reported(
    made: list[str], monkeypatch: pytest.MonkeyPatch, part: object
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise LabError("it cannot be had")

    monkeypatch.setattr(part, "ensure", fail)

    with pytest.raises(LabError, match="it cannot be had"):
        build.ensure(lambda _: None)


def test_by_itself_it_ends_with_one_line_of_the_error(
    made: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise LabError("it cannot be had")

    monkeypatch.setattr(index, "ensure", fail)

    assert build.main() == 1
    assert capsys.readouterr().err == "it cannot be had\n"


def test_off_a_terminal_it_says_line_by_line_what_it_does(
    made: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(base, "ensure", lambda progress: progress("building [the] base"))

    build.ensure()

    assert capsys.readouterr().err == "building [the] base\n"
