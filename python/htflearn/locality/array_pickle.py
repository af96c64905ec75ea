"""Pickles of byte arrays, strings, numbers and containers, read without being run.

A pickle is a program, and NumPy's part in it can be misled: the state of a ``dtype`` decides
whether bytes are taken for addresses. Here nothing that a file names is looked up or called. The
operations that such files are made of act on plain values, and an array is made of its shape and
its bytes.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np

from htflearn.errors import UserError

__all__ = ["read_array_pickle"]

_MOST_OPERATIONS = (
    10**7
)  # each makes an object of 100 bytes or so; CIFAR's largest file has 400,000
_MOST_DIMENSIONS = 8
_LONGEST_NAME = 80
_GLOBALS = {
    "numpy ndarray": "ndarray",
    "numpy dtype": "dtype",
    "numpy.core.multiarray _reconstruct": "_reconstruct",
    "numpy._core.multiarray _reconstruct": "_reconstruct",
}
# Of dtype("u1"): version, byte order, subarray, names, fields, size, alignment and flags.
_BYTE_STATE = (3, "|", None, None, None, -1, -1, 0)
_ELSE = "its pickle makes something else than arrays of bytes"


class _Global:
    """Stands for what a pickle names."""

    def __init__(self, name: str) -> None:
        self.name = name


class _Byte:
    """Stands for the dtype of bytes."""


class _Array:
    """Stands for an array that has no bytes yet."""


def read_array_pickle(content: bytes) -> Any:
    """The value in a pickle of dictionaries, lists, strings, numbers and NumPy's arrays of bytes,
    as Python 2 (protocol 2) and Python 3 (protocols 2 to 4) write it.

    Args:
        content: of the file. Strings of Python 2 are taken for latin-1.

    Returns:
        the value; its arrays are uint8 and read-only.

    Raises:
        UserError: the pickle asks for something else.
        IndexError, KeyError, TypeError, ValueError: it is damaged.

    Example:
        >>> import pickle
        >>> read_array_pickle(pickle.dumps({"labels": [1, 2]}, protocol=2))
        {'labels': [1, 2]}
    """
    reader = _Reader()
    for count, (operation, argument, _) in enumerate(pickletools.genops(content)):
        if operation.name == "STOP":
            (value,) = reader.stack
            return value
        if operation.name not in _STEPS:
            raise UserError(f"its pickle has the operation {operation.name}")
        if count > _MOST_OPERATIONS:
            raise UserError(f"its pickle has more than {_MOST_OPERATIONS:,} operations")
        _STEPS[operation.name](reader, argument)
    raise ValueError("it has no end")


class _Reader:
    """The stack and the memo of a pickle."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self, count: int) -> list[Any]:
        if count > len(self.stack):
            raise IndexError("there is nothing on the stack")
        return self._above(len(self.stack) - count)

    def pop_marked(self) -> list[Any]:
        return self._above(self.marks.pop())

    def _above(self, start: int) -> list[Any]:
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def mark(self) -> None:
        self.marks.append(len(self.stack))

    def memorize(self, key: int) -> None:
        self.memo[key] = self.stack[-1]

    def recall(self, key: int) -> None:
        self.push(self.memo[key])

    def extend(self, values: list[Any]) -> None:
        self._container(list).extend(values)

    def update(self, values: list[Any]) -> None:
        for key, value in zip(values[::2], values[1::2], strict=True):
            if type(key) not in (str, bytes, int):  # the hash of a deep tuple overflows the stack
                raise TypeError(f"expected a key, got {type(key).__name__}")
            self._container(dict)[key] = value

    def _container(self, kind: type) -> Any:
        found = self.stack[-1]
        if type(found) is not kind:
            raise TypeError(f"expected a {kind.__name__}, got {type(found).__name__}")
        return found

    def find(self, name: str) -> None:
        if name not in _GLOBALS:
            asked = ascii(name.replace(" ", "."))[1:-1][:_LONGEST_NAME]
            raise UserError(f"its pickle asks for {asked}, but only arrays are expected")
        self.push(_Global(_GLOBALS[name]))

    def call(self) -> None:
        function, arguments = self.pop(2)
        name = function.name if isinstance(function, _Global) else ""
        first = arguments[0] if type(arguments) is tuple and arguments else None
        if name == "_reconstruct" and isinstance(first, _Global) and first.name == "ndarray":
            self.push(_Array())
        elif name == "dtype" and first in ("u1", b"u1"):
            self.push(_Byte())
        else:
            raise UserError(_ELSE)

    def build(self) -> None:
        built, state = self.pop(2)
        if isinstance(built, _Byte) and state == _BYTE_STATE:
            self.push(built)
        elif isinstance(built, _Array) and type(state) is tuple:
            self.push(_array(*state))
        else:
            raise UserError(_ELSE)


def _array(version: Any, shape: Any, dtype: Any, fortran: Any, data: Any) -> np.ndarray:
    if version != 1 or not isinstance(dtype, _Byte):
        raise UserError(_ELSE)
    if type(shape) is not tuple or len(shape) > _MOST_DIMENSIONS:
        raise TypeError("expected the shape of an array")
    if not all(type(d) is int and d >= 0 for d in shape):
        raise TypeError("expected the shape of an array")
    content = data.encode("latin-1") if isinstance(data, str) else data
    if type(content) is not bytes or len(content) != prod(shape):
        raise ValueError(f"expected the bytes of an array of shape {list(shape)}")
    return np.frombuffer(content, np.uint8).reshape(shape, order="F" if fortran else "C")


_STEPS: dict[str, Callable[[_Reader, Any], None]] = {
    "PROTO": lambda reader, version: None,
    "FRAME": lambda reader, size: None,
    "NONE": lambda reader, _: reader.push(None),
    "NEWTRUE": lambda reader, _: reader.push(True),
    "NEWFALSE": lambda reader, _: reader.push(False),
    **dict.fromkeys(
        (
            "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT",
            "SHORT_BINSTRING", "BINSTRING", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8",
            "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8",
        ),
        _Reader.push,
    ),
    "EMPTY_LIST": lambda reader, _: reader.push([]),
    "EMPTY_DICT": lambda reader, _: reader.push({}),
    "EMPTY_TUPLE": lambda reader, _: reader.push(()),
    "TUPLE1": lambda reader, _: reader.push(tuple(reader.pop(1))),
    "TUPLE2": lambda reader, _: reader.push(tuple(reader.pop(2))),
    "TUPLE3": lambda reader, _: reader.push(tuple(reader.pop(3))),
    "TUPLE": lambda reader, _: reader.push(tuple(reader.pop_marked())),
    "MARK": lambda reader, _: reader.mark(),
    "APPEND": lambda reader, _: reader.extend(reader.pop(1)),
    "APPENDS": lambda reader, _: reader.extend(reader.pop_marked()),
    "SETITEM": lambda reader, _: reader.update(reader.pop(2)),
    "SETITEMS": lambda reader, _: reader.update(reader.pop_marked()),
    "BINPUT": _Reader.memorize,
    "LONG_BINPUT": _Reader.memorize,
    "MEMOIZE": lambda reader, _: reader.memorize(len(reader.memo)),
    "BINGET": _Reader.recall,
    "LONG_BINGET": _Reader.recall,
    "GLOBAL": _Reader.find,
    "STACK_GLOBAL": lambda reader, _: reader.find(" ".join(reader.pop(2))),
    "REDUCE": lambda reader, _: reader.call(),
    "BUILD": lambda reader, _: reader.build(),
}  # fmt: skip
"""Name in :mod:`pickletools` -> what it does. Others are refused."""
