"""Tensors as long tables: columns of indices and one of values, in ``.csv`` and ``.parquet``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from htflearn.complete.entries import LARGEST_TENSOR, Entries, Predict
from htflearn.complete.files import TABLES, Write, existing
from htflearn.errors import UserError, reason
from htflearn.files import check_fits
from htflearn.options import shown

__all__ = ["LARGEST_GRID", "TableSource"]

LARGEST_GRID = 5_000_000
"""``every`` writes at most that many rows."""

_LEAST_BYTES = 4  # of a cell, in memory

# An index column of integers is one of positions unless almost all positions would be empty.
_SPARSE = 100


@dataclass
class TableSource:
    """A long table. Use :meth:`open`.

    Attributes:
        table: a pyarrow table, as in the file.
        columns: names of the index columns.
        value: name of the value column.
        positions: ``[rows, N]`` int64.
        known: ``[rows]``, whether a row has a value.
        labels: for each mode a pyarrow array that tells the label of a position, or None where
            positions are the labels.
    """

    path: Path
    table: Any
    columns: list[str]
    value: str
    positions: np.ndarray
    known: np.ndarray
    labels: list[Any]
    entries: Entries
    every: bool
    kind: str = "table"
    default_smoothness: float = 0.0

    @classmethod
    def open(
        cls,
        path: Path,
        index_columns: Sequence[str] | None = None,
        value_column: str | None = None,
        dims: Sequence[int] | None = None,
        labels: Sequence[str] = (),
        every: bool = False,
    ) -> TableSource:
        """Reads a table.

        Args:
            path: ``.csv`` with a line of names, or ``.parquet``.
            index_columns: one for each mode; by default all but the value column.
            value_column: by default the last. A row without a value is one to predict.
            dims: sizes of the modes; by default the largest index and one more, or the number of
                different labels.
            labels: index columns whose integers are labels, not positions. Columns that are not
                of integers always are.
            every: the result has a row for every cell of the tensor, not for those of the table.

        Returns:
            the source. Where a cell has several values their mean counts, and a note says so.

        Raises:
            UserError: the file cannot be read as a table, a column is missing, a cell is no number
                or no index, or the tensor has too many cells to write them all.
        """
        table = _read(path)
        value, columns = _columns(table, path, index_columns, value_column)
        unknown = [name for name in labels if name not in columns]
        if unknown:
            raise UserError(
                f"--labels names {unknown[0]!r}, which is not an index column of {path}"
            )
        if dims is not None and len(dims) != len(columns):
            raise UserError(
                f"--dims expects {len(columns)} sizes, one for each of the index columns "
                f"{', '.join(columns)}, got {len(dims)}"
            )
        values, integer = _values(table, value, path)
        modes = [
            _positions(table, name, path, None if dims is None else dims[n], name in labels)
            for n, name in enumerate(columns)
        ]
        sizes = tuple(size for _, size, _ in modes)
        if prod(sizes) >= LARGEST_TENSOR:
            raise UserError(
                f"expected a tensor of fewer than 2**62 entries, but {path} makes the shape "
                f"{list(sizes)}"
            )
        positions = np.stack([p for p, _, _ in modes], axis=1)
        known = ~np.isnan(values)
        if every and prod(sizes) > LARGEST_GRID:
            raise UserError(
                f"--all would write {prod(sizes):,} rows, more than {LARGEST_GRID:,}; without it "
                "the rows of the table that have no value are predicted"
            )
        indices, means, notes = _merge(positions[known], values[known], sizes)
        bounded = integer and len(means) > 0
        entries = Entries(
            dims=sizes,
            indices=indices,
            values=means,
            names=tuple(columns),
            whole=len(columns),
            neighbours=tuple(n for n, (_, _, names) in enumerate(modes) if names is None),
            integer=integer,
            low=float(values[known].min()) if bounded else None,
            high=float(values[known].max()) if bounded else None,
            notes=notes,
        )
        names = [names for _, _, names in modes]
        return cls(path, table, columns, value, positions, known, names, entries, every)

    @property
    def asked(self) -> int:
        """Number of cells that the table asks for and gives no value of."""
        if self.every:
            return prod(self.entries.dims) - len(self.entries.values)
        return int((~self.known).sum())

    def notes(self, path: Path) -> tuple[str, ...]:
        """See :class:`htflearn.complete.files.Source`."""
        return ()

    def check_format(self, path: Path) -> None:
        """Raises a UserError where ``path`` does not end as a table."""
        if path.suffix.lower() not in TABLES:
            raise UserError(f"expected an output ending in {', '.join(TABLES)}, got {path.name}")

    def completed(self, predict: Predict, smooth: bool) -> Any:
        """The rows of the table (with ``every`` all cells, by index) with values everywhere.

        Known values stay, rows of one cell keep their own; a row without a value whose cell is
        known by another row gets that one's.
        """
        import pyarrow as pa

        entries, dims = self.entries, self.entries.dims
        flat = np.ravel_multi_index(tuple(entries.indices.T), dims)
        by_cell = np.argsort(flat)
        if self.every:
            places = np.stack(np.unravel_index(np.arange(prod(dims)), dims), axis=1)
        else:
            places = self.positions
        values = np.full(len(places), np.nan)
        if not smooth:
            wanted = np.ravel_multi_index(tuple(places.T), dims)
            at = np.searchsorted(flat, wanted, sorter=by_cell).clip(max=max(len(flat) - 1, 0))
            found = flat[by_cell[at]] == wanted
            values[found] = entries.values[by_cell[at[found]]]
            if not self.every:
                own = self.known & found  # neither missing nor hidden
                column = _as_numpy(self.table[self.value])
                values[own] = column[own]
        unknown = np.isnan(values)
        if unknown.any():
            values[unknown] = predict(places[unknown].astype(np.int64))
        kind = self.table.schema.field(self.value).type
        column = pa.array(values).cast(kind if _numeric(kind) else pa.float64(), safe=False)
        if not self.every:
            place = self.table.schema.get_field_index(self.value)
            return self.table.set_column(place, self.value, column)
        made: dict[str, Any] = {}
        for n, name in enumerate(self.columns):
            made[name] = pa.array(places[:, n])
            if self.labels[n] is not None:
                made[name] = self.labels[n].take(made[name])
        return pa.table({**made, self.value: column})

    def writer(self, path: Path, predict: Predict, smooth: bool) -> Write:
        """See :class:`htflearn.complete.files.Source`."""
        result = self.completed(predict, smooth)

        def write(to: Path) -> None:
            import pyarrow as pa
            from pyarrow import parquet

            try:
                if path.suffix.lower() == ".csv":
                    _write_csv(result, to)
                else:
                    parquet.write_table(result, to)
            except pa.ArrowException as error:
                raise ValueError(reason(error)) from error

        return write


def _write_csv(table: Any, to: Path) -> None:
    """With quotes where a cell needs them; pyarrow's own choice is all text or none."""
    import csv as lines

    import pyarrow as pa
    from pyarrow import csv

    with open(to, "w", newline="") as file:
        lines.writer(file, lineterminator="\n").writerow(table.column_names)
    for style in ("none", "needed"):
        options = csv.WriteOptions(include_header=False, quoting_style=style)
        with open(to, "ab") as file:
            header = file.tell()
            try:
                csv.write_csv(table, file, options)
                return
            except pa.ArrowInvalid:
                if style == "needed":
                    raise
                file.truncate(header)


def _read(path: Path) -> Any:
    import pyarrow as pa
    from pyarrow import csv, parquet

    existing(path)
    try:
        if path.suffix.lower() == ".parquet":
            told = parquet.read_metadata(path)
            # A value that is repeated takes no room in the file.
            check_fits(told.num_rows * told.num_columns * _LEAST_BYTES, str(path))
            table = parquet.read_table(path)
        else:
            table = csv.read_csv(path)
        names = table.column_names
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a table: {reason(error)}") from error
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"expected columns of different names, but {path} has {twice!r} twice")
    if path.suffix.lower() == ".csv" and all(_NUMBER.fullmatch(name.strip()) for name in names):
        raise UserError(
            f"expected the names of the columns in the first line of {path}, got only numbers"
        )
    if not table.num_rows:
        raise UserError(f"{path} holds no rows")
    return table


_NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?")


def _columns(
    table: Any, path: Path, index: Sequence[str] | None, value: str | None
) -> tuple[str, list[str]]:
    names = table.column_names
    listed = ", ".join(names)
    chosen = names[-1] if value is None else value
    if chosen not in names:
        raise UserError(f"{path} has no column {chosen!r}, only {listed}")
    columns = [name for name in names if name != chosen] if index is None else list(index)
    for name in columns:
        if name not in names:
            raise UserError(f"{path} has no column {name!r}, only {listed}")
    if chosen in columns:
        raise UserError(f"the column {chosen!r} cannot be an index and the value of {path}")
    if len(set(columns)) < len(columns):
        raise UserError(f"--index-columns names a column twice: {', '.join(columns)}")
    if not columns:
        raise UserError(f"expected columns of indices and one of values in {path}, got {listed}")
    return chosen, columns


def _numeric(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _as_numpy(column: Any) -> np.ndarray:
    import pyarrow as pa

    return np.asarray(column.cast(pa.float64(), safe=False).to_numpy())


def _values(table: Any, name: str, path: Path) -> tuple[np.ndarray, bool]:
    """The values, NaN where there is none, and whether they are whole numbers."""
    import pyarrow as pa
    from pyarrow import csv

    column = table[name]
    kind = column.type
    if pa.types.is_dictionary(kind):
        column = column.cast(kind.value_type)
        kind = column.type
    if pa.types.is_null(kind):
        return np.full(table.num_rows, np.nan), False
    if pa.types.is_decimal(kind):
        return np.asarray(column.cast(pa.float64()).to_numpy()), False
    if not _numeric(kind):
        empty = {None, *csv.ConvertOptions().null_values}
        for row, cell in enumerate(column.to_pylist() if pa.types.is_string(kind) else []):
            if cell not in empty and not _NUMBER.fullmatch(cell.strip()):
                raise UserError(
                    f"expected numbers in the value column {name!r} of {path}, got {shown(cell)} "
                    f"in row {row + 1}"
                )
        raise UserError(f"expected numbers in the value column {name!r} of {path}, got {kind}")
    return _as_numpy(column), bool(pa.types.is_integer(kind))


def _positions(
    table: Any, name: str, path: Path, size: int | None, labelled: bool
) -> tuple[np.ndarray, int, Any]:
    """Positions ``[rows]``, the mode's size, and its labels (None: the positions are)."""
    import pyarrow as pa
    import pyarrow.compute as pc

    column = table[name]
    if column.null_count:
        row = int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
        raise UserError(
            f"expected an index in every row, but the column {name!r} of {path} is empty in row "
            f"{row + 1}"
        )
    kind = column.type
    if pa.types.is_floating(kind) or pa.types.is_nested(kind):
        raise UserError(
            f"expected integers or labels in the index column {name!r} of {path}, got {kind}"
        )
    if pa.types.is_integer(kind) and not labelled:
        return (*_integers(np.asarray(column.to_numpy()), name, path, size), None)
    if pa.types.is_dictionary(kind):
        column = column.cast(kind.value_type)
    different = pc.unique(column).sort()
    if size is not None and size != len(different):
        raise UserError(
            f"--dims says {size} for the column {name!r} of {path}, which has {len(different)} "
            "different labels"
        )
    positions = pc.index_in(column, different).to_numpy(zero_copy_only=False)
    return np.asarray(positions, np.int64), len(different), different


def _integers(
    column: np.ndarray, name: str, path: Path, size: int | None
) -> tuple[np.ndarray, int]:
    low, high = int(column.min()), int(column.max())
    if low < 0:
        row = int(np.flatnonzero(column == low)[0]) + 1
        raise UserError(
            f"expected indices from 0, but the column {name!r} of {path} has {low} in row {row}"
        )
    if size is not None:
        if high >= size:
            row = int(np.flatnonzero(column == high)[0]) + 1
            raise UserError(
                f"the column {name!r} of {path} has the index {high} in row {row}, out of range "
                f"for its size of {size} (indices begin at 0)"
            )
        return column.astype(np.int64), size
    different = len(np.unique(column))
    if high + 1 > _SPARSE * different:
        raise UserError(
            f"the column {name!r} of {path} has indices up to {high}, but only {different} "
            f"different ones; give --labels {name} if they are names, or --dims"
        )
    return column.astype(np.int64), high + 1


def _merge(
    positions: np.ndarray, values: np.ndarray, dims: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Each cell once, with the mean of its values."""
    cells, first, owner, counts = np.unique(
        np.ravel_multi_index(tuple(positions.T), dims) if len(positions) else np.zeros(0, np.int64),
        return_index=True,
        return_inverse=True,
        return_counts=True,
    )
    if len(cells) == len(values):
        return positions, values, ()
    means = np.bincount(owner, weights=values, minlength=len(cells)) / counts
    repeated = int((counts > 1).sum())
    note = f"{repeated:,} cells have several values; the model learned their mean"
    return positions[first], means, (note,)
