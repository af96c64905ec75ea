"""The build backend finds the installed PyTorch without importing it, or says what is missing."""

from __future__ import annotations

import importlib.util
import runpy
import site
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

BACKEND = Path(__file__).parent.parent / "_build_backend" / "installed_torch.py"
Hook = Callable[[], list[str]]


@pytest.fixture
def hook() -> Hook:
    hook: Hook = runpy.run_path(str(BACKEND))["get_requires_for_build_wheel"]
    return hook


@pytest.fixture
def installed(hook: Hook, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The environment's site-packages, empty; the path has none of PyTorch."""
    hidden = [path for path in sys.path if not (Path(path) / "torch").is_dir()]
    monkeypatch.setattr(sys, "path", hidden)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(site, "getsitepackages", lambda: [])
    return tmp_path


def write_torch(folder: Path, version: str) -> None:
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").write_text("raise ImportError('it is imported')")
    (folder / "torch" / "version.py").write_text(f"__version__ = {version!r}\n")


def test_is_found_beside_the_build_environment(installed: Path, hook: Hook) -> None:
    write_torch(installed, "2.13.0+cpu")
    assert hook() == []
    assert sys.path[-1] == str(installed)
    assert "torch" not in sys.modules


def test_one_that_is_too_old(installed: Path, hook: Hook) -> None:
    write_torch(installed, "2.9.1")
    with pytest.raises(SystemExit, match=r"2\.9\.1 was found in .*\n.* 2\.11 or newer"):
        hook()


def test_none(installed: Path, hook: Hook) -> None:
    with pytest.raises(SystemExit, match="none was found"):
        hook()
    assert importlib.util.find_spec("torch") is None
