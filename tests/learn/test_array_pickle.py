"""Pickles of byte arrays: those of CIFAR are read, whatever else a pickle can say is refused."""

from __future__ import annotations

import pickle
import pickletools
import random
from typing import Any

import numpy as np
import pytest
from test_labelled import python2_batch

from htflearn.errors import UserError
from htflearn.locality.array_pickle import read_array_pickle

ROWS = np.arange(24, dtype=np.uint8).reshape(4, 6)
BATCH = {"labels": [0, 1, 2, 3], "data": ROWS, "rest": (1, 2.5, None, True, "é", b"abc")}

ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR"
BYTES = (
    b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
)
DAMAGED = (IndexError, KeyError, TypeError, ValueError)


def array(dtype: bytes, shape: bytes = b"K\x08\x85", content: bytes = b"A" * 8) -> bytes:
    """A pickle of an array, as Python 2 writes it."""
    size = len(content).to_bytes(4, "little")
    return b"\x80\x02" + ARRAY + b"(K\x01" + shape + dtype + b"\x89T" + size + content + b"tb."


def same(found: Any) -> bool:
    rest = {k: v for k, v in found.items() if k != "data"}
    data = found["data"]
    return (
        data.dtype == np.uint8
        and np.array_equal(data, ROWS)
        and rest == {k: v for k, v in BATCH.items() if k != "data"}
    )


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("place", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_what_pythons_write(order: Any, protocol: int, place: bytes) -> None:
    written = pickle.dumps({**BATCH, "data": np.array(ROWS, order=order)}, protocol)
    if protocol < 3:  # bytes are the result of a call there
        written = pickle.dumps({**BATCH, "rest": ()}, protocol)
        with pytest.raises(UserError, match=r"its pickle asks for _codecs\.encode"):
            read_array_pickle(written)
        return
    module = pickle.dumps(np.empty(0, np.uint8), 2).split(b"\n")[0][3:]
    if protocol == 3:  # in protocol 4 the length of the name stands before it
        written = written.replace(module, place)
    assert same(read_array_pickle(written))


def test_what_python_2_writes() -> None:
    rows = np.arange(2 * 3072).reshape(2, 3072).astype(np.uint8)
    found = read_array_pickle(python2_batch(rows, [3, 4], "labels"))
    assert np.array_equal(found["data"], rows) and found["labels"] == [3, 4]
    assert read_array_pickle(array(BYTES)).tolist() == [65] * 8


FIELDS = b"U\x01a\x85}U\x01acnumpy\ndtype\n(U\x02O8K\x00K\x01tRK\x00\x86s"
VOID = b"cnumpy\ndtype\n(U\x02V8K\x00K\x01tR(K\x03U\x01|N" + FIELDS + b"K\x08K\x01K\x00tb"
FLAGS = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNK\x08K\x01K\x3ftb"
HIDDEN = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|N" + FIELDS + b"K\x01K\x01K\x00tb"

REFUSED = {
    "a field of objects": array(VOID),
    "bytes with a field of objects": array(HIDDEN),
    "bytes with the flags of objects": array(FLAGS),
    "objects": array(b"cnumpy\ndtype\n(U\x02O8K\x00K\x01tR"),
    "another dtype": array(b"cnumpy\ndtype\n(U\x02f8K\x00K\x01tR"),
    "a call of another array's class": b"\x80\x02cnumpy\nndarray\n(K\x08\x85tR.",
    "a call of a system's function": b"\x80\x02cos\nsystem\n(U\x04exittR.",
    "a call of an attribute": b"\x80\x04\x8c\x05numpy\x8c\x11ndarray.__class__\x93.",
    "a state for a name": b"\x80\x02cnumpy\ndtype\nNb.",
    "a state for a list": b"\x80\x02]}b.",
    "an object of a class": b"\x80\x02cnumpy\ndtype\n)\x81.",
    "an instance": b"\x80\x02(inumpy\ndtype\n.",
    "a reference to elsewhere": b"\x80\x02U\x01aQ.",
    "an extension": b"\x80\x02\x82\x01.",
    "a set": pickle.dumps({1, 2}, 4),
    "numbers as text": pickle.dumps([1], 0),
    "a buffer": pickle.dumps(ROWS, 5),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_else_a_pickle_can_say(name: str) -> None:
    with pytest.raises(UserError, match=r"its pickle (asks for|has|makes)"):
        read_array_pickle(REFUSED[name])


TOO_DEEP = b"\x80\x02}(" + b")" + b"\x85" * 100_000 + b"K\x01u."

BROKEN = {
    "nothing": b"",
    "no end": b"\x80\x02}",
    "no value": b"\x80\x02.",
    "two values": b"\x80\x02NN.",
    "no mark": b"\x80\x02]K\x01e.",
    "nothing to take": b"\x80\x02\x87.",
    "nothing remembered": b"\x80\x02h\x05.",
    "half of a pair": b"\x80\x02}(K\x01u.",
    "a key that is a list": b"\x80\x02}]K\x01s.",
    "a key too deep to hash": TOO_DEEP,
    "too few bytes": array(BYTES, content=b"A" * 7),
    "no bytes": array(BYTES, b"K\x01\x85", b"").replace(b"T\0\0\0\0", b"N"),
    "a negative shape": array(BYTES, b"J\xf8\xff\xff\xff\x85"),
    "a shape of true": array(BYTES, b"K\x08\x88\x86"),
    "a shape without end": array(BYTES, b"(" + b"\x8a\xff" + b"\x7f" * 255 + b"2" * 9 + b"t"),
    "a string beyond the end": b"\x80\x02T\xff\xff\xff\x7fa.",
    "bytes beyond the end": b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f.",
}


@pytest.mark.parametrize("name", BROKEN)
def test_damaged(name: str) -> None:
    with pytest.raises((UserError, *DAMAGED)):
        read_array_pickle(BROKEN[name])


def test_a_list_within_itself_is_read() -> None:
    found = read_array_pickle(b"\x80\x02]q\x00h\x00a.")
    assert found[0] is found


def test_a_name_cannot_reach_the_terminal() -> None:
    with pytest.raises(UserError) as raised:
        read_array_pickle(b"\x80\x04\x8c\x04\x1b[2J\x8c\x01x\x93.")
    assert str(raised.value).isprintable()


def mutated(content: bytes, choose: random.Random) -> bytes:
    """With a few bytes changed, taken out, or put in; among these, whole operations."""
    pieces = [operation.code.encode("latin-1") for operation in pickletools.opcodes]
    pieces += [ARRAY, BYTES, VOID, HIDDEN, b"cos\nsystem\n", b"tR", b"tb", b"K\x3f", b"U\x01O"]
    changed = bytearray(content)
    for _ in range(choose.choice((1, 1, 2, 4))):
        place, kind = choose.randrange(len(changed)), choose.randrange(4)
        if kind == 0:
            changed[place] ^= 1 << choose.randrange(8)
        elif kind == 1:
            changed[place : place + choose.randrange(9)] = b""
        elif kind == 2:
            changed[place:place] = choose.choice(pieces)
        else:
            start = choose.randrange(len(content))
            changed[place:place] = content[start : start + choose.randrange(40)]
    return bytes(changed)


def test_mutations() -> None:
    """Whatever comes of it is a value of plain types, or an exception that is foreseen."""
    choose = random.Random(0)
    seeds = [array(BYTES), *(pickle.dumps(BATCH, protocol) for protocol in (3, 4))]
    arrays = 0
    for _ in range(1500):
        try:
            found = read_array_pickle(mutated(choose.choice(seeds), choose))
        except (UserError, *DAMAGED):
            continue
        data = found.get("data") if isinstance(found, dict) else found
        if isinstance(data, np.ndarray):
            assert data.dtype == np.uint8 and not data.flags.writeable
            arrays += 1
    assert arrays > 50
