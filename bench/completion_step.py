"""A training step of the paper's completion setting: order 4, D = 8, R = 512, 2048 of 4096 entries.

Checks each formulation against float64, then times forward, loss and backward, interleaved:

    python bench/completion_step.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

import htfkernels as hk

REPEATS = 25


def main() -> None:
    torch.manual_seed(0)
    model = hk.HTF(hk.ModeTree.balanced(4), 8, [512, 512], init_std=0.01)
    flat = torch.randperm(4096)[:2048]
    indices = torch.stack(torch.unravel_index(flat, (8,) * 4), 1)
    target, number = torch.randn(2048), torch.arange(4)
    plan = model.index_plan(indices)

    def batch_major() -> Tensor:
        h = model.weights[0][number[:, None], indices.T].transpose(0, 1)
        for w in list(model.weights)[1:]:
            h = torch.einsum("bnr,nrs->bns", h[:, 0::2] * h[:, 1::2], w)
        return h[:, 0, 0]

    def each_sample() -> Tensor:
        with hk.use_index_plans(False):
            return model.at(indices)

    def folded() -> Tensor:
        h = model.weights[0][number[:, None], indices.T]
        for w in list(model.weights)[1:]:
            h = torch.bmm(h[0::2] * h[1::2], w)
        return h[0, :, 0]

    ways: dict[str, Callable[[], Tensor]] = {
        "batch-major einsum, as the paper's code": batch_major,
        "folded bmm": folded,
        "htfkernels, at, without index plans": each_sample,
        "htfkernels, at": lambda: model.at(indices),
        "htfkernels, at an index plan": lambda: model.at(plan),
        "htfkernels, full_tensor": lambda: model.full_tensor().reshape(-1)[flat],
    }
    exact = hk.HTF(model.tree, 8, [512, 512], dtype=torch.float64)
    exact.load_state_dict(model.state_dict())
    with hk.use_backend("reference"):
        truth = exact.at(indices).detach()
    for name, way in ways.items():
        error = ((way().detach() - truth).abs().max() / truth.abs().max()).item()
        if not error < 1e-5:
            raise SystemExit(f"{name} is off by {error:.1e}")

    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(REPEATS + 1):
        for name, way in ways.items():
            model.zero_grad()
            start = time.perf_counter()
            (way() - target).square().mean().backward()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, medians of {REPEATS}")
    for name, times in seconds.items():
        print(f"{statistics.median(times) * 1e3:8.2f} ms  {name}")


if __name__ == "__main__":
    main()
