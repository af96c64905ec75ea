"""Holds the tables of tiles (``htfkernels/triton/configs.py``) against timing, on a GPU.

    python bench/tune_tiles.py                      # all kernels, float32 in TF32 and bfloat16
    python bench/tune_tiles.py --only fused --seconds 120

For each kernel and shape it times the tile that the table chooses and its neighbours (twice and
half as large in each direction, more and fewer warps and stages), and prints the best beside the
table's. The library itself never does this: a row of the table that loses here by more than the
noise is to be changed there, with its reason.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton

from htfkernels.tree import ModeTree
from htfkernels.tree.layout import Layout
from htfkernels.triton import configs, fused, launch, uniform
from htfkernels.triton.launch import Config
from htfkernels.triton.tables import Fused, Tables
from htfkernels.triton.tiles import input_precision

SHAPES = ((8, 32, 4096), (16, 64, 4096), (64, 128, 4096), (64, 256, 4096))  # D, R, B
NODES = 32
DTYPES = {"tf32": torch.float32, "bfloat16": torch.bfloat16}


class Work(NamedTuple):
    """A launch to time.

    Attributes:
        kernel: module and direction.
        shape: for the table.
        table: name of the function of :mod:`htfkernels.triton.configs` that chooses its tile.
        run: launches it.
    """

    kernel: str
    shape: str
    table: str
    run: Callable[[], Any]


def works(dtype: torch.dtype, precision: str, device: torch.device) -> Iterator[Work]:
    """The two large kernels, forward and backward, on nodes of several sizes."""
    for dim, rank, batch in SHAPES:
        layout = Layout.make(ModeTree.balanced(4 * NODES), dim, rank)
        below, level = Tables(
            layout.program, device, (dtype, input_precision(dtype, precision))
        ).launches[:2]
        assert isinstance(below, Fused)
        leaf, first, second = (_random(dtype, device, *layout.groups[i].shape) for i in range(3))
        x = _random(dtype, device, batch, layout.offsets[-1])
        buffer = _random(dtype, device, 2 * NODES * rank * batch)
        out = torch.empty_like(buffer)
        shape = f"D {dim}, R {rank}, B {batch}"
        places, leaf_places = len(first), len(leaf)
        yield Work(
            "fused forward", shape, "fused_forward",
            lambda x=x, leaf=leaf, w=first, f=below, out=out: fused.forward(
                f, x, leaf, w, out, precision
            ),
        )  # fmt: skip
        yield Work(
            "fused backward", shape, "fused_backward",
            lambda x=x, leaf=leaf, w=first, f=below, g=buffer, n=places, m=leaf_places: (
                fused.backward(f, x, leaf, w, g, n, m, precision)
            ),
        )  # fmt: skip
        yield Work(
            "uniform forward", shape, "forward",
            lambda b=buffer, w=second, u=level, out=out, rank=rank, batch=batch: uniform.forward(
                u, b, rank, batch, w, out, batch, precision
            ),
        )  # fmt: skip
        yield Work(
            "uniform backward", shape, "backward",
            lambda b=buffer, w=second, u=level, out=out, rank=rank, batch=batch: uniform.backward(
                u, b, rank, batch, w, b, out, len(w), batch, precision
            ),
        )  # fmt: skip


def _random(dtype: torch.dtype, device: torch.device, *shape: int) -> torch.Tensor:
    return torch.randn(shape, device=device).to(dtype)


def chosen(work: Work) -> Config:
    """The tile of the table."""
    found: list[Config] = []
    with launch.recorded(lambda kernel, grid, args, constants, config: found.append(config)):
        work.run()
    return found[0]


def neighbours(config: Config) -> Iterator[Config]:
    """Tiles of up to twice the size in any direction, and half; the columns' size stays."""
    for m, k in itertools.product((1, 2, 0.5), repeat=2):
        for warps, stages in itertools.product((4, 8), (1, 2, 3, 4)):
            other = Config(int(config.m * m), config.n, int(config.k * k), warps, stages)
            if other != config and min(other.m, other.k) >= 16:
                yield other


def timed(work: Work, config: Config) -> float | None:
    """Milliseconds with a tile, or None where it does not fit on the chip."""
    with mock.patch.object(configs, work.table, lambda *shape: config):
        try:
            return triton.testing.do_bench(work.run, warmup=10, rep=40, return_mode="median")
        except (triton.runtime.errors.OutOfResources, triton.runtime.errors.PTXASError):
            return None


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--only", default="", help="kernels whose name holds this")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="one of the two")
    parser.add_argument("--seconds", type=float, default=300.0, help="to stop after")
    parser.add_argument("--out", type=Path, help="a JSON file for all times")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("tune_tiles: there is no CUDA device; nothing can be timed", file=sys.stderr)
        return 2
    end = time.monotonic() + options.seconds
    device = torch.device("cuda", torch.cuda.current_device())
    rows = []
    print("| kernel | dtype | shape | table's tile | ms | best tile | ms | table / best |")
    print("|---|---|---|---|--:|---|--:|--:|")
    for name, dtype in DTYPES.items():
        if options.dtype not in (None, name):
            continue
        for work in works(dtype, "tf32", device):
            if options.only not in work.kernel:
                continue
            table = chosen(work)
            times = {table: timed(work, table)}
            for config in neighbours(table):
                if time.monotonic() < end:
                    times[config] = timed(work, config)
            known = {config: ms for config, ms in times.items() if ms is not None}
            if table not in known:
                print(f"| {work.kernel} | {name} | {work.shape} | {tuple(table)} | - | | | |")
                continue
            best = min(known, key=lambda config: known[config])
            print(
                f"| {work.kernel} | {name} | {work.shape} | {tuple(table)} | {known[table]:.3f} "
                f"| {tuple(best)} | {known[best]:.3f} | {known[table] / known[best]:.2f} |",
                flush=True,
            )
            rows.append({
                "kernel": work.kernel, "dtype": name, "shape": work.shape, "table": table,
                "ms": [[*config, ms] for config, ms in times.items()],
            })  # fmt: skip
    if options.out is not None:
        about = {"gpu": torch.cuda.get_device_name(device), "triton": triton.__version__}
        options.out.write_text(json.dumps({**about, "rows": rows}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
