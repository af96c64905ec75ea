"""Contact sheets: many small images with their labels in one picture."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from htflearn.errors import UserError
from htflearn.figures import FORMATS, save_figure

__all__ = ["contact_sheet"]

_DPI = 160
_BOX = "#E69F00"
_LETTER = 0.07  # inches that a letter of a label takes, on average

Box = tuple[float, float, float, float]


def contact_sheet(
    images: np.ndarray,
    labels: Sequence[int] | Sequence[str] | np.ndarray,
    path: str | os.PathLike[str],
    columns: int = 8,
    title: str = "",
    names: Sequence[str] | None = None,
    boxes: Sequence[Sequence[Box]] | None = None,
) -> None:
    """Draws images in a grid, each under its label.

    Args:
        images: uint8 ``[n, H, W]``, ``[n, 1, H, W]``, ``[n, 3, H, W]`` or ``[n, H, W, 3]``.
        labels: ``[n]``, or a text for each, of one or several lines.
        path: the file, replaced as a whole; its suffix is one of
            :data:`htflearn.figures.FORMATS`.
        columns: images in a row.
        title: above all of them.
        names: of the labels; without them the label itself is shown.
        boxes: for each image those to draw onto it, ``(top, left, bottom, right)`` in pixels.

    Raises:
        ValueError: the images are of another shape or dtype, or the numbers of images, labels and
            boxes differ.
        UserError: the suffix is another, or the file cannot be written.

    Example:
        >>> data = ShardedImages("data/train")
        >>> contact_sheet(data.images(range(16)), data.labels[:16], Path("sheet.png"), columns=4)
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    file = Path(path)
    if file.suffix.lower() not in FORMATS:
        raise UserError(f"expected a picture that ends in {', '.join(FORMATS)}, got {file.name}")
    pictures = _pictures(np.asarray(images))
    for what, given in (("labels", labels), ("boxes", boxes)):
        if given is not None and len(given) != len(pictures):
            raise ValueError(f"expected {len(pictures)} {what}, one an image, got {len(given)}")
    columns = max(1, min(columns, len(pictures)))
    rows = max(1, -(-len(pictures) // columns))
    height, width = pictures.shape[1:3]
    texts = [str(label) if names is None else names[int(label)] for label in labels]
    lines = [text.split("\n") for text in texts] or [[""]]
    longest = max(len(line) for text in lines for line in text)
    side = min(2.5, max(1.1, min(2.0, width / _DPI), _LETTER * longest))
    above = 0.08 + 0.14 * max(map(len, lines))
    figure = Figure(
        figsize=(columns * side, rows * (side * height / width + above) + 0.35 * bool(title)),
        dpi=_DPI,
        layout="constrained",
    )
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title, fontsize=10)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    for i, (axis, picture) in enumerate(zip(axes, pictures, strict=False)):
        axis.imshow(picture, cmap="gray", vmin=0, vmax=255)
        axis.set_title(texts[i], fontsize=8, pad=2)
        for top, left, bottom, right in () if boxes is None else boxes[i]:
            corner = (left - 0.5, top - 0.5)  # pixels are centred on whole numbers
            axis.add_patch(
                Rectangle(corner, right - left, bottom - top, fill=False, color=_BOX, linewidth=1)
            )
    try:
        save_figure(figure, file)
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror or error}") from error


def _pictures(images: np.ndarray) -> np.ndarray:
    """``[n, H, W]`` or ``[n, H, W, 3]``."""
    if images.dtype == np.uint8 and images.ndim == 3:
        return images
    if images.dtype == np.uint8 and images.ndim == 4:
        if images.shape[1] == 1:
            return images[:, 0]
        if images.shape[-1] == 3:
            return images
        if images.shape[1] == 3:
            return images.transpose(0, 2, 3, 1)
    raise ValueError(
        "expected uint8 images [n, H, W], [n, 1, H, W], [n, 3, H, W] or [n, H, W, 3], got "
        f"{images.dtype} of shape {images.shape}"
    )
