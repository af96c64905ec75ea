"""Trains in a child process that is killed again and again, and says what was left each time.

A program of its own: ``python kill_driver.py DIRECTORY SEED``. It forks, so it starts no threads.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from htflearn import (
    GroupRMSprop,
    TrainConfig,
    Trainer,
    completion,
    load_checkpoint,
    load_model,
    make_target,
    matrix_factorization,
)
from htflearn.trackers import SingularValues


def train(out: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    task = completion(make_target("matrix", (6, 6), 2, 6.0, None, generator), 30, 0.0, generator)
    model = matrix_factorization(6, 6, init_std=0.1)
    model.reset_parameters(generator)
    config = TrainConfig(150, batch_size=8, log_every=5, checkpoint_every=4)
    optimizer = GroupRMSprop(model.parameters())
    Trainer(model, task, optimizer, config, [SingularValues()], out, False).fit(resume=True)


def killed_after(out: Path, seconds: float) -> bool:
    """Whether the child was still at work when it was killed."""
    child = os.fork()
    if child == 0:
        train(out)
        os._exit(0)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def main() -> None:
    torch.set_num_threads(1)
    root, choose = Path(sys.argv[1]), random.Random(int(sys.argv[2]))
    train(root / "warm")
    start = time.monotonic()
    train(root / "whole")
    whole = time.monotonic() - start  # of this machine: no child gets further than a fifth of it
    kills, iterations = 0, []
    while killed_after(root / "killed", choose.uniform(0.02, 0.2) * whole):
        kills += 1
        if (root / "killed" / "checkpoints" / "latest").exists():
            model = load_model(root / "killed")
            state = load_checkpoint(root / "killed", model, GroupRMSprop(model.parameters()))
            iterations.append(state["iteration"])
    print(json.dumps({"kills": kills, "iterations": iterations}))


if __name__ == "__main__":
    main()
