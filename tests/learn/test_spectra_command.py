"""``htf spectra``: the table and the numbers, and what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from spectra_runs import TREE, caterpillar, htf, ok, run
from torch import Tensor

import htfkernels as hk
from htfkernels.testing import assert_matches, random_tree
from htflearn import UserError, load_model, matrix_factorization, save_checkpoint
from htflearn.checkpoint import save_model
from htflearn.spectra.measure import choose_nodes, measure, rank_bounds, to_json
from htflearn.spectra.table import LARGEST_TABLE, short_label
from htflearn.trackers import node_label

F64 = torch.float64


def dense(model: hk.HTF, node: hk.Node) -> Tensor:
    """Singular values of the matricization itself; the outputs are columns."""
    tensor = model.full_tensor().detach().double()
    rest = [n for n in range(tensor.dim()) if n not in node.modes]
    rows = math.prod(model.layout.mode_dims[m] for m in node.modes)
    return torch.linalg.svdvals(tensor.permute(*node.modes, *rest).reshape(rows, -1))


def measures(s: Tensor, rtol: float) -> Tensor:
    p, q = s / s.sum(), s.square() / s.square().sum()
    return torch.stack(
        [
            (s > rtol * s[0]).sum().to(F64),
            (-p * p.log()).sum().exp(),
            1 / q.max(),
            1 / q.square().sum(),
            (-q * q.log()).sum(),
        ]
    )


def numbers(row: dict[str, Any]) -> Tensor:
    return torch.tensor([row[name] for name in NAMES], dtype=F64)


NAMES = "numerical_rank effective_rank stable_rank renyi2_rank entanglement_entropy".split()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_model(tmp_path / "model.safetensors", htf())
    return tmp_path / "model.safetensors"


def test_table(tmp_path: Path) -> None:
    model = htf()
    save_checkpoint(tmp_path / "run" / "checkpoints", model, state={"iteration": 1200})
    lines = ok(tmp_path / "run", "--rtol", 0.05).splitlines()
    assert "iteration 1,200" in lines[0] and "2 outputs" in lines[1]
    rows = {name: line.split()[-9:] for line in lines if (name := label(line.strip()))}
    assert list(rows) == [node_label(n) for n in TREE.nodes]
    ranks = []
    for node in TREE.nodes:
        expected = dense(model, node)[: rank_bounds(model.layout)[node]]
        numerical, *others = measures(expected, 0.05).tolist()
        ranks.append(int(numerical))
        assert rows[node_label(node)] == [
            str(math.prod(model.layout.mode_dims[m] for m in node.modes)),
            "-" if node.is_leaf else "3",
            str(len(expected)),
            f"{expected[0].item():.3g}",
            str(int(numerical)),
            *(f"{value:.2f}" for value in others[:3]),
            f"{others[3]:.3f}",
        ]
    assert lines[2] == f"hierarchical rank: ({', '.join(map(str, ranks[:-1]))})"
    assert "above 0.05 of the largest" in lines[-1]


def label(line: str) -> str:
    return next((n for n in map(node_label, TREE.nodes) if line.startswith(f"{n} ")), "")


def test_top_shows_singular_values_instead_of_the_largest(saved: Path) -> None:
    printed = ok(saved, "--top", 2, "--nodes", "0,3")
    expected = dense(load_model(saved), TREE.node((0, 3)))
    assert " ".join(f"{s:.3g}" for s in expected[:2].tolist()) in printed
    assert f"{expected[2].item():.3g}" not in printed and "sigma_1" not in printed
    assert "hierarchical rank" not in printed


@pytest.mark.parametrize("method", ["auto", "qr", "gram"])
def test_json(saved: Path, tmp_path: Path, method: str) -> None:
    model = load_model(saved)
    made = tmp_path / "made" / "numbers.json"
    printed = ok(saved, "--json", made, "--method", method)
    assert printed.splitlines()[-1] == f"written: {made}"
    found = json.loads(made.read_text())
    assert list(made.parent.iterdir()) == [made]
    assert found["layout"]["tree"] == json.loads(TREE.to_json())
    assert found["file"] == str(saved) and found["iteration"] is None
    assert found["dtype"] == "float64" and found["rtol"] is None
    # Which of the two "auto" takes is the engine's choice.
    assert found["method"] in {method} | ({"qr", "gram"} if method == "auto" else set())
    assert [n["node"] for n in found["nodes"]] == [node_label(n) for n in TREE.nodes]
    assert found["hierarchical_rank"] == [n["numerical_rank"] for n in found["nodes"][:-1]]
    for node, row in zip(TREE.nodes, found["nodes"], strict=True):
        values = torch.tensor(row["singular_values"], dtype=F64)
        expected = dense(model, node)
        padded = torch.zeros_like(expected)
        padded[: len(values)] = values
        if method == "gram":  # squared singular values are what it holds to rounding
            assert_matches(padded.square(), expected.square(), F64, "backward")
        else:
            assert_matches(padded, expected, F64, "backward")
        assert row["modes"] == list(node.modes) and row["level"] == node.level
        assert row["rows"] * row["columns"] == model.layout.num_entries
        assert row["log2_rows"] == math.log2(row["rows"])
        assert len(values) == row["bound"] and row["log2_scale"] == 0
        exact = measures(values, row["rtol"])
        assert_matches(numbers(row), exact, F64, "backward")


def test_json_alone_on_standard_output(saved: Path, tmp_path: Path) -> None:
    result = run(saved, "--json", "-", "--top", 1, "--out", tmp_path / "tree.png")
    found = json.loads(result.stdout)
    assert {len(n["singular_values"]) for n in found["nodes"]} == {1}
    assert result.stderr == f"written: {tmp_path / 'tree.png'}\n"


def test_a_root_of_one_output_is_measured_where_asked_for(tmp_path: Path) -> None:
    model = htf(out_features=1)
    save_model(tmp_path / "model", model)
    every = json.loads(ok(tmp_path / "model", "--json", "-"))["nodes"]
    assert [n["node"] for n in every] == [node_label(n) for n in TREE.nodes[:-1]]
    (root,) = json.loads(ok(tmp_path / "model", "--json", "-", "--nodes", "0-3"))["nodes"]
    norm = model.full_tensor().detach().norm()
    assert_matches(torch.tensor(root["singular_values"], dtype=F64), norm[None], F64, "backward")


def test_numerical_ranks_are_to_the_precision_of_the_weights() -> None:
    exact = measure(htf()).spectra[0]
    assert exact.rtol == hk.spectra.ACCURACY["qr"]
    single = measure(htf(dtype=torch.float32)).spectra[0]
    assert single.rtol == len(single.values) * torch.finfo(torch.float32).eps
    assert single.values.dtype == F64
    half = measure(htf(dtype=torch.bfloat16)).spectra[0]
    assert exact.rtol < single.rtol < half.rtol <= 0.01
    gram = measure(htf(), method="gram").spectra[0]
    assert exact.rtol < gram.rtol < single.rtol
    assert measure(htf(), rtol=0.3).spectra[0].rtol == 0.3


def test_measuring_leaves_the_model_alone() -> None:
    model = htf(dtype=torch.float32)
    before = [p.clone() for p in model.parameters()]
    measure(model)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    with torch.no_grad():
        model.weights[0][0, 0, 0] = math.nan
    with pytest.raises(UserError, match="not finite"):
        measure(model)


@pytest.mark.parametrize("scale", [0, -1500, 1500])
def test_singular_values_beyond_the_range(scale: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the engine tells them: values in range, and powers of two beside them."""

    class Scaled(dict):  # type: ignore[type-arg]
        method, accuracy = "qr", 1e-13

    model = htf()
    plainly = model.matricization_spectra(list(TREE.nodes), "qr")

    def spectra(model: hk.HTF, nodes: list[hk.Node], method: str) -> Scaled:
        found = Scaled({n: torch.ldexp(plainly[n], torch.tensor(scale)) for n in nodes})
        found.relative = {n: plainly[n] * 8 for n in nodes}  # type: ignore[attr-defined]
        found.log2_scale = dict.fromkeys(nodes, scale - 3)  # type: ignore[attr-defined]
        return found

    exact = to_json(measure(model, method="qr"))
    monkeypatch.setattr(hk.HTF, "matricization_spectra", spectra)
    measured = measure(model)
    found = to_json(measured)
    json.dumps(found, allow_nan=False)
    assert found["method"] == "qr"
    for a, b in zip(found["nodes"], exact["nodes"], strict=True):
        assert_matches(numbers(a), numbers(b), F64, "forward")
        up = 0 if not scale else 3
        assert a["log2_scale"] == (scale - 3 if scale else 0)
        values = torch.tensor(b["singular_values"], dtype=F64) * 2**up
        assert_matches(torch.tensor(a["singular_values"], dtype=F64), values, F64, "backward")
    from htflearn.spectra.table import _scientific

    largest = float(plainly[TREE.nodes[0]].detach()[0])
    mantissa, exponent = _scientific(measured.spectra[0], 0), math.log10(largest)
    if scale:
        exponent += scale * math.log10(2)
        assert mantissa.endswith(f"e{math.floor(exponent):+d}")
    else:
        assert mantissa == f"{largest:.3g}"


LAYOUTS = [
    hk.HTF(hk.ModeTree.balanced(4), 2, 12),
    hk.HTF(hk.ModeTree.balanced(4), [1, 5, 3, 4], [3, 2], 3),
    hk.HTF(hk.ModeTree.flat(4), 3, 5, root="sum"),
    hk.HTF(hk.ModeTree.flat(3), [2, 3, 40], 30),
    matrix_factorization(6, 5, 5, 4),
    hk.HTF(random_tree(7, 1), 2, 4, 2),
    hk.HTF(hk.ModeTree.from_nested((((0, 1), 2),)), 3, [5, 2, 3], 4),
]


@pytest.mark.parametrize("model", LAYOUTS, ids=range(len(LAYOUTS)))
def test_bounds_are_the_ranks_of_random_models(model: hk.HTF) -> None:
    model = hk.HTF(
        model.tree,
        model.layout.mode_dims,
        dict(zip(model.tree.interior, model.layout.ranks, strict=True)),
        model.layout.out_features,
        model.layout.root,
        dtype=F64,
    )
    for node, bound in rank_bounds(model.layout).items():
        assert int(hk.numerical_rank(dense(model, node))) == bound, node


def test_choosing_nodes() -> None:
    for tree in (TREE, random_tree(9, 2), hk.ModeTree.chain(5), hk.ModeTree.halves(16)):
        for node in tree.nodes:
            assert choose_nodes(tree, [node_label(node)]) == [node]
            assert len(short_label(node)) <= 24
    assert choose_nodes(TREE, ["1"]) == [n for n in TREE.nodes if n.modes == (1,)]
    assert len(choose_nodes(TREE, ["1", " 1 level 1", "0 - 3", "3,0"])) == 4


def test_large_trees_are_summarised(tmp_path: Path) -> None:
    model = hk.HTF(hk.ModeTree.balanced(64), 3, 4)
    save_model(tmp_path / "model", model)
    lines = ok(tmp_path / "model").splitlines()
    assert len(lines) < LARGEST_TABLE and "hierarchical rank: (3 x 64, 4 x 62)" in lines
    level = next(line for line in lines if line.startswith(" 1 ")).split()
    effective = sorted(s.effective_rank for s in measure(model).spectra if s.node.level == 1)
    middle = (effective[15] + effective[16]) / 2
    assert level[:4] == ["1", "32", "4", "4"]
    assert level[4] == f"{effective[0]:.1f}/{middle:.1f}/{effective[-1]:.1f}"
    printed = ok(tmp_path / "model", "--all")
    assert all(f" {node_label(n)} " in printed for n in model.tree.nodes[:-1])


def test_levels_of_deep_trees_are_taken_together(tmp_path: Path) -> None:
    save_model(tmp_path / "model", hk.HTF(caterpillar(150), 2, 2))
    assert len(ok(tmp_path / "model").splitlines()) < LARGEST_TABLE


def test_without_out_nothing_is_written(saved: Path) -> None:
    ok(saved)
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


BAD: dict[str, tuple[list[object], str]] = {
    "nothing there": (["absent"], "there is no checkpoint in absent"),
    "not safetensors": (["text"], "cannot be read as safetensors"),
    "another model": (["other"], "not those of an htfkernels.HTF"),
    "no list": (["model", "--nodes", "left"], "takes the modes of a node"),
    "many digits": (["model", "--nodes", "9" * 5000], "takes the modes of a node"),
    "a level of many digits": (["model", "--nodes", f"0 level {'9' * 5000}"], "takes the modes"),
    "an empty run": (["model", "--nodes", "0,,1"], "takes the modes of a node"),
    "no such mode": (["model", "--nodes", "7"], "the modes are 0 to 3"),
    "no such node": (["model", "--nodes", "0,1"], "has {0,3}, "),
    "no such level": (["model", "--nodes", "{1} level 2"], "no such node"),
    "format": (["model", "--out", "tree.jpeg"], "--out must end in .png, .svg, .pdf"),
    "no format": (["model", "--out", "tree"], "--out must end in"),
    "out is a directory": (["model", "--out", "folder.png"], "is a directory"),
    "json is a directory": (["model", "--json", "folder.png"], "is a directory"),
    "unwritable": (["model", "--out", "model/x/tree.png"], "cannot be written"),
    "unwritable json": (["model", "--json", "/proc/none/x.json"], "cannot be written"),
    "the model itself": (["model", "--json", "model"], "would replace the model"),
    "the same file": (["model", "--json", "t.svg", "--out", "t.svg"], "are the same file"),
    "method": (["model", "--method", "svd"], "--method must be one of auto, qr, gram"),
    "rtol": (["model", "--rtol", "1"], "--rtol must be at least 0 and less than 1"),
    "negative rtol": (["model", "--rtol", "-0.1"], "--rtol must be"),
    "rtol nan": (["model", "--rtol", "nan"], "--rtol must be"),
    "top": (["model", "--top", "0"], "--top must be positive"),
    "out is a device": (["model", "--json", "/dev/null"], "is a device or a pipe"),
    "until": (["model", "--until", "3"], "--until needs --follow"),
    "timeout": (["model", "--timeout", "3"], "--timeout needs --follow"),
    "interval": (["folder.png", "--follow", "--interval", "0"], "--interval must be positive"),
    "no end": (["folder.png", "--follow", "--interval", "inf"], "--interval must be finite"),
    "too long": (
        ["folder.png", "--follow", "--timeout", "1e30"],
        "at most 1,000,000,000, got 1e+30",
    ),
    "follow a file": (["model", "--follow"], "--follow takes a folder"),
    "none came": (["folder.png", "--follow", "--timeout", "0"], "no checkpoint appeared"),
}


@pytest.mark.parametrize("name", BAD)
def test_errors(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_model("model", htf())
    Path("text").write_text("no weights")
    save_file({"w": torch.ones(2)}, "other")
    Path("folder.png").mkdir()
    before = {p: p.read_bytes() for p in Path().iterdir() if p.is_file()}
    arguments, sentence = BAD[name]
    result = run(*arguments)
    assert result.exit_code == 2 and result.stdout == ""
    *waiting, error = result.stderr.splitlines()
    assert error.startswith("htf: ") and sentence in error, error
    assert all(line.startswith("waiting") for line in waiting)
    assert {p: p.read_bytes() for p in Path().iterdir() if p.is_file()} == before
    assert not list(Path("folder.png").iterdir())


def test_a_full_disk(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    names = [tmp_path / "numbers.json", tmp_path / "tree.png"]
    result = run(saved, "--json", names[0], "--out", names[1])
    assert result.exit_code == 3 and "hierarchical rank" in result.stdout
    told = [f"htf: {name} could not be made: No space left on device" for name in names]
    assert result.stderr.splitlines() == told
    assert [p.name for p in tmp_path.iterdir()] == [saved.name]


def test_a_figure_that_cannot_be_drawn_does_not_cost_the_numbers(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise ValueError("no font")

    monkeypatch.setattr("htflearn.spectra.figure.draw_spectra", broken)
    numbers, figure = tmp_path / "numbers.json", tmp_path / "tree.png"
    result = run(saved, "--json", numbers, "--out", figure)
    assert result.exit_code == 3 and json.loads(numbers.read_text())["nodes"]
    assert result.stderr == f"htf: {figure} could not be made: ValueError: no font\n"
    assert result.stdout.splitlines()[-1] == f"written: {numbers}"


def test_outputs_are_proved_before_the_first_checkpoint_is_waited_for(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "lines").write_text("[" * 100_000 + "\n")
    for option, path in (("--out", tmp_path / "file" / "t.png"), ("--json", tmp_path / "lines")):
        result = run(tmp_path / "later", "--follow", option, path, "--timeout", 1000)
        assert result.exit_code == 2 and str(path.parent) in result.stderr
        assert "waiting" not in result.stderr
