"""What several unit tests start from."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

PROGRAM = Path(__file__).resolve().parents[2] / "files" / "fleet_host.py"


@pytest.fixture
def program() -> ModuleType:
    """A fresh copy of the hosts' program as a module."""
    spec = importlib.util.spec_from_file_location("fleet_host", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
