"""What ``htf locality`` trains: a grid of distances, coefficients and seeds of one task."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple

from htflearn.errors import UserError
from htflearn.locality.patches import RandomSquares
from htflearn.locality.pathfinder import PathfinderSetting
from htflearn.locality.resnets import NETWORKS
from htflearn.locality.same_class import SameClassSetting
from htflearn.options import not_negative, positive, shown

__all__ = [
    "DISTANCE",
    "FASHION_MNIST",
    "PRESETS",
    "TASKS",
    "TITLES",
    "Case",
    "Setting",
    "network_names",
]

FASHION_MNIST = "/usr/share/datasets/fashion-mnist"
"""Where Debian's package dataset-fashion-mnist puts it."""

_MOST_SAMPLES, _MOST_PIXELS = 10**8, 2**14

TASKS = ("isc", "pathfinder")
TITLES = {"isc": "Is Same Class", "pathfinder": "Pathfinder"}
DISTANCE = {"isc": "pixels between the images", "pathfinder": "dashes of a path"}
"""What the distances of a task are."""


def network_names(coefficients: Iterable[float]) -> dict[float, str]:
    """What figures and tables call the networks that were trained with each coefficient.

    Args:
        coefficients: of the regularizer, in any order, as often as they come.

    Returns:
        a name for each, from the smallest coefficient to the largest; it says the coefficient where
        there are several that are not 0.

    Example:
        >>> network_names([1.0, 0.0, 1.0])
        {0.0: 'plain', 1.0: 'regularized'}
        >>> network_names([0.5, 9.0])
        {0.5: 'regularized, coefficient 0.5', 9.0: 'regularized, coefficient 9'}
    """
    found = sorted(set(coefficients))
    several = sum(c > 0 for c in found) > 1
    return {
        c: ("regularized" + (f", coefficient {c:g}" if several else "")) if c else "plain"
        for c in found
    }


class Case(NamedTuple):
    """One training of a grid."""

    distance: int
    coefficient: float
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"distance-{self.distance}-coefficient-{self.coefficient:.12g}-seed-{self.seed}"


@dataclass(frozen=True)
class Setting:
    """A grid of trainings.

    Attributes:
        task: ``"isc"`` (Is Same Class) or ``"pathfinder"``.
        distances: pixels between the two images, or dashes of a path.
        coefficients: of the regularizer; 0 trains without.
        seeds: of pairs (Is Same Class), initial weights, order of the samples and patches.
        data: labelled images (Is Same Class); Pathfinder makes its own.
        canvas: height and width the images are made with.
        image_size: what the images on a canvas (Is Same Class) or the pictures (Pathfinder) are
            averaged to; None keeps them.
        train_size, test_size: samples.
        network: a name of :data:`htflearn.locality.resnets.NETWORKS`.
        epochs, batch, lr, momentum, weight_decay: of stochastic gradient descent. Samples left over
            after the last whole batch of an epoch are left out.
        test_every: epochs between two tests; the last epoch always ends with one.
        every: the regularizer is computed at every so-manyth step, times that number.
        patch: side of the squares (Pathfinder); of Is Same Class, the patches are the two images.
        alike: of the pictures, see :class:`htflearn.locality.pathfinder.PathfinderSetting`.
        amp: ``"off"``, ``"float16"`` or ``"bfloat16"``.
        channels_last: memory format of images and weights.
        smoke: whether it only shows that everything works: what is made of the grid says so.
    """

    task: Literal["isc", "pathfinder"]
    distances: tuple[int, ...]
    coefficients: tuple[float, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    data: str | None = None
    canvas: tuple[int, int] = (224, 224)
    image_size: int | None = None
    train_size: int = 5000
    test_size: int = 10000
    network: str = "resnet18"
    epochs: int = 150
    batch: int = 64
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 0.0
    test_every: int = 1
    every: int = 1
    patch: int = 2
    alike: bool = False
    amp: Literal["off", "float16", "bfloat16"] = "off"
    channels_last: bool = True
    smoke: bool = False

    def cases(self) -> Iterator[Case]:
        """The trainings, those that take longest first."""
        for coefficient in sorted(self.coefficients, reverse=True):
            for seed in self.seeds:
                for distance in sorted(self.distances, reverse=True):
                    yield Case(distance, coefficient, seed)

    def same_class(self, case: Case) -> SameClassSetting:
        """The data of a training of Is Same Class."""
        return SameClassSetting(
            case.distance,
            self.canvas,
            self.image_size,
            self.train_size,
            self.test_size,
            case.seed,
        )

    def pathfinder(self, length: int) -> PathfinderSetting:
        """The pictures of Pathfinder with paths of that length."""
        return PathfinderSetting(length, canvas=self.canvas[0], alike=self.alike)

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def check(self) -> None:
        """Everything that can be wrong before data are read.

        Raises:
            UserError: a value is out of its range; the sentence names the option.
        """
        for name in ("epochs", "batch", "test_every", "every", "patch", "image_size", "lr"):
            positive(name.replace("_", "-"), getattr(self, name))
        for name in ("train_size", "test_size"):
            positive(name.replace("_", "-"), getattr(self, name), _MOST_SAMPLES)
        not_negative("weight-decay", self.weight_decay)
        if not 0 <= self.momentum < 1:
            raise UserError(f"--momentum must be in 0..1, got {self.momentum}")
        for name in ("distances", "coefficients", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise UserError(f"--{name} needs values that differ, got {shown(list(values))}")
        for name, pixels in (("distances", self.distances), ("canvas", self.canvas)):
            if max(pixels) > _MOST_PIXELS:
                raise UserError(
                    f"--{name} must be at most {_MOST_PIXELS:,}, got {shown(max(pixels))}"
                )
        if self.train_size < self.batch or self.batch < 2:
            raise UserError(
                f"--batch must be in 2..{self.train_size}, the number of training samples, got "
                f"{self.batch}"
            )
        if min(self.coefficients) < 0 or not all(map(math.isfinite, self.coefficients)):
            raise UserError(f"--coefficients must not be negative, got {list(self.coefficients)}")
        if not 0 <= min(self.seeds) <= max(self.seeds) < 2**62:
            raise UserError(f"--seeds must be in 0..2^62, got {list(self.seeds)}")
        if self.network not in NETWORKS:
            raise UserError(f"--network must be one of {', '.join(NETWORKS)}, got {self.network!r}")
        if self.amp not in ("off", "float16", "bfloat16"):
            raise UserError(f"--amp must be off, float16 or bfloat16, got {self.amp!r}")
        if len(self.canvas) != 2 or (self.task == "pathfinder" and len(set(self.canvas)) > 1):
            raise UserError(f"--canvas must be square for Pathfinder, got {self.canvas}")
        try:
            for case in self.cases():
                if self.task == "isc":
                    self.same_class(case)
                else:
                    self.pathfinder(case.distance)
                    side = self.image_size or self.canvas[0]
                    if side > self.canvas[0]:
                        raise ValueError(
                            f"--image-size must be at most that of the canvas, {self.canvas[0]}, "
                            f"got {side}"
                        )
                    RandomSquares(self.patch).sample(side, side)
        except ValueError as error:
            raise UserError(str(error)) from error


_PAPER = Setting("isc", (0, 40, 80, 120, 160), (0.0, 1.0), test_every=10, amp="bfloat16")
_LAPTOP = Setting(
    "isc",
    (0, 40, 80, 120),
    (0.0, 1.0),
    data=FASHION_MNIST,
    canvas=(14, 148),
    image_size=14,
    train_size=1000,
    test_size=4000,
    network="small",
    epochs=70,
    test_every=10,
    every=4,
)

PRESETS: dict[str, dict[str, Setting]] = {
    "isc": {
        "paper": _PAPER,
        "laptop": _LAPTOP,
        "smoke": replace(
            _LAPTOP,
            distances=(0, 16),
            seeds=(0,),
            canvas=(14, 44),
            train_size=128,
            test_size=64,
            epochs=1,
            smoke=True,
        ),
    },
    "pathfinder": {
        "paper": replace(
            _PAPER,
            task="pathfinder",
            distances=(3, 5, 7, 9),
            coefficients=(0.0, 9.0),
            canvas=(300, 300),
            image_size=150,
            train_size=10000,
        ),
        "laptop": replace(
            _LAPTOP,
            task="pathfinder",
            distances=(2, 4, 6),
            data=None,
            canvas=(48, 48),
            image_size=None,
            train_size=8000,
            test_size=2000,
            network="small4",
            epochs=13,
            test_every=13,
            every=6,
        ),
        "smoke": replace(
            _LAPTOP,
            task="pathfinder",
            distances=(2, 3),
            data=None,
            seeds=(0,),
            canvas=(32, 32),
            image_size=None,
            train_size=128,
            test_size=64,
            epochs=1,
            smoke=True,
        ),
    },
}
"""Task -> name -> setting. ``paper``: the paper's, for a GPU; ``laptop``: two cores, 20 minutes;
``smoke``: seconds."""
