"""A machine on which kernels of a GPU run as far as `auto` can tell; whether they are right is a
table's to say."""

from __future__ import annotations

import torch

from htfkernels.runtime import dispatch, plan, verdicts
from htfkernels.runtime.dispatch import Spec
from htfkernels.runtime.verdicts import Place, Verdict
from htfkernels.verify import run as verify

SPEC = Spec("evaluate_at_planned", torch.float32, "cpu")  # which no estimate has a say in
GPU = Place("cpu", "Some GPU", "9.0", "580.1")
RIGHT = Verdict(None, 5, 1e-7, 1e-6, 0.1)
WRONG = Verdict("evaluate on primes, forward: the error is 1.0e-02 of the scale", 3, 1e-2, 1e-6)


class Machine:
    """One where the kernels of both GPU backends run on CPU tensors.

    Attributes:
        checks: the kernels that were checked, in order.
        verdicts: what checks find, by the kernels' names.
        places, versions: what verdicts depend on.
    """

    def __init__(self, monkeypatch):
        self.checks = []
        self.verdicts = {}
        self.places = [GPU]
        self.versions = {"torch": "2.13.0", "sources": "abc"}
        monkeypatch.setattr(verdicts, "places", lambda device: self.places)
        monkeypatch.setattr(verdicts, "_versions", lambda backend: self.versions)
        monkeypatch.setattr(verify, "check", self.check)
        monkeypatch.setattr(dispatch, "why_not", lambda backend, spec: None)

    def check(self, family, math, place):
        self.checks.append(f"{family} {math}")
        return self.verdicts.get(str(family), RIGHT)


def restart():
    """As another process."""
    verdicts.forget()
    plan.make_plan.cache_clear()


def failing(error):
    def raises(*args, **kwargs):
        raise error

    return raises
