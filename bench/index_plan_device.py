"""What it costs to build the index plan of tuples that are on a GPU.

Three ways: there, by the CUDA kernels; on the CPU, with the copies there and back, which is what is
done without them; and `torch.unique` for each node, which leaves out the lists of a plan. The plans
of the first two are compared before anything is timed.

    python bench/index_plan_device.py
    python bench/index_plan_device.py --samples 1e5 1e6 --repeats 20 --json plans.json
    HTF_EMULATE_CUDA=1 python bench/index_plan_device.py     # tiny: a check where there is no GPU
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import htfkernels as hk
from htfkernels.ops.index_plan.cuda import OnDevice
from htfkernels.runtime import cuda_module as module
from htfkernels.schedule.index_build import Builder, OnCpu
from htfkernels.tree.layout import Layout
from htflearn.bench import report

# Name: order, dimension, how many different tuples there are, as a part of the samples (None: as
# many as come). In turn: tables in shared memory, tables, many nodes, keys of 64 bits.
SETTINGS: dict[str, tuple[int, int, float | None]] = {
    "order 4, D = 64": (4, 64, None),
    "order 4, D = 2000, few different": (4, 2000, 0.25),
    "order 32, D = 4": (32, 4, None),
    "order 4, D = 100,000, few different": (4, 100_000, 0.25),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", nargs="+", type=float, default=[1e5, 1e6, 1e7])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--repeats", type=int, default=10, help="of each way; one more warms up")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the CPU's way")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    options = parser.parse_args()
    if module.emulated():  # the times say nothing
        options.samples, options.repeats = [500], 1
    device = module.device_type()
    reason = module.why_not(device)
    if reason is not None:
        raise SystemExit(f"building index plans on a GPU cannot be timed here: {reason}")
    torch.set_num_threads(options.threads)
    where = provenance(device)
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    rows = []
    for name in options.settings:
        for samples in map(int, options.samples):
            rows += measure(name, samples, device, options.repeats)
            # Written as it goes: what was measured is not lost with the rest.
            if options.json:
                report.save(options.json, where, rows)


def measure(name: str, samples: int, device: str, repeats: int) -> list[dict[str, Any]]:
    """A row for each way; printed too."""
    torch.manual_seed(0)
    order, dim, different = SETTINGS[name]
    layout = Layout.make(hk.ModeTree.balanced(order), dim, 8)
    count = samples if different is None else max(int(samples * different), 1)
    indices = torch.randint(dim, (count, order), device=device)
    if count < samples:
        indices = indices[torch.randint(count, (samples,), device=device)]

    def on_device() -> Any:
        return Builder(layout, indices, OnDevice).build()

    def on_cpu() -> Any:
        return Builder(layout, indices, OnCpu).build()

    def by_unique() -> Any:
        return distinct_by_unique(layout, indices)

    table, lists, *rest = on_device()
    exact_table, exact_lists, *exact = on_cpu()
    if not (torch.equal(table, exact_table) and torch.equal(lists, exact_lists) and rest == exact):
        raise SystemExit(f"{name}, {samples:,} samples: the two plans are not the same")
    size = lists.numel() * 4
    del table, lists, exact_table, exact_lists
    ways: dict[str, Callable[[], Any]] = {
        "GPU": on_device,
        "CPU": on_cpu,
        "torch.unique": by_unique,
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    peaks: dict[str, float | None] = {}
    for repeat in range(repeats + 1):
        for way, build in ways.items():
            taken, peaks[way] = timed(build, device)
            if repeat:  # the first warms up
                times[way].append(taken * 1e3)
    loops = Builder(layout, indices, OnDevice)
    loops.build()
    print(f"\n{name}, {samples:,} samples, {size:,} bytes of lists, {loops.loops.waits} waits")
    rows = []
    for way, taken in times.items():
        median = statistics.median(taken)
        rows.append(
            {
                "setting": name,
                "samples": samples,
                "way": way,
                "median_ms": median,
                "min_ms": min(taken),
                "repeats": len(taken),
                "bytes_of_lists": size,
                "peak_mb": peaks[way],
            }
        )
        memory = "" if peaks[way] is None else f"  {peaks[way]:9.0f} MB"
        per_index = median * 1e6 / max(samples * order, 1)
        print(f"{median:10.3f} ms  {per_index:8.3f} ns per index{memory}  {way}", flush=True)
    return rows


def timed(build: Callable[[], Any], device: str) -> tuple[float, float | None]:
    """Seconds, and on a GPU the peak of memory in MB."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    start = time.perf_counter()
    build()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return seconds, torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else None


def distinct_by_unique(layout: Layout, indices: Tensor) -> dict[int, Tensor]:
    """Each node's distinct sub-tuples as pairs of its children's, where they are few enough."""
    tree = layout.tree
    ids = {
        leaf.index: (indices[:, leaf.index], layout.mode_dims[leaf.index]) for leaf in tree.leaves
    }
    found = {}
    for node in tree.interior:
        left, right = (ids.get(child.index) for child in node.children)
        if left is None or right is None:
            continue
        pairs, inverse = torch.unique(left[0] * right[1] + right[0], return_inverse=True)
        if len(pairs) <= len(indices) // 2:
            found[node.index] = pairs
            ids[node.index] = (inverse, len(pairs))
    return found


def provenance(device: str) -> dict[str, Any]:
    """Where, when and with what the numbers were made."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "the emulation",
        "processor": report._processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "htfkernels": hk.__version__,
        "commit": report._commit(Path(hk.__file__).parent),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


if __name__ == "__main__":
    main()
