"""Locality and ranks of convolutional arithmetic circuits that learn Fashion-MNIST.

Three of them, alike but for one thing: the tree that merges neighbours first, the same with a
regularizer that raises the ranks of its quadrants, and a tree that merges far-apart windows first.
Measured are test accuracy, how strongly patches are coupled at each distance, and the exact
singular values of the outputs for the partitions of the windows into left and right, and into even
and odd columns. As in docs, with 7 to 10 s for each training on one core:

    python bench/convac_locality.py --maps docs/convac-maps.png
    python bench/convac_locality.py --steps 200 --picture /tmp/convac.png
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import htfkernels as hk
from htflearn import RankRegularizer
from htflearn.files import replace_file
from htflearn.locality.convac import ConvAC, far_first_tree
from htflearn.locality.labelled import mean_std, read_labelled
from htflearn.locality.profile import locality_profile
from htflearn.locality.profile_figure import draw_profiles, draw_theory

WINDOW, CHANNELS, RANKS = 7, 6, (6, 24)
PARTITIONS = ("left/right", "even/odd")
MODELS: dict[str, dict[str, Any]] = {
    "neighbours first": {},
    "neighbours first,\nquadrants' ranks raised": {"coefficient": 1.0},
    "far-apart first": {"tree": far_first_tree(4, 4)},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="/usr/share/datasets/fashion-mnist")
    parser.add_argument("--steps", type=int, default=6000, help="of each training")
    parser.add_argument("--images", type=int, default=512, help="to measure profiles with")
    parser.add_argument("--patch", type=int, default=WINDOW, help="side of the profiles' patches")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, default=Path("docs/convac.png"))
    parser.add_argument("--maps", type=Path, help="profiles with their maps, a second picture")
    parser.add_argument("--json", type=Path, help="all numbers")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    train, test = (read_labelled(options.data, split) for split in ("train", "test"))
    mean, std = (t[:, None, None] for t in mean_std(train.images))
    x, z = ((torch.from_numpy(d.images) - mean) / std for d in (train, test))
    y, t = torch.from_numpy(train.labels), torch.from_numpy(test.labels)

    found, rows = {}, []
    for name, setting in MODELS.items():
        model, seconds = trained(x, y, options, **setting)
        right = float((outputs(model, z).argmax(1) == t).float().mean())
        profile = locality_profile(
            model, z[: options.images], t[: options.images], patch=options.patch
        )
        ranks = {p: model.matricization_ranks(p, images=x[:5000]) for p in PARTITIONS}
        found[name] = profile, ranks
        rows.append(
            {
                "name": name.replace("\n", " "),
                "test_accuracy": right,
                "seconds": round(seconds, 1),
                "profile": profile.to_dict(),
                "ranks": {
                    p: {
                        "numerical": r.numerical_rank.tolist(),
                        "effective": r.effective_rank.tolist(),
                        "largest_singular_values": r.singular_values[:, :64].tolist(),
                    }
                    for p, r in ranks.items()
                },
            }
        )
        print(f"{rows[-1]['name']}: {100 * right:.1f}% of the test set, {seconds:.0f} s")
        for p, r in ranks.items():
            effective, numerical = r.effective_rank.median(), r.numerical_rank.median()
            print(f"  {p}: effective rank {effective:.3g}, numerical rank {numerical}")
        coupling = [f"{row.distance}: {row.coupling:.2g}" for row in profile.by_distance()]
        print(f"  coupling by distance: {', '.join(coupling)}", flush=True)
    draw_theory(found, options.picture)
    if options.maps is not None:
        draw_profiles({name: profile for name, (profile, _) in found.items()}, options.maps)
    if options.json is not None:
        replace_file(options.json, json.dumps(_report(options, rows), indent=1) + "\n")


def trained(
    x: Tensor,
    y: Tensor,
    options: argparse.Namespace,
    tree: hk.ModeTree | None = None,
    coefficient: float = 0.0,
) -> tuple[ConvAC, float]:
    """A circuit after a training, and its seconds."""
    torch.manual_seed(options.seed)
    model = ConvAC(x.shape[1:], WINDOW, CHANNELS, RANKS, int(y.max()) + 1, False, tree=tree)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    rate = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, options.steps)
    regularize = RankRegularizer("renyi2", "raise", coefficient, model.htf.tree.levels[1])
    start = time.perf_counter()
    for _ in range(options.steps):
        rows = torch.randint(len(x), (128,))
        loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
        if coefficient:
            loss = loss + regularize(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    return model, time.perf_counter() - start


@torch.no_grad()
def outputs(model: ConvAC, images: Tensor) -> Tensor:
    return torch.cat([model(part) for part in images.split(1000)])


def _report(options: argparse.Namespace, rows: list[dict[str, Any]]) -> dict[str, Any]:
    settings = {k: getattr(options, k) for k in ("steps", "images", "patch", "threads", "seed")}
    settings |= {"window": WINDOW, "channels": CHANNELS, "ranks": RANKS}
    return {"torch": torch.__version__, "settings": settings, "models": rows}


if __name__ == "__main__":
    main()
