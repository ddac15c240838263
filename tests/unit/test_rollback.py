"""Going back: which generation, what it needs, and that nothing else follows from doing it twice.

The host's side is the real program over the machine of test_cutover.py; the control side is pure.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from pydantic import ValidationError

from fleet import pruning, rollback
from fleet.status import describe
from tests.unit.state import converged, plan_of, service
from tests.unit.test_cutover import NEW, OLD, Machine

OLDEST = "2" * 12
UNIT = "minimax-m25.service"


class Host(Machine):
    """A machine with releases and weights, that roll-outs stage as `deploy.py` does."""

    def keep_made(self, stamp: str) -> None:
        """Release and weights of a stamp lie on the host, complete."""
        release, weights = self.release(stamp), self.folder / "models" / stamp
        for folder in (release, weights):
            folder.mkdir(parents=True, exist_ok=True)
        (release / "libtorch.so").write_text("x" * 4096)
        manifest = {"built_at": time.time() - 2 * self.program.RECENT_S}
        (release / self.program.MANIFEST).write_text(json.dumps(manifest))
        (weights / self.program.WEIGHTS_STAMP).write_text('{"files": {}}')

    def release(self, stamp: str) -> Path:
        return self.folder / "releases" / f"vllm-{stamp}"

    def stage(self, stamp: str, *names: str, proxy: str = OLD) -> dict[str, Any]:
        """What a roll-out puts on the host before the waves."""
        self.keep_made(stamp)
        plan = {**self.plan(stamp, *names), "proxy": self.proxy(proxy)}
        aim = {"services": {one["name"]: one["stamp"] for one in plan["services"]}}
        self.program.AIM.write_text(json.dumps({**aim, "proxy": plan["proxy"]}))
        return plan

    def roll_out(self, stamp: str, *names: str, proxy: str = OLD) -> dict[str, Any]:
        plan = self.stage(stamp, *names, proxy=proxy)
        self.program.cutover(plan)
        return plan

    def fail(self, stamp: str) -> None:
        """From now on services of this stamp do not pass the gate."""

        def gate(service: dict[str, Any]) -> None:
            if service["stamp"] == stamp:
                raise self.program.GateError("health", "200", "503")

        self.gate = gate

    def history(self) -> dict[str, Any]:
        past = self.program.generations()
        names = {name for one in past for name in one["services"]}
        units = [self.program.PROXY_UNIT, *map(self.program.unit_of, names)]
        found: dict[str, Any] = self.program.history_state(past, self.units_state(units))
        return found

    def go_back(self, wanted: str | None = None) -> rollback.Choice:
        """What `tasks.rollback` does on this host."""
        choice = rollback.choose(self.history(), wanted)
        if choice.needed and not choice.problems:
            self.program.rollback(choice.request)
        return choice

    def serving(self) -> dict[str, str]:
        """Stamps of the processes, by unit, without the proxy's."""
        proxy = self.program.PROXY_UNIT
        return {unit: found["stamp"] for unit, found in self.processes.items() if unit != proxy}


@pytest.fixture
def host(program: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    """A host that nothing was rolled out to yet."""
    made = Host(program, tmp_path, monkeypatch)
    monkeypatch.setattr(program, "active_jobs", list)
    (tmp_path / "releases").mkdir()
    return made


# ---------------------------------------------------------------------------------- which and where


def test_what_served_before_serves_again_and_a_second_time_changes_nothing(host: Host) -> None:
    host.roll_out(OLD, "m25")
    host.roll_out(NEW, "m25")

    assert host.go_back().said.startswith(f"goes back to vllm-{OLD}, which passed at ")
    assert host.serving() == {UNIT: OLD}
    pids, history = host.pids(), host.program.generations()

    again = host.go_back()

    assert not again.needed
    assert again.said.startswith(
        f"serves vllm-{OLD} already; it was rolled back from vllm-{NEW} at"
    )
    assert (host.pids(), host.program.generations()) == (pids, history)


def test_the_same_plan_rolled_out_again_goes_forward_and_can_be_gone_back_from_again(
    host: Host,
) -> None:
    host.roll_out(OLD, "m25")
    plan = host.roll_out(NEW, "m25")
    host.go_back()

    host.program.cutover(plan)

    assert host.serving() == {UNIT: NEW}
    assert rollback.rolled_back(host.history()) is None
    host.go_back()
    assert host.serving() == {UNIT: OLD}


def test_what_was_gone_back_from_is_no_way_back_from_a_later_roll_out(host: Host) -> None:
    """Group data was changed back and rolled out, which changes nothing; then another is rolled out."""
    host.roll_out(OLD, "m25")
    host.roll_out(NEW, "m25")
    host.go_back()
    host.stage(OLD, "m25")
    assert host.go_back().problems, "the withdrawn one must not come back"
    host.roll_out(OLDEST, "m25")

    host.go_back()

    assert host.serving() == {UNIT: OLD}


def test_a_host_where_the_new_one_never_passed_is_left_alone(host: Host) -> None:
    host.roll_out(OLDEST, "m25")
    host.roll_out(OLD, "m25")
    host.fail(NEW)
    with pytest.raises(host.program.HostError, match="was undone"):
        host.roll_out(NEW, "m25")
    pids = host.pids()

    choice = host.go_back()

    assert not choice.needed
    assert choice.said == f"serves vllm-{OLD} already"
    assert (host.serving(), host.pids()) == ({UNIT: OLD}, pids)


def test_a_host_whose_wave_never_came_is_left_alone(host: Host) -> None:
    host.roll_out(OLDEST, "m25")
    host.roll_out(OLD, "m25")
    host.stage(NEW, "m25")

    assert not host.go_back().needed
    assert host.serving() == {UNIT: OLD}


def test_what_does_not_pass_any_more_is_undone(host: Host) -> None:
    host.roll_out(OLD, "m25")
    host.roll_out(NEW, "m25")
    before = host.program.generations()
    host.fail(OLD)

    with pytest.raises(host.program.HostError, match="undone: m25: gate, health: expected 200"):
        host.go_back()

    assert host.serving() == {UNIT: NEW}
    assert host.program.generations() == before
    assert host.history()["generations"][0]["differs"] is False


def test_a_roll_out_that_failed_over_its_records_leaves_no_trace_in_the_history(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.roll_out(OLD, "m25")
    before = host.program.generations()

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(host.program, "note_serving", full_disk)
    with pytest.raises(host.program.HostError, match="was undone"):
        host.roll_out(NEW, "m25")

    assert host.program.generations() == before


def test_a_service_that_is_gone_comes_back_and_one_that_came_goes(host: Host) -> None:
    host.roll_out(OLD, "m25", "old")
    host.roll_out(NEW, "m25", "new")
    assert set(host.serving()) == {UNIT, "minimax-new.service"}

    host.go_back()

    assert host.serving() == {UNIT: OLD, "minimax-old.service": OLD}
    assert host.file("minimax-new.service") is None
    host.program.cutover(host.stage(NEW, "m25", "new"))
    assert host.serving() == {UNIT: NEW, "minimax-new.service": NEW}


def test_the_proxy_of_that_time_comes_back(host: Host) -> None:
    host.roll_out(OLD, "m25", proxy=OLD)
    host.roll_out(OLD, "m25", proxy=NEW)
    assert host.nginx == NEW
    pids = host.pids()

    host.go_back()

    assert host.nginx == OLD
    assert host.pids()[UNIT] == pids[UNIT]


def test_a_host_with_one_release_alone_says_what_to_do(host: Host) -> None:
    assert not host.go_back().problems
    host.roll_out(OLD, "m25")

    (problem,) = host.go_back().problems

    assert problem.startswith(f"nothing served here before vllm-{OLD}; leave this host out (--excl")


@pytest.mark.parametrize("wanted", [f"vllm-{OLDEST}", OLDEST[0]])
def test_an_older_one_is_named_by_release_or_version(host: Host, wanted: str) -> None:
    for stamp in (OLDEST, OLD, NEW):
        host.roll_out(stamp, "m25")

    assert host.go_back(wanted).needed
    assert host.serving() == {UNIT: OLDEST}
    assert not host.go_back(wanted).needed
    assert not host.go_back().needed


def test_a_release_that_never_served_or_is_ambiguous_is_refused(host: Host) -> None:
    host.roll_out(OLD, "m25")
    host.roll_out(NEW, "m25")
    history = host.history()
    for one in history["generations"]:
        one["services"]["m25"]["vllm"] = "0.33.0"

    unknown, ambiguous = (rollback.choose(history, to) for to in ("0.34.0", "0.33.0"))

    assert unknown.problems == (
        f"--data to=0.34.0: no such release has served here; vllm-{NEW}, vllm-{OLD} did",
    )
    assert ambiguous.problems == (
        f"--data to=0.33.0: that is vllm-{OLD} and vllm-{NEW}; give one in full",
    )


# ------------------------------------------------------------------------------------ what is needed


def lose_release(host: Host) -> None:
    (host.release(OLD) / host.program.MANIFEST).unlink()


def lose_weights(host: Host) -> None:
    (host.folder / "models" / OLD / host.program.WEIGHTS_STAMP).unlink()


def lose_unit(host: Host) -> None:
    (host.program.SERVICES / "m25" / OLD / "unit.service").unlink()


def lose_plan(host: Host) -> None:
    """As a power cut may leave a file that was written long ago."""
    (host.program.SERVICES / "m25" / OLD / "plan.json").write_text("")


def lose_secrets(host: Host) -> None:
    unit = host.program.SERVICES / "m25" / OLD / "unit.service"
    unit.write_text(f"{unit.read_text()}EnvironmentFile={unit.with_name('secrets.env')}\n")


def lose_proxy(host: Host) -> None:
    (host.program.PROXY / f"{OLD}.conf").unlink()


@pytest.mark.parametrize(
    ("lose", "named"),
    [
        (lose_release, f"the release vllm-{OLD}"),
        (lose_weights, f"/models/{OLD} is gone"),
        (lose_unit, f"the unit {OLD} of m25"),
        (lose_plan, f"the unit {OLD} of m25"),
        (lose_secrets, f"the unit {OLD} of m25"),
        (lose_proxy, "the proxy's configuration of that time"),
    ],
)
def test_what_is_gone_is_named_before_anything_is_stopped(
    host: Host, lose: Any, named: str
) -> None:
    host.roll_out(OLD, "m25", proxy=OLD)
    host.roll_out(NEW, "m25", proxy=NEW)
    request = rollback.choose(host.history(), None).request
    lose(host)
    pids = host.pids()

    (problem,) = host.go_back().problems
    assert problem.startswith(f"vllm-{OLD} cannot serve again: ")
    assert named in problem
    assert "roll out (deploy.py), which brings it again" in problem
    # Had it gone only after all hosts were looked at, the host itself would have found it.
    with pytest.raises(host.program.HostError, match="is gone; nothing was changed"):
        host.program.rollback(request)

    assert host.pids() == pids


def test_records_of_an_earlier_release_of_the_program_lead_back(host: Host) -> None:
    """They know a stamp and the one before; what was staged says neither release nor weights."""
    host.roll_out(OLD, "m25")
    host.roll_out(NEW, "m25")
    (host.program.RECORDS / "history.json").unlink()
    host.program.AIM.unlink()
    for stamp in (OLD, NEW):
        path = host.program.SERVICES / "m25" / stamp / "plan.json"
        plan = json.loads(path.read_text())
        weights = Path(plan.pop("weights"))
        (weights.parent / "org" / "model").mkdir(parents=True, exist_ok=True)
        weights.rename(weights.parent / "org" / "model" / stamp)
        argv = [f"{plan.pop('release')}/bin/vllm", "serve", f"{weights.parent}/org/model/{stamp}"]
        path.write_text(json.dumps({**plan, "argv": argv, "repository": "org/model"}))
    host.processes[UNIT]["argv"] = []

    assert [one["missing"] for one in host.history()["generations"]] == [[], []]
    host.go_back()

    assert host.serving() == {UNIT: OLD}
    assert not host.go_back().needed


def test_old_records_of_a_service_on_another_port_do_not_know_their_proxy(host: Host) -> None:
    host.roll_out(OLD, "m25")
    host.roll_out(NEW, "m25")
    (host.program.RECORDS / "history.json").unlink()
    host.program.AIM.unlink()
    path = host.program.SERVICES / "m25" / OLD / "plan.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "port": 9000}))

    (problem,) = host.go_back().problems

    assert "the proxy's configuration of that time is gone" in problem


def test_stages_stay_as_long_as_the_history_names_them(host: Host) -> None:
    stamps = [f"{number:012x}" for number in range(100, 100 + host.program.GENERATIONS + 2)]
    for stamp in stamps:
        host.roll_out(stamp, "m25")

    staged = sorted(path.name for path in (host.program.SERVICES / "m25").iterdir())

    assert staged == stamps[2:]


def test_a_repaired_service_is_no_generation_of_its_own(host: Host) -> None:
    plan = host.roll_out(OLD, "m25")
    before = host.program.generations()
    host.processes.pop(UNIT)

    host.program.cutover(plan)

    assert host.program.generations() == before


# ----------------------------------------------------------------------------------------- status


def test_status_says_that_a_host_was_rolled_back(host: Host) -> None:
    host.roll_out(OLD, "m25")
    host.roll_out(NEW, "m25")
    host.go_back()
    plan = plan_of(service())
    seen = converged(plan)
    seen["history"] = host.history()
    seen["records"]["m25"].update(ready_s=1.0, first_answer_s=0.1)
    seen["due"]["services"] = {"m25": "its process is not the plan's"}

    (row,) = describe(plan, seen)

    assert row["gate"].startswith(
        f"differs: its process is not the plan's; rolled back from vllm-{NEW} at 20"
    )


# ---------------------------------------------------------------------------------------- pruning


def spare(host: Host, *named: str, keep: int = 2, stages: Any = ()) -> dict[str, Any]:
    """What the host is asked; the plan names releases of these stamps."""
    request = {
        "releases": str(host.folder / "releases"),
        "named": [str(host.release(stamp)) for stamp in named],
        "keep": keep,
        "stages": stages,
        "proxy": {"stamp": OLD, "unit_stamp": OLD.replace("0", "a")},
        "uv": "/nowhere",
    }
    found: dict[str, Any] = host.program.spare(request)
    host.request = request  # type: ignore[attr-defined]
    return found


def going(found: dict[str, Any]) -> list[str]:
    return [Path(entry["path"]).name for entry in found["remove"]]


def kept(found: dict[str, Any]) -> dict[str, str]:
    return {Path(entry["path"]).name: entry["why"] for entry in found["kept"]}


def test_what_served_last_and_the_plan_names_stays_and_the_rest_goes(host: Host) -> None:
    for stamp in (OLDEST, OLD, NEW):
        host.roll_out(stamp, "m25")
    host.keep_made("3" * 12)

    found = spare(host, "3" * 12)

    assert going(found) == [f"vllm-{OLDEST}"]
    assert set(kept(found)) == {f"vllm-{stamp}" for stamp in (OLD, NEW, "3" * 12)}
    assert found["remove"][0]["bytes"] >= 4096
    assert [Path(path).name for path in found["files"]] == [OLDEST]
    assert going(spare(host, keep=3)) == [f"vllm-{'3' * 12}"]


def test_the_way_back_stays_though_others_served_later(host: Host) -> None:
    for stamp in (OLDEST, OLD, NEW):
        host.roll_out(stamp, "m25")
    host.go_back(f"vllm-{OLD}")
    host.stage(OLD, "m25")

    found = spare(host, OLD)

    # OLD serves; NEW was gone back from; what a rollback from OLD leads to is OLDEST.
    assert kept(found)[f"vllm-{OLDEST}"] == "it is the way back"
    assert going(found) == []


def test_a_release_in_use_stays_whoever_uses_it(host: Host) -> None:
    for stamp in ("3" * 12, OLDEST, OLD, NEW):
        host.roll_out(stamp, "m25")
    unit = host.program.UNITS / "other.service"
    unit.write_text(f"ExecStart={host.release(OLDEST)}/bin/vllm serve\n")
    open_file = (host.release("3" * 12) / "libtorch.so").open("rb")
    import mmap

    with open_file, mmap.mmap(open_file.fileno(), 0, prot=mmap.PROT_READ):
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        try:
            found = spare(host)
        finally:
            os.kill(child, 9)
            os.waitpid(child, 0)

    assert going(found) == []
    assert kept(found)[f"vllm-{OLDEST}"] == "other.service uses it"
    assert kept(found)[f"vllm-{'3' * 12}"] == f"PID {child} uses it"


def test_an_image_is_in_use_by_its_tag_and_counts_with_its_size(host: Host) -> None:
    for stamp in ("3" * 12, OLDEST, OLD, NEW):
        host.roll_out(stamp, "m25")
    for stamp in ("3" * 12, OLDEST):
        manifest = host.release(stamp) / host.program.MANIFEST
        image = {"image": {"tag": f"minimax-fleet/vllm:{stamp}", "id": "sha256:0"}}
        manifest.write_text(json.dumps({**image, "bytes": 7 << 30, "built_at": 0}))
    unit = host.program.UNITS / "other.service"
    unit.write_text(f"ExecStart=/usr/bin/docker run minimax-fleet/vllm:{OLDEST} serve\n")

    found = spare(host)

    assert kept(found)[f"vllm-{OLDEST}"] == "other.service uses it"
    assert going(found) == [f"vllm-{'3' * 12}"]
    assert found["remove"][0]["bytes"] >= 7 << 30


def test_the_wheel_of_a_source_build_goes_with_its_release(host: Host) -> None:
    for stamp in (OLDEST, OLD, NEW):
        host.roll_out(stamp, "m25")
        (host.folder / "releases" / ".wheels" / f"vllm-{stamp}").mkdir(parents=True)

    found = spare(host)

    assert [entry["path"].rpartition("releases/")[2] for entry in found["remove"]] == [
        f"vllm-{OLDEST}",
        f".wheels/vllm-{OLDEST}",
    ]


def test_a_build_that_has_not_served_yet_stays_for_a_day(host: Host) -> None:
    host.roll_out(OLD, "m25")
    host.keep_made(NEW)
    manifest = host.release(NEW) / host.program.MANIFEST
    manifest.write_text(json.dumps({"built_at": time.time() - 3600}))

    assert kept(spare(host))[f"vllm-{NEW}"] == "it was built 1 h ago and has not served yet"
    manifest.write_text(json.dumps({"built_at": time.time() - 90000}))
    assert going(spare(host)) == [f"vllm-{NEW}"]


@pytest.fixture(params=["release", "image"])
def builds(request: pytest.FixtureRequest, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build is under way, and another was killed."""
    for name in ("going-on", "killed"):
        (host.folder / "releases" / f".{name}.partial").mkdir(parents=True)
    (host.folder / "releases" / ".wheels" / "going-on").mkdir(parents=True)
    host.program.JOBS.mkdir()
    job = f"minimax-job-{request.param}-0123456789ab"
    told = {"request": {"path": str(host.folder / "releases" / "going-on")}}
    (host.program.JOBS / f"{job}.json").write_text(json.dumps(told))
    monkeypatch.setattr(host.program, "active_jobs", lambda: [f"{job}.service"])


def test_what_a_killed_build_left_goes_and_a_build_under_way_stays(
    host: Host, builds: None
) -> None:
    found = spare(host)

    assert going(found) == [".killed.partial"]
    assert kept(found)[".going-on.partial"] == "a build is under way"


def test_a_build_that_does_not_say_which_keeps_all(host: Host, builds: None) -> None:
    for file in host.program.JOBS.iterdir():
        file.unlink()

    assert going(spare(host)) == []


def cached(host: Host, name: str, *, of: str, size: int = 8192) -> Path:
    """An unpacked wheel of uv's cache whose file a release has as a hard link."""
    file = host.folder / "releases" / ".cache" / "archive-v0" / name / "lib.so"
    file.parent.mkdir(parents=True)
    file.write_text("x" * size)
    (host.release(of) / name).hardlink_to(file)
    return file.parent


def test_the_cache_keeps_what_a_release_shares_and_its_bytes_count_once(host: Host) -> None:
    for stamp in (OLDEST, OLD, NEW):
        host.roll_out(stamp, "m25")
    shared, alone = cached(host, "torch", of=NEW, size=30000), cached(host, "old", of=OLDEST)
    (host.release(OLDEST) / "torch").hardlink_to(shared / "lib.so")

    found = spare(host)

    assert found["archives"] == [str(alone)]
    (entry,) = found["remove"]
    # Its own library, and the wheel whose other link goes with the cache; torch stays with the new one.
    assert 4096 + 8192 <= entry["bytes"] < 4096 + 8192 + 100
    assert found["archive_bytes"] == 0


def test_pruning_removes_what_was_found_and_a_second_time_nothing(
    host: Host, program: ModuleType
) -> None:
    import importlib

    for stamp in (OLDEST, OLD, NEW):
        host.roll_out(stamp, "m25", proxy=stamp)
    cached(host, "old", of=OLDEST)
    assert pruning.needed(spare(host, NEW))

    importlib.import_module("fleet_prune").prune(host.request)  # type: ignore[attr-defined]

    left = sorted(path.name for path in (host.folder / "releases").iterdir())
    assert left == [".cache", f"vllm-{OLD}", f"vllm-{NEW}"]
    assert sorted(path.name for path in (program.SERVICES / "m25").iterdir()) == [OLD, NEW]
    assert not (program.PROXY / f"{OLDEST}.conf").exists()
    assert (program.PROXY / f"{OLD}.conf").exists()
    found = spare(host, NEW)
    assert [*pruning.lines(found)][-1] == "nothing to remove"
    assert not pruning.needed(found)
    assert host.history()["generations"][2]["missing"][0].startswith("the unit")
    assert host.go_back().needed


def test_the_way_back_cannot_be_declared_away() -> None:
    with pytest.raises(ValidationError, match="greater than or equal to 2"):
        plan_of(service(), keep_releases=1)

    assert plan_of(service(), keep_releases=5).prune_request()["keep"] == 5


def test_what_would_go_is_said_with_its_size() -> None:
    found = {
        "kept": [{"path": "/r/vllm-a", "why": "the plan names it"}],
        "remove": [{"path": "/r/vllm-b", "why": "nothing needs it", "bytes": 3 << 30}],
        "archives": ["/r/.cache/archive-v0/x"],
        "archive_bytes": 1 << 30,
        "files": ["/etc/minimax/services/m25/0"],
    }

    assert [*pruning.lines(found)] == [
        "keeps vllm-a: the plan names it",
        "removes vllm-b: nothing needs it; frees 3.0 GiB",
        "removes wheels that only they had from uv's cache; frees 1.0 GiB",
        "removes 1 staged units and configurations of what is gone",
        "frees 4.0 GiB",
    ]
