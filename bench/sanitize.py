"""All operations forward and backward on a few awkward shapes, for a memory checker:

    compute-sanitizer --tool memcheck --error-exitcode 9 python bench/sanitize.py

Without one it is a short test. Exit code 1: a result was not the reference's.
"""

from __future__ import annotations

import argparse

import torch

import htfkernels as hk
from htfkernels import testing

# Primes, one-child nodes, several outputs, mixed arities, a batch of one, of none, and one that no
# tile size divides.
CASES = (
    "primes",
    "one_child_nodes",
    "random7_outputs",
    "balanced7_arity3",
    "batch1",
    "empty_batch",
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Whether memory is read or written where it should not be is what the checker says. This only sees
# that something was computed at all, relative to the sum of the magnitudes of all terms.
ALLOWED = 0.25


def check(op: str, case: testing.Case, dtype: torch.dtype, device: str) -> float:
    """The largest error of values and gradients, relative to their condition scale."""
    inputs = testing.make_inputs(case, dtype, device)
    function, arguments = testing.operation(op, case, inputs)
    exact, scale = testing.exact(function, arguments)
    worst = testing.error(function(*arguments), exact, scale)
    step = testing.gradients(function)
    cotangent = torch.ones_like(exact)
    exact, scale = testing.exact(step, (cotangent, *arguments))
    found = step(cotangent.to(dtype), *arguments)
    return max(worst, testing.error(found, exact, scale))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--only", nargs="+", choices=CASES, default=CASES, help="cases")
    given = parser.parse_args()
    cases = {case.name: case for case in testing.cases()}
    bad = count = 0
    for name in given.only:
        for op in (op for op in testing.OPS if cases[name].fits(op)):
            for dtype in DTYPES:
                for precision in ("ieee", "tf32") if dtype == "float32" else ("ieee",):
                    with hk.use_precision(precision):
                        off = check(op, cases[name], DTYPES[dtype], given.device)
                    count += 1
                    if not off < ALLOWED:
                        bad += 1
                        print(f"{op} on {name} in {dtype}, {precision}: off by {off:.1e}")
    if given.device == "cuda":
        torch.cuda.synchronize()
    print(f"sanitize: {count} checks on {given.device}, {bad} wrong")
    return int(bad > 0)


if __name__ == "__main__":
    raise SystemExit(main())
