"""Hierarchical tensor factorizations at work: train them, watch ranks grow, complete tensors.

What a :class:`Trainer` can record at every logged iteration, its ``trackers``:

- :class:`LocalComponentNorms`, :class:`ComponentNorms` (of a CP factorization): sorted, or with
  ``sort=False`` each component in its own place along the run; :func:`draw_norms` draws either;
- :class:`SingularValues` (of a matrix factorization), :class:`Spectra` (of all matricizations, with
  their ranks);
- :class:`ReconstructionError` (from a known tensor), :class:`Unbalancedness`;
- anything else with a ``name`` and a ``measure(model, task)``, see :class:`Tracker`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from htflearn.checkpoint import load_checkpoint, load_model, save_checkpoint
    from htflearn.completion_step import CompletionStep
    from htflearn.errors import UserError
    from htflearn.figures import draw_norms
    from htflearn.locality.convac import ConvAC, far_first_tree
    from htflearn.locality.gradient_change import InputGradientChange, input_gradient_change
    from htflearn.locality.patches import AdjacentSquares, FixedPatches, Patch, RandomSquares
    from htflearn.locality.profile import LocalityProfile, locality_profile
    from htflearn.locality.separation import SeparationRank, separation_rank
    from htflearn.losses import LOSSES
    from htflearn.models import matrix_factorization, tensor_factorization
    from htflearn.optim import GroupRMSprop
    from htflearn.regularizers import RankRegularizer
    from htflearn.tasks import CompletionTask, SensingTask, completion, make_target, sensing
    from htflearn.trackers import (
        ComponentNorms,
        LocalComponentNorms,
        ReconstructionError,
        SingularValues,
        Spectra,
        Tracker,
        Unbalancedness,
        node_label,
        unbalancedness,
    )
    from htflearn.train import TrainConfig, Trainer, TrainResult

__all__ = [
    "LOSSES",
    "AdjacentSquares",
    "CompletionStep",
    "CompletionTask",
    "ComponentNorms",
    "ConvAC",
    "FixedPatches",
    "GroupRMSprop",
    "InputGradientChange",
    "LocalComponentNorms",
    "LocalityProfile",
    "Patch",
    "RandomSquares",
    "RankRegularizer",
    "ReconstructionError",
    "SensingTask",
    "SeparationRank",
    "SingularValues",
    "Spectra",
    "Tracker",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "Unbalancedness",
    "UserError",
    "completion",
    "draw_norms",
    "far_first_tree",
    "input_gradient_change",
    "load_checkpoint",
    "load_model",
    "locality_profile",
    "make_target",
    "matrix_factorization",
    "node_label",
    "save_checkpoint",
    "sensing",
    "separation_rank",
    "tensor_factorization",
    "unbalancedness",
]

_HOME = {
    "LOSSES": "losses",
    "AdjacentSquares": "locality.patches",
    "CompletionStep": "completion_step",
    "CompletionTask": "tasks",
    "ComponentNorms": "trackers",
    "ConvAC": "locality.convac",
    "FixedPatches": "locality.patches",
    "GroupRMSprop": "optim",
    "InputGradientChange": "locality.gradient_change",
    "LocalComponentNorms": "trackers",
    "LocalityProfile": "locality.profile",
    "Patch": "locality.patches",
    "RandomSquares": "locality.patches",
    "RankRegularizer": "regularizers",
    "ReconstructionError": "trackers",
    "SensingTask": "tasks",
    "SeparationRank": "locality.separation",
    "SingularValues": "trackers",
    "Spectra": "trackers",
    "Tracker": "trackers",
    "TrainConfig": "train",
    "TrainResult": "train",
    "Trainer": "train",
    "Unbalancedness": "trackers",
    "UserError": "errors",
    "completion": "tasks",
    "draw_norms": "figures",
    "far_first_tree": "locality.convac",
    "input_gradient_change": "locality.gradient_change",
    "load_checkpoint": "checkpoint",
    "load_model": "checkpoint",
    "locality_profile": "locality.profile",
    "make_target": "tasks",
    "matrix_factorization": "models",
    "node_label": "trackers",
    "save_checkpoint": "checkpoint",
    "sensing": "tasks",
    "separation_rank": "locality.separation",
    "tensor_factorization": "models",
    "unbalancedness": "trackers",
}


def __getattr__(name: str) -> Any:
    # Loaded when first asked for: `htf --help` imports this package and needs no PyTorch.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
