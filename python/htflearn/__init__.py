"""Hierarchical tensor factorizations at work: train them, watch ranks grow, complete tensors."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from htflearn.checkpoint import load_checkpoint, load_model, save_checkpoint
    from htflearn.errors import UserError
    from htflearn.losses import LOSSES
    from htflearn.models import matrix_factorization, tensor_factorization
    from htflearn.optim import GroupRMSprop
    from htflearn.regularizers import RankRegularizer
    from htflearn.tasks import CompletionTask, SensingTask, completion, make_target, sensing
    from htflearn.train import TrainConfig, Trainer, TrainResult

__all__ = [
    "LOSSES",
    "CompletionTask",
    "GroupRMSprop",
    "RankRegularizer",
    "SensingTask",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "UserError",
    "completion",
    "load_checkpoint",
    "load_model",
    "make_target",
    "matrix_factorization",
    "save_checkpoint",
    "sensing",
    "tensor_factorization",
]

_HOME = {
    "LOSSES": "losses",
    "CompletionTask": "tasks",
    "GroupRMSprop": "optim",
    "RankRegularizer": "regularizers",
    "SensingTask": "tasks",
    "TrainConfig": "train",
    "TrainResult": "train",
    "Trainer": "train",
    "UserError": "errors",
    "completion": "tasks",
    "load_checkpoint": "checkpoint",
    "load_model": "checkpoint",
    "make_target": "tasks",
    "matrix_factorization": "models",
    "save_checkpoint": "checkpoint",
    "sensing": "tasks",
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
