"""Data flows one way; files stay readable; importing costs nothing that is not needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import htfkernels

ENGINE = Path(htfkernels.__file__).parent
ROOT = Path(__file__).parent.parent

# What each module of the engine may import of it: itself never, and nothing above. An operation's
# package may import the modules of its own package, and another operation's reference.
MAY_IMPORT = {
    "tree_checks": set(),
    "tree": {"tree_checks"},
    "layout": {"arguments", "tree", "tree_checks"},
    "verdicts": {"cuda.*"},
    "dispatch": {"arguments", "_C", "cuda.*", "layout", "ops.library", "verdicts"},
    "plan": {"dispatch", "layout", "precision"},
    "arguments": set(),
    "memory": {"_C"},
    "index_build": {"_plan", "layout"},
    "index_cost": {"index_build", "layout", "tree_checks"},
    "index_plan": {
        "arguments",
        "cuda.*",
        "dispatch",
        "index_build",
        "index_cost",
        "layout",
        "tree",
        "tree_checks",
    },
    "index_cache": {"arguments", "index_build", "index_cost", "index_plan", "layout"},
    "exponents": set(),
    "finite": set(),
    "output_mode": {"layout", "tree"},
    "ops": set(),
    "ops.library": {"_C", "cuda.*", "precision"},
    "ops.autograd": {"layout", "precision"},
    "ops.*": {
        "finite",
        "index_plan",
        "layout",
        "ops.autograd",
        "ops.library",
        "ops.*.reference",
        "ops.*.planned_reference",
        "plan",
    },
    "ops.*.planned_reference": {"index_plan", "layout"},
    "ops.*.reference": {"exponents", "layout", "ops.*.reference"},
    "ops.*.triton": {"exponents", "gpu.*", "layout"},
    "ops.*.cuda": {"cuda.*", "finite", "layout"},
    "precision": {"arguments"},
    "cuda": set(),
    "cuda.*": {"cuda.*", "index_build", "layout"},
    "gpu": set(),
    "gpu.*": {"gpu.*", "index_build", "layout"},
    "functional": {"arguments", "index_cache", "index_plan", "layout", "ops.*", "plan", "tree"},
    "ranks": {"arguments"},
    "grams": {"layout", "ops.autograd"},
    "spectra": {
        "arguments",
        "functional",
        "grams",
        "layout",
        "ops.*",
        "output_mode",
        "plan",
        "ranks",
        "tree",
    },
    "trace_ranks": {
        "functional",
        "grams",
        "layout",
        "ops.autograd",
        "output_mode",
        "plan",
        "spectra",
        "tree",
    },
    "balance": {"tree"},
    "mode_cores": {"tree"},
    "mode_grams": {"mode_cores", "tree"},
    "mode_sets": {
        "arguments",
        "balance",
        "finite",
        "functional",
        "layout",
        "mode_cores",
        "mode_grams",
        "ops.autograd",
        "spectra",
        "tree",
        "tree_checks",
    },
    "inner_products": {"exponents", "layout", "ops.*", "output_mode", "plan"},
    "nn": {
        "arguments",
        "functional",
        "index_cache",
        "index_plan",
        "inner_products",
        "layout",
        "mode_sets",
        "spectra",
        "trace_ranks",
        "tree",
    },
    "algebra": {"exponents", "functional", "inner_products", "layout", "nn"},
    "convert": {"nn", "tree"},
    "testing": {"dispatch", "functional", "index_plan", "layout", "spectra", "tree"},
    "checks": {
        "cuda.*",
        "dispatch",
        "index_plan",
        "layout",
        "ops.autograd",
        "precision",
        "spectra",
        "testing",
        "trace_ranks",
        "tree",
        "verdicts",
    },
    "verify": {"checks", "dispatch", "plan", "precision", "verdicts"},
    "info": {"", "_C", "cuda.*", "dispatch", "verdicts"},
    "__main__": {"info", "verify"},
    "": {
        "algebra",
        "dispatch",
        "functional",
        "index_cache",
        "index_plan",
        "layout",
        "memory",
        "nn",
        "plan",
        "precision",
        "ranks",
        "spectra",
        "tree",
        "testing",
    },
}
NOT_AT_IMPORT = ["matplotlib", "typer", "rich", "scipy", "sklearn", "skimage", "htflearn"]
NOT_AT_IMPORT += ["htfkernels.gpu"]  # PyTorch itself loads Triton where it is installed
NOT_AT_IMPORT += ["tensap", "tensorly", "pyttb", "hiepy"]
NOT_AT_IMPORT += ["torch._dynamo"]  # takes as long as PyTorch itself


def modules(package):
    """Dotted name below the package (the package itself: "") and file of each module."""
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


ENGINE_MODULES = dict(modules(ENGINE))


def rule(name):
    """The entry of the table that a module falls under."""
    if name in MAY_IMPORT:
        return name
    parts = name.split(".")
    if parts[0] in ("ops", "gpu", "cuda"):
        parts[1] = "*"
    return ".".join(parts)


def imports(name, path, at_module_level=False):
    """Modules of the engine that a file imports, by their names below the package."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if at_module_level else list(ast.walk(tree))
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = f"htfkernels.{package}".rstrip(".").split(".")
                kept = above[: len(above) - node.level + 1]
                base = ".".join([*kept, *([base] if base else [])])
            for alias in node.names:
                below = f"{base}.{alias.name}".removeprefix("htfkernels.")
                is_module = base.split(".")[0] == "htfkernels" and (
                    below in ENGINE_MODULES or below == "_C"
                )
                found.add(f"{base}.{alias.name}" if is_module else base)
    return {
        f.removeprefix("htfkernels").removeprefix(".")
        for f in found
        if f == "htfkernels" or f.startswith("htfkernels.")
    }


@pytest.mark.parametrize("name", ENGINE_MODULES, ids=lambda n: n or "htfkernels")
def test_imports_point_down(name):
    assert rule(name) in MAY_IMPORT, f"{name} has no place in the table"
    allowed = MAY_IMPORT[rule(name)]
    for imported in imports(name, ENGINE_MODULES[name]):
        assert rule(imported) in allowed, f"htfkernels.{name} imports htfkernels.{imported}"


def test_the_table_itself_has_no_cycle():
    """Between different entries: what may be imported may not import back."""

    def reach(start):
        seen, stack = set(), [start]
        while stack:
            for below in MAY_IMPORT.get(stack.pop(), set()):
                if below not in seen:
                    seen.add(below)
                    stack.append(below)
        return seen

    for name in MAY_IMPORT:
        for below in reach(name) - {name}:
            assert name not in reach(below), f"{name} and {below} may import each other"


def test_no_cycles_at_module_level():
    graph = {
        n: {i for i in imports(n, p, at_module_level=True) if i in ENGINE_MODULES and i != n}
        for n, p in ENGINE_MODULES.items()
        if n
    }
    done: set[str] = set()

    def visit(name, path):
        assert name not in path, " -> ".join([*path, name])
        if name not in done:
            for below in sorted(graph.get(name, ())):
                visit(below, [*path, name])
            done.add(name)

    for name in graph:
        visit(name, [])


def test_the_engine_never_imports_what_is_built_on_it():
    for name, path in ENGINE_MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [a.name for a in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            assert not any(n.split(".")[0] == "htflearn" for n in names), name


def test_learning_uses_only_the_public_engine():
    """htflearn imports htfkernels, its documented modules and nothing with an underscore."""
    learn = ROOT / "python" / "htflearn"
    for path in sorted(learn.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.ImportFrom)
                and (node.module or "").split(".")[0] == "htfkernels"
            ):
                parts = node.module.split(".") + [a.name for a in node.names]
                assert not any(p.startswith("_") and p != "__version__" for p in parts), path


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


def test_every_operation_has_its_reference():
    from htfkernels import testing

    for op in (*testing.OPS, "slog"):
        assert (ENGINE / "ops" / op / "reference.py").exists()
        assert (Path(__file__).parent / f"test_{op}.py").exists()
