"""The command line itself, and ``python -m htfkernels``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import htfkernels as hk
from htfkernels.info import info_text
from htflearn import cli
from htflearn.errors import Incomplete, UserError, writable_directory

ROOT = Path(__file__).parents[2]


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def test_help_names_the_commands_and_does_not_wait_for_torch() -> None:
    code = "import sys; from htflearn import cli; code = cli.run(['--help'])"
    done = python(f"{code}; print('torch' in sys.modules, code)")
    assert done.stdout.splitlines()[-1] == "False 0"
    assert "dynamics" in done.stdout and "info" in done.stdout and done.stderr == ""


def test_without_the_learn_extra() -> None:
    block = "import sys; sys.modules['typer'] = None; sys.modules['rich'] = None"
    done = python(f"{block}; from htflearn.cli import main; main()")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == 'htf needs the learn extra: pip install "htfkernels[learn]"\n'


def test_info_is_the_same_with_and_without_the_learn_extra() -> None:
    modules = ("typer", "rich", "safetensors", "matplotlib", "PIL", "scipy", "sklearn", "skimage")
    block = f"import sys; sys.modules.update(dict.fromkeys({modules}))"
    bare = python(f"{block}; import runpy; runpy.run_module('htfkernels', run_name='__main__')")
    assert bare.returncode == 0, bare.stderr
    full = python("from htflearn.cli import main; import sys; sys.argv[1:] = ['info']; main()")
    assert full.returncode == 0 and full.stdout == bare.stdout
    assert torch.__version__ in bare.stdout
    for name, reason in hk.backends().items():
        line = next(x for x in bare.stdout.splitlines() if x.startswith(f"backend {name} "))
        assert (reason or "runs here") in line


def test_a_command_without_its_module_is_not_offered(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(cli.COMMANDS, "absent", ("htflearn.commands.absent:absent", "Nothing."))
    assert cli.run(["--help"]) == 0
    assert "absent" not in capsys.readouterr().out
    assert cli.run(["absent"]) == 2


def test_errors_of_the_user_and_interruptions(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from htflearn.commands import info

    def raising(error: BaseException) -> None:
        def command() -> None:
            raise error

        monkeypatch.setattr(info, "info", command)

    raising(UserError("the file is empty"))
    assert cli.run(["info"]) == 2
    assert capsys.readouterr().err == "htf: the file is empty\n"
    raising(KeyboardInterrupt())
    assert cli.run(["info"]) == 130
    assert capsys.readouterr().err == "htf: interrupted\n"
    raising(Incomplete(["no figure", "no ranks"]))
    assert cli.run(["info"]) == 3
    assert capsys.readouterr().err == "htf: no figure\nhtf: no ranks\n"
    raising(OSError(36, "File name too long", "a.npy"))
    assert cli.run(["info"]) == 2
    assert capsys.readouterr().err == "htf: a.npy: File name too long\n"
    raising(UserError(f"\x1b[2J{'a' * 5000}\nb"))
    assert cli.run(["info"]) == 2
    told = capsys.readouterr().err
    assert told.startswith(r"htf: \x1b[2Jaaa") and told.endswith("a\\nb\n") and len(told) < 700
    raising(MemoryError())
    assert cli.run(["info"]) == 2
    assert capsys.readouterr().err == "htf: there is not enough memory\n"
    raising(RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes"))
    assert cli.run(["info"]) == 2
    assert "there is not enough memory: DefaultCPU" in capsys.readouterr().err
    raising(RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        cli.run(["info"])


@pytest.mark.parametrize("arguments", [["nonsense"], ["info", "--nonsense"], ["dynamics", "x"]])
def test_usage_errors(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and "Error" in printed.err


def test_writable_directory(tmp_path: Path) -> None:
    made = writable_directory(tmp_path / "a" / "b")
    assert made.is_dir() and not list(made.iterdir())
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "b", Path("/proc/nowhere")):
        with pytest.raises(UserError, match="cannot be written"):
            writable_directory(path)


@pytest.mark.parametrize(
    ("command", "given", "spins"),
    [
        ("dynamics", {}, "100"),
        ("bench", {}, "20000"),
        ("dynamics", {"GOMP_SPINCOUNT": "7"}, "7"),
        ("dynamics", {"OMP_WAIT_POLICY": "active"}, "None"),
        ("info", {}, "None"),
    ],
)
def test_threads_wait_without_long_spinning(
    command: str, given: dict[str, str], spins: str
) -> None:
    code = f"""
import os, sys
for name in ('GOMP_SPINCOUNT', 'OMP_WAIT_POLICY'):
    os.environ.pop(name, None)
os.environ.update({given})
from htflearn import cli
sys.argv = ['htf', '{command}']
cli.run = lambda arguments: print(os.environ.get('GOMP_SPINCOUNT'))
cli.main()
"""
    assert python(code).stdout.strip() == spins


def test_info_says_how_threads_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", "12")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    line = next(x for x in info_text().splitlines() if x.startswith("waiting threads "))
    assert "GOMP_SPINCOUNT 12, OMP_WAIT_POLICY not set" in line
    assert f"sets GOMP_SPINCOUNT={cli._spins(['dynamics'])} before" in line
