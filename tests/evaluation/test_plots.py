"""Pictures: they show the right numbers, and render whatever they get."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.container import ErrorbarContainer
from matplotlib.image import imread
from torch import nn

from hf_prune import compare, plot_layer_sparsity, plot_tradeoff, plot_weight_histogram, prune, sparsity_report
from hf_prune.evaluation.accuracy_result import Evaluation
from hf_prune.evaluation.sweep_point import SweepPoint
from hf_prune.evaluation.weight_statistics import WeightHistogram, weight_histogram
from hf_prune.utils.figures import PALETTE, save_figure, save_pair
from tests import models

N = 100
PNG = b"\x89PNG\r\n\x1a\n"


def evaluation(right: int) -> Evaluation:
    """The first so many of 100 examples are right."""
    p = right / N
    return Evaluation(
        accuracy=p,
        n=N,
        standard_error=(p * (1 - p) / N) ** 0.5,
        predictions=tuple(int(i >= right) for i in range(N)),
        labels=(0,) * N,
        split="validation",
        source="here",
        data_fingerprint="0" * 16,
        seconds=1.0,
        dtype="float32",
        max_length=8,
        batch_size=32,
    )


DENSE = evaluation(90)


def point(sparsity: float, right: int, criterion: str = "magnitude") -> SweepPoint:
    pruned = evaluation(right)
    return SweepPoint(criterion, sparsity, sparsity, sparsity / 2, 1000, 0.1, pruned, compare(DENSE, pruned))


def tradeoff(points: list[SweepPoint], best: SweepPoint | None = None) -> Any:
    return plot_tradeoff(DENSE.accuracy, points, best, "model", "data, n = 100")


def labels(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def render(figure: Any, tmp_path: Path) -> None:
    """Warnings are errors, so nothing is missing from the font or the layout."""
    path = save_figure(figure, tmp_path / "plot.png")
    assert path.read_bytes().startswith(PNG)
    assert [p.name for p in tmp_path.iterdir()] == ["plot.png"]


# --- histogram -------------------------------------------------------------------------------------


def test_histogram_shows_the_counts_and_the_spike(tmp_path):
    model = models.tiny_bert()
    names = [t.name for t in sparsity_report(model).targets]
    before = weight_histogram(model, names)
    after = weight_histogram(prune(model, 0.75), names, limit=float(before.edges[-1]))
    figure = plot_weight_histogram(before, after, "the title")
    (axes,) = figure.axes
    stairs = [patch for patch in axes.patches if hasattr(patch, "get_data")]
    assert [np.array_equal(s.get_data().values, h.counts) for s, h in zip(stairs, (before, after), strict=True)] == [
        1,
        1,
    ]
    assert all(np.array_equal(s.get_data().edges, before.edges) for s in stairs)
    (spike,) = axes.containers[0]
    assert spike.get_height() == after.zeros > before.counts.max()
    assert spike.get_x() + spike.get_width() / 2 == pytest.approx(0)
    assert spike.get_width() == pytest.approx(before.edges[1] - before.edges[0])
    assert axes.get_yscale() == "log"
    assert axes.get_ylim()[1] > after.zeros
    assert axes.get_ylim()[0] < before.counts[before.counts > 0].min()
    assert axes.get_xlim() == pytest.approx((before.edges[0], before.edges[-1]))
    assert axes.get_title() == "the title"
    assert labels(axes)[-1] == f"pruned: exactly zero ({after.zeros:,}, 75.0 %)"
    render(figure, tmp_path)


def histogram_of(values: list[float], limit: float | None = None) -> WeightHistogram:
    layer = nn.Linear(max(1, len(values)), 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([values or [0.0]]))
    return weight_histogram(layer, ["weight"] if values else [], limit=limit)


@pytest.mark.parametrize("values", [[0.0, 0.0, 0.0], [], [0.5], [1e-30, 2e-30], [3.0, 3.0, 3.0], [-1e4, 1e-4]])
@pytest.mark.parametrize("pruned", [False, True])
def test_histogram_of_odd_weights_renders(tmp_path, values, pruned):
    before = histogram_of(values)
    after = histogram_of([0.0] * len(values) if pruned else values, limit=float(before.edges[-1]))
    figure = plot_weight_histogram(before, after, "odd")
    low, high = figure.axes[0].get_ylim()
    assert 0 < low < high
    assert all(low < count < high for count in (*before.counts, *after.counts, after.zeros) if count)
    render(figure, tmp_path)


def test_histogram_without_the_dense_weights(tmp_path):
    after = histogram_of([0.0, 0.5, -0.5, 0.0])
    figure = plot_weight_histogram(None, after, "pruned only")
    assert len(figure.axes[0].get_legend_handles_labels()[1]) == 2
    assert figure.axes[0].containers[0].patches[0].get_height() == 2
    render(figure, tmp_path)


# --- layers ----------------------------------------------------------------------------------------


def test_layers_show_every_target_in_the_order_of_the_model(tmp_path):
    model = prune(models.tiny_bert(), 0.5, scope="global")
    report = sparsity_report(model)
    figure = plot_layer_sparsity(report, "layers")
    (axes,) = figure.axes
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([100 * t.sparsity for t in report.targets])
    assert len(set(round(bar.get_width(), 6) for bar in axes.patches)) > 3
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == [t.name.removesuffix(".weight") for t in report.targets]
    assert axes.yaxis_inverted()
    assert list(axes.lines[0].get_xdata()) == pytest.approx([50, 50])
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["all targets: 50.0 %"]
    assert axes.get_xlim() == (0, 100)
    render(figure, tmp_path)


def test_labels_of_many_layers_do_not_overlap():
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(80)))
    figure = plot_layer_sparsity(sparsity_report(model), "many")
    figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
    assert len(boxes) == 80
    assert all(upper.y0 >= lower.y1 - 1 for upper, lower in itertools.pairwise(boxes))


@pytest.mark.parametrize("model", [nn.LayerNorm(3), nn.Linear(3, 2)])
def test_layers_of_a_model_with_no_or_one_target_render(tmp_path, model):
    render(plot_layer_sparsity(sparsity_report(model), "few"), tmp_path)


# --- trade-off -------------------------------------------------------------------------------------


def lines(axes: Any) -> dict[str, ErrorbarContainer]:
    return {c.get_label(): c for c in axes.containers if isinstance(c, ErrorbarContainer)}


def texts(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_tradeoff_shows_points_intervals_the_dense_point_and_the_sweet_spot(tmp_path):
    points = [point(0.8, 60), point(0.3, 89), point(0.5, 85), point(0.3, 70, "random"), point(0.5, 55, "random")]
    figure = tradeoff(points, points[1])
    (axes,) = figure.axes
    assert list(axes.lines[0].get_ydata()) == [90, 90]
    drawn = lines(axes)
    assert list(drawn) == ["magnitude", "random"]
    assert drawn["magnitude"].lines[0].get_xydata() == pytest.approx(np.array([[0, 90], [30, 89], [50, 85], [80, 60]]))
    assert drawn["random"].lines[0].get_xydata() == pytest.approx(np.array([[0, 90], [30, 70], [50, 55]]))
    assert drawn["magnitude"].lines[0].get_color() != drawn["random"].lines[0].get_color()
    for (x, low), (_, high) in drawn["magnitude"].lines[2][0].get_segments()[1:]:
        (p,) = (p for p in points if p.criterion == "magnitude" and p.sparsity == pytest.approx(x / 100))
        best, worst = p.comparison.interval  # of the drop
        assert low == pytest.approx(90 - worst)
        assert high == pytest.approx(90 - best)
        assert low < 100 * p.evaluation.accuracy < high
    (ring,) = (line for line in axes.lines if line.get_markersize() == 15)
    assert ring.get_xydata().tolist() == [[30, 89]]
    assert axes.get_legend() is None  # each line has its name at its end, in its colour
    assert texts(axes) == ["dense 90.00 %", "sweet spot", "magnitude", "random"]
    assert axes.texts[-1].get_color() == drawn["random"].lines[0].get_color()
    assert axes.get_title() == "model\ndata, n = 100"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("sparsity of the targets (%)", "accuracy (%)")
    render(figure, tmp_path)


def test_names_at_the_ends_of_lines_do_not_overlap(tmp_path):
    figure = tradeoff([point(0.5, 80 + j % 2, f"criterion {j}") for j in range(6)])
    render(figure, tmp_path)
    boxes = [text.get_window_extent() for text in figure.axes[0].texts if text.get_text().startswith("criterion")]
    assert len(boxes) == 6
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    assert all(box.x1 <= figure.bbox.x1 for box in boxes)


def test_tradeoff_without_a_sweet_spot():
    (axes,) = tradeoff([point(0.3, 50)]).axes
    assert "sweet spot" not in texts(axes)


def test_colours_are_told_apart_by_the_colour_blind_and_pictures_are_legible_on_any_page(tmp_path):
    """As seen without one kind of cone (Machado et al. 2009): no two colours of the palette come close."""
    blind = {
        "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    }
    colours = np.array([to_rgb(colour) for colour in PALETTE])
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    for matrix in blind.values():
        seen = linear @ np.array(matrix).T
        apart = [np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)]
        assert min(apart) > 0.1
    drawn = tradeoff([point(0.3, 80)])
    light, dark = save_pair(drawn, tmp_path / "plot.png")
    assert (light.name, dark.name) == ("plot.png", "plot-dark.png")
    for path, lowest, highest in (
        (light, 0, 0.3),
        (dark, 0.7, 1),
        (save_figure(drawn, tmp_path / "any.png"), 0.3, 0.6),
    ):
        pixels = imread(path)
        assert pixels[2, 2, 3] == 0  # transparent
        words = pixels[:80][pixels[:80, :, 3] > 0.99][:, :3]  # the title
        assert lowest <= words.mean() <= highest


@pytest.mark.parametrize(
    "points",
    [
        [],
        [point(0.5, 80)],
        [point(0.3, 80), point(0.5, 80)],
        [point(0.3, 90), point(0.5, 90)],  # no example differs: intervals round to nothing
        [point(1.0, 0)],
        [point(0.5, 100)],
        [point(0.1 * i, 90 - i, f"criterion {j}") for i in range(1, 9) for j in range(14)],
    ],
)
def test_tradeoff_of_odd_points_renders(tmp_path, points):
    figure = tradeoff(points, points[0] if points else None)
    drawn = lines(figure.axes[0])
    assert set(drawn) <= {p.criterion for p in points}
    assert len(drawn) == min(6, len({p.criterion for p in points}))
    assert len({c.lines[0].get_color() for c in drawn.values()}) == len(drawn)
    render(figure, tmp_path)


# --- files -----------------------------------------------------------------------------------------


def test_save_figure_by_suffix_and_over_an_old_file(tmp_path):
    figure = tradeoff([point(0.5, 80)])
    assert save_figure(figure, tmp_path / "new" / "a.svg").read_text().startswith("<?xml")
    (tmp_path / "a.png").write_text("old")
    assert save_figure(figure, tmp_path / "a.png").read_bytes().startswith(PNG)


def test_save_figure_of_an_unknown_kind_keeps_the_old_file(tmp_path):
    (tmp_path / "a.xyz").write_text("old")
    with pytest.raises(ValueError, match="Format 'xyz' is not supported"):
        save_figure(tradeoff([]), tmp_path / "a.xyz")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.xyz", "old")]


def test_pyplot_is_not_touched():
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    tradeoff([point(0.5, 80)])
    assert plt.get_fignums() == before
