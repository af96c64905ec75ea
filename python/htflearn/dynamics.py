"""The paper's three settings: low rank is learned one component at a time.

Matrix (MF), tensor (TF) and hierarchical tensor (HTF) factorizations are trained to complete a
tensor of low rank, and the norms of their components are recorded. (Razin, Maman & Cohen, ICML
2022.)
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from math import exp, inf, log, prod, sqrt
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

import htfkernels as hk
from htfkernels.training import plan_for
from htflearn.errors import Extras, UserError, reason, usable_device, writable_directory
from htflearn.files import read_object, replace_file
from htflearn.learned import SHARE, Evidence, risen, shares
from htflearn.metrics import plain
from htflearn.models import matrix_factorization, tensor_factorization
from htflearn.optim import GroupRMSprop
from htflearn.targets import make_target
from htflearn.tasks import CompletionTask, completion
from htflearn.trackers import (
    ComponentNorms,
    LocalComponentNorms,
    SingularValues,
    Spectra,
    Tracker,
    Unbalancedness,
    node_label,
)
from htflearn.train import TrainConfig, Trainer, TrainResult

__all__ = ["PRESETS", "Setting", "adapted", "prepare", "run", "run_panel"]

Panel = Literal["mf", "tf", "htf"]
OPTIMIZERS = ("grouprmsprop", "sgd", "adam")
DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class Setting:
    """What one panel trains.

    Attributes:
        panel: ``"mf"``, ``"tf"`` or ``"htf"``.
        order: number of modes (2 for ``"mf"``).
        dim: ``D`` of every mode.
        rank: of the target: matrix rank, number of outer products, or local rank.
        norm: Frobenius norm of the target.
        samples: number of training entries.
        noise_std: of the noise on them.
        width: hidden width, number of components, or local rank of the model.
        depth: number of matrices of ``"mf"``.
        init_std: of the model's initial weights.
        optimizer: ``"grouprmsprop"``, ``"sgd"`` or ``"adam"``.
        lr: its step size.
        loss: a name of :data:`htflearn.LOSSES`.
        iterations: at most that many.
        log_every: iterations between two points of the figure.
        stop_train_loss: training stops when the train loss stays below it.
        dtype: ``"float32"`` or ``"float64"``.
        seed: of the target, the entries and the initial weights.
        threads: of PyTorch; the bits of the weights do not depend on it. Two take the paper's HTF
            panel forward 1.6 times as fast as one where both cores are free, and about as fast as
            one where another program has a core (unless OpenMP's threads wait by long spinning,
            see :mod:`htflearn.cli`). The steps of the other panels are too small to be shared.
        device: ``"cpu"`` or ``"cuda"``, where steps are captured as a CUDA graph.
        smoke: whether it only shows that everything works: what is made of the run says so.
    """

    panel: Panel
    order: int
    dim: int
    rank: int
    norm: float
    samples: int
    width: int
    init_std: float
    iterations: int
    log_every: int
    noise_std: float = 0.0
    depth: int = 3
    optimizer: str = "grouprmsprop"
    lr: float = 0.01
    loss: str = "l2"
    stop_train_loss: float = 5e-5
    dtype: str = "float32"
    seed: int = 0
    threads: int = 1
    device: str = "cpu"
    smoke: bool = False


# Three of four random targets of local rank 5 are nearly of a lower one: the fifth singular value
# at the pairs is below 1% of the first. This seed's is 10%, the most of the seeds 0 to 199: there
# are five components to be learned.
_SEED = 107

PRESETS: dict[str, dict[str, Setting]] = {
    "paper": {
        "mf": Setting("mf", 2, 64, 5, 64.0, 2048, 64, 1e-3, 30_000, 25, seed=_SEED),
        "tf": Setting("tf", 3, 16, 5, 64.0, 2048, 256, 1e-3, 50_000, 25, seed=_SEED),
        "htf": Setting("htf", 4, 8, 5, 64.0, 2048, 512, 1e-2, 100_000, 100, seed=_SEED, threads=2),
    },
    "smoke": {
        "mf": Setting("mf", 2, 12, 2, 12.0, 100, 12, 1e-2, 2_000, 20, smoke=True),
        "tf": Setting("tf", 3, 6, 2, 12.0, 150, 16, 1e-2, 2_000, 20, smoke=True),
        "htf": Setting("htf", 4, 4, 2, 12.0, 200, 16, 5e-2, 3_000, 20, smoke=True),
    },
}


def adapted(setting: Setting, **values: Any) -> Setting:
    """A setting with other values, and initial weights that suit another order or depth.

    With M weight matrices of standard deviation ``s``, an entry of the end tensor is of size
    ``s^M sqrt(product of the R_v)``, the gradient at a weight of size ``s^(M-1) sqrt(...)``. So
    weights begin to grow, relative to their size, at a rate of::

        s^(M - 2) sqrt(product of the R_v)

    With the same ``s`` the rate falls with every weight matrix, and the loss stays flat for longer
    than anybody waits. Where order or depth change and ``init_std`` is not given, a rate that is
    slower than that of the setting's own ``s`` at its own order and depth (with the other values as
    they are now) is raised to it::

        log s' = max(log s, ((M - 2) log s + (log product - log product') / 2) / (M' - 2))

    With two matrices the rate is the same for every ``s``, which stays. The norm of a local
    component depends on ``s`` and on the weights around it alone, not on the order: it grows with
    ``s``, most of all at upper nodes of wide trees.

    Args:
        setting: to begin with.
        **values: other values of its attributes.

    Raises:
        UserError: there is no tree of that order or depth.

    Example:
        >>> adapted(PRESETS["paper"]["htf"], seed=1).init_std
        0.01
        >>> adapted(PRESETS["paper"]["htf"], order=8).init_std
        0.0652
    """
    changed = replace(setting, **values)
    before = replace(changed, order=setting.order, depth=setting.depth)
    if "init_std" in values or changed == before:
        return changed
    try:
        (matrices, size), (others, other_size) = _growth(before), _growth(changed)
    except ValueError as error:
        raise UserError(f"{setting.panel}: {error}") from error
    if others == 2:
        return changed
    std = exp(((matrices - 2) * log(setting.init_std) + size - other_size) / (others - 2))
    return replace(changed, init_std=max(setting.init_std, float(f"{std:.3g}")))


def _growth(setting: Setting) -> tuple[int, float]:
    """The number of weight matrices, and half the logarithm of the product of all local ranks."""
    layout = _model(setting, (setting.dim,) * setting.order, "meta").layout
    return len(layout.location), sum(map(log, layout.ranks)) / 2


def _usual_std(setting: Setting) -> float:
    """The default for the setting's order, depth and sizes."""
    preset = PRESETS["smoke" if setting.smoke else "paper"][setting.panel]
    same = {name: getattr(setting, name) for name in ("order", "depth", "dim", "width")}
    return adapted(preset, **same).init_std


def prepare(setting: Setting) -> tuple[CompletionTask, hk.HTF, torch.optim.Optimizer]:
    """The task, the model with its initial weights, and the optimizer of a setting.

    Random numbers are drawn in float64 whatever the dtype, so that a seed means the same in both.

    Args:
        setting: of one panel.

    Raises:
        UserError: the setting's values do not fit together.

    Example:
        >>> task, model, optimizer = prepare(PRESETS["smoke"]["tf"])
        >>> model.full_tensor().shape
        torch.Size([6, 6, 6])
    """
    try:
        return _prepare(setting)
    except ValueError as error:
        raise UserError(f"the {setting.panel.upper()} panel: {error}") from error


def _prepare(setting: Setting) -> tuple[CompletionTask, hk.HTF, torch.optim.Optimizer]:
    if setting.optimizer not in OPTIMIZERS:
        raise ValueError(
            f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {setting.optimizer!r}"
        )
    if setting.dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {setting.dtype!r}")
    device = usable_device(setting.device)
    if setting.init_std <= 0 or setting.norm <= 0:
        raise ValueError("the initial standard deviation and the target's norm must be positive")
    dtype, dims = DTYPES[setting.dtype], (setting.dim,) * setting.order
    if prod(dims) > 2**24:
        raise ValueError(f"a tensor of {setting.dim}^{setting.order} entries is too large to form")
    generator = torch.Generator().manual_seed(setting.seed)
    kind: Any = {"mf": "matrix", "tf": "cp", "htf": "ht"}[setting.panel]
    target = make_target(kind, dims, setting.rank, setting.norm, None, generator, torch.float64)
    task = completion(target, setting.samples, setting.noise_std, generator, setting.loss)
    model = _model(setting, dims)
    model.reset_parameters(generator)
    model = model.to(device, dtype)
    make: Any = {"grouprmsprop": GroupRMSprop, "sgd": torch.optim.SGD, "adam": torch.optim.Adam}
    # Adam is no part of a CUDA graph unless it says so; the two others need not say it.
    options = {"capturable": True} if setting.optimizer == "adam" and device == "cuda" else {}
    optimizer = make[setting.optimizer](model.parameters(), lr=setting.lr, **options)
    return task.to(device, dtype), model, optimizer


def _model(setting: Setting, dims: tuple[int, ...], device: str = "cpu") -> hk.HTF:
    std, width = setting.init_std, setting.width
    if setting.panel == "mf":
        rows, columns = dims
        depth = setting.depth
        return matrix_factorization(rows, columns, depth, width, std, torch.float64, device)
    if setting.panel == "tf":
        return tensor_factorization(dims, width, std, torch.float64, device)
    tree = hk.ModeTree.balanced(setting.order)
    return hk.HTF(tree, dims, width, init_std=std, dtype=torch.float64, device=device)


def run(
    settings: Iterable[Setting],
    out: str | Path,
    resume: bool = False,
    progress: bool = True,
    force: bool = False,
) -> dict[str, Any]:
    """Trains the panels one after another, writes ``dynamics.json`` and draws ``dynamics.png``.

    A panel that fails does not stop the others.

    Args:
        settings: one of each panel.
        out: directory; each panel has its metrics and checkpoints in one of its own there.
        resume: goes on where an earlier run with the same settings stopped.
        progress: see :class:`htflearn.Trainer`.
        force: starts anew where ``out`` holds a run already.

    Returns:
        what ``dynamics.json`` holds: ``{"panels": [...]}``, see :func:`run_panel`, and a ``note``
        where the run is a smoke test.

    Raises:
        UserError: settings that do not fit, or differ from those of the run to resume, or an output
            directory that cannot be written, or that holds a run (without ``resume`` and
            ``force``). All of this is seen before the first iteration.
        Incomplete: a panel, its ranks or the figure could not be made. What could be is in its
            ``made``.

    Example:
        >>> results = run([PRESETS["smoke"]["mf"]], "figures", progress=False)
        >>> len(results["panels"][0]["series"][0]["components"])
        2
    """
    from htflearn.figures import SMOKE, draw_dynamics

    directory = Path(out)
    if not resume and not force:
        _refuse_earlier(directory)
    settings = list(settings)
    for setting in settings:
        prepare(setting)
    writable_directory(directory)
    numbers, figure = directory / "dynamics.json", directory / "dynamics.png"
    for setting in settings:
        _check_same_settings(setting, directory / setting.panel, resume)
    if force and not resume:
        for file in (numbers, figure):
            file.unlink(missing_ok=True)
    extras, panels = Extras(), []
    for setting in settings:
        try:
            panels.append(run_panel(setting, directory / setting.panel, resume, progress, extras))
        except UserError as error:
            extras.sentences.append(str(error))
    if not panels:
        raise UserError("; ".join(extras.sentences))
    results: dict[str, Any] = {"htfkernels": hk.__version__, "torch": torch.__version__}
    if any(setting.smoke for setting in settings):
        results["note"] = SMOKE
    results["panels"] = panels
    try:
        replace_file(numbers, json.dumps(results, indent=1) + "\n")
    except OSError as error:
        raise UserError(
            f"the results cannot be written into {directory}: {reason(error)}; the trainings "
            "are there, and --resume goes on from them"
        ) from error
    with extras.making(f"the figure {figure}"):
        draw_dynamics(panels, figure)
    extras.done(results)
    return results


def run_panel(
    setting: Setting,
    out: Path,
    resume: bool = False,
    progress: bool = True,
    extras: Extras | None = None,
) -> dict[str, Any]:
    """Trains one panel.

    Args:
        setting: what to train.
        out: directory of its metrics and checkpoints.
        resume: goes on from the newest checkpoint.
        progress: see :class:`htflearn.Trainer`.
        extras: told where the ranks cannot be computed; they are then missing.

    Returns:
        ``settings``; ``series``: for each node (or the singular values of ``"mf"``) the recorded
        norms, ``iterations``, and the ``components`` that have risen (see
        :func:`htflearn.learned.risen`) with their ``share`` of the end tensor; what was ``learned``
        (``"target"``, ``"entries"`` or ``"nothing"``), ``remarks`` on what to change where it was
        not the target, and their ``evidence`` (see :class:`htflearn.learned.Evidence`); the final
        errors, ``ranks`` of the matricizations, and the time taken.
    """
    told = Extras() if extras is None else extras
    with _threads(setting.threads):
        panel = _run_panel(setting, out, resume, progress, told)
    if extras is None:
        told.done(panel)
    return panel


def _run_panel(
    setting: Setting, out: Path, resume: bool, progress: bool, extras: Extras
) -> dict[str, Any]:
    task, model, optimizer = prepare(setting)
    start = [p.detach().clone() for p in model.parameters()]
    trackers: list[Tracker] = [_tracker(setting), Unbalancedness()]
    config = TrainConfig(
        iterations=setting.iterations,
        log_every=setting.log_every,
        stop_train_loss=setting.stop_train_loss,
        stop_patience=3,
        seed=setting.seed,
    )
    out.mkdir(parents=True, exist_ok=True)
    replace_file(out / "settings.json", json.dumps(asdict(setting), indent=1) + "\n")
    title = setting.panel.upper()
    trainer = Trainer(model, task, optimizer, config, trackers, out, progress, title=title)
    result = trainer.fit(resume=resume)
    if result.reason == "not finite":
        raise UserError(
            f"the {title} panel: the loss is no longer finite after {result.iterations} "
            f"iterations; a smaller --lr than {setting.lr:g} may help"
        )
    ranks: dict[str, Any] = {}
    with extras.making(f"the ranks of the {title} panel"):
        ranks = _ranks(setting, model, task)
    plan = plan_for("full_tensor", model.layout, DTYPES[setting.dtype], setting.device)
    final = result.history[-1]
    evidence = _evidence(setting, task, model, optimizer, start, result)
    return {
        "settings": asdict(setting),
        "parameters": model.layout.num_parameters,
        "iterations": result.iterations,
        "reason": result.reason,
        "learned": evidence.learned,
        "remarks": evidence.remarks(),
        "evidence": plain(asdict(evidence)),
        "series": _series(setting, result, model, evidence.learned != "nothing"),
        "train_loss": final["train_loss"],
        "test_mse": final.get("test_mse"),
        "reconstruction_error": final["reconstruction_error"],
        "unbalancedness": final["unbalancedness"]["max"],
        "ranks": ranks,
        "seconds": result.seconds,
        "iterations_per_second": result.iterations / result.seconds if result.seconds else None,
        "backend": plan.backend,
    }


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _tracker(setting: Setting) -> Tracker:
    if setting.panel == "mf":
        return SingularValues()
    return ComponentNorms() if setting.panel == "tf" else LocalComponentNorms()


def _ranks(setting: Setting, model: hk.HTF, task: CompletionTask) -> dict[str, Any]:
    if setting.panel == "mf":  # one matricization, whatever the number of nodes on the chain
        measured = Spectra(model.tree.leaves[:1]).measure(model, task)
        return {"matrix": next(iter(measured.values()))}
    return Spectra().measure(model, task)


def _evidence(
    setting: Setting,
    task: CompletionTask,
    model: hk.HTF,
    optimizer: torch.optim.Optimizer,
    start: list[Tensor],
    result: TrainResult,
) -> Evidence:
    weights = list(model.parameters())
    gradients = torch.autograd.grad(task.loss(model), weights)
    first, last = result.history[0], result.history[-1]
    # Adam's is added to the size of each single gradient.
    size = sqrt(sum(p.numel() for p in weights)) if setting.optimizer == "adam" else 1.0
    with torch.no_grad():
        zero = float(task.loss_function(torch.zeros_like(task.values), task.values))
        moved = _norm([p - before for p, before in zip(weights, start, strict=True)]) / _norm(start)
    return Evidence(
        loss=setting.loss,
        start_loss=first["train_loss"],
        end_loss=last["train_loss"],
        zero_loss=zero,
        start_error=first["reconstruction_error"],
        end_error=last["reconstruction_error"],
        iterations=result.iterations,
        moved=moved,
        gradient_norm=_norm(gradients),
        optimizer=setting.optimizer,
        lr=setting.lr,
        eps=optimizer.defaults.get("eps", inf) * size,
        init_std=setting.init_std,
        usual_std=_usual_std(setting),
    )


def _norm(tensors: Iterable[Tensor]) -> float:
    """Of all entries together, in float64: squares of tiny gradients vanish in float32."""
    return float(torch.stack([t.detach().double().norm() for t in tensors]).norm())


def _series(
    setting: Setting, result: TrainResult, model: hk.HTF, learned: bool
) -> list[dict[str, Any]]:
    """Norms against iterations, sorted; of an HTF for each interior node."""
    lines = result.history
    if setting.panel == "mf":
        named = {"singular values": [line["singular_values"]["values"] for line in lines]}
    elif setting.panel == "tf":
        named = {"components": [line["component_norms"]["norms"] for line in lines]}
    else:
        labels = [node_label(node) for node in model.tree.interior]
        named = {s: [line["local_component_norms"][s] for line in lines] for s in labels}
    iterations = [line["iteration"] for line in lines]
    series = []
    for (name, norms), node in zip(named.items(), model.tree.interior, strict=False):
        components = risen(iterations, norms) if learned else []
        found = _shares(setting, model, node, [c["curve"] for c in components])
        components = [{**c, "share": s} for c, s in zip(components, found, strict=True)]
        series.append(
            {
                "name": name,
                "iterations": iterations,
                "norms": norms,
                "components": [c for c in components if c["share"] > SHARE],
            }
        )
    return series


def _shares(setting: Setting, model: hk.HTF, node: hk.Node, curves: list[int]) -> list[float]:
    """Of the end tensor, of the components with the largest norms now, by their places."""
    if not curves:
        return []
    if setting.panel == "mf":
        values = torch.linalg.svdvals(model.full_tensor().detach())
        return (values / values.norm())[curves].tolist()
    norms = model.local_component_norms()[node].detach()
    order = norms.topk(max(curves) + 1).indices
    return shares(model, node, order[curves].tolist())


def _refuse_earlier(directory: Path) -> None:
    """A run is not written over: whoever has waited for it may still want it."""
    earlier = [directory / name for name in ("dynamics.json", "dynamics.png")]
    for panel in get_args(Panel):
        earlier += [directory / panel / name for name in ("metrics.jsonl", "checkpoints/latest")]
    found = next((path for path in earlier if os.path.lexists(path)), None)
    if found is not None:
        raise UserError(
            f"{directory} holds a run already ({found.relative_to(directory)}): --resume goes on "
            "with it, --force starts anew in its place, another --out leaves it alone"
        )


def _check_same_settings(setting: Setting, out: Path, resume: bool) -> None:
    """A run goes on with the settings it began with, but for where it ends and where it runs."""
    path = out / "settings.json"
    if not resume or not path.exists():
        return
    before, now = read_object(path), asdict(setting)
    free = {"iterations", "stop_train_loss", "device", "smoke"}
    for name, value in now.items():
        if name not in free and before.get(name) != value:
            option = name.replace("_", "-")
            raise UserError(
                f"the {setting.panel} run in {out} has {option} {before.get(name)}, not "
                f"{value}: resume it with the same settings, or start anew in another directory"
            )
