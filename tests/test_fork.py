"""Processes that are forked by one whose operators used threads."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

import htfkernels as hk

pytestmark = pytest.mark.skipif(
    not hasattr(os, "fork") or hk.backends()["cpp"] is not None, reason="no fork, or no cpp"
)

_FORKS = """
import json, os, signal, sys, warnings
import torch
import htfkernels as hk
from torch.utils.data import DataLoader, Dataset

torch.set_num_threads(2)
model = hk.HTF(hk.ModeTree.balanced(16), 8, 64).requires_grad_(False)
x = torch.randn(512, 16, 8)
expected = model(x)  # OpenMP has its threads now

def forked(prepare):
    seen, told = os.pipe()
    if os.fork() == 0:
        signal.alarm(20)  # instead of waiting for ever
        prepare()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            right = torch.equal(model(x), expected) and torch.equal(model(x), expected)
        os.write(told, json.dumps([right, *(str(w.message) for w in caught)]).encode())
        os._exit(0)
    os.close(told)
    os.wait()
    return json.loads(os.read(seen, 4096) or "null")

class Samples(Dataset):
    def __len__(self):
        return 2
    def __getitem__(self, i):
        warnings.simplefilter("error")
        return model(x)

loaded = list(DataLoader(Samples(), num_workers=1, multiprocessing_context="fork", timeout=20))
print(json.dumps({
    "plain": forked(lambda: None),
    "one thread": forked(lambda: torch.set_num_threads(1)),
    "loader": all(torch.equal(each[0], expected) for each in loaded),
    "parent": torch.equal(model(x), expected),
}))
"""


def test_a_forked_process_computes_on_one_thread() -> None:
    run = subprocess.run([sys.executable, "-c", _FORKS], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    told = json.loads(run.stdout)
    right, *warnings = told["plain"]
    assert right and len(warnings) == 1
    assert "this process was forked" in warnings[0] and "set_num_threads(1)" in warnings[0]
    assert told["one thread"] == [True]
    assert told["loader"] and told["parent"]
