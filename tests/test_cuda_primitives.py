"""What CUDA kernels are written with gives the same products on a GPU and emulated."""

from __future__ import annotations

import pytest
import torch

from htfkernels.runtime import cuda_module as module

ON = module.device_type()
REASON = module.why_not(ON)
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
if ON == "cuda":
    pytestmark = [pytestmark, pytest.mark.gpu]

TF32, BF16, F64 = range(3)


def rounded(x, which):
    """Operands as the instructions read them."""
    if which == TF32:
        bits = x.view(torch.int32) + 0x1000
        return (bits & ~0x1FFF).view(torch.float32).double()
    return x.to(torch.bfloat16).double() if which == BF16 else x


@pytest.mark.parametrize("which", [TF32, BF16, F64])
@pytest.mark.parametrize("shape", [(64, 64, 64), (5, 17, 33), (1, 1, 1), (16, 64, 7)])
def test_products(which, shape):
    m, n, k = shape
    dtype = torch.float64 if which == F64 else torch.float32
    a, b = torch.randn(m, k, dtype=dtype), torch.randn(k, n, dtype=dtype)
    out = module.call("primitives", a.to(ON), b.to(ON), which).cpu()
    exact = rounded(a, which) @ rounded(b, which)
    # The exact products are summed in float32, or float64.
    allowed = k * torch.finfo(dtype).eps * (a.double().abs() @ b.double().abs())
    assert ((out - exact).abs() <= allowed + 1e-300).all()


@pytest.mark.parametrize("which", [TF32, BF16])
@pytest.mark.parametrize("sign", [1, -1])
def test_sums_of_tensor_cores_are_cut_off(which, sign):
    """1 + 3/4 of a unit in the last place: additions would give the number above."""
    a = torch.tensor([[1.0, 0.75]])
    b = torch.tensor([[1.0], [2.0**-23]]) * sign
    assert float(module.call("primitives", a.to(ON), b.to(ON), which)) == sign


@pytest.mark.skipif(not module.emulated(), reason="there are two orders only in an emulation")
@pytest.mark.parametrize("which", [TF32, BF16, F64])
def test_the_order_of_threads_changes_nothing(which):
    from htfkernels import _C_emulated

    dtype = torch.float64 if which == F64 else torch.float32
    a, b = torch.randn(40, 50, dtype=dtype), torch.randn(50, 60, dtype=dtype)
    forward = module.call("primitives", a, b, which)
    _C_emulated.set_backward(True)
    try:
        backward = module.call("primitives", a, b, which)
    finally:
        _C_emulated.set_backward(False)
    assert torch.equal(forward, backward)


def test_bad_arguments():
    a = torch.randn(65, 3, device=ON)
    with pytest.raises(RuntimeError, match=r"primitives: a \[M, K\] and b .* got Float \[65, 3\]"):
        module.call("primitives", a, torch.randn(3, 3, device=ON), TF32)
