"""A site's lock: read and written, held beside plans, and what is said where the two differ."""

from __future__ import annotations

import difflib
import re
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet import inventory
from fleet.catalog import catalog
from fleet.errors import BAD_INPUT, Problem, SiteError
from fleet.lock import (
    Asks,
    Lock,
    LockedFile,
    LockedModel,
    LockedRelease,
    LockFile,
    LockingError,
    asked,
    canonical,
    changes,
    common_python,
    needs_python,
    read,
    unpinned,
    upgradable,
    write,
)
from fleet.plan import HostPlan
from fleet.planner import Planner, Texts
from fleet.spec import HostSpec
from tests.unit.state import REVISION, plan_of, service
from tests.unit.test_fleet_command import ROOT, fleet, site

PATH = "locks/h20.lock"
INVENTORY = "inventories/h20.py"
RUN = "run `fleet lock inventories/h20.py`"
MODEL = "MiniMaxAI/MiniMax-M2.5"
TWO = {"name": "two", "port": 8001, "gpus": [4, 5, 6, 7]}


def sha(digit: str) -> str:
    return digit * 64


def release_of(asks: Asks, **changes: Any) -> LockedRelease:
    first = asks.requirements[0] if asks.requirements else "vllm==0.34.0"
    given: dict[str, Any] = {
        "asks": asks,
        "python": "3.11",
        "platform": "x86_64-manylinux_2_34",
        "packages": {"anyio==4.16.0": [f"sha256:{sha('a')}"], first: [f"sha256:{sha('b')}"]},
    }
    return LockedRelease(**given | changes)


def lock_of(plan: HostPlan, **changes: Any) -> Lock:
    """A lock that answers a plan."""
    content: dict[str, Any] = {
        "uv": catalog().tools.uv,
        "releases": [release_of(asked(release)) for release in plan.releases],
        "drivers": {plan.spec.driver.version: {}} if plan.spec.driver else {},
        "models": [
            LockedModel(
                repository=weights.repository,
                revision=weights.revision,
                files={"config.json": LockedFile(size=3, sha256=sha("c"))},
            )
            for weights in plan.weights
        ],
    }
    return Lock(**content | changes)


def planned(lock: Lock, **data: Any) -> tuple[HostPlan | None, list[str]]:
    """The plan of a host with this lock, and the problems found."""
    given = {
        "gpu": "h20-141",
        "gpu_count": 8,
        "driver": {"version": "580.95.05"},
        "vllm": {"version": "0.33.0"},
        "services": [service()],
    } | data
    planner = Planner({}, Texts({}, {}, {}), LockFile(PATH, INVENTORY, lock))
    plan = planner.plan("h20-01", "h20", HostSpec.model_validate(given))
    return plan, [str(problem) for problem in dict.fromkeys(planner.problems)]


def problems_of(lock: Lock, **data: Any) -> list[str]:
    plan, problems = planned(lock, **data)
    assert plan is None
    return problems


# ------------------------------------------------------------------------------------------- the file


def odd_lock() -> Lock:
    """A lock with all that one can hold, and with texts that YAML could take for something else."""
    plain = lock_of(plan_of(service()))
    nightly = Asks(
        requirements=[],
        overrides=["certifi>=2026"],
        python="3.12",
        torch_backend="cu130",
        origin={"kind": "nightly", "commit": "1" * 40, "variant": "cu129"},
    )
    packages = {
        "a==1.10": [f"sha256:{sha('1')}", f"sha256:{sha('2')}"],
        "b @ https://wheels.example/b-1-py3-none-any.whl": [f"sha256:{sha('3')}"],
        f"c @ git+https://git.example/c.git@{'4' * 40}#subdirectory=python/c": [],
    }
    image = Asks(requirements=[], python="python3", origin={"kind": "docker", "name": "vllm/vllm"})
    files = {
        name: LockedFile(size=size, sha256=sha(str(size)))
        for size, name in enumerate(["yes", "0x1", "1.0", "null", "ü b.txt", "a: b #c", "d/e"])
    }
    model = LockedModel(repository="own/1.0", revision="0" * 40, files=files)
    return plain.model_copy(
        update={
            "releases": [
                *plain.releases,
                LockedRelease(asks=nightly, python="3.12.16", platform="x", packages=packages),
                LockedRelease(asks=image),
            ],
            "drivers": {
                "580.95.05": {"ubuntu-24.04": {"nv": "580.95.05-1ubuntu1"}, "debian-13": {}}
            },
            "models": [*plain.models, model],
        }
    )


def test_what_is_written_is_what_is_read() -> None:
    lock = odd_lock()

    assert read(PATH, write(lock, INVENTORY)) == lock


def test_an_empty_lock_is_written_and_read() -> None:
    lock = Lock(uv=catalog().tools.uv)

    assert read(PATH, write(lock, INVENTORY)) == lock


def test_the_documented_lock_is_one() -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "lock.md").read_text(), re.DOTALL)
    lock = read(PATH, text)

    assert write(lock, "X").split("format: 1")[1] == text.partition("format: 1")[2]
    assert lock.uv == catalog().tools.uv


def test_another_version_is_one_line_of_a_diff() -> None:
    lock = lock_of(plan_of(service()))
    release = lock.releases[0]
    packages = {
        name.replace("anyio==4.16.0", "anyio==4.17.0"): hashes
        for name, hashes in release.packages.items()
    }
    newer = release.model_copy(update={"packages": packages})

    after = write(lock.model_copy(update={"releases": [newer, *lock.releases[1:]]}), INVENTORY)

    before = write(lock, INVENTORY)
    diff = difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=0)
    assert [line[:18] for line in diff if re.match(r"[+-] ", line)] == [
        "-    anyio==4.16.0",
        "+    anyio==4.17.0",
    ]


GOOD = write(lock_of(plan_of(service())), INVENTORY)


@pytest.mark.parametrize(
    ("pattern", "replacement", "place", "says"),
    [
        (r"format: 1", "format: 2", ": format", "is 2; this program writes and reads 1; lock anew"),
        (r"format: 1\n", "", ": format", "is None; this program writes and reads 1"),
        (r"(?s).*", "", "", "holds nothing and no lock; take it from git, or remove it"),
        (r"(?s).*", "[1, 2]", "", "holds a list and no lock"),
        (r"releases:\n", "releases: [\n", ": line ", "; take it from git"),
        (r"(?s)(.*models:)", "<<<<<<< HEAD\n\\1", ": line ", "; take it from git"),
        (r"  version: ", "  version: 1\n  version: ", ": line ", "'version' stands twice"),
        (r"  version: .*", "  version: 1", ": uv.version", "expected a text, got int"),
        (
            r"size: 3",
            "size: three",
            ": models[0].files.config.json.size",
            "a whole number, got str",
        ),
        (
            r"size: 3",
            "size: -1",
            ": models[0].files.config.json.size",
            "greater than or equal to 0",
        ),
        (r"size: 3", "size: 1999-99-99", "", "ValueError"),
        (r"size: 3, ", "", ": models[0].files.config.json.size", "missing; locks are written by"),
        (r"size: 3", "size: 3, made: 1", ": models[0].files.config.json.made", "unknown key"),
        (r"config\.json", "../passwd", ": models[0].files.../passwd", "is no file of a model"),
        (r'sha256: "c{64}"', "sha256: abc", ".sha256", "'abc' is no SHA-256 of 64 hex digits"),
        (r"sha256:a{64}", "sha256:abc", "[0]", "'abc' is no SHA-256 of 64 hex digits"),
        (r"sha256:a{64}", "md5:abc", "[0]", "'md5:abc' is no hash; one is written sha256:…"),
        (r"\[sha256:a{64}\]", "[]", ": releases[0]", "anyio==4.16.0 has no hash"),
        (
            r"anyio==4\.16\.0",
            "anyio>=4",
            ": releases[0].packages",
            "'anyio>=4' is no exact package",
        ),
        (r"anyio==4\.16\.0", "anyio", ": releases[0].packages", "'anyio' is no exact package"),
        (r"anyio==4\.16\.0", '"anyio==4 -i x"', ": releases[0].packages", "is no exact package"),
        (r"revision: .*", "revision: main", ": models[0].revision", "'main' is no commit"),
        (r'python: "3\.11"', "python: 3.11", ": releases[0].python", "expected a text, got float"),
        (
            r'python: "3\.11"',
            "python: new",
            ": releases[0].python",
            "'new' is no version of Python",
        ),
        (r'  python: "3\.11"\n', "", ": releases[0]", "has no Python version, or no packages"),
        (
            r"(?s)(.*)anyio==4",
            r"\1vllm==4",
            ": releases[",
            "vllm==4.16.0 and vllm==0.33.0 exclude each other",
        ),
        (r'\["huggingface-hub==2.4.0"\]', "[]", ": releases[0].asks", "asks for nothing"),
        (r'\["huggingface-hub==2.4.0"\]', '["? ?"]', ".requirements[0]", "'? ?' is no requirement"),
        (
            r"( +)python: /usr",
            r"\1origin: {name: x}\n\1python: /usr",
            ".asks",
            "an origin of no kind",
        ),
        (
            r"( +)python: /usr",
            r"\1origin: {how: x}\n\1python: /usr",
            ".origin.how",
            "'kind', 'commit'",
        ),
        (
            r"580.95.05\": {}",
            '580.95.05": {debian-12: {a b: "1"}}',
            ".a b",
            "'a b' is no name of a",
        ),
        (
            r"580.95.05\": {}",
            '580.95.05": {debian-12: {nv: "1 -y"}}',
            ".nv",
            "'1 -y' is no exact version",
        ),
        (r"repository: .*", "repository: x", ": models[0].repository", "'x' is no repository"),
    ],
)
def test_a_lock_that_was_edited_into_nonsense_is_refused_in_a_line(
    pattern: str, replacement: str, place: str, says: str
) -> None:
    text, count = re.subn(pattern, replacement, GOOD, count=1)
    assert count

    with pytest.raises(SiteError) as error:
        read(PATH, text)

    lines = [str(problem) for problem in error.value.problems]
    assert any(line.startswith(PATH) and place in line and says in line for line in lines), lines
    assert all("\n" not in line for line in lines)


@given(st.one_of(st.text(), st.text().map(lambda text: f"format: 1\n{text}")))
def test_any_text_is_a_lock_or_refused(text: str) -> None:
    problems: tuple[Problem, ...] = ()
    try:
        read(PATH, text)
    except SiteError as error:
        problems = error.problems
    assert all(str(problem).startswith(PATH) for problem in problems)


# ---------------------------------------------------------------------------------- plans with a lock


def test_a_plan_takes_its_packages_from_the_lock() -> None:
    bare = plan_of(service())
    lock = lock_of(bare)

    plan, problems = planned(lock)

    assert plan is not None, problems
    request = plan.release_request(plan.release)
    assert request["lock"] == (
        f"anyio==4.16.0 --hash=sha256:{sha('a')}\nvllm==0.33.0 --hash=sha256:{sha('b')}\n"
    )
    assert request["lock_python"] == "3.11"
    assert request["requirements"] == ["vllm==0.33.0"]
    assert plan.release_request(plan.hub_tool)["lock"] is not None
    assert plan.release.id.startswith("vllm-0.33.0-")
    assert plan.release.path == f"{plan.spec.paths.releases}/{plan.release.id}"
    assert plan.release.id != bare.release.id
    assert plan.services[0].argv[0].startswith(plan.release.path)


def test_another_lock_is_another_release() -> None:
    lock = lock_of(plan_of(service()))
    packages = {**lock.releases[0].packages, "idna==3.20": [f"sha256:{sha('d')}"]}
    other = [one.model_copy(update={"packages": packages}) for one in lock.releases]
    python = [one.model_copy(update={"python": "3.12"}) for one in lock.releases]

    names = {
        plan.release.id
        for content in (
            lock,
            lock,
            *(lock.model_copy(update={"releases": r}) for r in (other, python)),
        )
        if (plan := planned(content)[0])
    }

    assert len(names) == 3


def test_models_are_fetched_by_the_locks_hashes() -> None:
    plan, _ = planned(lock_of(plan_of(service())))

    assert plan is not None
    (weights,) = plan.weights
    assert plan.weights_request(weights)["files"] == {"config.json": (3, sha("c"))}
    assert plan.question()["weights"] == {weights.path: weights.digest}
    bare = plan_of(service())
    assert bare.weights_request(bare.weights[0])["files"] is None
    assert bare.question()["weights"] == {weights.path: None}


def test_the_host_names_a_models_hashes_as_the_plan_does(program: ModuleType) -> None:
    weights = replace(
        plan_of(service()).weights[0],
        files={"b": (1, sha("1")), "ü/a": (2, sha("2")), "B": (3, sha("3"))},
    )
    hashes = {"B": sha("3"), "ü/a": sha("2"), "b": sha("1")}

    assert program.weights_digest(hashes) == weights.digest
    assert program.weights_digest({**hashes, "b": sha("4")}) != weights.digest


def test_what_uv_fetches_is_locked_to_the_patch_release() -> None:
    vllm = {"version": "0.33.0", "python": "3.12", "torch_backend": "auto"}
    lock = lock_of(plan_of(service(), vllm=vllm))
    exact = [one.model_copy(update={"python": "3.12.16"}) for one in lock.releases]

    plan, _ = planned(lock.model_copy(update={"releases": exact}), vllm=vllm)

    assert plan is not None
    assert plan.release_request(plan.release)["python"] == "3.12.16"
    # What "auto" picks is a host's matter, and the lock has picked.
    assert plan.release_request(plan.release)["torch_backend"] is None


def test_what_comes_from_git_is_pinned_to_its_commit_and_installed_apart() -> None:
    tagged = "c @ git+https://git.example/c.git@v1"
    vllm = {"version": "0.33.0", "packages": [tagged]}
    bare = plan_of(service(), vllm=vllm)
    commit = f"c @ git+https://git.example/c.git@{'4' * 40}"
    lock = lock_of(bare)
    own = next(one for one in lock.releases if tagged in one.asks.requirements)
    packages = {"vllm==0.33.0": [f"sha256:{sha('b')}"], commit: []}
    others = [one for one in lock.releases if one is not own]
    releases = [*others, own.model_copy(update={"packages": packages})]

    plan, _ = planned(lock.model_copy(update={"releases": releases}), vllm=vllm)

    assert plan is not None
    request = plan.release_request(plan.release)
    assert request["requirements"] == ["vllm==0.33.0", commit]
    assert request["lock"] == f"vllm==0.33.0 --hash=sha256:{sha('b')}\n"


NIGHTLY = {"channel": "nightly", "version": "0.34.0", "commit": "1" * 40}


def test_of_a_nightly_the_wheel_is_known_by_hash_and_the_rest_is_listed() -> None:
    bare = plan_of(service(), vllm=NIGHTLY)
    lock = lock_of(bare)
    own = f"vllm==0.34.0rc1.dev1+g{'1' * 9}"
    packages = {"anyio==4.16.0": [f"sha256:{sha('a')}"], own: [f"sha256:{sha('e')}"]}
    releases = [
        one.model_copy(update={"packages": packages}) if one.asks.origin else one
        for one in lock.releases
    ]

    plan, _ = planned(lock.model_copy(update={"releases": releases}), vllm=NIGHTLY)

    assert plan is not None
    request = plan.release_request(plan.release)
    assert request["lock"] == f"anyio==4.16.0 --hash=sha256:{sha('a')}\n"
    assert request["origin"]["sha256"] == sha("e")


def test_a_source_build_is_locked_by_its_commit_alone() -> None:
    source = {**NIGHTLY, "channel": "source"}
    bare = plan_of(service(), vllm=source)
    lock = lock_of(bare)
    releases = [LockedRelease(asks=one.asks) if one.asks.origin else one for one in lock.releases]
    lock = read(PATH, write(lock.model_copy(update={"releases": releases}), INVENTORY))

    plan, _ = planned(lock, vllm=source)

    assert plan is not None
    assert plan.release == bare.release
    (note,) = unpinned([plan], LockFile(PATH, INVENTORY, lock), Path(INVENTORY))
    assert note == (
        "locks/h20.lock: what is left to builds, on each host: the requirements of vllm source 111111111111"
    )
    other = {**source, "commit": "2" * 40}
    assert problems_of(lock, vllm=other) == [
        f"{PATH}: commit {'1' * 40} of vllm is locked and group data says {'2' * 40}; {RUN}"
    ]


def test_an_image_has_all_that_it_requires() -> None:
    image = {"channel": "docker", "version": "0.33.0", "image": f"vllm/vllm@sha256:{'2' * 64}"}

    def notes(**more: Any) -> list[str]:
        vllm = {**image, **more}
        lock = lock_of(plan_of(service(), vllm=vllm))
        releases = [
            LockedRelease(asks=one.asks) if one.asks.origin else one for one in lock.releases
        ]
        lock = lock.model_copy(update={"releases": releases})
        plan, problems = planned(lock, vllm=vllm)
        assert plan is not None, problems
        return list(unpinned([plan], LockFile(PATH, INVENTORY, lock), Path(INVENTORY)))

    assert notes() == []
    assert notes(commit="1" * 40)[0].endswith("the requirements of vllm docker 111111111111")


def test_a_drivers_packages_are_of_the_locked_revision() -> None:
    bare = plan_of(service())
    names = bare.packages("ubuntu-24.04")
    pattern = {name: version for name, version in names.items() if version}
    exact = dict.fromkeys(pattern, "580.95.05-1ubuntu1")
    lock = lock_of(bare, drivers={"580.95.05": {"ubuntu-24.04": exact}})

    plan, _ = planned(lock)

    assert set(pattern.values()) == {"580.95.05-*"}
    assert plan is not None
    assert {n: v for n, v in plan.packages("ubuntu-24.04").items() if v} == exact
    assert plan.packages("debian-12") == bare.packages("debian-12")


# ------------------------------------------------------------------------------------- what differs


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        ({"vllm": {"version": "0.33.1"}}, ["vllm 0.33.0 is locked and group data says 0.33.1"]),
        (
            {"vllm": {"version": "0.33.0", "python": "3.12"}},
            [
                "Python /usr/bin/python3 of vllm 0.33.0 is locked and group data says 3.12",
                "Python /usr/bin/python3 of huggingface-hub 2.4.0 is locked and group data says 3.12",
            ],
        ),
        (
            {"vllm": {"version": "0.33.0", "packages": ["a==1"]}},
            ["a==1 is asked for by group data and not locked"],
        ),
        (
            {"vllm": {"version": "0.33.0", "overrides": ["certifi>=2026.1"]}},
            ["the override certifi>=2026.1 is asked for by group data and not locked"],
        ),
        (
            {"vllm": {"version": "0.33.0", "torch_backend": "cu130"}},
            ["torch backend none of vllm 0.33.0 is locked and group data says cu130"],
        ),
        (
            {"driver": {"version": "580.82.07"}},
            ["driver 580.95.05 is locked and group data says 580.82.07"],
        ),
        (
            {"services": [service(revision="2" * 40)], "reviewed_revisions": ["2" * 40]},
            [f"{MODEL} is locked at {REVISION} and group data says {'2' * 40}"],
        ),
        (
            {"services": [service(repository="own/copy")]},
            [f"own/copy is not locked and group data says {REVISION}"],
        ),
        (
            {"vllm": {"version": "0.33.1"}, "driver": {"version": "580.82.07"}},
            [
                "vllm 0.33.0 is locked and group data says 0.33.1",
                "driver 580.95.05 is locked and group data says 580.82.07",
            ],
        ),
        ({"vllm": NIGHTLY}, [f"vllm nightly {'1' * 12} is not locked and group data asks for it"]),
    ],
)
def test_a_lock_that_does_not_answer_group_data_is_refused_with_the_difference(
    data: dict[str, Any], lines: list[str]
) -> None:
    assert problems_of(lock_of(plan_of(service())), **data) == [
        f"{PATH}: {line}; {RUN}" for line in lines
    ]


@pytest.mark.parametrize(
    ("locked", "asks", "line"),
    [
        (["a==1"], ["a==2"], "a 1 is locked and group data says 2"),
        (["a==1"], ["a[b]==1"], "a==1 is locked and group data says a[b]==1"),
        (["a==1"], [], "a==1 is locked and group data does not ask for it"),
    ],
)
def test_differences_of_packages(locked: list[str], asks: list[str], line: str) -> None:
    before, after = ({"version": "0.33.0", "packages": list(p)} for p in (locked, asks))

    assert problems_of(lock_of(plan_of(service(), vllm=before)), vllm=after) == [
        f"{PATH}: {line}; {RUN}"
    ]


def test_the_order_of_packages_is_no_difference() -> None:
    before, after = (
        {"version": "0.33.0", "packages": p} for p in (["a==1", "b==1"], ["b==1", "a==1"])
    )

    plan, problems = planned(lock_of(plan_of(service(), vllm=before)), vllm=after)

    assert plan is not None, problems


def test_another_uv_than_this_programs_is_refused() -> None:
    old = catalog().tools.uv.model_copy(update={"version": "0.1.0"})

    assert problems_of(lock_of(plan_of(service()), uv=old)) == [
        f"{PATH}: uv 0.1.0 is locked and uv {catalog().tools.uv.version} is known here; {RUN}"
    ]


def test_a_lock_of_more_than_is_asked_for_is_enough() -> None:
    """With --limit, part of a site is asked for."""
    both = plan_of(service(), service(**TWO, revision="2" * 40), reviewed_revisions=["2" * 40])

    plan, problems = planned(lock_of(both))

    assert plan is not None, problems


# --------------------------------------------------------------------------------- what is not pinned


def test_without_a_lock_what_is_not_pinned_is_named_once() -> None:
    plan = plan_of(service())

    assert list(unpinned([plan, plan], None, Path(INVENTORY))) == [
        "locks/h20.lock is not there, so mirrors decide what huggingface-hub 2.4.0, vllm 0.33.0 require "
        f"and the hashes of {MODEL}; `fleet lock inventories/h20.py` pins them"
    ]


def test_with_a_lock_nothing_is_left_to_say() -> None:
    lock = lock_of(plan_of(service()))
    plan, _ = planned(lock)

    assert plan is not None
    assert list(unpinned([plan], LockFile(PATH, INVENTORY, lock), Path(INVENTORY))) == []


# ------------------------------------------------------------------------------------ what is changed


def table(before: Lock | None, after: Lock) -> list[tuple[str, str, str | None, str | None]]:
    return [(one.of, one.what, one.before, one.after) for one in changes(before, after)]


def test_equal_locks_have_no_changes() -> None:
    assert table(odd_lock(), odd_lock()) == []


def test_changes_name_what_was_and_what_is() -> None:
    before = lock_of(plan_of(service()))
    after = lock_of(plan_of(service(revision="2" * 40), vllm={"version": "0.33.1"}, driver=None,
                            reviewed_revisions=["2" * 40]))  # fmt: skip
    vllm = next(one for one in after.releases if "vllm==0.33.1" in one.packages)
    vllm.packages["idna==3.20"] = vllm.packages.pop("anyio==4.16.0")
    before = before.model_copy(update={"drivers": {"580.95.05": {"debian-12": {"n": "1"}}}})

    assert table(before, after) == [
        ("vllm 0.33.1", "anyio", "4.16.0", None),
        ("vllm 0.33.1", "idna", None, "3.20"),
        ("vllm 0.33.1", "vllm", "0.33.0", "0.33.1"),
        ("driver 580.95.05, debian-12", "n", "1", None),
        (MODEL, f"at {'2' * 12}", None, "1 files"),
        (MODEL, f"at {REVISION[:12]}", "1 files", None),
    ]


def test_other_files_of_the_same_version_are_a_change() -> None:
    before = lock_of(plan_of(service()))
    other = [
        one.model_copy(update={"packages": {name: [f"sha256:{sha('f')}"] for name in one.packages}})
        for one in before.releases
    ]

    found = table(before, before.model_copy(update={"releases": other}))

    assert ("vllm 0.33.0", "vllm", "0.33.0 (files)", "0.33.0 (other files)") in found
    assert len(found) == 4


# ------------------------------------------------------------------------------ Python, and --upgrade


def test_the_hosts_are_asked_for_their_python_only_where_it_counts() -> None:
    plan = plan_of(service())
    lock = lock_of(plan)
    fetched = plan_of(service(), vllm={"version": "0.33.0", "python": "3.12"})

    assert needs_python([plan], None, [])
    assert not needs_python([plan], lock, [])
    assert needs_python([plan], lock, ["python"])
    assert not needs_python([fetched], None, [])


def test_hosts_of_two_pythons_are_refused() -> None:
    assert common_python({"a": "3.11", "b": "3.11"}) == "3.11"
    with pytest.raises(
        LockingError, match=r"is 3.11 on a, c; 3.12 on b: a lock is for one version"
    ):
        common_python({"a": "3.11", "b": "3.12", "c": "3.11"})
    with pytest.raises(LockingError, match=r"no host says .*; name it: --python 3.11"):
        common_python({})


def test_what_may_be_upgraded() -> None:
    plan = plan_of(service())

    assert upgradable([plan], None) == {"python", "vllm", "huggingface-hub", MODEL.lower()}
    assert "anyio" in upgradable([plan], lock_of(plan))
    assert canonical("Typing_Extensions") == "typing-extensions"
    assert canonical(MODEL) == MODEL.lower()


# ------------------------------------------------------------------------- the site and the command


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A site with a lock that answers it."""
    site(tmp_path)
    monkeypatch.chdir(tmp_path)
    plan = inventory.load(INVENTORY).plans["a"]
    (tmp_path / "locks").mkdir()
    (tmp_path / PATH).write_text(write(lock_of(plan), INVENTORY))
    return tmp_path


def change_version(root: Path) -> None:
    file = root / "group_data" / "h20.py"
    file.write_text(file.read_text().replace("0.33.0", "0.33.1"))


def test_a_site_is_planned_by_the_lock_of_its_inventorys_name(root: Path) -> None:
    planned_site = inventory.load(INVENTORY)

    assert planned_site.plans["a"].release.lock is not None
    assert planned_site.notes == ()
    (root / PATH).rename(root / "locks" / "other.lock")
    assert inventory.load(INVENTORY).plans["a"].release.lock is None
    assert len(inventory.load(INVENTORY).notes) == 1


def test_the_plan_says_what_is_not_pinned(root: Path) -> None:
    assert "note: " not in fleet("plan", INVENTORY).output
    (root / PATH).unlink()
    assert "note: locks/h20.lock is not there" in fleet("plan", INVENTORY).output


@pytest.mark.parametrize("words", [("plan", INVENTORY), ("plan", INVENTORY, "--json")])
def test_a_plan_with_a_lock_that_differs_is_refused(root: Path, words: tuple[str, ...]) -> None:
    change_version(root)

    done = fleet(*words)

    assert done.exit_code == BAD_INPUT
    assert done.output == (
        f"error: {PATH}: vllm 0.33.0 is locked and group data says 0.33.1; {RUN}\n"
    )


def test_what_installs_nothing_goes_on_with_a_note(root: Path) -> None:
    change_version(root)

    found = inventory.load(INVENTORY, lock_may_differ=True)

    assert found.plans["a"].release.lock is None
    assert found.notes == (
        str(Problem(PATH, f"vllm 0.33.0 is locked and group data says 0.33.1; {RUN}")),
    )
    (root / "group_data" / "h20.py").write_text("gpu = 1\n")
    with pytest.raises(SiteError):
        inventory.load(INVENTORY, lock_may_differ=True)


def test_what_installs_nothing_does_not_ask_for_a_lock(root: Path) -> None:
    (root / PATH).unlink()

    assert inventory.load(INVENTORY, lock_may_differ=True).notes == ()


def test_a_broken_lock_is_one_line_whoever_reads_it(root: Path) -> None:
    (root / PATH).write_text("format: 1\nuv: [\n")

    for words in (("plan", INVENTORY), ("lock", INVENTORY)):
        done = fleet(*words)
        assert done.exit_code == BAD_INPUT
        assert done.output.count("\n") == 1
        assert f"error: {PATH}: line 3: " in done.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--upgrade", "anyoi"),
            "--upgrade anyoi: nothing of that name is locked; did you mean 'anyio'?",
        ),
        (("--python", "three"), "--python 'three' is no version of Python; write for example 3.11"),
    ],
)
def test_wrong_options_of_lock_are_one_line(
    root: Path, words: tuple[str, ...], message: str
) -> None:
    done = fleet("lock", INVENTORY, *words)

    assert done.exit_code == BAD_INPUT
    assert done.output == f"error: {message}\n"
