"""What it costs to track spectra while the paper's HTF setting trains: order 4, D = 8, R = 512.

The setting of ``htf dynamics`` (float32, 2048 entries, GroupRMSprop) by its trainer, which logs the
losses every 25 steps: with the singular values of all six matricizations there, and without. Blocks
of either kind take turns, on one model that learns all along; what counts is the ratio of
neighbours. (A block measures at its start too, once more than its number of steps over 25.)

    python bench/tracking_step.py
    python bench/tracking_step.py --blocks 4 --steps 50 --every 25
"""

from __future__ import annotations

import argparse
import statistics

import torch

import htfkernels as hk
from htflearn import TrainConfig, Trainer
from htflearn.dynamics import PRESETS, prepare
from htflearn.trackers import Spectra


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=20, help="of each kind")
    parser.add_argument("--steps", type=int, default=500, help="of a block")
    parser.add_argument("--every", type=int, default=25, help="steps between two measurements")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    task, model, optimizer = prepare(PRESETS["paper"]["htf"])
    _check(model)
    config = TrainConfig(iterations=options.steps, log_every=options.every)

    def block(tracked: bool) -> float:
        """Milliseconds per step."""
        trackers = [Spectra()] if tracked else []
        result = Trainer(model, task, optimizer, config, trackers, progress=False).fit()
        if result.iterations != options.steps:
            raise SystemExit(f"the training ended: {result.reason}")
        return result.seconds / options.steps * 1e3

    seconds: dict[bool, list[float]] = {False: [], True: []}
    for number in range(options.blocks + 1):
        # Who comes first changes, so that neither has the warmer caches.
        for tracked in (False, True) if number % 2 else (True, False):
            taken = block(tracked)
            if number:
                seconds[tracked].append(taken)
    ratios = [w / wo for wo, w in zip(seconds[False], seconds[True], strict=True)]
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.blocks} blocks of "
        f"{options.steps} steps of each kind, spectra every {options.every} steps"
    )
    print(f"{statistics.median(seconds[False]):8.3f} ms per step without")
    print(f"{statistics.median(seconds[True]):8.3f} ms per step with spectra")
    low, _, high = statistics.quantiles(ratios, n=4)
    print(f"{statistics.median(ratios):8.3f} median ratio (quartiles {low:.3f} to {high:.3f})")


def _check(model: hk.HTF) -> None:
    """What is tracked are the singular values of the tensor's matricizations."""
    whole = model.full_tensor().detach().double()
    for node, s in model.matricization_spectra().items():
        rows = sorted(node.modes)
        order = [*rows, *(n for n in range(whole.dim()) if n not in rows)]
        matrix = whole.permute(order).reshape(8 ** len(rows), -1)
        exact = torch.linalg.svdvals(matrix)[: len(s)]
        error = ((s.detach() - exact).abs().max() / exact[0]).item()
        if not error < 1e-5:
            raise SystemExit(f"the spectrum at {node} is off by {error:.1e}")


if __name__ == "__main__":
    main()
