"""Index plans that are kept with their indices, and those that nobody asked for."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from htfkernels.arguments import shown
from htfkernels.schedule.index_build import fingerprint, native
from htfkernels.schedule.index_cost import STEP, passes_to_pay
from htfkernels.schedule.index_plan import IndexPlan, Indices, build_plan, check_indices
from htfkernels.tree.layout import Layout

__all__ = ["index_plan", "plan_that_pays", "use_index_plans"]

_log = logging.getLogger("htfkernels")


@dataclass
class _Entry:
    """A plan without its indices: with them, the cache would keep its own keys alive."""

    state: tuple[Any, ...]
    rest: tuple[Any, ...]
    plan: weakref.ref[IndexPlan]


_plans: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _state(indices: Tensor) -> tuple[Any, ...] | None:
    """Another one once the indices have changed; None where that cannot be told.

    On the CPU it is made of the contents: NumPy, ``Tensor.data``, other processes and collectives
    write past PyTorch's count of versions. On a GPU looking at them would wait for the device.
    """
    if indices.device.type == "cpu":
        return indices.dtype, indices.shape, fingerprint(indices)
    if indices.is_inference():
        return None
    place = indices.data_ptr(), indices.shape, indices.stride()
    return indices.dtype, place, indices._version


def index_plan(layout: Layout, indices: Indices) -> IndexPlan:
    """The plan of these tuples, built at the first call.

    It is kept as long as the tensor lives, for this layout, and built anew once its values are
    others, whoever wrote them. (On a GPU only writes that PyTorch counts are noticed, which leaves
    out those through ``Tensor.data`` or other libraries; the plan of a tensor of inference mode is
    built at every call there.) Lists and arrays are not kept.

    Args:
        layout, indices: as in :meth:`IndexPlan.make`.

    Raises:
        ValueError, IndexError, RuntimeError: as :meth:`IndexPlan.make`.

    Example:
        >>> from htfkernels import Layout, ModeTree
        >>> layout = Layout.make(ModeTree.balanced(4), mode_dims=2, ranks=3)
        >>> indices = torch.randint(2, (100, 4))
        >>> index_plan(layout, indices) is index_plan(layout, indices)
        True
    """
    return _kept("IndexPlan", layout, indices, check_indices("IndexPlan", layout, indices))


def _kept(op: str, layout: Layout, indices: Indices, values: Tensor) -> IndexPlan:
    """The plan of ``values``, which is ``indices`` as int64, from the cache or built."""
    state = None
    if isinstance(indices, Tensor) and not indices.is_meta:
        state = _state(indices)
    if state is None:
        return build_plan(op, layout, indices, values)
    assert isinstance(indices, Tensor)
    entries: dict[Layout, _Entry] = _plans.setdefault(indices, {})
    entry = entries.get(layout)
    if entry is not None and entry.state == state:
        plan = entry.plan()
        if plan is None:
            plan = IndexPlan(layout, indices, *entry.rest)
            entry.plan = weakref.ref(plan)
        return plan
    plan = build_plan(op, layout, indices, values)
    rest = (plan.table, plan.lists, plan.form, plan.framed, plan.cuts)
    entries[layout] = _Entry(state, rest, weakref.ref(plan))
    return plan


# -- plans that nobody asked for ------------------------------------------------------------------

_enabled: ContextVar[bool | None] = ContextVar("htfkernels_index_plans", default=None)


@contextmanager
def use_index_plans(enabled: bool) -> Iterator[None]:
    """Whether entries at plain indices are computed by an index plan where one pays.

    By default they are: on the CPU, ``model.at(indices)`` and :func:`htfkernels.evaluate_at` make a
    plan where even a single call, or a single training step, is expected to gain by it, and keep it
    as :meth:`htfkernels.HTF.index_plan` does. That depends only on the tree, the number of samples
    and whether gradients are wanted: the same call gives the same bits every time. With a plan and
    without, results agree to rounding. Plans that are passed in are used in any case.

    Args:
        enabled: False leaves them out. The environment variable ``HTF_INDEX_PLANS=0`` does the same
            for a process.

    Raises:
        ValueError: neither True nor False.

    Example:
        >>> import htfkernels as hk
        >>> model = hk.HTF(hk.ModeTree.balanced(4), mode_dims=8, ranks=64)
        >>> with use_index_plans(False):
        ...     model.at(torch.randint(8, (2048, 4))).shape
        torch.Size([2048])
    """
    if not isinstance(enabled, bool):
        raise ValueError(f"use_index_plans: expected True or False, got {shown(enabled)}")
    token = _enabled.set(enabled)
    try:
        yield
    finally:
        _enabled.reset(token)


def _wanted() -> bool:
    enabled = _enabled.get()
    if enabled is not None:
        return enabled
    setting = os.environ.get("HTF_INDEX_PLANS", "1")
    if setting not in ("0", "1"):
        raise ValueError(f"HTF_INDEX_PLANS: expected 0 or 1, got {setting!r}")
    return setting == "1"


def plan_that_pays(
    op: str, layout: Layout, weights: Sequence[Tensor], indices: Indices, values: Tensor
) -> IndexPlan | None:
    """The plan by which entries at plain indices are computed, None where each sample is computed
    by itself.

    Args:
        op: who is called, for errors.
        layout, weights: the model. What is differentiated saves more.
        indices: as the caller gave them.
        values: the same as int64, on the CPU.
    """
    # A graph that is being traced must not be for these indices alone.
    if (
        type(values) is not Tensor
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state() is not None
    ):
        return None
    batch = values.shape[0]
    # Asked for the power of two below: ragged batches do not ask anew for every size.
    passes = passes_to_pay(layout, 1 << batch.bit_length() - 1 if batch else 0)
    if passes >= STEP or not _wanted():
        return None
    if passes >= 1 and not (torch.is_grad_enabled() and any(w.requires_grad for w in weights)):
        return None
    try:
        native()
    except RuntimeError as error:
        _note(f"{op} goes without index plans. {error}")
        return None
    return _kept(op, layout, indices, values)


@cache
def _note(sentence: str) -> None:
    _log.info("%s", sentence)
