"""What the plots show, read back from the figures: numbers, names, and that no text covers another."""

import csv
import re
import subprocess
import sys
from itertools import combinations, pairwise

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from adamerge.demo.digits import TASKS as DIGIT_TASKS
from adamerge.demo.digits import DigitNet
from adamerge.report import (
    accuracy_bars,
    coefficient_heatmap,
    cosine_heatmap,
    cosine_matrix,
    score_table,
    training_curves,
    write_plots,
)
from adamerge.report.columns import place_columns, segments_of, shared_kinds
from adamerge.report.curves import running_mean
from adamerge.rules import MergeRule, TaskWise
from adamerge.types import InputError
from tests.tiny import TASKS, merged_of, vectors_of

EIGHT = ("SUN397", "Cars", "RESISC45", "EuroSAT", "SVHN", "GTSRB", "MNIST", "DTD")
TWENTY = (*EIGHT, *(f"DatasetWithName{number}" for number in range(12)))
PARTS = ("ln_1.weight", "ln_1.bias", "attn.in_proj_weight", "attn.in_proj_bias", "attn.out_proj.weight")
PARTS += ("attn.out_proj.bias", "ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight")
PARTS += ("mlp.c_proj.bias",)
VIT = ("class_embedding", "positional_embedding", "proj", "conv1.weight", "ln_pre.weight", "ln_pre.bias")
VIT += tuple(f"transformer.resblocks.{block}.{part}" for block in range(12) for part in PARTS)
VIT = tuple(f"visual.{name}" for name in (*VIT, "ln_post.weight", "ln_post.bias"))
MORE = (*VIT, *(f"visual.extra{number}.weight" for number in range(6)))  # 158
LAYERS = tuple(name for name, _ in DigitNet().named_parameters())
STAGES = tuple(
    f"visual.trunk.stages.{stage}.blocks.{block}.{part}"
    for stage, depth in enumerate((3, 3, 9, 3))
    for block in range(depth)
    for part in ("gamma", "conv_dw.weight", "norm.weight", "mlp.fc1.weight", "mlp.fc2.weight")
)
BLOCKS = ("visual", "visual.conv1", *(f"visual.transformer.resblocks.{block}" for block in range(12)), "visual.ln_post")


def coefs(tasks, groups):
    return torch.rand(len(tasks), len(groups), generator=torch.Generator().manual_seed(0)) - 0.2


def cells(axes):
    """Drawn values [T, columns] from left to right."""
    return torch.cat([torch.as_tensor(mesh.get_array().data.copy()) for mesh in axes.collections], 1)


def texts(figure):
    """(axes, text) of everything written and visible."""
    for axes in figure.axes:
        legend = axes.get_legend()
        written = [*axes.texts, axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
            written += [label for place, label in ticks if low <= place <= high]
        written += legend.get_texts() if legend else ()
        yield from (text for text in written if text.get_text().strip() and text.get_visible())
    yield from figure.texts


def assert_texts_are_apart_and_inside(figure):
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in texts(figure)]
    width, height = figure.get_size_inches() * figure.dpi
    assert len(boxes) > 3
    for name, box in boxes:
        assert box.x0 >= 0, name
        assert box.y0 >= 0, name
        assert box.x1 <= width, name
        assert box.y1 <= height, name
    for (one, a), (two, b) in combinations(boxes, 2):
        across, down = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        assert across <= 0.5 or down <= 0.5, f"'{one}' covers '{two}'"


# --- coefficients


def test_blocks_and_kinds_of_vit():
    segments = segments_of(VIT)
    labels = [segment.label for segment in segments]
    assert labels[:6] == [
        "class_embedding",
        "positional_embedding",
        "proj",
        "conv1",
        "ln_pre",
        "transformer.resblocks.0",
    ]
    assert labels[-2:] == ["transformer.resblocks.11", "ln_post"]
    assert (segments[8].container, segments[8].number, segments[8].kinds) == ("transformer.resblocks", "3", PARTS)
    kinds = shared_kinds(segments)
    assert tuple(kinds) == PARTS
    assert [VIT[column] for column in kinds["mlp.c_fc.bias"]] == [n for n in VIT if n.endswith("mlp.c_fc.bias")]


def test_nested_numbers_are_cut_where_the_blocks_are():
    names = [f"net.layers.{layer}.{part}" for layer in range(2) for part in ("mlp.0.weight", "mlp.2.weight", "gamma")]
    segments = segments_of([*names, "net.stem.0.weight"])
    assert [segment.label for segment in segments] == ["layers.0", "layers.1", "stem.0"]
    assert segments[1].kinds == ("mlp.0.weight", "mlp.2.weight", "gamma")
    assert {segment.container for segment in segments_of(STAGES)} == {f"stages.{stage}.blocks" for stage in range(4)}
    assert [segment.label for segment in segments_of(["a.0.weight", "a.1.weight"])] == ["a.0", "a.1"]


def test_names_have_room_however_narrow_the_columns():
    edges = place_columns(segments_of(VIT), 0.001)
    middles = [(edge[0] + edge[-1]) / 2 for edge in edges]
    assert min(b - a for a, b in pairwise(middles)) > 0.2
    assert all(a[-1] < b[0] for a, b in pairwise(edges))


def test_scattered_names_of_a_block_stand_together():
    names = ["blocks.0.a.weight", "blocks.1.a.weight", "head.weight", "blocks.0.b.weight"]
    assert [segment.columns for segment in segments_of(names)] == [(0, 3), (1,), (2,)]
    coef_TG = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    assert cells(coefficient_heatmap(coef_TG, ["t"], names).axes[0]).tolist() == [[0, 3, 1, 2]]


@pytest.mark.parametrize("groups", [VIT, LAYERS], ids=["vit", "digits"])
def test_heatmap_draws_the_coefficients_and_their_means(groups):
    coef_TG = coefs(EIGHT, groups).double()
    figure = coefficient_heatmap(coef_TG, EIGHT, groups)
    main, _, means = figure.axes
    assert torch.equal(cells(main), coef_TG)
    shown = [text.get_text() for text in means.texts if text.get_rotation() == 90]
    assert shown[-1] == "all groups"
    for place, kind in enumerate(shown[:-1]):
        columns = [i for i, name in enumerate(groups) if re.search(rf"blocks\.\d+\.{re.escape(kind)}$", name)]
        assert len(columns) in (3, 12)
        assert torch.allclose(cells(means)[:, place], coef_TG[:, columns].mean(1)), kind
    assert torch.allclose(cells(means)[:, -1], coef_TG.mean(1))
    assert [text.get_text() for text in means.get_yticklabels()] == list(EIGHT)


def test_zero_is_white_and_the_sign_is_the_hue():
    (mesh,) = coefficient_heatmap(torch.tensor([[-0.3, 0.0, 0.5]]), ["t"], ["a", "b", "c"]).axes[0].collections[:1]
    low, middle, high = (mesh.cmap(mesh.norm(value))[:3] for value in (-0.25, 0.0, 0.25))
    assert min(middle) > 0.95
    assert low[0] > low[2] + 0.3
    assert high[2] > high[0] + 0.3


def test_one_far_coefficient_leaves_the_others_their_colours():
    coef_TG = torch.full((1, 22), 0.3)
    coef_TG[0, 5] = 9.0
    main, scale = coefficient_heatmap(coef_TG, ["t"], LAYERS).axes[:2]
    assert main.collections[0].norm.vmax == pytest.approx(0.3)
    assert scale._colorbar.extend == "both"


@pytest.mark.parametrize("tasks", [EIGHT[:1], EIGHT, TWENTY], ids=len)
@pytest.mark.parametrize(
    "groups", [VIT, MORE, LAYERS, STAGES, BLOCKS, ("model",), ("attn", "mlp", "rest")], ids=lambda g: f"{len(g)}"
)
def test_heatmap_names_are_readable(tasks, groups):
    figure = coefficient_heatmap(coefs(tasks, groups), tasks, groups)
    assert_texts_are_apart_and_inside(figure)
    names = {text.get_text() for text in texts(figure)}
    assert {*tasks, *(s.number or s.label for s in segments_of(groups))} <= names | {
        segment.number for segment in segments_of(groups) if segment.label in names
    }


def test_dollars_are_no_mathematics():
    figure = coefficient_heatmap(torch.rand(1, 1), ["a$x_1$b"], ["model"])
    assert_texts_are_apart_and_inside(figure)
    assert r"a\$x_1\$b" in [label.get_text() for label in figure.axes[0].get_yticklabels()]


# --- accuracy


def scores_of(tasks):
    rows = {row: {t: base + 0.01 * i for i, t in enumerate(tasks)} for row, base in [("base", 0.3), ("TIES", 0.6)]}
    experts = {f"expert {task}": {task: 0.99 - 0.01 * place} for place, task in enumerate(tasks)}
    return {**rows, **experts, "this merge": {task: 0.7 + 0.01 * place for place, task in enumerate(tasks)}}


def test_bars_are_the_table():
    scores = scores_of(EIGHT)
    axes = accuracy_bars(scores).axes[0]
    bars = {container.get_label(): [bar.get_height() for bar in container] for container in axes.containers}
    assert list(bars) == ["base", "TIES", "experts", "this merge"]
    merge = list(scores["this merge"].values())
    assert bars["this merge"] == pytest.approx([*(100 * value for value in merge), 100 * sum(merge) / 8])
    assert bars["experts"] == pytest.approx([99, 98, 97, 96, 95, 94, 93, 92, 95.5])
    assert [label.get_text() for label in axes.get_xticklabels()] == [*EIGHT, "mean"]
    written = [text.get_text() for text in axes.texts]
    assert {"73.5", "70.0", "77.0", "33.5", "95.5"} <= set(written)
    assert "95.5" in score_table(scores)
    last = axes.containers[-1][0].get_facecolor()
    assert all(container[0].get_facecolor() != last for container in axes.containers[:-1])
    for place in range(8):  # a task's bars stand over its name
        middle = axes.get_xticks()[place]
        assert all(abs(c[place].get_x() + c[place].get_width() / 2 - middle) < 0.5 for c in axes.containers)


def test_a_task_that_was_not_scored_has_no_bar():
    axes = accuracy_bars({"base": {"a": 0.5}, "this merge": {"a": 0.5, "b": 1.0}}).axes[0]
    assert [[bar.get_height() for bar in each] for each in axes.containers] == [[50, 50], [50, 100, 75]]


@pytest.mark.parametrize("tasks", [EIGHT[:2], EIGHT, TWENTY], ids=len)
def test_accuracy_names_are_readable(tasks):
    figure = accuracy_bars(scores_of(tasks))
    axes = figure.axes[0]
    if axes.get_xticklabels()[0].get_rotation():  # leaning names are apart when their lines are
        assert min(b - a for a, b in zip(axes.get_xticks(), axes.get_xticks()[1:], strict=False)) > 0.3
        axes.set_xticklabels(["x" for _ in axes.get_xticks()])
    assert_texts_are_apart_and_inside(figure)


# --- curves


def write_metrics(path, rows):
    columns = sorted({column for row in rows for column in row})
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    return path


def rows_of(number, terms=("entropy",)):
    rows = []
    for step in range(number):
        losses = {f"train/{t}/{term}": 1 + p + step / 100 for p, t in enumerate(TASKS) for term in terms}
        rows.append({"epoch": 0, "step": step, **losses, "train/loss": sum(losses.values())})
    accuracy = {f"val/{task}/accuracy": 0.5 + place / 10 for place, task in enumerate(TASKS)}
    return [*rows, {"epoch": 0, "step": number - 1, **accuracy, "val/accuracy": 0.6}]


def lines_of(axes):
    return {line.get_gid(): line for line in axes.lines}


def test_curves_are_the_file(tmp_path):
    figure = training_curves(write_metrics(tmp_path / "metrics.csv", rows_of(5, ("entropy", "consistency"))))
    losses, accuracy = map(lines_of, figure.axes)
    assert set(losses) == {"train/loss", *(f"train/{t}/{term}" for t in TASKS for term in ("entropy", "consistency"))}
    assert list(losses["train/b/entropy"].get_xdata()) == [0, 1, 2, 3, 4]
    assert list(losses["train/b/entropy"].get_ydata()) == pytest.approx([2, 2.01, 2.02, 2.03, 2.04])
    assert losses["train/loss"].get_ydata()[4] == pytest.approx(12.24)
    assert list(accuracy["val/c/accuracy"].get_ydata()) == pytest.approx([70])
    assert list(accuracy["val/accuracy"].get_ydata()) == pytest.approx([60])
    color = {gid: to_rgb(line.get_color()) for gid, line in {**losses, **accuracy}.items()}
    assert (
        color["train/a/entropy"] == color["train/a/consistency"] == color["val/a/accuracy"] != color["train/b/entropy"]
    )
    assert losses["train/a/entropy"].get_linestyle() != losses["train/a/consistency"].get_linestyle()
    assert_texts_are_apart_and_inside(figure)


def test_long_curves_have_their_running_mean_on_top(tmp_path):
    figure = training_curves(write_metrics(tmp_path / "metrics.csv", rows_of(200)[:-1]))
    assert len(figure.axes) == 1  # nothing was validated
    lines = lines_of(figure.axes[0])
    raw, mean = (list(lines[f"train/a/entropy{more}"].get_ydata()) for more in ("", " mean"))
    assert mean == running_mean(raw, 9)
    assert mean[100] == pytest.approx(sum(raw[96:105]) / 9)
    assert "running mean over 9 logged steps" in figure.axes[0]._left_title.get_text()


def test_a_loss_below_zero_gets_a_linear_axis(tmp_path):
    rows = [{"step": 0, "train/a/gain": -1.0, "train/penalty/size": 0.5, "train/loss": -0.5}]
    axes = training_curves(write_metrics(tmp_path / "metrics.csv", rows)).axes[0]
    assert axes.get_yscale() == "linear"
    assert "penalty size" in [text.get_text() for text in axes.get_legend().get_texts()]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"no curves to draw: .*metrics.csv does not exist; name the metrics.csv of a run"),
        ("", "holds no training loss"),
        ("epoch,step,train/loss\n", "holds no training loss"),
        ("epoch,step,train/loss\n0,1,abc\n", "is damaged"),
        ("epoch,train/loss\n0,1\n", "is damaged"),
    ],
)
def test_a_file_without_curves_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "metrics.csv").write_text(content)
    with pytest.raises(InputError, match=message):
        training_curves(tmp_path / "metrics.csv")


# --- cosines


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cosines_equal_the_dense_computation(dtype, monkeypatch):
    vectors = vectors_of(dtype=dtype)
    monkeypatch.setattr("adamerge.report.cosine.CHUNK", 7)
    flat_TP = torch.cat([vectors.deltas(name).dense().double().flatten(1) for name in vectors.space.shapes], 1)
    unit_TP = flat_TP / flat_TP.norm(dim=1, keepdim=True)
    cos_TT = cosine_matrix(vectors)
    assert cos_TT.dtype == torch.float64
    assert torch.allclose(cos_TT, unit_TP @ unit_TP.T, rtol=0, atol=1e-14)


def test_a_task_vector_of_zeros_is_like_none():
    vectors = vectors_of()
    for name in vectors.space.shapes:
        vectors.deltas(name).dense()[0] = 0
    cos_TT = cosine_matrix(vectors)
    assert cos_TT[0].tolist() == [0, 0, 0]
    assert float(cos_TT[1, 1]) == pytest.approx(1)


@pytest.mark.parametrize("tasks", [EIGHT[:2], EIGHT, TWENTY], ids=len)
def test_cosines_are_written_in_their_cells(tasks):
    cos_TT = torch.linspace(-0.4, 0.4, len(tasks) ** 2, dtype=torch.float64).view(len(tasks), -1)
    cos_TT = ((cos_TT + cos_TT.T) / 2).fill_diagonal_(1)
    figure = cosine_heatmap(cos_TT, tasks)
    axes = figure.axes[0]
    drawn = cells(axes)
    off = ~torch.eye(len(tasks), dtype=torch.bool)
    assert torch.equal(drawn[off], cos_TT[off])
    written = [float(text.get_text().replace("−", "-")) for text in axes.texts]
    assert written == pytest.approx(cos_TT.flatten().tolist(), abs=0.0051)
    assert_texts_are_apart_and_inside(figure)


# --- files


def test_all_plots_are_written_whole(tmp_path):
    model, metrics = merged_of(), write_metrics(tmp_path / "metrics.csv", rows_of(3))
    folder = tmp_path / "plots"
    paths = write_plots(folder, model=model, scores=scores_of(TASKS), metrics=metrics, vectors=model.vectors)
    assert [path.name for path in paths] == ["coefficients.png", "accuracy.png", "curves.png", "cosine.png"]
    assert sorted(paths) == sorted(folder.iterdir())
    for path in paths:
        with Image.open(path) as picture:
            picture.load()
            assert picture.format == "PNG"
            assert picture.info["dpi"][0] == pytest.approx(150, abs=1)


class Uncounted(MergeRule):
    """The base, whatever is asked."""

    def merge(self, name, base, deltas, shared):
        return base


def test_what_there_is_not_is_not_drawn(tmp_path):
    (tmp_path / "metrics.csv").write_text("epoch,step\n")
    model = merged_of(rule=Uncounted)
    assert write_plots(tmp_path, model=model, scores={}, metrics=tmp_path / "metrics.csv") == []
    assert write_plots(tmp_path, vectors=vectors_of(tasks=TASKS[:1])) == []
    (path,) = write_plots(tmp_path, model=merged_of(rule=TaskWise))
    assert path.name == "coefficients.png"


def test_a_killed_save_leaves_what_was_there(tmp_path, monkeypatch):
    (path,) = write_plots(tmp_path, scores=scores_of(TASKS))
    before, save = path.read_bytes(), Figure.savefig

    def killed(self, target, **options):
        save(self, target, **options)
        target.write_bytes(target.read_bytes()[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr(Figure, "savefig", killed)
    for folder in (tmp_path, tmp_path / "new"):
        with pytest.raises(KeyboardInterrupt):
            write_plots(folder, scores=scores_of(EIGHT))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["accuracy.png"]
    assert list((tmp_path / "new").iterdir()) == []


def test_the_table_needs_no_matplotlib_and_the_plots_no_pyplot(tmp_path):
    code = (
        "import sys, adamerge.report as r; r.score_table({'this merge': {'a': 0.5}}); from pathlib import Path\n"
        "assert 'matplotlib' not in sys.modules\n"
        f"assert r.write_plots(Path({str(tmp_path)!r}), scores={{'this merge': {{'a': 0.5}}}})\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_digits_names_are_those_of_the_demo():
    figure = coefficient_heatmap(coefs(DIGIT_TASKS, LAYERS), DIGIT_TASKS, LAYERS)
    assert {"stem", "norm", "blocks", "0", "1", "2", *DIGIT_TASKS} <= {text.get_text() for text in texts(figure)}
