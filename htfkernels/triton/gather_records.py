"""What the kernels over gathered rows read from their tables, and how they find their tile.

A launch runs many jobs, of different shapes. ``TABLE``, int64, holds records of :data:`FIELDS`
numbers: a :class:`Job` for each node, then an :class:`Operand` for each of its operands. ``WORK``,
int32, names the record of each program's job. Offsets count elements.

``BUF`` holds the weights, one after the other as they are folded, then the frames of the nodes:
``[rows, columns]`` each. Results go to one of three buffers (:data:`WEIGHTS`, :data:`FRAMES`,
:data:`PARTS`): gradients of weights, of frames, or partial sums in the accumulators' dtype.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from htfkernels.triton.tiles import cast


class Job(NamedTuple):
    """A node, or the gradient of one of its operands, or a sum of parts."""

    first: int = 0  # its first program in the launch
    rows: int = 0  # of the node; of a sum: the number of parts
    k: int = 0  # width of the product p; of a sum: the number of elements
    n: int = 0  # columns of the message; of an operand's gradient: rows of the operand
    weight: int = -1  # of W in BUF; -1: ones
    out: int = 0  # of the message, or of its gradient; of a sum: of the parts
    operands: int = 0  # record of the first operand
    count: int = 0  # of operands
    dp: int = -1  # of the gradient of p; -1: not asked for
    space: int = -1  # where the result goes
    dest: int = 0
    splits: int = 1  # parts that the rows are summed in
    child: int = 0  # whose gradient this is
    start: int = -1  # of the rows of each of the operand's rows
    order: int = -1  # of the rows in that order; -1: they are in it


class Operand(NamedTuple):
    """A frame whose rows a node reads, and where its gradient goes."""

    base: int = 0  # of the frame in BUF
    ids: int = -1  # of the list of rows (in a matrix of indices the column); -1: row i
    div: int = 1  # on a grid: row (i // div) % mod, for i below launch.MOST
    mod: int = 0  # 0: row i
    space: int = -1
    dest: int = 0


FIELDS = tl.constexpr(16)

# How a node turns its product into a message.
DOT = tl.constexpr(0)  # p W on tensor cores
SUM = tl.constexpr(1)  # one column: sum over k of p[:, k] W[k]
PRODUCT = tl.constexpr(2)  # p itself

NOWHERE = tl.constexpr(-1)
WEIGHTS = tl.constexpr(0)
FRAMES = tl.constexpr(1)
PARTS = tl.constexpr(2)

_FIRST = tl.constexpr(Job._fields.index("first"))
ROWS = tl.constexpr(Job._fields.index("rows"))
WIDTH = tl.constexpr(Job._fields.index("k"))
COLUMNS = tl.constexpr(Job._fields.index("n"))
WEIGHT = tl.constexpr(Job._fields.index("weight"))
OUT = tl.constexpr(Job._fields.index("out"))
OPERANDS = tl.constexpr(Job._fields.index("operands"))
COUNT = tl.constexpr(Job._fields.index("count"))
DP = tl.constexpr(Job._fields.index("dp"))
SPACE = tl.constexpr(Job._fields.index("space"))
DEST = tl.constexpr(Job._fields.index("dest"))
SPLITS = tl.constexpr(Job._fields.index("splits"))
CHILD = tl.constexpr(Job._fields.index("child"))
START = tl.constexpr(Job._fields.index("start"))
ORDER = tl.constexpr(Job._fields.index("order"))

_BASE = tl.constexpr(Operand._fields.index("base"))
_IDS = tl.constexpr(Operand._fields.index("ids"))
DIV = tl.constexpr(Operand._fields.index("div"))
MOD = tl.constexpr(Operand._fields.index("mod"))
CHILD_SPACE = tl.constexpr(Operand._fields.index("space"))
CHILD_DEST = tl.constexpr(Operand._fields.index("dest"))


@triton.jit
def job_of(TABLE, WORK):
    """This program's job, and which of the job's programs it is."""
    pid = tl.program_id(0)
    job = TABLE + tl.load(WORK + pid).to(tl.int64) * FIELDS
    return job, pid - tl.load(job + _FIRST).to(tl.int32)


@triton.jit
def node_of(TABLE, WORK, ALIGN_K: tl.constexpr, ALIGN_N: tl.constexpr):
    """``(job, tile, rows, K, N, out, operands, count)`` of this program's node. Widths and offsets
    that are known to be multiples of 16 are said to be: accesses become wide."""
    job, tile = job_of(TABLE, WORK)
    K, N = tl.load(job + WIDTH).to(tl.int32), tl.load(job + COLUMNS).to(tl.int32)
    out = tl.load(job + OUT)
    if ALIGN_K:
        K = tl.multiple_of(K, 16)
    if ALIGN_N:
        N = tl.multiple_of(N, 16)
        out = tl.multiple_of(out, 16)
    operands = TABLE + tl.load(job + OPERANDS) * FIELDS
    return job, tile, tl.load(job + ROWS), K, N, out, operands, tl.load(job + COUNT).to(tl.int32)


@triton.jit
def place_of(
    operand, IDS, ids_row, ids_mode, i, live, K, GRID: tl.constexpr, ALIGNED: tl.constexpr
):
    """Offsets in BUF of the rows ``row_c(i)`` of an operand."""
    base = tl.load(operand + _BASE)
    if ALIGNED:
        base = tl.multiple_of(base, 16)
    if GRID:
        div, mod = tl.load(operand + DIV).to(tl.int32), tl.load(operand + MOD).to(tl.int32)
        rows = ((i.to(tl.int32) // div) % tl.maximum(mod, 1)).to(tl.int64)
        rows = tl.where(mod > 0, rows, i)
    else:
        ids = tl.load(operand + _IDS)
        # A mask where a number's condition holds. (The interpreter's & of the two gives no mask.)
        listed = tl.where(ids >= 0, live, False)
        ids = tl.load(IDS + ids * ids_mode + i * ids_row, mask=listed, other=0).to(tl.int64)
        rows = tl.where(listed, ids, i)
    return base + rows * K


@triton.jit
def places_of(
    operands, IDS, ids_row, ids_mode, i, live, K,
    COUNT: tl.constexpr, GRID: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """:func:`place_of` for each of ``COUNT`` operands."""
    places = ()
    for c in tl.static_range(COUNT):
        operand = operands + c * FIELDS
        place = place_of(operand, IDS, ids_row, ids_mode, i, live, K, GRID, ALIGNED)
        places = places + (place,)  # noqa: RUF005
    return places


@triton.jit
def product(BUF, places, k, mask, SKIP: tl.constexpr, COUNT: tl.constexpr, like):
    """``p[i, k]`` for ``COUNT`` operands without the one called ``SKIP``, in the dtype and shape of
    ``like``."""
    p = tl.full(like.shape, 1.0, like.dtype)
    for c in tl.static_range(COUNT):
        if c != SKIP:
            factor = tl.load(BUF + places[c][:, None] + k[None, :], mask=mask, other=0.0)
            p *= factor.to(like.dtype)
    return p


@triton.jit
def others(
    BUF, operands, count, skip, IDS, ids_row, ids_mode, i, live, k, K, mask, like,
    GRID: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """As :func:`product`, for any number of operands; ``skip`` may be known at run time alone."""
    p = tl.full(like.shape, 1.0, like.dtype)
    for c in range(count):
        if c != skip:
            operand = operands + c * FIELDS
            place = place_of(operand, IDS, ids_row, ids_mode, i, live, K, GRID, ALIGNED)
            factor = tl.load(BUF + place[:, None] + k[None, :], mask=mask, other=0.0)
            p *= factor.to(like.dtype)
    return p


@triton.jit
def put(WEIGHTS_OUT, FRAMES_OUT, PARTS_OUT, space, at, value, mask):
    """Stores a result in the buffer it goes to, in that one's dtype."""
    if space == WEIGHTS:
        tl.store(WEIGHTS_OUT + at, cast(value, WEIGHTS_OUT.dtype.element_ty), mask=mask)
    elif space == FRAMES:
        tl.store(FRAMES_OUT + at, cast(value, FRAMES_OUT.dtype.element_ty), mask=mask)
    elif space == PARTS:
        tl.store(PARTS_OUT + at, value, mask=mask)
