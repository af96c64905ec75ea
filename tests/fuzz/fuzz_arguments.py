"""Bad arguments to public functions: each call returns, or raises one sentence.

One argument of a call that is right is replaced by junk. ``ValueError``, ``TypeError``,
``RuntimeError``, ``IndexError``, and the ``KeyError`` of a node that is not there, are answers, if
their message is short; anything else (an ``AttributeError`` from the depth, a ``MemoryError``) is a
finding.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from drawing import draw_layout, draw_tensor, draw_tree, model_of

import htfkernels as hk

ANSWERS = (ValueError, TypeError, LookupError, RuntimeError, torch.linalg.LinAlgError)
LONGEST = 600
"""Characters of a message: more is a dump."""


def _junk(draw: random.Random) -> Any:
    """Something that no function here asks for, or asks for in another place."""
    kind = draw.randrange(24)
    number = draw.choice((0, 1, -1, 2, 3, 7, 10**6, 2**31, 2**63, -(2**63), 10**30))
    if kind == 0:
        return None
    if kind == 1:
        return number
    if kind == 2:
        return draw.choice((0.5, -1.5, math.nan, math.inf, -math.inf, 1e300))
    if kind == 3:
        return draw.choice(("", "auto", "qr", "nonsense", "\x00", "1"))
    if kind == 4:
        return draw.choice((True, False))
    if kind == 5:
        return [_junk(draw) for _ in range(draw.randint(0, 4))]
    if kind == 6:
        return (number,)
    if kind == 7:
        return {draw.randrange(3): _junk(draw)}
    if kind == 8:
        return draw_tree(draw)
    if kind == 9:
        return draw.choice(draw_tree(draw).nodes)
    if kind == 10:
        layout = draw_layout(draw)
        return model_of(layout, [draw_tensor(draw, g.shape, torch.float64) for g in layout.groups])
    if kind == 11:
        return draw_layout(draw)
    if kind == 12:
        return object()
    if kind == 13:
        return np.zeros(draw.choice(((), (0,), (3,), (2, 3))), draw.choice(("f8", "i8", "O", "U3")))
    if kind == 14:
        return torch.zeros(2, 2).to_sparse()
    if kind == 15:
        return lambda *_: None
    if kind == 16:
        return b"bytes"
    if kind == 17:
        return torch.zeros(3, device="meta")
    if kind == 18:
        return 1j
    if kind == 19:
        return range(draw.randint(0, 5))
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.bool)
    shape = [draw.choice((0, 1, 2, 3, 5)) for _ in range(draw.randint(0, 4))]
    tensor = torch.full(shape, draw.choice((0, 1, -1)), dtype=draw.choice((*dtypes, torch.cfloat)))
    return tensor if draw.random() < 0.8 else tensor.expand(2, *tensor.shape)


Call = tuple[Callable[..., Any], list[Any], dict[str, Any]]


def _calls(draw: random.Random) -> list[tuple[str, Call]]:
    layout = draw_layout(draw)
    tree, dims = layout.tree, layout.mode_dims
    folded = [draw_tensor(draw, g.shape, torch.float64) for g in layout.groups]
    model = model_of(layout, folded)
    other = model_of(layout, folded)
    vectors = [draw_tensor(draw, (3, d), torch.float64) for d in dims]
    indices = torch.tensor([[draw.randrange(d) for d in dims] for _ in range(3)])
    nodes = [draw.choice(tree.nodes)]
    ranks = dict(zip(tree.interior, layout.ranks, strict=True))
    matrices = {n: model.node_weight(n).detach() for n in tree.nodes}
    values = torch.tensor([3.0, 1.0, 0.5], dtype=torch.float64)
    keywords = {"layout": layout}
    return [
        ("HTF", (hk.HTF, [tree, [*dims], ranks, 1, "linear", False, 0.1], {})),
        ("from_weights", (hk.HTF.from_weights, [tree, folded, layout], {})),
        ("forward", (model, [vectors], {})),
        ("at", (model.at, [indices], {})),
        ("index_plan", (model.index_plan, [indices], {})),
        ("slog", (model.slog, [vectors], {})),
        ("node_weight", (model.node_weight, [nodes[0]], {})),
        ("spectra", (model.matricization_spectra, [nodes, "auto"], {})),
        ("hierarchical_rank", (model.hierarchical_rank, [1e-3, "auto"], {})),
        ("principal_frames", (model.principal_frames, [nodes, "qr"], {})),
        ("renyi2_ranks", (model.renyi2_ranks, [nodes], {})),
        ("stable_ranks", (model.stable_ranks, [nodes], {})),
        ("spectrum", (model.matricization_spectrum, [[0], "auto", 1e9], {})),
        ("evaluate", (hk.evaluate, [tree, folded, vectors], keywords)),
        ("evaluate matrices", (hk.evaluate, [tree, matrices, vectors], {})),
        ("evaluate_at", (hk.evaluate_at, [tree, folded, indices], keywords)),
        ("full_tensor", (hk.full_tensor, [tree, folded], keywords)),
        ("slog_evaluate", (hk.slog_evaluate, [tree, folded, vectors], keywords)),
        ("IndexPlan", (hk.IndexPlan.make, [layout, indices], {})),
        ("Layout", (hk.Layout.make, [tree, [*dims], ranks, 1, "linear", False], {})),
        ("inner", (hk.inner, [model, other], {})),
        ("norm", (hk.norm, [model], {})),
        ("distance", (hk.distance, [model, other], {})),
        ("add", (hk.add, [model, other], {})),
        ("scale", (hk.scale, [model, 2.0], {})),
        ("effective_rank", (hk.effective_rank, [values], {})),
        ("numerical_rank", (hk.numerical_rank, [values, 1e-3], {})),
        ("schatten_norm", (hk.schatten_norm, [values, 2.0], {})),
        ("balanced", (hk.ModeTree.balanced, [4, 2], {})),
        ("halves", (hk.ModeTree.halves, [4], {})),
        ("grid", (hk.ModeTree.grid, [2, 2, (2, 2)], {})),
        ("flat", (hk.ModeTree.flat, [3], {})),
        ("chain", (hk.ModeTree.chain, [3], {})),
        ("from_levels", (hk.ModeTree.from_levels, [[[[0], [1]], [[0, 1]]]], {})),
        ("from_nested", (hk.ModeTree.from_nested, [((0, 1), 2)], {})),
        ("from_json", (hk.ModeTree.from_json, [tree.to_json()], {})),
        ("node", (tree.node, [[0], 0], {})),
        ("use_backend", (hk.use_backend, ["auto"], {})),
        ("use_precision", (hk.use_precision, ["ieee"], {})),
    ]


def case(seed: int) -> str:
    """Puts junk into one argument of one call."""
    draw = random.Random(seed)
    calls = _calls(draw)
    name, (function, args, keywords) = calls[seed % len(calls)]
    args, keywords = [*args], {**keywords}
    at = draw.randrange(len(args) + len(keywords))
    junk = _junk(draw)
    if at < len(args):
        # A list of right things with a wrong one among them, or something else altogether.
        if isinstance(args[at], list) and args[at] and draw.random() < 0.5:
            args[at] = [*args[at]]
            args[at][draw.randrange(len(args[at]))] = junk
        else:
            args[at] = junk
    else:
        keywords[[*keywords][at - len(args)]] = junk
    if name in _GROWING and _is_huge(args):
        return f"{name} left out: asks for as much memory as there is"
    try:
        function(*args, **keywords)
    except ANSWERS as error:
        message = str(error)
        assert message.strip(), f"{name}({junk!r}): {type(error).__name__} without a message"
        assert len(message) <= LONGEST, f"{name}: a message of {len(message)} characters: {message}"
        return f"{name} refused"
    return f"{name} accepted"


_GROWING = ("HTF", "balanced", "halves", "grid", "flat", "chain", "Layout", "from_levels")
"""What these make grows with a number they are given."""


def _is_huge(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_is_huge, value))
    if isinstance(value, dict):
        return any(map(_is_huge, value.values()))
    return isinstance(value, int) and value > 10**5
