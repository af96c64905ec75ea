"""Models of a layout, and dense matricizations to hold them against."""

from __future__ import annotations

import math

import torch

import htfkernels as hk


def module(layout, dtype=torch.float64, seed=0):
    """A model of a layout, with random weights."""
    torch.manual_seed(seed)
    ranks = dict(zip(layout.tree.interior, layout.ranks, strict=True))
    return hk.HTF(
        layout.tree,
        layout.mode_dims,
        ranks,
        layout.out_features,
        layout.root,
        layout.share_weights,
        dtype=dtype,
    )


class At(torch.nn.Module):
    """Entries of a model's end tensor, as a module."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, indices):
        return self.model.at(indices)


def of_one_vector(function, tensors):
    """A function of several tensors as one of a vector, and that vector: finite differences in a
    random direction then take one evaluation for all of them."""
    sizes = [t.numel() for t in tensors]

    def run(vector):
        parts = vector.split(sizes)
        return function(*(p.view(t.shape) for p, t in zip(parts, tensors, strict=True)))

    return run, torch.cat([t.detach().flatten() for t in tensors]).requires_grad_()


def matricization(tensor, modes):
    """Rows the modes, in their order; columns all others and the outputs."""
    rest = [n for n in range(tensor.dim()) if n not in modes]
    rows = math.prod(tensor.shape[n] for n in modes)
    return tensor.permute(*modes, *rest).reshape(rows, -1)


def dense(tensor, modes):
    """Singular values of the matricization."""
    return torch.linalg.svdvals(matricization(tensor, modes))
