"""Files stay readable; importing costs nothing that is not needed. (The direction of the imports is
import-linter's to hold: ``lint-imports``, contracts in pyproject.toml.)"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import htfkernels
from htfkernels.runtime.operations import OPERATIONS

ENGINE = Path(htfkernels.__file__).parent
ROOT = Path(__file__).parent.parent

NOT_AT_IMPORT = ["matplotlib", "typer", "rich", "scipy", "sklearn", "skimage", "htflearn"]
NOT_AT_IMPORT += ["htfkernels.triton"]  # PyTorch itself loads Triton where it is installed
NOT_AT_IMPORT += ["tensap", "tensorly", "pyttb", "hiepy"]
NOT_AT_IMPORT += ["torch._dynamo"]  # takes as long as PyTorch itself


def source_files():
    kinds = ("*.py", "*.cpp", "*.h", "*.inl", "*.cu", "*.cuh")
    folders = ("htfkernels", "python", "csrc", "tests", "bench", "_build_backend")
    return sorted(p for f in folders for k in kinds for p in (ROOT / f).rglob(k))


def test_no_file_is_too_long_to_read():
    long = {
        str(p.relative_to(ROOT)): n
        for p in source_files()
        if (n := len(p.read_text().splitlines())) > 600
    }
    assert not long


def test_importing_the_engine_loads_nothing_else():
    code = f"import sys, htfkernels; print([m for m in {NOT_AT_IMPORT} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_every_operation_of_a_tree_has_its_reference():
    for name, operation in OPERATIONS.items():
        if operation.traced or operation.data:
            package = name.removesuffix("_planned")
            assert list((ENGINE / "ops" / package).glob("*reference.py")), name
