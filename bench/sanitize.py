"""All operations forward and backward on a few awkward shapes, for a memory checker:

    compute-sanitizer --tool memcheck --error-exitcode 9 python bench/sanitize.py
    compute-sanitizer --tool racecheck --error-exitcode 9 python bench/sanitize.py --backend cuda

Without one it is a short test. Exit code 1: a result was not the reference's.
"""

from __future__ import annotations

import argparse
from itertools import product

import torch

import htfkernels as hk
from htfkernels import testing
from htfkernels.runtime import dispatch
from htfkernels.verify import checks

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
# Operation, dtype, precision of float32 products.
CHECKS = [
    *(
        (op, dtype, precision)
        for op in (*testing.OPS, "evaluate_at_planned")
        for dtype, precision in (
            (torch.float32, "ieee"),
            (torch.float32, "tf32"),
            (torch.bfloat16, "ieee"),
        )
    ),
    ("spectra", torch.float32, "ieee"),  # by Gram matrices
    ("spectra", torch.float64, "ieee"),  # by QR
]
# Whether memory is read or written where it should not be is what the checker says. This only sees
# that something was computed at all, relative to the sum of the magnitudes of all terms.
ALLOWED = 0.25


def check(op: str, case: testing.Case, numbers: checks.Numbers) -> float:
    """The largest error of values and gradients, relative to their condition scale."""
    return max(result.error for result in checks.held(op, case, numbers))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--backend", nargs="+", choices=(*dispatch.BACKENDS, "auto"))
    parser.add_argument("--only", nargs="+", choices=CASES, default=CASES, help="cases")
    given = parser.parse_args()
    backends = given.backend or (["cuda", "triton"] if given.device == "cuda" else ["auto"])
    cases = {case.name: case for case in testing.cases()}
    bad = count = left = 0
    for backend, name, (op, dtype, precision) in product(backends, given.only, CHECKS):
        case = cases[name]
        if not case.fits(op):
            continue
        spec = dispatch.Spec(op, dtype, given.device, case.layout)
        if backend != "auto" and dispatch.why_not(backend, spec) is not None:
            left += 1
            continue
        with hk.use_backend(backend), hk.use_precision(precision):
            off = check(op, case, checks.Numbers(dtype, precision, given.device))
        count += 1
        if not off < ALLOWED:
            bad += 1
            print(f"{op} on {name}, {backend}, {dtype}, {precision}: off by {off:.1e}")
    if given.device == "cuda":
        torch.cuda.synchronize()
    print(
        f"sanitize: {count} checks on {given.device} by {', '.join(backends)}, {bad} wrong, "
        f"{left} that a backend does not do"
    )
    return int(bad > 0 or count == 0)


if __name__ == "__main__":
    raise SystemExit(main())
