"""Training steps as operators, and who runs them.

This is the engine's door for optimizers and training loops, which are :mod:`htflearn`'s.
"""

from __future__ import annotations

from htfkernels.ops.completion_step.cuda import LOSSES, completion_step_
from htfkernels.ops.group_rmsprop import group_rmsprop_on_cpu_
from htfkernels.ops.group_rmsprop.cuda import group_rmsprop_
from htfkernels.runtime.cuda_module import device_type
from htfkernels.runtime.dispatch import Spec, refusal, requested, why_not_taken
from htfkernels.runtime.plan import plan_for
from htfkernels.runtime.precision import float32_precision

__all__ = [
    "LOSSES",
    "Spec",
    "completion_step_",
    "device_type",
    "float32_precision",
    "group_rmsprop_",
    "group_rmsprop_on_cpu_",
    "plan_for",
    "refusal",
    "requested",
    "why_not_taken",
]
