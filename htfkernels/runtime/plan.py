"""Plans: everything about a call that is decided before its data, once, and can be printed."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import lru_cache

import torch

from htfkernels.runtime import dispatch
from htfkernels.runtime.precision import float32_precision
from htfkernels.tree.layout import Layout, layout_of

__all__ = ["Plan", "make_plan", "plan_for"]

_log = logging.getLogger("htfkernels")
_TRACED_ROWS = 1024


@dataclass(frozen=True)
class Plan:
    """How an operation runs on a layout: backend and why.

    Attributes:
        op: ``"evaluate"``, ``"evaluate_at"``, ``"evaluate_at_planned"``, ``"full_tensor"`` ...
        layout: tree and shapes.
        dtype, device: of the numbers (``device`` is a device type).
        backend: who runs it.
        why: the reason for that backend.
    """

    op: str
    layout: Layout
    dtype: torch.dtype
    device: str
    backend: str
    why: str

    def __str__(self) -> str:
        layout = self.layout
        lines = [
            f"{self.op} on {self.device}, {str(self.dtype).removeprefix('torch.')}: "
            f"backend {self.backend} ({self.why})",
            f"order {layout.tree.order}, {len(layout.tree.parents)} nodes, "
            f"depth {layout.tree.depth}, "
            f"{layout.num_parameters:,} weights, {layout.flops(1):,} flops per vector batch row",
        ]
        if self.backend == "cpp":
            lines.append(f"products held at a time by a tile's walk: {int(layout.program[3])}")
        lines.append("level  nodes  R_in x R_out")
        for g in layout.groups:
            shared = "  shared" if g.count < len(g.nodes) else ""
            lines.append(f"{g.level:5}  {len(g.nodes):5}  {g.rows} x {g.cols}{shared}")
        return "\n".join(lines)


def plan_for(op: str, layout: Layout, dtype: torch.dtype, device: str, rows: int = 0) -> Plan:
    """The plan of a call on the backend that is asked for at this moment.

    On a GPU it may depend on the number of ``rows`` in the batch, up to the next power of two.

    Under ``torch.compile`` the choice is made once, at trace time: a compiled function keeps its
        backend.
    """
    if torch.compiler.is_compiling():
        backend = _traced_backend(op, layout.number, dtype, device)
        return Plan(op, layout, dtype, device, backend, "chosen when traced")
    request = dispatch.requested()
    if device == "cpu":  # one backend is the fastest at every size
        plan = make_plan(op, layout, dtype, device, request)
    else:
        about = 1 << (rows - 1).bit_length() if rows else 0
        plan = make_plan(op, layout, dtype, device, request, about, _precision(dtype))
    if torch._C._get_tracing_state() is not None:
        _check_export(op, plan.backend)
    return plan


def _precision(dtype: torch.dtype) -> str:
    return float32_precision() if dtype == torch.float32 else "ieee"


def _check_export(op: str, backend: str) -> None:
    """ONNX has PyTorch's own operations alone."""
    if backend != "reference" and torch.onnx.is_in_onnx_export():
        raise RuntimeError(
            f"{op}: ONNX has no operator for the backend {backend!r}; export under "
            'hk.use_backend("reference")'
        )


def _traced_backend(op: str, number: int, dtype: torch.dtype, device: str) -> str:
    # A graph may be for any number of rows.
    precision = _precision(dtype)
    spec = dispatch.Spec(op, dtype, device, layout_of(number), _TRACED_ROWS, precision)
    backend = dispatch.choose(spec, dispatch.requested())[0]
    if backend == "triton" and device == "cpu":
        raise RuntimeError(f"{op}: Triton's interpreter does not run under torch.compile")
    _check_export(op, backend)
    return backend


# As torch.compiler.assume_constant_result does, which imports the whole of torch._dynamo for it:
# half of what `import htfkernels` would take.
_traced_backend._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache(maxsize=1024)
def make_plan(
    op: str,
    layout: Layout,
    dtype: torch.dtype,
    device: str,
    request: str,
    rows: int = 0,
    precision: str = "ieee",
) -> Plan:
    """The plan of a call; cached, so that a training step pays a dictionary look-up."""
    spec = dispatch.Spec(op, dtype, device, layout, rows, precision)
    backend, why = dispatch.choose(spec, request)
    plan = Plan(op, layout, dtype, device, backend, why)
    if backend != request:
        _log.info("%s", plan)
    return plan
