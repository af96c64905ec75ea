"""Pictures with missing pixels, as tensors ``[height, width]`` or ``[height, width, colours]``."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from htflearn.complete.arrays import read_mask
from htflearn.complete.entries import Entries, Predict
from htflearn.complete.files import Write, existing, missing_places
from htflearn.errors import UserError, reason

__all__ = ["ImageSource", "image_suffixes", "read_gray"]

_LOSSY = (".jpg", ".jpeg", ".webp")


def picture_errors() -> tuple[type[Exception], ...]:
    """What Pillow raises for a file that is no picture or a damaged one, or far too large."""
    from PIL import Image

    bombs = Image.DecompressionBombError, Image.DecompressionBombWarning
    return (*bombs, OSError, ValueError, SyntaxError, EOFError)


def image_formats() -> list[str]:
    """Formats that Pillow reads and writes by itself. PostScript is a program, which it hands to
    Ghostscript, whatever the file's name ends in."""
    from PIL import Image

    Image.init()
    return sorted((Image.OPEN.keys() & Image.SAVE.keys()) - {"EPS"})


def image_suffixes() -> set[str]:
    """Suffixes of the files of these formats."""
    from PIL import Image

    formats = image_formats()
    return {suffix for suffix, name in Image.registered_extensions().items() if name in formats}


@dataclass
class ImageSource:
    """A picture. Use :meth:`open`.

    Attributes:
        pixels: ``[height, width]`` or ``[height, width, colours]``, without alpha.
        known: ``[height, width]``, which pixels are known.
        alpha: ``[height, width]``, or None.
    """

    path: Path
    pixels: np.ndarray
    known: np.ndarray
    alpha: np.ndarray | None
    entries: Entries
    kind: str = "image"
    default_smoothness: float = 0.1

    @classmethod
    def open(cls, path: Path, mask: Path | None = None) -> ImageSource:
        """Reads a picture.

        Args:
            path: of any format Pillow reads and writes.
            mask: file of a boolean array ``[height, width]`` or a picture of that size (not black:
                known). Without it, fully transparent pixels are missing.

        Raises:
            UserError: the file cannot be read as a picture.
        """
        pixels, alpha = _read(path)
        if mask is not None:
            known = read_mask(mask, pixels.shape[:2])
        else:
            known = np.ones(pixels.shape[:2], bool) if alpha is None else alpha > 0
        whole_numbers = pixels.dtype.kind == "u"
        places = np.broadcast_to(known if pixels.ndim == 2 else known[..., None], pixels.shape)
        entries = Entries(
            dims=tuple(pixels.shape),
            indices=np.stack(np.nonzero(places), axis=1).astype(np.int64),
            values=pixels[places].astype(np.float64),
            names=("rows", "columns", "colours")[: pixels.ndim],
            whole=2,
            neighbours=(0, 1),
            integer=whole_numbers,
            low=0.0 if whole_numbers else None,
            high=float(np.iinfo(pixels.dtype).max) if whole_numbers else None,
        )
        return cls(path, pixels, known, alpha, entries)

    @property
    def asked(self) -> int:
        """Number of missing pixels."""
        return int((~self.known).sum())

    def check_format(self, path: Path) -> None:
        """Raises a UserError where Pillow writes no such file."""
        if path.suffix.lower() not in image_suffixes():
            raise UserError(f"expected an output that is a picture, such as .png, got {path.name}")
        if path.suffix.lower() in _LOSSY and (self.pixels.dtype != np.uint8):
            raise UserError(f"{path.suffix} holds 8 bits a colour, the picture has more; use .png")

    def completed(self, predict: Predict, smooth: bool) -> np.ndarray:
        """The pixels with predictions where they are missing or hidden (everywhere if smooth)."""
        known = np.zeros_like(self.known) if smooth else self.shown()
        places = np.broadcast_to(
            known if self.pixels.ndim == 2 else known[..., None], self.pixels.shape
        )
        result = self.pixels.copy()
        result[~places] = predict(missing_places(places)).astype(self.pixels.dtype)
        return result

    def shown(self) -> np.ndarray:
        """``[height, width]``: which pixels the model may see, those that are neither missing nor
        hidden."""
        known = self.known.copy()
        known[tuple(self.entries.hidden_indices[:, :2].T)] = False
        return known

    def writer(self, path: Path, predict: Predict, smooth: bool) -> Write:
        """See :class:`htflearn.complete.files.Source`. Pixels that were missing become opaque."""
        pixels = self.completed(predict, smooth)
        if self.alpha is not None and path.suffix.lower() not in (".jpg", ".jpeg", ".bmp", ".ppm"):
            opaque = np.where(self.known & (self.alpha > 0), self.alpha, 255).astype(np.uint8)
            colours = pixels if pixels.ndim == 3 else pixels[..., None]
            pixels = np.concatenate([colours, opaque[..., None]], axis=2)
        return lambda to: _save(to, pixels)

    def notes(self, path: Path) -> tuple[str, ...]:
        """See :class:`htflearn.complete.files.Source`."""
        if path.suffix.lower() in _LOSSY:
            return (
                f"{path.suffix} is lossy: known pixels change a little; --out with .png keeps them",
            )
        return ()


def _read(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Colours and alpha; palettes, bilevel and CMYK pictures become gray or RGB."""
    from PIL import Image, UnidentifiedImageError

    existing(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=image_formats()) as image:
                frames = getattr(image, "n_frames", 1)
                if frames > 1:
                    raise UserError(f"expected a single picture, but {path} holds {frames} frames")
                converted = _plain_mode(image)
                array = np.array(converted)
    except UserError:
        raise
    except UnidentifiedImageError as error:
        raise UserError(f"expected a picture, but {path} cannot be read as one") from error
    except picture_errors() as error:
        raise UserError(f"{path} cannot be read as a picture: {reason(error)}") from error
    if converted.mode in ("LA", "RGBA"):
        colours = array[..., :-1] if converted.mode == "RGBA" else array[..., 0]
        return np.ascontiguousarray(colours), array[..., -1]
    return array, None


def _plain_mode(image: Any) -> Any:
    if image.mode in ("L", "RGB", "LA", "RGBA", "F"):
        return image.copy()
    if image.mode.startswith("I"):
        return image.copy() if image.mode == "I;16" else image.convert("F")
    if image.mode in ("P", "PA") or "transparency" in image.info:
        return image.convert("RGBA" if "A" in image.mode or "transparency" in image.info else "RGB")
    return image.convert("L" if image.mode == "1" else "RGB")


def read_gray(path: Path) -> np.ndarray:
    """A picture as ``[height, width]`` gray values.

    Raises:
        UserError: the file cannot be read as a picture.
    """
    colours, _ = _read(path)
    return colours if colours.ndim == 2 else colours.max(axis=2)


def _save(to: Path, pixels: np.ndarray) -> None:
    from PIL import Image

    image = Image.fromarray(pixels)
    if to.suffix.lower() in _LOSSY:
        image.save(to, quality=95, subsampling=0)
    else:
        image.save(to)
