"""``htf locality``: a grid of trainings from the settings to the figure."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from htflearn.checkpoint import load_checkpoint
from htflearn.errors import Extras, UserError, reason, writable_directory
from htflearn.files import read_object, replace_file
from htflearn.locality.accuracy_figure import draw_accuracy
from htflearn.locality.data import load, make_pictures
from htflearn.locality.follow import Follower
from htflearn.locality.launch import check_engine, cores, launch
from htflearn.locality.patches import FixedPatches, Patch
from htflearn.locality.processes import Processes, joined, only_one
from htflearn.locality.profile import LocalityProfile, locality_profile
from htflearn.locality.profile_figure import draw_profiles
from htflearn.locality.setting import DISTANCE, TITLES, Case, Setting, network_names
from htflearn.locality.sheets import contact_sheet
from htflearn.locality.training import METRICS, RESULT, inputs, make_network, train
from htflearn.options import positive, usable_threads
from htflearn.progress import Progress

__all__ = ["How", "Outcome", "run_grid"]

_REGULARIZED_WEIGHT = 6.0  # a step with the regularizer in plain steps, for the time left
_PROFILE_IMAGES = 128
_PROFILE_PIXELS = 2**18  # of all replaced patches' images together, for one image, on a CPU
_SHEET_COLUMNS = 4
_MOST_WORKERS = 1024
_ERROR = "error.txt"
# What tells that a folder holds a grid.
_LEFT = ("settings.json", "results.jsonl", "accuracy.png", "profile.png", "profile.json")
_MEASURES = ("epochs", "distance", "coefficient", "seed", "test_accuracy", "train_accuracy")


@dataclass(frozen=True)
class How:
    """Where and with how many workers a grid is trained; none of it changes the numbers, but for
    the rounding of other devices and numbers of threads.

    Attributes:
        device: ``"cpu"``, ``"cuda"`` or ``"auto"``.
        workers: trainings at once; None: one for each GPU, or for each core.
        threads: of each training on a CPU; None shares the cores out.
        engine, options: see :func:`htflearn.locality.launch.launch`.
        progress: shows how far the grid is.
        data_only: makes the data and the sheet of samples, and trains nothing.
    """

    device: str = "auto"
    workers: int | None = None
    threads: int | None = None
    engine: str = "joblib"
    options: Mapping[str, Any] = field(default_factory=dict)
    progress: bool = True
    data_only: bool = False

    def check(self) -> None:
        """Everything that can be wrong before anything is written.

        Raises:
            UserError: a number is not positive, or the engine cannot be used.
        """
        positive("workers", self.workers, _MOST_WORKERS)
        usable_threads(self.threads)
        check_engine(self.engine, self.options)


@dataclass(frozen=True)
class Outcome:
    """What a grid came to.

    Attributes:
        results: of each training that is done, see :func:`htflearn.locality.training.train`.
        failed: name -> the error, of each that is not.
        files: what was written.
    """

    results: list[dict[str, Any]]
    failed: dict[str, str]
    files: list[Path]


def run_grid(setting: Setting, out: Path, how: How, resume: bool = False) -> Outcome:
    """Trains a grid and draws accuracy against distance.

    Args:
        setting: of the grid.
        out: folder; ``runs/NAME`` holds each training, ``results.jsonl`` and ``accuracy.png`` the
            outcome, ``profile.png`` how far the networks of the largest distance see, ``sheet.png``
            some samples, ``data`` the pictures of Pathfinder.
        how: devices and workers.
        resume: goes on with what an earlier call in the same folder has left. Distances,
            coefficients, seeds and epochs may be more than they were then.

    Raises:
        UserError: a setting or an option is out of its range, the data cannot be read, the folder
            holds a grid already (without ``resume``) or one of other settings. All of this is seen
            before anything is trained.
        Incomplete: the trainings are done, and a figure could not be made. Its ``made`` is the
            outcome.
    """
    setting.check()
    how.check()
    device = _device(how.device)
    with joined(device) as (processes, place):
        if processes.count > 1:
            return _together(setting, out, how, resume, processes, place)
        return _alone(setting, out, how, resume, device)


def _alone(setting: Setting, out: Path, how: How, resume: bool, device: str) -> Outcome:
    cases = list(setting.cases())
    _refuse_another(setting, out, resume)
    if setting.task == "isc":  # what is wrong with the images is seen before anything is written
        _check_data(setting, out)
    _prepare(setting, out, how)
    if how.data_only:
        return _data_only(setting, out)
    todo = [case for case in cases if not _done(setting, out, case)]
    workers, threads = _workers(how, device, max(1, len(todo)))
    gpus = torch.cuda.device_count()
    places = [f"cuda:{i}" for i in range(gpus)] if device == "cuda" else [device]
    jobs = [(setting, case, out, places[i % len(places)]) for i, case in enumerate(todo)]
    failed: dict[str, str] = {}
    weights = {_folder(out, case): (setting.epochs, _weight(setting, case)) for case in todo}
    with Follower(setting.task, weights, how.progress):
        answers = launch(_train_one, jobs, how.engine, workers, threads, how.options, out / "jobs")
        for number, answer in answers:
            if isinstance(answer, Exception):
                failed[todo[number].name] = f"{answer}" or type(answer).__name__
            else:
                _write_results(setting, out, cases)
    return _written(setting, out, cases, failed, device)


def _together(
    setting: Setting, out: Path, how: How, resume: bool, processes: Processes, place: str
) -> Outcome:
    """All processes train one network after another."""
    if setting.batch % processes.count or setting.batch // processes.count < 2:
        raise UserError(
            f"--batch must be a multiple of the {processes.count} processes, with two samples for "
            f"each at least, got {setting.batch}"
        )
    cases = list(setting.cases())
    if how.threads is not None:
        torch.set_num_threads(how.threads)
    if processes.first:
        _refuse_another(setting, out, resume)
    if setting.task == "isc":
        _check_data(setting, out)
    if processes.first:
        _prepare(setting, out, how)
    processes.wait()
    if how.data_only:
        return _data_only(setting, out) if processes.first else Outcome([], {}, [])
    todo = [case for case in cases if not _done(setting, out, case)]
    processes.wait()  # until all have looked
    weights = {_folder(out, case): (setting.epochs, _weight(setting, case)) for case in todo}
    with Follower(setting.task, weights, how.progress and processes.first):
        for case in todo:
            data = load(setting, case, out / "data")
            with only_one(_folder(out, case)) if processes.first else nullcontext():
                train(setting, case, data, _folder(out, case), place, processes)
            if processes.first:
                _write_results(setting, out, cases)
            processes.wait()
    return _written(setting, out, cases, {}, place) if processes.first else Outcome([], {}, [])


def _train_one(setting: Setting, case: Case, out: Path, device: str) -> dict[str, Any]:
    data = load(setting, case, out / "data")
    folder = _folder(out, case)
    with only_one(folder):
        try:
            return train(setting, case, data, folder, device)
        except UserError:
            raise
        except Exception as error:
            # The process that started this one gets the exception alone, not where it was raised.
            text = f"{type(error).__name__}: {error}"
            with suppress(OSError):  # it may be the disk that is full
                replace_file(folder / _ERROR, traceback.format_exc())
                text += f" (see {folder / _ERROR})"
            raise RuntimeError(text) from error


def _data_only(setting: Setting, out: Path) -> Outcome:
    data = [out / "data"] if setting.task == "pathfinder" else []
    return Outcome([], {}, [*data, out / "sheet.png"])


def _check_data(setting: Setting, out: Path) -> None:
    for distance in setting.distances:
        load(setting, Case(distance, 0.0, 0), out / "data")


def _refuse_another(setting: Setting, out: Path, resume: bool) -> None:
    """A grid is not written over, and not gone on with in another setting."""
    path = out / "settings.json"
    left = [out / name for name in _LEFT if os.path.lexists(out / name)]
    left += out.glob(f"runs/*/{METRICS}")
    found = left[0].relative_to(out) if left else None
    if found is not None and not resume:
        raise UserError(
            f"{out} holds a grid already ({found}): --resume goes on with it, another --out leaves "
            "it alone"
        )
    if path.exists():
        _check_same(setting, path)
    elif found is not None:
        raise UserError(
            f"{out} holds {found}, but no {path.name} that says of what: choose another --out"
        )


def _prepare(setting: Setting, out: Path, how: How) -> None:
    """The folder, what it says it holds, the pictures of Pathfinder, some samples to look at."""
    writable_directory(out)
    replace_file(out / "settings.json", json.dumps(setting.to_dict(), indent=1) + "\n")
    if setting.task == "pathfinder":
        _make_pictures(setting, out, how)
    _draw_sheet(setting, out)


def _make_pictures(setting: Setting, out: Path, how: How) -> None:
    bars: dict[str, Progress] = {}

    def report(title: str, done: int, count: int) -> None:
        if title not in bars:
            bars[title] = Progress(count, done, title, how.progress, "pictures").__enter__()
        bars[title].update(done)
        if done == count:
            bars[title].__exit__(None, None, None)

    make_pictures(setting, out / "data", how.workers or cores(), report)


def _check_same(setting: Setting, path: Path) -> None:
    """A grid goes on with the settings it began with, but for how much of it there is."""
    before = read_object(path)
    free = {"distances", "coefficients", "seeds", "epochs", "smoke"}
    for name, value in setting.to_dict().items():
        if name not in free and before.get(name) != value:
            raise UserError(
                f"the grid in {path.parent} has {name} {before.get(name)}, not {value}: "
                "resume it with the same settings, or choose another --out"
            )


def _draw_sheet(setting: Setting, out: Path) -> None:
    images: list[torch.Tensor] = []
    labels: list[str] = []
    boxes: list[list[Patch]] = []
    for distance in setting.distances:
        data = load(setting, Case(distance, 0.0, setting.seeds[0]), out / "data")
        rows = torch.arange(min(_SHEET_COLUMNS, len(data.train)))
        images.append(data.train.batch(rows))
        apart = f"{distance} pixels apart" if setting.task == "isc" else f"{distance} dashes"
        labels += [f"{apart}, {words}" for words in data.train.describe(rows)]
        fixed = data.sampler.pairs[0] if isinstance(data.sampler, FixedPatches) else ()
        boxes += [list(fixed)] * len(rows)
    contact_sheet(
        torch.cat(images).numpy(),
        labels,
        out / "sheet.png",
        _SHEET_COLUMNS,
        f"{TITLES[setting.task]}: samples",
        boxes=boxes,
    )


def _done(setting: Setting, out: Path, case: Case) -> bool:
    result = _result(out, case)
    return result is not None and result["epochs"] >= setting.epochs


def _result(out: Path, case: Case) -> dict[str, Any] | None:
    path = _folder(out, case) / RESULT
    try:
        result = read_object(path)
    except FileNotFoundError:
        return None
    missing = [k for k in _MEASURES if not isinstance(result.get(k), int | float)]
    if missing or not isinstance(result.get("change"), int | float | None):
        raise UserError(f"{path} is damaged: it has no {(*missing, 'change')[0]}")
    return result


def _write_results(setting: Setting, out: Path, cases: Sequence[Case]) -> list[dict[str, Any]]:
    results = [r for case in cases if (r := _result(out, case)) is not None]
    try:
        replace_file(out / "results.jsonl", "".join(json.dumps(r) + "\n" for r in results))
    except OSError as error:
        raise UserError(
            f"the results cannot be written into {out}: {reason(error)}; the trainings are there, "
            "and --resume goes on from them"
        ) from error
    return results


def _written(
    setting: Setting, out: Path, cases: Sequence[Case], failed: dict[str, str], device: str
) -> Outcome:
    results = _write_results(setting, out, cases)
    files, extras = [out / "results.jsonl", out / "sheet.png"], Extras()
    if results:
        with extras.making(f"{out / 'accuracy.png'}"):
            draw_accuracy(results, setting.task, out / "accuracy.png")
            files.append(out / "accuracy.png")
        profiles: dict[str, LocalityProfile] = {}
        with extras.making(f"{out / 'profile.json'}"):
            profiles = _profiles(setting, out, cases, device)
            if profiles:
                stamped = {"smoke": setting.smoke}
                found = {name: p.to_dict() | stamped for name, p in profiles.items()}
                replace_file(out / "profile.json", json.dumps(found) + "\n")
                files.append(out / "profile.json")
        if profiles:
            with extras.making(f"{out / 'profile.png'}"):
                task = setting.task
                title = f"{TITLES[task]}, {DISTANCE[task]}: {max(setting.distances)}"
                place = _place(setting, out)
                draw_profiles(profiles, out / "profile.png", title, place, setting.smoke)
                files.append(out / "profile.png")
    outcome = Outcome(results, failed, files)
    extras.done(outcome)
    return outcome


def _profiles(
    setting: Setting, out: Path, cases: Sequence[Case], device: str
) -> dict[str, LocalityProfile]:
    """Of the networks of the largest distance and the first seed, one for each coefficient."""
    profiles = {}
    for coefficient, name in network_names(setting.coefficients).items():
        case = Case(max(setting.distances), coefficient, setting.seeds[0])
        if case not in cases or _result(out, case) is None:
            continue
        data = load(setting, case, out / "data")
        network = make_network(setting, case, data.train.shape[0])
        load_checkpoint(_folder(out, case) / "checkpoints", network)
        rows = torch.arange(min(_PROFILE_IMAGES, len(data.test)))
        images = inputs(data.test.batch(rows), data, setting)
        height, width = images.shape[2:]
        size = min(height, max(2, width // 8))
        # On a CPU, minutes for large images: fewer patches are replaced there.
        patches, most = (height // size) * (width // size), _PROFILE_PIXELS // (height * width)
        replaced = None if device != "cpu" else min(patches, max(4, most))
        profiles[name] = locality_profile(network.to(device), images, patch=size, replaced=replaced)
    return profiles


def _place(setting: Setting, out: Path) -> tuple[float, float] | None:
    """The middle of the left image of Is Same Class at the largest distance."""
    if setting.task != "isc":
        return None
    data = load(setting, Case(max(setting.distances), 0.0, setting.seeds[0]), out / "data")
    assert isinstance(data.sampler, FixedPatches)
    patch = data.sampler.pairs[0][0]
    return (patch.top + patch.bottom) / 2, (patch.left + patch.right) / 2


def _folder(out: Path, case: Case) -> Path:
    return out / "runs" / case.name


def _weight(setting: Setting, case: Case) -> float:
    return 1.0 + (_REGULARIZED_WEIGHT - 1.0) / setting.every if case.coefficient else 1.0


def _workers(how: How, device: str, jobs: int) -> tuple[int, int | None]:
    """Trainings at once, and the threads of each."""
    if how.engine != "joblib":
        return 1, how.threads
    most = torch.cuda.device_count() if device == "cuda" else cores()
    workers = min(how.workers or most, jobs)
    return workers, how.threads or (None if device == "cuda" else max(1, cores() // workers))


def _device(asked: str) -> str:
    if asked not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device must be auto, cpu or cuda, got {asked!r}")
    there = torch.cuda.is_available()
    if asked == "cuda" and not there:
        raise UserError("--device cuda: PyTorch finds no GPU here")
    return "cuda" if there and asked != "cpu" else "cpu"
