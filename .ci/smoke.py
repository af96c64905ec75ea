"""What an installed package must be able to do: values, gradients, spectra, an index plan."""

import torch

import htfkernels as hk

torch.manual_seed(0)
tree = hk.ModeTree.balanced(4)
model = hk.HTF(tree, [5] * 4, 3)
vectors = [torch.randn(7, 5) for _ in range(4)]
indices = torch.randint(5, (60, 4))


def results(backend: str) -> list[torch.Tensor]:
    with hk.use_backend(backend):
        values = model(vectors)
        gradients = torch.autograd.grad(values.square().sum(), list(model.parameters()))
        planned = model.at(model.index_plan(indices))
        spectra = model.matricization_spectra()
    return [values, *gradients, planned, *spectra.values()]


for found, expected in zip(results("cpp"), results("reference"), strict=True):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
print("smoke: forward, backward, index plan and spectra agree with PyTorch's own operations")
