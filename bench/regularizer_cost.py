"""What a step with the gradient-change regularizer costs beside one without.

A training step: outputs, cross entropy, backward, SGD. The ways to add the penalty take turns with
the step without it, in an order that changes; what counts is the ratio of their medians. A way that
computes the penalty at every fourth step only is timed over four steps. On a GPU also the peak of
memory, which `one` and `two` passes share out in other ways.

    python bench/regularizer_cost.py
    python bench/regularizer_cost.py --networks small --precisions float32 --repeats 5
    python bench/regularizer_cost.py --device cuda --json cost.json
"""

from __future__ import annotations

import argparse
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import htfkernels as hk
from htflearn.bench import report
from htflearn.locality.gradient_change import InputGradientChange
from htflearn.locality.patches import RandomSquares
from htflearn.locality.resnets import NETWORKS

CLASSES = 10
# Network, images, batch.
SETTINGS = {
    "cpu": {"small": ((1, 32, 64), 64), "resnet18": ((3, 64, 64), 16)},
    "cuda": {"small": ((1, 32, 64), 512), "resnet18": ((3, 224, 224), 64)},
}
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
FORMATS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}


@dataclass(frozen=True)
class Way:
    """How a step gets its penalty; None: it has none."""

    passes: Any = None
    every: int = 1
    shared: bool = True

    def __str__(self) -> str:
        if self.passes is None:
            return "plain step"
        call = "with_outputs" if self.shared else "separate"
        return f"{self.passes}, {call}" + (f", every {self.every}" if self.every > 1 else "")


WAYS = [Way(), *(Way(p, 1, shared) for p in ("one", "two", "auto") for shared in (True, False))]
WAYS += [Way("auto", 4, shared) for shared in (True, False)]


@dataclass
class Training:
    """A network with its data, and the steps it takes."""

    model: nn.Module
    x: Tensor
    y: Tensor
    half: torch.dtype | None

    def __post_init__(self) -> None:
        self.kind = self.x.device.type
        # A small step: the network is much the same for all ways.
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4, momentum=0.9)
        self.scaler = torch.amp.GradScaler(self.kind, enabled=self.half == torch.float16)

    def stepper(self, way: Way) -> Callable[[], Tensor]:
        """A function that takes one step and gives the penalty."""
        passes: Any = way.passes or "auto"
        regularize = InputGradientChange(RandomSquares(2), 1.0, every=way.every, passes=passes)
        nothing = self.x.new_zeros(())

        def step() -> Tensor:
            self.optimizer.zero_grad()
            with torch.autocast(self.kind, self.half, enabled=self.half is not None):
                if way.passes is None:
                    logits, penalty = self.model(self.x), nothing
                elif way.shared:
                    logits, penalty = regularize.with_outputs(self.model, self.x, self.y)
                else:
                    logits = self.model(self.x)
                    penalty = regularize(self.model, self.x, self.y)
                loss = nn.functional.cross_entropy(logits, self.y) + penalty
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            return penalty.detach()

        return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=SETTINGS, default="cpu")
    parser.add_argument("--networks", nargs="+", choices=("small", "resnet18"))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--repeats", type=int, default=15, help="of each way; one more warms up")
    parser.add_argument("--batch", type=int, help="in place of the setting's")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="file for the numbers")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device")
    torch.set_num_threads(options.threads)
    # float16 is emulated on most CPUs.
    precisions = options.precisions or [
        p for p in PRECISIONS if options.device == "cuda" or p != "float16"
    ]
    where = provenance(options)
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    rows = []
    for network in options.networks or SETTINGS[options.device]:
        for precision in precisions:
            for layout in options.formats:
                rows += measure(network, precision, layout, options)
                # Written as it goes: what was measured is not lost with the rest.
                if options.json:
                    report.save(options.json, where, rows)


def measure(
    network: str, precision: str, layout: str, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row for each way; printed too."""
    torch.manual_seed(0)
    shape, batch = SETTINGS[options.device][network]
    batch = options.batch or batch
    x = torch.randn(batch, *shape, device=options.device).to(memory_format=FORMATS[layout])
    y = torch.randint(CLASSES, (batch,), device=options.device)
    model: nn.Module = NETWORKS[network](shape[0], CLASSES).to(options.device)
    model.to(memory_format=FORMATS[layout])  # type: ignore[call-overload]
    training = Training(model, x, y, PRECISIONS[precision])
    steppers = {way: training.stepper(way) for way in WAYS}
    milliseconds: dict[Way, list[float]] = {way: [] for way in WAYS}
    peaks: dict[Way, float | None] = {}
    for repeat, order in enumerate(orders(options.repeats + 1)):
        for way in order:
            taken, penalties, peaks[way] = block(steppers[way], way.every, options.device)
            if repeat:  # the first warms up
                milliseconds[way].append(taken / way.every * 1e3)
            check(way, penalties)
    plain = statistics.median(milliseconds[WAYS[0]])
    print(f"\n{network}, {batch} x {' x '.join(map(str, shape))}, {precision}, {layout}")
    rows = []
    for way in WAYS:
        times = milliseconds[way]
        row: dict[str, Any] = {
            "network": network,
            "images": [batch, *shape],
            "precision": precision,
            "format": layout,
            "way": str(way),
            "passes": way.passes,
            "every": way.every,
            "with_outputs": way.shared if way.passes else None,
            "median_ms": statistics.median(times),
            "min_ms": min(times),
            "ratio": statistics.median(times) / plain,
            "repeats": len(times),
            "peak_mb": peaks[way],
        }
        rows.append(row)
        memory = "" if row["peak_mb"] is None else f"  {row['peak_mb']:9.0f} MB"
        print(f"{row['median_ms']:10.2f} ms  {row['ratio']:6.2f} x{memory}  {way}", flush=True)
    return rows


def orders(count: int) -> Iterator[list[Way]]:
    """Who comes behind whom changes, so that nobody always finds the same caches."""
    generator = random.Random(0)
    for _ in range(count):
        yield generator.sample(WAYS, len(WAYS))


def block(
    step: Callable[[], Tensor], count: int, device: str
) -> tuple[float, list[Tensor], float | None]:
    """Seconds of some steps, their penalties, and on a GPU the peak of memory in MB."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    start = time.perf_counter()
    penalties = [step() for _ in range(count)]
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else None
    return seconds, penalties, peak


def check(way: Way, penalties: list[Tensor]) -> None:
    """The first step of a block has the penalty, times the number of steps; others have none."""
    first, *others = (float(p) for p in penalties)
    fine = first == 0 if way.passes is None else 0 < first <= way.every * 1.001
    if not fine or any(others):
        raise SystemExit(f"{way}: penalties of {first}, {others}")


def provenance(options: argparse.Namespace) -> dict[str, Any]:
    """Where, when and with what the numbers were made."""
    found: dict[str, Any] = {
        "processor": report._processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "htfkernels": hk.__version__,
        "commit": report._commit(Path(hk.__file__).parent),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    if options.device == "cuda":
        found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return found


if __name__ == "__main__":
    main()
