"""Iterations per second of the paper's tensor completion on a GPU: order 4, D = 8, R = 512, 2048 of
4096 entries, GroupRMSprop, float32.

Checks the fused step against ordinary ones in float64, then times iterations, interleaved: the
fused step (:class:`htflearn.CompletionStep`) and ordinary steps, each as a captured CUDA graph as
the trainer replays it, and launched one by one.

    python bench/train_step.py
    python bench/train_step.py --precision tf32 --out bench/results/train-step.json
    HTF_EMULATE_CUDA=1 python bench/train_step.py --dry     # tiny, on a CPU, to check this script
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import htfkernels as hk
from htfkernels.runtime import cuda_module as module
from htflearn import CompletionStep
from htflearn.bench import device as machine
from htflearn.bench.report import provenance, save
from htflearn.dynamics import PRESETS, prepare
from htflearn.optim import GroupRMSprop
from htflearn.step import WARM_UP, CudaGraph, GraphStep

CHECKED = 20  # steps
PRECISIONS = ("ieee", "tf32x3", "tf32")
# Of a loss after so few steps, relative; what the products round to.
TOLERANCE = {"ieee": 1e-4, "tf32x3": 1e-4, "tf32": 2e-2}


def step_of(setting: Any, backend: str) -> CompletionStep:
    """A step of the setting's training, fused or ordinary, on a model of its own."""
    # The model and its target are made on the CPU, by the fastest that is there.
    task, model, optimizer = prepare(setting)
    if setting.device == "cpu":
        optimizer = GroupRMSprop(model.parameters(), lr=setting.lr, capturable=True)
    with hk.use_backend(backend):
        return CompletionStep(model, task.indices, task.values, optimizer, setting.loss)


def check(setting: Any, precisions: tuple[str, ...]) -> None:
    """Losses of the first steps, against ordinary steps of the reference in float64."""
    exact = step_of(replace(setting, dtype="float64"), "reference")
    with hk.use_backend("reference"):
        expected = torch.stack([exact() for _ in range(CHECKED)]).double()
    for precision in precisions:
        step = step_of(setting, "cuda")
        if step.why_not is not None:
            raise SystemExit(f"train_step: steps are not fused: {step.why_not}")
        with machine.precision(precision):
            found = torch.stack([step() for _ in range(CHECKED)]).double()
        error = float(((found - expected).abs() / expected).max())
        if not error < TOLERANCE[precision]:
            raise SystemExit(f"train_step: losses in {precision} are off by {error:.1e}")


def ways(setting: Any, precision: str) -> dict[str, Callable[[], Any]]:
    """What is timed."""
    found: dict[str, Callable[[], Any]] = {}
    on_gpu = setting.device == "cuda"
    for name, backend in (("fused", "cuda"), ("ordinary steps, triton", "triton")):
        if backend == "triton" and not on_gpu:
            continue
        step = step_of(setting, backend)

        def run(step: CompletionStep = step, backend: str = backend) -> None:
            with hk.use_backend(backend), machine.precision(precision):
                step()

        found[f"{name}, launched"] = run
        if on_gpu:
            again = step_of(setting, backend)

            def captured(step: CompletionStep = again, backend: str = backend) -> None:
                with hk.use_backend(backend), machine.precision(precision):
                    step()

            graph = CudaGraph(torch.device("cuda", torch.cuda.current_device()))
            found[f"{name}, CUDA graph"] = GraphStep(
                captured, again.optimizer, graph, required=True
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--precision", action="append", choices=PRECISIONS, help="all by default")
    parser.add_argument("--steps", type=int, default=2000, help="of a block")
    parser.add_argument("--blocks", type=int, default=7, help="of each way")
    parser.add_argument("--out", type=Path, help="a JSON file for the numbers")
    parser.add_argument("--dry", action="store_true", help="tiny and emulated, on a CPU")
    options = parser.parse_args()
    precisions = tuple(options.precision or PRECISIONS)
    kind = "cpu" if options.dry else "cuda"
    if options.dry and not module.emulated():
        raise SystemExit("train_step: --dry needs HTF_EMULATE_CUDA=1")
    if not options.dry and not torch.cuda.is_available():
        raise SystemExit("train_step: there is no CUDA device, and this measures one")
    reason = module.why_not(kind)
    if reason is not None:
        raise SystemExit(f"train_step: {reason}")
    setting = replace(PRESETS["paper"]["htf"], device=kind)
    if options.dry:
        setting = replace(setting, dim=4, width=20, samples=128, init_std=0.1)
        options.steps, options.blocks = 2, 1
    check(setting, precisions)

    rows = []
    for precision in precisions:
        taken: dict[str, list[float]] = {}
        timed = ways(setting, precision)
        for run in timed.values():
            for _ in range(WARM_UP + 2):  # a graph is captured, and replayed once
                run()
        for _ in range(options.blocks):
            for name, run in timed.items():

                def block(run: Callable[[], Any] = run) -> None:
                    for _ in range(options.steps):
                        run()

                each = machine.seconds(block, kind)[0] / options.steps
                taken.setdefault(name, []).append(each)
        for name, times in taken.items():
            median = statistics.median(times)
            print(f"{precision:7} {median * 1e6:10.2f} us {1 / median:12.1f} iterations/s  {name}")
            rows.append(
                {
                    "workload": "paper completion step", "implementation": name,
                    "precision": precision, "steps": options.steps, "blocks": options.blocks,
                    "seconds": median, "seconds_least": min(times), "seconds_most": max(times),
                    "iterations_per_second": 1 / median,
                }
            )  # fmt: skip
    if options.out is not None:
        tiny = options.dry
        rate = machine.Machine(
            machine.gemm_rate(torch.float32, kind, tiny), machine.copy_rate(kind, tiny)
        )
        made = provenance({"float32": rate}, "tiny" if tiny else "full")
        if kind == "cuda":
            made |= machine.described(", ".join(precisions))
        save(options.out, {**made, "command": shlex.join(["python", *sys.argv])}, rows)


if __name__ == "__main__":
    main()
