"""Hierarchical tensor factorizations at work: train them, watch ranks grow, complete tensors."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from htflearn.checkpoint import load_checkpoint, load_model, save_checkpoint
    from htflearn.completion_step import CompletionStep
    from htflearn.errors import UserError
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
    from htflearn.train import TrainConfig, Trainer, TrainResult

__all__ = [
    "LOSSES",
    "AdjacentSquares",
    "CompletionStep",
    "CompletionTask",
    "ConvAC",
    "FixedPatches",
    "GroupRMSprop",
    "InputGradientChange",
    "LocalityProfile",
    "Patch",
    "RandomSquares",
    "RankRegularizer",
    "SensingTask",
    "SeparationRank",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "UserError",
    "completion",
    "far_first_tree",
    "input_gradient_change",
    "load_checkpoint",
    "load_model",
    "locality_profile",
    "make_target",
    "matrix_factorization",
    "save_checkpoint",
    "sensing",
    "separation_rank",
    "tensor_factorization",
]

_HOME = {
    "LOSSES": "losses",
    "AdjacentSquares": "locality.patches",
    "CompletionStep": "completion_step",
    "CompletionTask": "tasks",
    "ConvAC": "locality.convac",
    "FixedPatches": "locality.patches",
    "GroupRMSprop": "optim",
    "InputGradientChange": "locality.gradient_change",
    "LocalityProfile": "locality.profile",
    "Patch": "locality.patches",
    "RandomSquares": "locality.patches",
    "RankRegularizer": "regularizers",
    "SensingTask": "tasks",
    "SeparationRank": "locality.separation",
    "TrainConfig": "train",
    "TrainResult": "train",
    "Trainer": "train",
    "UserError": "errors",
    "completion": "tasks",
    "far_first_tree": "locality.convac",
    "input_gradient_change": "locality.gradient_change",
    "load_checkpoint": "checkpoint",
    "load_model": "checkpoint",
    "locality_profile": "locality.profile",
    "make_target": "tasks",
    "matrix_factorization": "models",
    "save_checkpoint": "checkpoint",
    "sensing": "tasks",
    "separation_rank": "locality.separation",
    "tensor_factorization": "models",
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
