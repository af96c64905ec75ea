"""``htf complete`` from the file to the results."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import htfkernels as hk
from htflearn.complete.arrays import ArraySource
from htflearn.complete.entries import Entries
from htflearn.complete.files import (
    ARRAYS,
    TABLES,
    Source,
    check_outputs,
    existing,
    rehearse,
    write_file,
)
from htflearn.complete.fit import Fitted, Settings, fit, make_cp, make_htf, prepare
from htflearn.complete.images import ImageSource, image_suffixes
from htflearn.complete.quantize import LONG, Split, factors_of, parse_factors
from htflearn.complete.report import make_report, picture_writer, report_writer
from htflearn.complete.tables import TableSource
from htflearn.complete.trees import LARGEST_MODEL, make_ranks, make_tree
from htflearn.errors import Extras, UserError, out_of_memory, usable_device
from htflearn.options import not_negative, positive, shown, whole_numbers

__all__ = ["Options", "Outputs", "complete"]

_BUDGET = 250_000
_PATCHES = "auto,8"
# A CP over many short modes needs thousands of components for its number of parameters, and a
# minute for a step.
_LARGEST_SPLIT_CP = 256
_OPTIMIZERS, _LOSSES = ("adam", "rmsprop", "sgd"), ("l2", "l1", "huber")
_DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class Options:
    """What the command line says; the names are those of its options. Text is parsed here.

    Attributes:
        quantize: True: prime factors; False: no mode is split; None: pictures in blocks of 8 x 8.
        factors: explicit ones, see :func:`htflearn.complete.quantize.parse_factors`.
        every: ``--all``.
    """

    key: str | None = None
    mask: Path | None = None
    missing: float | None = None
    index_columns: str | None = None
    value_column: str | None = None
    labels: str | None = None
    dims: str | None = None
    every: bool = False
    hide: float | None = None
    tree: str = "auto"
    ranks: str | None = None
    quantize: bool | None = None
    factors: str | None = None
    smoothness: float | None = None
    smooth_modes: str | None = None
    held_out: float = 0.1
    iterations: int = 800
    max_seconds: float = 110.0
    lr: float = 0.03
    optimizer: str = "adam"
    loss: str = "l2"
    weight_decay: float | None = None
    init_std: float | None = None
    batch_size: int | None = None
    dtype: str = "float32"
    device: str = "cpu"
    seed: int = 0
    out: Path | None = None
    smooth: bool = False
    force: bool = False
    progress: bool = True


@dataclass(frozen=True)
class Outputs:
    """What a run made.

    Attributes:
        result: the completed tensor.
        report: JSON.
        picture: panels side by side, where the input is a picture.
        numbers: what ``report`` holds.
    """

    result: Path
    report: Path
    picture: Path | None
    numbers: dict[str, Any] = field(default_factory=dict)


def complete(file: Path, options: Options) -> Outputs:
    """Completes the tensor of a file and writes the results.

    Everything that can be wrong with the input is found before the training begins. The completed
    tensor is written as soon as it is there; what it is compared with, the report and the picture
    come after it.

    Args:
        file: an array, a table or a picture.
        options: the rest.

    Raises:
        UserError: whatever the user can put right, in a sentence.
        Incomplete: the completed tensor is written, and some of the rest could not be made. Its
            ``made`` are the outputs.
    """
    began = time.monotonic()
    settings = _settings(options)
    source = _open(file, options)
    source.entries = _entries(source, options)
    entries = source.entries
    split = _split(source, options)
    tree = make_tree(options.tree, split)
    entries.check_enough(split.shape)
    problem = prepare(entries, options.held_out, options.seed + 1)
    budget = min(2 * len(problem.train), max(_BUDGET, 8 * sum(split.shape)))
    ranks = make_ranks(options.ranks, tree, split.shape, budget)
    layout = hk.Layout.make(tree, split.shape, ranks, root="sum")
    if layout.num_parameters > LARGEST_MODEL:
        raise UserError(
            f"--ranks makes a model of {layout.num_parameters:,} weights, more than "
            f"{LARGEST_MODEL:,}"
        )
    if options.smoothness is None:
        settings = replace(settings, smoothness=source.default_smoothness)
    paths = _outputs(source, options)
    written = [p for p in (paths.result, paths.report, paths.picture) if p is not None]
    check_outputs(written, source.path, options.force)

    rehearse(paths.result, source.writer(paths.result, problem.mean_everywhere, options.smooth))

    htf = ("HTF", split, lambda: make_htf(tree, split.shape, ranks, settings))
    baselines = _baselines(tree, split, layout.num_parameters, settings)
    training, left = time.monotonic(), 1 + len(baselines)

    def trained(name: str, shape: Split, make: Callable[[], hk.HTF]) -> Fitted:
        nonlocal left
        seconds = options.max_seconds - (time.monotonic() - training)
        share, left = seconds / left, left - 1
        return _fit(name, problem, shape, make, replace(settings, max_seconds=share))

    fitted, numbers, extras = [trained(*htf)], dict[str, Any](), Extras()
    write_file(
        paths.result, source.writer(paths.result, fitted[0].predict, options.smooth), options.force
    )
    if options.force:  # what is there tells of an earlier result
        for path in written[1:]:
            path.unlink(missing_ok=True)
    try:
        for name, shape, make in baselines:
            with extras.making(f"the comparison with {name}"):
                fitted.append(trained(name, shape, make))
        with extras.making("the report"):
            numbers = make_report(
                source, paths.result, options, problem, fitted, len(baselines), began, extras
            )
            write_file(paths.report, report_writer(numbers), options.force)
        if paths.picture is not None and isinstance(source, ImageSource):
            with extras.making("the picture"):
                drawn = picture_writer(source, fitted[0], options.smooth)
                write_file(paths.picture, drawn, options.force)
    except KeyboardInterrupt:
        print(f"the completed tensor is in {paths.result}", file=sys.stderr)
        raise
    made = replace(paths, numbers=numbers)
    extras.done(made)
    return made


def _settings(options: Options) -> Settings:
    for name, value in (
        ("iterations", options.iterations),
        ("max-seconds", options.max_seconds),
        ("lr", options.lr),
        ("batch-size", options.batch_size),
        ("init-std", options.init_std),
    ):
        positive(name, value)
    for name, value in (
        ("weight-decay", options.weight_decay),
        ("smoothness", options.smoothness),
    ):
        not_negative(name, value)
    for name, word, words in (
        ("optimizer", options.optimizer, _OPTIMIZERS),
        ("loss", options.loss, _LOSSES),
        ("dtype", options.dtype, tuple(_DTYPES)),
    ):
        if word not in words:
            raise UserError(f"--{name} expects one of {', '.join(words)}, got {word!r}")
    if not 0 <= options.seed < 2**32:
        raise UserError(f"--seed expects a number from 0 to 2**32 - 1, got {options.seed}")
    return Settings(
        iterations=options.iterations,
        lr=options.lr,
        optimizer=options.optimizer,
        loss=options.loss,
        weight_decay=options.weight_decay,
        init_std=options.init_std,
        dtype=_DTYPES[options.dtype],
        device=usable_device(options.device),
        batch_size=options.batch_size,
        seed=options.seed,
        progress=options.progress,
    )


def _open(file: Path, options: Options) -> Source:
    existing(file)
    suffix = file.suffix.lower()
    kind = "array" if suffix in ARRAYS else "table" if suffix in TABLES else "image"
    if kind == "image" and suffix not in image_suffixes():
        raise UserError(
            f"expected a file ending in {', '.join((*ARRAYS, *TABLES))} or a picture such as .png, "
            f"got {file.name}"
        )
    for name, value, kinds in (
        ("key", options.key, ("array",)),
        ("missing", options.missing, ("array",)),
        ("mask", options.mask, ("array", "image")),
        ("index-columns", options.index_columns, ("table",)),
        ("value-column", options.value_column, ("table",)),
        ("labels", options.labels, ("table",)),
        ("dims", options.dims, ("table",)),
        ("all", options.every or None, ("table",)),
    ):
        if value is not None and kind not in kinds:
            raise UserError(f"--{name} is for {' and '.join(kinds)} files, and {file} is {kind}")
    if kind == "array":
        return ArraySource.open(file, options.key, options.mask, options.missing)
    if kind == "image":
        return ImageSource.open(file, options.mask)
    return TableSource.open(
        file,
        _names(options.index_columns),
        options.value_column,
        None if options.dims is None else _numbers("dims", options.dims),
        _names(options.labels) or (),
        options.every,
    )


def _entries(source: Source, options: Options) -> Entries:
    entries = source.entries.checked()
    if options.hide is not None:
        entries = entries.hide(options.hide, options.seed).checked()
    asked = source.asked + len(entries.hidden_values)
    if not asked and not options.smooth:
        hint = "give --all" if source.kind == "table" else "missing entries are NaN, or by --mask"
        hint = "missing pixels are transparent, or by --mask" if source.kind == "image" else hint
        raise UserError(
            f"nothing is missing in {source.path} ({hint}); --hide 0.5 hides half for a "
            "demonstration"
        )
    if options.smooth_modes is None:
        return entries
    order = len(entries.dims)
    modes = whole_numbers(options.smooth_modes, order - 1)
    if modes is None:
        raise UserError(
            f"--smooth-modes expects modes from 0 to {order - 1} such as 0,1, got "
            f"{shown(options.smooth_modes)}"
        )
    return replace(entries, neighbours=tuple(sorted(set(modes))))


def _split(source: Source, options: Options) -> Split:
    dims = source.entries.dims
    whole = Split(dims, tuple((d,) for d in dims))
    if options.quantize is False:
        if options.factors is not None:
            raise UserError("--factors splits modes, --no-quantize does not: give one of them")
        return whole
    if options.factors is not None:
        return parse_factors(options.factors, dims)
    if options.quantize:
        if max(dims) < LONG:
            raise UserError(
                f"--quantize splits modes of length {LONG} or more, the shape is {list(dims)}"
            )
        return Split(dims, tuple(factors_of(d) if d >= LONG else (d,) for d in dims))
    return parse_factors(_PATCHES, dims) if source.kind == "image" else whole


def _baselines(
    tree: hk.ModeTree, split: Split, parameters: int, settings: Settings
) -> list[tuple[str, Split, Callable[[], hk.HTF]]]:
    """CP with as many parameters, on the tensor as it is; where modes are split, on those too. None
    where the HTF is that CP: on a flat tree, such as every tree over two modes."""
    whole = Split(split.dims, tuple((d,) for d in split.dims))
    components = max(1, round(parameters / sum(whole.dims)))
    models = []
    flat = tree == hk.ModeTree.flat(tree.order)
    if len(whole.dims) > 1 and not (flat and split.is_trivial):
        models.append(("CP", whole, lambda: make_cp(whole.dims, components, settings)))
    if not split.is_trivial:
        of_split = max(1, round(parameters / sum(split.shape)))
        if of_split <= _LARGEST_SPLIT_CP and not flat:
            models.append(
                ("CP, split modes", split, lambda: make_cp(split.shape, of_split, settings))
            )
    return models


def _fit(
    name: str, problem: Any, split: Split, make: Callable[[], hk.HTF], settings: Settings
) -> Fitted:
    try:
        return fit(name, problem, split, make, settings)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise UserError(
            f"not enough memory to train {name} on the shape {list(split.shape)}; try smaller "
            "--ranks"
        ) from error


def _outputs(source: Source, options: Options) -> Outputs:
    path = source.path
    result = options.out or path.with_name(f"{path.stem}-completed{path.suffix}")
    source.check_format(result)
    report = result.with_suffix(".json")
    panels = result.with_name(f"{result.stem}-panels.png")
    return Outputs(result, report, panels if source.kind == "image" else None)


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",")]


def _numbers(option: str, text: str) -> Sequence[int]:
    numbers = whole_numbers(text)
    if numbers is None or not all(numbers):
        raise UserError(
            f"--{option} expects positive whole numbers such as 10,20,5, got {shown(text)}"
        )
    return numbers
