"""Rows of the table that the CUDA kernels of the spectra read (csrc/spectra/steps.cuh), and the
memory that they name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from htfkernels.runtime.cuda_module import shared_bytes

__all__ = [
    "FIELDS",
    "WIDEST",
    "Memory",
    "Side",
    "Steps",
    "TooWide",
    "check_width",
    "row_of",
    "widest",
]

WIDEST = 128
"""Rows and columns of what is decomposed, at most."""
_SHARED = 147 * 1024  # bytes, for a matrix of that size; half as wide, the least device has room

FIELDS = 16
"""Numbers of a row."""

_TRIANGLES, _GRAMS, _PRODUCTS = range(3)
_KEEP, _TRIANGLE, _IDENTITY = range(3)
_CHUNK = 128  # rows that a block takes in at a time
_MOST_PARTS = 16
_MOST_COLUMNS = 2048  # of factors that are not decomposed
_MOST_ROWS = 2**31 - 2**16  # of factors; kernels count them in 32 bits, a few chunks past the last


class TooWide(Exception):
    """There is no kernel for matrices of this size; the sentence says so."""


def widest() -> int:
    """Rows and columns of what is decomposed on this machine's GPUs, at most."""
    return WIDEST if shared_bytes() >= _SHARED else WIDEST // 2


def check_width(what: str, size: int, most: int | None = None) -> None:
    """
    Raises:
        TooWide: the size is above what there are kernels for.
    """
    most = widest() if most is None else most
    if size > most:
        raise TooWide(f"cuda takes {what} up to {most}, and this layout has {size}")


@dataclass(frozen=True)
class Side:
    """Where a frame or an environment is.

    Attributes:
        at: its first element in the memory.
        rows, columns: its shape, row after row.
        exponents: its columns' first exponent.
        triangular: whether it has as many rows as columns, with zeros below the diagonal.
    """

    at: int
    rows: int
    columns: int
    exponents: int
    triangular: bool


@dataclass
class Memory:
    """What has been given out, in elements.

    What is not kept is over with its wave: other waves have theirs in its place, behind what is
    kept. Until it is known where that ends, such places count backwards from -2.
    """

    kept: int = 0
    exponents: int = 0
    scratch: int = 0  # of this wave
    most_scratch: int = 0

    def make(self, rows: int, columns: int, triangular: bool, kept: bool) -> Side:
        """Room for a factor."""
        check_width("factors with a number of columns", columns, _MOST_COLUMNS)
        check_width("factors with a number of rows", rows, _MOST_ROWS)
        at = self.kept if kept else -2 - self.scratch
        side = Side(at, rows, columns, self.exponents, triangular)
        if kept:
            self.kept += rows * columns
        else:
            self.scratch += rows * columns
            self.most_scratch = max(self.most_scratch, self.scratch)
        self.exponents += columns
        return side

    def settled(self, row: Sequence[int]) -> list[int]:
        """A row with its places in the whole memory."""
        places = (0, 3, 8)
        return [self.kept - 2 - x if i in places and x < -1 else x for i, x in enumerate(row)]


@dataclass(frozen=True)
class _Task:
    row: list[int]
    columns: int
    rows: int
    work: int  # chunks times strips of a triangle, 0 where there is none


@dataclass
class Steps:
    """The tasks of a wave, which depend on each other only in the order of their kinds.

    Attributes:
        memory: where results are put.
        gram: by Gram matrices, not by QR.
        downwards: products with weights come first.
    """

    memory: Memory
    gram: bool
    downwards: bool
    products: list[_Task] = field(default_factory=list)
    grams: list[_Task] = field(default_factory=list)
    khatri_raos: list[_Task] = field(default_factory=list)
    shrunk: list[_Task] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.memory.scratch = 0

    def launches(self, first: int, processors: int) -> tuple[list[int], list[list[int]]]:
        """The launches, and the rows that they begin at ``first`` with."""
        joined = [(_TRIANGLES, self.khatri_raos), (_GRAMS, self.grams)]
        weighed = [(_PRODUCTS, self.products), (_TRIANGLES, self.shrunk)]
        found: list[int] = []
        rows: list[list[int]] = []
        for kind, tasks in weighed + joined if self.downwards else joined + weighed:
            if not tasks:
                continue
            widest = max(t.columns for t in tasks)
            sized = [t for t in tasks if t.work > 0] if kind == _TRIANGLES else tasks
            most_columns = max((t.columns for t in sized), default=1)
            most_rows = max((t.rows for t in sized), default=1)
            parts = _parts(tasks, processors) if kind == _TRIANGLES else 1
            at = first + len(rows)
            found += [kind, at, len(tasks), parts, most_columns, most_rows, widest]
            rows += [t.row for t in tasks]
        return found, rows

    def khatri_rao(self, x: Side, y: Side, kept: bool, stored: bool = False) -> Side:
        """Two factors' product, shrunk to as many rows as columns where it has more, unless it is
        to be stored whole."""
        rows = x.rows * y.rows
        tall = rows > x.columns and not stored
        if not (tall and self.gram):
            return self._triangle(self.khatri_raos, x, y, tall, kept)
        check_width("Gram matrices with a number of columns", x.columns)
        out = self.memory.make(x.columns, x.columns, False, kept)
        self.grams.append(_Task(row_of(x, y, 0, out), x.columns, rows, 1))
        return out

    def shrink(self, x: Side, kept: bool) -> Side:
        """A factor of at most as many rows as columns. Square ones are made triangular too:
        products of such have structure."""
        square = x.rows == x.columns <= widest() and not self.gram
        return self._triangle(self.shrunk, x, None, square or x.rows > x.columns, kept)

    def _triangle(
        self, to: list[_Task], x: Side, y: Side | None, reduced: bool, kept: bool
    ) -> Side:
        rows, n = x.rows * (1 if y is None else y.rows), x.columns
        if reduced:
            check_width("QR decompositions with a number of columns", n)
        out = self.memory.make(n if reduced else rows, n, reduced, kept)
        row = row_of(x, y, _TRIANGLE if reduced else _KEEP, out)
        to.append(_Task(row, n, rows, _work(x, y) if reduced else 0))
        return out

    def multiply(self, x: Side | None, weight: int, shape: tuple[int, int], turned: bool) -> Side:
        """A factor, or the identity, through a weight of this shape, or through its transpose."""
        inner, n = reversed(shape) if turned else shape
        out = self.memory.make(inner if x is None else x.rows, n, False, kept=False)
        row = row_of(x, None, int(turned), out)
        row[12:14] = [weight, inner]
        self.products.append(_Task(row, n, 1 if x is None else inner, 0))
        return out

    def identity(self, columns: int) -> Side:
        """The outputs as columns of the root's matricization."""
        out = self.memory.make(columns, columns, not self.gram, kept=True)
        row = row_of(None, None, _IDENTITY, out)
        self.khatri_raos.append(_Task(row, columns, columns, 0))
        return out


def row_of(x: Side | None, y: Side | None, mode: int, out: Side) -> list[int]:
    """A row of the table, see SpectraTask; weight and inner are not set."""
    one = [-1, 1, 0]
    a = one if x is None else [x.at, x.rows, int(x.triangular)]
    b = one if y is None else [y.at, y.rows, int(y.triangular)]
    exponents = [-1 if s is None else s.exponents for s in (x, y, out)]
    return [*a, *b, out.columns, mode, out.at, *exponents, -1, out.columns, 0, 0]


def _work(x: Side, y: Side | None) -> int:
    """Strips that the chunks of a product have (of a plain matrix it is dense)."""
    n, strip = x.columns, 8
    rows = x.rows * (1 if y is None else y.rows)
    both = y is not None and x.triangular and y.triangular
    steps = -(-n // strip) * -(-rows // _CHUNK)
    return -(-steps // 3) if both else steps


def _parts(tasks: Sequence[_Task], processors: int) -> int:
    """Blocks for each task, where multiprocessors are idle otherwise: the time is that of its own
    strips and those of putting the triangles together. What is only scaled is shared by columns."""
    most = max(tasks, key=lambda t: t.work)
    allowed = min(_MOST_PARTS, max(1, 2 * processors // len(tasks)))
    if most.work == 0:
        return min(allowed, max(-(-t.columns // 32) for t in tasks))
    strips = -(-most.columns // 8)

    def time(parts: int) -> float:
        together = -(-((parts - 1) * most.columns) // _CHUNK) * strips
        return most.work / parts + together

    return min(range(1, allowed + 1), key=time)
