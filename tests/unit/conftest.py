"""What several unit tests start from."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

from fleet.plan import PROGRAM_FILES

FILES = Path(__file__).resolve().parents[2] / "files"
PROGRAM = FILES / PROGRAM_FILES[0]


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A fresh copy of the hosts' program as a module; `module` has those of its long verbs."""
    monkeypatch.syspath_prepend(str(FILES))
    for file in PROGRAM_FILES:
        monkeypatch.delitem(sys.modules, Path(file).stem, raising=False)
    return importlib.import_module("fleet_host")


@pytest.fixture
def packages(program: ModuleType) -> ModuleType:
    """The module of the verb `packages`, over `program`."""
    return importlib.import_module("fleet_packages")


@pytest.fixture
def releases(program: ModuleType) -> ModuleType:
    """The module of the verb `release`, over `program`."""
    return importlib.import_module("fleet_release")


@pytest.fixture
def weights(program: ModuleType) -> ModuleType:
    """The module of the verb `weights`, over `program`."""
    return importlib.import_module("fleet_weights")
