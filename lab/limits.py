"""Kernel limits of this machine that many hosts at once run into: raised for the lab, put back."""

import json
from pathlib import Path

from lab.paths import STATE
from lab.process import Progress

# Each host's systemd, journald and dbus hold inotify instances; each unit has a session keyring.
WANTED = {
    "fs/inotify/max_user_instances": 8192,
    "fs/inotify/max_user_watches": 524288,
    "kernel/keys/maxbytes": 2000000,
    "kernel/keys/maxkeys": 20000,
}

_REMEMBERED = STATE / "limits.json"
_SYSCTL = Path("/proc/sys")


def raise_limits(progress: Progress) -> None:
    """Raise the limits that are lower than the lab needs, remembering what they were."""
    before = _remembered()
    low = {name: value for name in WANTED if (value := _get(name)) < WANTED[name]}
    if not low:
        return
    # Written first: after a crash in between, what is put back is what was there.
    _REMEMBERED.write_text(json.dumps({**low, **before}, indent=1) + "\n", encoding="utf-8")
    for name in low:
        _set(name, WANTED[name])
    raised = ", ".join(name.replace("/", ".") for name in low)
    progress(f"raised until `lab down`, for many hosts on one kernel: {raised}")


def restore_limits() -> None:
    """Put the limits back, but for those that someone else has changed meanwhile."""
    for name, value in _remembered().items():
        if _get(name) == WANTED.get(name):
            _set(name, value)
    _REMEMBERED.unlink(missing_ok=True)


def _remembered() -> dict[str, int]:
    if not _REMEMBERED.exists():
        return {}
    remembered: dict[str, int] = json.loads(_REMEMBERED.read_text(encoding="utf-8"))
    return remembered


def _get(name: str) -> int:
    return int((_SYSCTL / name).read_text(encoding="utf-8"))


def _set(name: str, value: int) -> None:
    (_SYSCTL / name).write_text(str(value), encoding="utf-8")
