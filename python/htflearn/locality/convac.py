"""Convolutional arithmetic circuits: images through a hierarchical tensor factorization."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

import htfkernels as hk
from htflearn.locality.separation import SeparationRank

__all__ = ["ACTIVATIONS", "PARTITIONS", "ConvAC", "far_first_tree"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "softplus": nn.functional.softplus,
    "sigmoid": torch.sigmoid,
    "none": lambda x: x,
}

# Whether the window at (row, column) of a grid of that many rows and columns is in region A.
PARTITIONS: dict[str, Callable[[int, int, int, int], bool]] = {
    "left/right": lambda row, column, rows, columns: column < columns // 2,
    "top/bottom": lambda row, column, rows, columns: row < rows // 2,
    "even/odd": lambda row, column, rows, columns: column % 2 == 0,
    "checkerboard": lambda row, column, rows, columns: (row + column) % 2 == 0,
}
"""Partitions of the windows into two regions, by name: ``"even/odd"`` are columns of windows."""


class ConvAC(nn.Module):
    """A deep convolutional network with product pooling, which is a HTF (Cohen & Shashua, 2016)::

        f(x) = HTF(r(x_1), ..., r(x_N)),   r(x_n) = (1, activation(K x_n + b))

    ``x_n`` are the windows of the image, side by side; each is represented by ``channels``
    functions, the first of them constant. A 1 x 1 convolution is a weight of the HTF, pooling a
    product over a node's children. The rank of its matricization with the windows of a region as
    rows is how strongly it couples the region to the rest.

    Products of hundreds of numbers stay in range only where all are near one. Initial weights make
    every message ``1 + epsilon``, small where a level has many nodes: leaves pass the constant
    function, interior nodes average. For images of mean 0 and variance 1.

    Args:
        image: (C, H, W), or (H, W) for one channel.
        window: side of the square windows, or (height, width); they must fill the image.
        channels: representation functions D, at least 2.
        ranks: as for :class:`htfkernels.HTF`.
        classes: outputs.
        shared: one weight for all nodes of a level, as a convolution has (blind to which child is
            which, as the product is); False: its own for each place.
        activation: one of :data:`ACTIVATIONS`, or a function of tensors.
        tree: merges the N windows (mode ``row * columns + column``); by default
            ``ModeTree.grid(rows, columns)``, pooling windows of 2 x 2.
        dtype, device: of the parameters.

    Raises:
        ValueError: windows that do not fill the image, another number of modes, or sizes, ranks or
            an activation that are not possible.

    Attributes:
        htf: the :class:`htfkernels.HTF`; its matricizations are those of the network.
        representation: the convolution ``K, b``.
        grid: rows and columns of windows.

    Example:
        >>> model = ConvAC((1, 28, 28), window=7, channels=8, ranks=[8, 32], classes=10)
        >>> model(torch.randn(32, 1, 28, 28)).shape
        torch.Size([32, 10])
    """

    def __init__(
        self,
        image: Sequence[int],
        window: int | tuple[int, int],
        channels: int,
        ranks: int | Sequence[int] | Mapping[hk.Node, int],
        classes: int,
        shared: bool = True,
        *,
        activation: str | Callable[[Tensor], Tensor] = "tanh",
        tree: hk.ModeTree | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.image = _image(image)
        self.window = (window, window) if isinstance(window, int) else window
        self.grid = _grid(self.image[1:], self.window)
        if channels < 2:
            raise ValueError(
                f"ConvAC: channels must be at least 2, the constant function among them, got "
                f"{channels}"
            )
        if isinstance(activation, str) and activation not in ACTIVATIONS:
            raise ValueError(
                f"ConvAC: activation must be one of {', '.join(ACTIVATIONS)} or a function, got "
                f"{activation!r}"
            )
        self.activation = activation
        rows, columns = self.grid
        tree = hk.ModeTree.grid(rows, columns) if tree is None else tree
        if tree.order != rows * columns:
            raise ValueError(
                f"ConvAC: the tree has {tree.order} modes, the image {rows} x {columns} windows"
            )
        self.representation = nn.Conv2d(
            self.image[0], channels - 1, self.window, self.window, dtype=dtype, device=device
        )
        self.htf = hk.HTF(
            tree, channels, ranks, classes, share_weights=shared, dtype=dtype, device=device
        )
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws new initial weights."""
        kernel, bias = self.representation.weight, self.representation.bias
        layout = self.htf.layout
        with torch.no_grad():
            kernel.normal_(0.0, kernel[0].numel() ** -0.5, generator=generator)
            if bias is not None:
                bias.zero_()
            for group, weight in zip(layout.groups, self.htf.weights, strict=True):
                root = layout.tree.root.index in group.nodes
                weight.normal_(0.0, (group.rows * len(group.nodes)) ** -0.5, generator=generator)
                if group.level == 0:
                    weight[:, 0] = 1.0
                elif not root:
                    # On messages that are all 1 exactly their mean: a deviation that depends on no
                    # image would be the same at all nodes that share the weight, and a power of it
                    # their product.
                    weight += 1.0 / group.rows - weight.mean(1, keepdim=True)

    def represent(self, images: Tensor) -> Tensor:
        """The representation functions of all windows.

        Args:
            images: ``[B, C, H, W]``.

        Returns:
            ``[B, N, D]``; the first of the D is 1.

        Raises:
            ValueError: images of another shape.
        """
        if images.shape[1:] != self.image:
            raise ValueError(
                f"ConvAC: images must be [B, {', '.join(map(str, self.image))}], got "
                f"{list(images.shape)}"
            )
        activation = self.activation
        activate = ACTIVATIONS[activation] if isinstance(activation, str) else activation
        learned = activate(self.representation(images)).flatten(2).transpose(1, 2)
        return torch.cat([torch.ones_like(learned[..., :1]), learned], -1)

    def forward(self, images: Tensor) -> Tensor:
        """Outputs ``[B, classes]`` for images ``[B, C, H, W]``; ``[B]`` for one class."""
        return self.htf(self.represent(images))

    def partition(self, region: str | Tensor | Iterable[int]) -> tuple[int, ...]:
        """The modes of a region.

        Args:
            region: one of :data:`PARTITIONS`, a mask ``[H, W]`` bool, or modes.

        Returns:
            the modes, ascending: not none, and not all.

        Raises:
            ValueError: no such name, a mask of another shape or kind or that cuts through a window,
                modes that are not there, or one side is empty.

        Example:
            >>> ConvAC((4, 4), 1, 2, 3, 2).partition("left/right")
            (0, 1, 4, 5, 8, 9, 12, 13)
        """
        rows, columns = self.grid
        if isinstance(region, str):
            if region not in PARTITIONS:
                raise ValueError(
                    f"ConvAC.partition: expected one of {', '.join(PARTITIONS)}, a mask or modes, "
                    f"got {region!r}"
                )
            inside = PARTITIONS[region]
            modes = [n for n in range(rows * columns) if inside(*divmod(n, columns), rows, columns)]
        elif isinstance(region, Tensor):
            modes = self._modes_of(region)
        else:
            modes = sorted(set(region))
        if not set(modes) <= set(range(rows * columns)) or not 0 < len(modes) < rows * columns:
            raise ValueError(
                f"ConvAC.partition: a region must have some but not all of the modes "
                f"0..{rows * columns - 1}, got {modes}"
            )
        return tuple(modes)

    def matricization_spectrum(
        self,
        region: str | Tensor | Iterable[int],
        output: int = 0,
        *,
        images: Tensor | None = None,
        method: str = "auto",
        max_cost: tuple[float, float] | float | None = None,
    ) -> Tensor:
        """Singular values of one output's tensor with the modes of a region as rows.

        Their number above zero is the separation rank of the output for independent representation
        functions. Their sizes depend on which functions represent a window; with ``images`` they do
        not: each leaf's weight is multiplied by a root of its window's Gram matrix ``mean r r^T``,
        and the singular values are those of ``f`` itself as an integral operator, for windows drawn
        independently of each other, each from those of the images.

        Args:
            region: as in :meth:`partition`.
            output: which class.
            images: ``[M, C, H, W]``, more than ``channels``; not differentiated through.
            method, max_cost: as in :func:`htfkernels.spectra.mode_sets.matricization_spectrum`.
                Interleaved regions of many windows are expensive: the message says how much.

        Returns:
            ``[S]`` float64, descending; differentiable once with respect to the HTF's weights.

        Raises:
            ValueError: no such region or output, images of another shape, or it costs more than
                allowed.

        Example:
            >>> model = ConvAC((4, 4), 1, 2, [3, 5], 2)
            >>> model.matricization_spectrum("left/right").shape
            torch.Size([5])
        """
        weights = self._weights(images)
        return self._spectrum(weights, self.partition(region), output, method, max_cost)

    def matricization_ranks(
        self,
        region: str | Tensor | Iterable[int],
        *,
        images: Tensor | None = None,
        method: str = "qr",
        max_cost: tuple[float, float] | float | None = None,
        rtol: float | None = None,
    ) -> SeparationRank:
        """Spectra and ranks of every output, see :meth:`matricization_spectrum`; no derivatives.

        Args:
            region, images, method, max_cost: as there.
            rtol: singular values above this fraction of the largest count; by default ``S eps`` of
                float64, and 1e-7 (its accuracy) unless ``method`` is ``"qr"``.

        Raises:
            ValueError: as there.

        Example:
            >>> model = ConvAC((4, 4), 1, 2, [3, 5], 2)
            >>> model.matricization_ranks("left/right").numerical_rank
            tensor([5, 5])
        """
        if rtol is None and method != "qr":
            rtol = 1e-7
        modes = self.partition(region)
        with torch.no_grad():
            weights = self._weights(images)
            outputs = range(self.htf.layout.out_features)
            spectra = [self._spectrum(weights, modes, k, method, max_cost) for k in outputs]
        return SeparationRank.of(torch.stack(spectra), rtol)

    def _modes_of(self, mask: Tensor) -> list[int]:
        if mask.dtype != torch.bool or mask.shape != self.image[1:]:
            raise ValueError(
                f"ConvAC.partition: a mask must be bool {list(self.image[1:])}, got {mask.dtype} "
                f"{list(mask.shape)}"
            )
        (rows, columns), (height, width) = self.grid, self.window
        windows = (
            mask.reshape(rows, height, columns, width).transpose(1, 2).flatten(2).flatten(0, 1)
        )
        if not torch.equal(windows.all(1), windows.any(1)):
            raise ValueError("ConvAC.partition: the mask cuts through a window")
        return windows.all(1).nonzero()[:, 0].tolist()

    def _weights(self, images: Tensor | None) -> dict[hk.Node, Tensor]:
        weights = {node: self.htf.node_weight(node).double() for node in self.htf.tree.nodes}
        if images is not None:
            with torch.no_grad():
                functions = self.represent(images).double() / len(images) ** 0.5
                roots = torch.linalg.qr(functions.transpose(0, 1), mode="r").R  # [N, D, D]
            for leaf, root in zip(self.htf.tree.leaves, roots, strict=True):
                weights[leaf] = root @ weights[leaf]
        return weights

    def _spectrum(
        self,
        weights: Mapping[hk.Node, Tensor],
        modes: tuple[int, ...],
        output: int,
        method: str,
        max_cost: tuple[float, float] | float | None,
    ) -> Tensor:
        outputs = self.htf.layout.out_features
        if not 0 <= output < outputs:
            raise ValueError(f"ConvAC: output must be in 0..{outputs - 1}, got {output}")
        tree = self.htf.tree
        one = {**weights, tree.root: weights[tree.root][:, output : output + 1]}
        return hk.spectra.matricization_spectrum(tree, one, modes, method, max_cost)

    def extra_repr(self) -> str:
        return f"image={self.image}, window={self.window}, grid={self.grid}"


def far_first_tree(rows: int, columns: int) -> hk.ModeTree:
    """A tree of a grid's cells that merges far-apart ones first: those half the grid away,
    horizontally, vertically and both; then again in the half that is left, to the end.

    Left and right halves meet in its lowest nodes, where :meth:`htfkernels.ModeTree.grid` lets
    neighbours meet: a :class:`ConvAC` on it is made for long-range dependence.

    Args:
        rows, columns: of the grid, with two cells or more.

    Raises:
        ValueError: fewer cells.

    Example:
        >>> [node.modes for node in far_first_tree(2, 4).levels[1]]
        [(0, 2, 4, 6), (1, 3, 5, 7)]
    """
    if rows < 1 or columns < 1 or rows * columns < 2:
        raise ValueError(f"far_first_tree: expected two cells or more, got {rows} x {columns}")
    parents: list[int] = []
    order, first = rows * columns, 0
    while rows * columns > 1:
        up, across = -(-rows // 2), -(-columns // 2)
        first += rows * columns
        parents += [
            first + (r % up) * across + c % across for r in range(rows) for c in range(columns)
        ]
        rows, columns = up, across
    return hk.ModeTree.from_parents(order, [*parents, -1])


def _image(image: Sequence[int]) -> tuple[int, int, int]:
    sizes = tuple(int(n) for n in image)
    if len(sizes) not in (2, 3) or min(sizes) < 1:
        raise ValueError(f"ConvAC: image must be (C, H, W) or (H, W), got {tuple(image)}")
    channels, height, width = (1, *sizes)[-3:]
    return channels, height, width


def _grid(size: tuple[int, ...], window: tuple[int, ...]) -> tuple[int, int]:
    if len(window) != 2 or min(window) < 1 or size[0] % window[0] or size[1] % window[1]:
        raise ValueError(
            f"ConvAC: windows must fill the image of {size[0]} x {size[1]} pixels, got the window "
            f"{window}"
        )
    rows, columns = size[0] // window[0], size[1] // window[1]
    if rows * columns < 2:
        raise ValueError(f"ConvAC: expected two windows or more, the window {window} is the image")
    return rows, columns
