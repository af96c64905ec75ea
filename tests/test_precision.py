"""How float32 products are asked to be rounded on a GPU."""

from __future__ import annotations

import pytest
import torch

import htfkernels as hk
from htfkernels.runtime.precision import PRECISIONS, float32_precision


@pytest.fixture(autouse=True)
def torchs_default(monkeypatch):
    monkeypatch.delenv("HTF_PRECISION", raising=False)
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize(
    ("setting", "expected"), [("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")]
)
def test_torchs_own_setting_is_followed(setting, expected):
    torch.set_float32_matmul_precision(setting)
    assert float32_precision() == expected
    with hk.use_precision("tf32x3"):
        assert float32_precision() == "tf32x3"
        with hk.use_precision("auto"):
            assert float32_precision() == expected


@pytest.mark.parametrize("name", PRECISIONS)
def test_it_is_in_force_in_the_block_and_no_longer(name):
    with pytest.raises(KeyError), hk.use_precision(name):
        assert float32_precision() == name
        raise KeyError
    assert float32_precision() == "ieee"


def test_environment(monkeypatch):
    monkeypatch.setenv("HTF_PRECISION", "tf32")
    assert float32_precision() == "tf32"
    with hk.use_precision("ieee"):
        assert float32_precision() == "ieee"
    monkeypatch.setenv("HTF_PRECISION", "fp8")
    with pytest.raises(ValueError, match=r"HTF_PRECISION: expected one of ieee, .*auto, got 'fp8'"):
        float32_precision()


def test_unknown_names():
    with (
        pytest.raises(ValueError, match=r"use_precision: expected one of .*auto, got 'float'"),
        hk.use_precision("float"),
    ):
        pass
