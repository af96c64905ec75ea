"""Some cases of each family; and the runner, which has to survive what it finds."""

from __future__ import annotations

from importlib import import_module

import pytest
import run

CASES = 60


@pytest.mark.parametrize("family", run.FAMILIES)
def test_cases(family):
    case = import_module(f"fuzz_{family}").case
    for number in range(CASES):
        assert case(number)


def test_a_case_is_the_same_every_time():
    import fuzz_operators

    assert [fuzz_operators.case(n) for n in range(40)] == [
        fuzz_operators.case(n) for n in range(40)
    ]


BAD = """
import os, signal, time
def case(seed):
    if seed == 3: os.kill(os.getpid(), signal.SIGSEGV)
    if seed == 5: raise ValueError("wrong")
    if seed == 6: os._exit(7)
    if seed == 8: time.sleep(60)
    return "right"
"""


def test_crashes_and_hangs_are_findings(tmp_path, monkeypatch):
    (tmp_path / "fuzz_bad.py").write_text(BAD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(run, "HUNG", 4.0)
    found = run.run("bad", 0, 10, jobs=2)
    assert found.counts == {"right": 6} and found.cases == 10
    told = dict(found.failures)
    assert sorted(told) == [3, 5, 6, 8]
    assert "SIGSEGV" in told[3] and "ValueError: wrong" in told[5]
    assert "exit code 7" in told[6] and "did not end within 4 s" in told[8]


def test_stops_after_enough_failures(tmp_path, monkeypatch):
    (tmp_path / "fuzz_wrong.py").write_text("def case(seed): raise ValueError('wrong')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    found = run.run("wrong", 0, 1000, most_failures=5)
    assert 5 <= len(found.failures) < 1000
