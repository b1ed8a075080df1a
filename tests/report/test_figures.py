"""What the figures show is what they were given; nothing is cut off; the files are the same every time."""

import itertools
import re
from functools import partial
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
from browser import contrast
from every_kind import KINDS
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.container import ErrorbarContainer

from saejax.evaluation.results import DensityHistogram
from saejax.interventions.answers import CONTROLS
from saejax.interventions.patching import DIRECTIONS, PatchGrid
from saejax.page import style
from saejax.results import Interval
from saejax.stages.ablate import report as figures
from saejax.stages.baseline import report as tasks
from saejax.stages.patch import report as patching
from saejax.stages.probe import report as probes
from saejax.stages.steer import report as steering
from saejax.stages.train import figures as dictionary_figures
from saejax.unicode import visible_token


def interval(mean, half=0.1):
    return Interval(mean, mean - half, mean + half)


NAMES = ("Subject-verb agreement", "Capital of a country", "A behaviour with quite a long name indeed", "x")


def baselines_figure():
    split = SimpleNamespace(accuracy=Interval(0.95, 0.85, 1.0), logit_diff=interval(-3.1, 2.0))
    both = SimpleNamespace(splits=dict(test=split, train=split))
    return tasks.baselines(dict.fromkeys(NAMES, both))


def training_figure(members=1):
    values = [([-0.2, 0.9 - 0.1 * i], [3000, 40 * (i + 1)]) for i in range(members)]
    curves = [dictionary_figures.TrainingCurve([1e4, 1e6], *each) for each in values]
    return dictionary_figures.training({"topk": curves, "standard": curves})


def density_figure(edges=(-6, -4, -2, 0), counts=(0, 5, 9)):
    histogram = DensityHistogram(tuple(edges), tuple(counts), never=1234)
    return dictionary_figures.density({"topk": [histogram], "standard": [histogram]})


def point(l0, explained_variance, ce_recovered):
    return SimpleNamespace(l0=l0, explained_variance=explained_variance, ce_recovered_mean=ce_recovered)


SWEEP = [point(16, 0.7, 0.9), point(64, 0.8, 0.97), point(32, 0.75, 0.95), point(40, 0.6, 0.96)]


def frontier_figure():
    kinds = dict(topk=[SWEEP], standard=[SWEEP[:2], SWEEP[2:]], gated=[[point(50.5, -0.3, 0.5)]])
    return dictionary_figures.frontier(kinds | dict(linear=[[point(0.0, 0.0, None)]]))


def control_figure(sets=40, bases=3):
    rng = np.random.default_rng(0)
    controls = {group: rng.normal(0.3, 0.2, sets) for group in CONTROLS}
    names = ("MLP neurons", "principal components", "the difference of means")[:bases]
    top = {0.2: 0.4, 0.6: 1.7, 1.0: 3.0}
    return figures.control_strips(NAMES[2], top, interval(3.0), controls, dict.fromkeys(names, 1.0))


def probe_rows(sizes=(1, 20, None)):
    rows = []
    for name, shift in (("features", 0.1), ("raw", -0.1)):
        values = dict(accuracy=interval(0.5 + shift), shuffled=interval(0.3 + shift, 0.05), majority=0.4)
        rows += [SimpleNamespace(input=name, k=k, **values) for k in sizes]
    return rows


def probes_figure():
    return probes.probes({name: probe_rows() for name in NAMES})


WORDS = ["The", " near", "\n", " \x00\u200b", " extraordinarily", "$$"]  # no formula


def heatmap_figure(layers=30, length=14, is_normalised=True, heads=1):
    shape = (2, layers, heads, length)
    direction_N, layer_N, head_N, column_N = (index.ravel() for index in np.indices(shape))
    share_N = np.where(np.abs(column_N - length // 2) < 1, layer_N / layers, 0.02)
    nothing_N = np.full(len(share_N), np.nan)
    grid = PatchGrid(
        direction=np.array(DIRECTIONS, object)[direction_N],
        layer=layer_N,
        head=head_N if heads > 1 else nothing_N,
        position=column_N - length if length > 1 else nothing_N,
        prompts=0 * layer_N,
        **dict.fromkeys(("effect", "low", "high", "normalised"), share_N),
    )
    columns = [SimpleNamespace(token=WORDS[i % 6], differs=float(i == length // 2)) for i in range(length)]
    return patching.heatmap(grid, SimpleNamespace(is_normalised=is_normalised, columns=columns))


def steering_figure():
    points = [SimpleNamespace(dose=dose, drop=interval(dose / 10)) for dose in (0.0, 12.0, 40.0)]
    method = SimpleNamespace(points=points, chosen=2, controls=(-1.0, 0.5, 2.0))
    few = SimpleNamespace(points=points[:2], chosen=1, controls=())
    return steering.steering({name: SimpleNamespace(methods=dict(add=method, clamp=few)) for name in NAMES})


DRAWN = [
    control_figure,
    lambda: control_figure(0, 0),
    lambda: figures.control_strips("$^$", {1.0: 3.0}, interval(3.0), {}, {"sets/$\\frac$": 1.0}),
    steering_figure,
    lambda: heatmap_figure(length=1, heads=9),
    *(partial(heatmap_figure, *size, is_normalised=False) for size in ((30, 14), (2, 40), (1, 1), (30, 1))),
    probes_figure,
    lambda: probes.probes({"x": probe_rows((None,))}),
    baselines_figure,
    training_figure,
    density_figure,
    lambda: density_figure(counts=(0, 0, 0)),
    lambda: density_figure(edges=np.linspace(-9, 0, 4)),
    lambda: dictionary_figures.training({"topk": []}),
    lambda: training_figure(3),
    frontier_figure,
    lambda: dictionary_figures.frontier({kind: [SWEEP] for kind in KINDS}),
]


@pytest.mark.parametrize("draw", DRAWN)
def test_nothing_is_cut_off_and_row_labels_do_not_overlap(draw):
    figure = draw()
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    drawn = [figure.get_tightbbox(canvas.get_renderer()).transformed(figure.dpi_scale_trans)]
    panels = [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]
    titles = [text.get_window_extent() for axes in panels for text in axes.texts]
    width, height = canvas.get_width_height()
    assert len(titles) == len(panels)
    for box in drawn + titles:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            labels = zip(axis.get_majorticklocs(), axis.get_majorticklabels(), strict=True)
            boxes = [label.get_window_extent() for place, label in labels if low <= place <= high]
            assert not any(a.overlaps(b) for a, b in itertools.pairwise(boxes))


def bars(axes):
    """Error bars of the axes, in order: (mean, low, high)."""
    drawn = [container.lines for container in axes.containers if isinstance(container, ErrorbarContainer)]
    ends = [segments.get_segments()[0] for _, _, (segments,) in drawn]
    return [(line.get_xdata()[0], start[0], end[0]) for (line, *_), (start, end) in zip(drawn, ends, strict=True)]


def test_baselines_show_percent_and_logits():
    upper, lower = baselines_figure().axes
    assert np.allclose(bars(upper), [(95, 85, 100)] * 8)
    assert np.allclose(bars(lower), [(-3.1, -5.1, -1.1)] * 8)
    assert upper.get_xlim()[0] < 85 and any(np.allclose(line.get_xdata(), 80) for line in upper.lines)


def test_each_kind_of_control_is_a_strip_beside_the_top_features():
    controls = dict(random=np.array([0.1, 0.5]), placebo=np.zeros(0), untrained=np.array([0.2, 0.3, 1.0]))
    (axes,) = figures.control_strips("b", {0.5: 1.0, 1.0: 3.0}, interval(3.0), controls, {"neurons": 2.0}).axes
    labels = [label.get_text().replace("\n", " ") for label in axes.get_xticklabels()]
    assert labels == ["top features", "2 random lists", "3 untrained", "simpler bases"]
    drawn = {
        round(float(line.get_xdata().mean())): line.get_ydata().tolist()
        for line in axes.lines
        if line.get_marker() == "o"
    }
    assert drawn == {1: [0.1, 0.5], 2: [0.2, 0.3, 1.0]}
    (square,) = [line for line in axes.lines if line.get_marker() == "s"]
    assert (square.get_xdata()[0], square.get_ydata()[0]) == (3, 2.0)


def test_probes_show_accuracy_by_size_above_what_shuffled_labels_reach():
    axes = probes_figure().axes[0]
    lines = [container.lines[0] for container in axes.containers if isinstance(container, ErrorbarContainer)]
    assert [line.get_ydata().tolist() for line in lines] == [pytest.approx([60.0] * 3), pytest.approx([40.0] * 3)]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "20", "all"]
    (band,) = axes.collections[:1]
    assert band.get_paths()[0].get_extents().intervaly.tolist() == pytest.approx([15.0, 45.0])


def test_a_heatmap_holds_the_cells_with_the_first_layer_at_the_bottom():
    axes = heatmap_figure(3, 5).axes[0]
    (image,) = axes.images
    assert image.origin == "lower" and image.get_array().shape == (3, 5) and image.get_clim() == (-1, 1)
    np.testing.assert_allclose(image.get_array()[:, 2], [0, 1 / 3, 2 / 3])
    assert [label.get_fontweight() for label in axes.get_xticklabels()] == ["normal"] * 2 + ["bold"] + ["normal"] * 2


def test_tokens_below_a_heatmap_are_shown_as_on_pages():
    labels = [label.get_text() for label in heatmap_figure(2, 6).axes[0].get_xticklabels()]
    assert labels[:3] == [visible_token(token) for token in WORDS[:3]] == ["The", "␣near", "↵"]
    assert labels[3:] == ["␣·\\u200b", "␣extraordin…", "$$"]


def test_density_counts_and_axis():
    (axes,) = density_figure().axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.01 %", "0.1 %", "1 %", "10 %", "100 %"]
    assert any(np.allclose(line.get_xdata(), -1) for line in axes.lines)
    assert list(axes.patches[0].get_data().values) == [0, 5, 9]


def test_density_of_a_stack_is_the_mean_bin_by_bin():
    few = DensityHistogram((-4, -2, 0), (4, 6), never=10)
    more = DensityHistogram((-6, -4, -2, 0), (2, 2, 2), never=20)  # more tokens reach further down
    (axes,) = dictionary_figures.density({"topk": [few, more]}).axes
    assert list(axes.patches[0].get_data().values) == [1, 3, 4]
    assert axes.get_legend_handles_labels()[1][0] == "topk, mean of 2 (15 never fire)"


def test_training_of_a_stack_is_the_median_in_a_band():
    upper, lower = training_figure(3).axes
    assert list(upper.lines[0].get_ydata()) == [-0.2, 0.8] and list(lower.lines[0].get_ydata()) == [3000, 80]
    assert np.ptp(lower.collections[0].get_paths()[0].vertices[:, 1]) == 2960
    assert len(training_figure().axes[0].collections) == 0


def test_the_frontier_joins_what_is_not_beaten():
    upper, lower = frontier_figure().axes
    topk = [line for line in upper.lines if line.get_color() == style.BLUE]
    assert [list(line.get_xdata()) for line in topk] == [[16, 32, 64], [40]]
    assert topk[0].get_alpha() is None and topk[1].get_alpha() == 0.4 and topk[1].get_linestyle() == "None"
    assert list(topk[0].get_ydata()) == [0.7, 0.75, 0.8]
    recovered = [line for line in lower.lines if line.get_color() == style.BLUE]
    assert list(recovered[0].get_xdata()) == [16, 32, 40, 64]
    standard = [line for line in upper.lines if line.get_color() == style.ORANGE]
    assert [list(line.get_xdata()) for line in standard[::2]] == [[16, 64], [32]]  # a line for each site
    assert upper.get_legend_handles_labels()[1].count("linear") == 0  # no feature of it is ever active


def test_files_are_the_same_every_time_whatever_the_callers_style(tmp_path):
    for folder, changes in (("a", {}), ("b", {"font.size": 30, "axes.facecolor": "red", "lines.linewidth": 9})):
        (tmp_path / folder).mkdir()
        with matplotlib.rc_context(changes):
            style.save(control_figure(), tmp_path / folder, "x")
    for name in ("x.svg", "x.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    svg = (tmp_path / "a" / "x.svg").read_text()
    assert "dc:date" not in svg and len(svg) < 150_000
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["x.png", "x.svg"]


def test_inline_svgs_share_a_page(tmp_path):
    svg = style.save(control_figure(), tmp_path, "x")
    parts = [style.inline(svg, name, 'A "quoted" <text>') for name in ("one", "two")]
    ids = re.findall(r'\bid="([^"]+)"', "".join(parts))
    assert len(ids) == len(set(ids)) > 10
    references = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', parts[0])
    assert references and {a or b for a, b in references} <= set(ids)
    for text in ('role="img" aria-label="A &#34;quoted&#34; &lt;text&gt;"', "currentColor", "viewBox"):
        assert text in parts[0]
    for text in (style.INK, style.PAPER, r"<\?xml", "<svg[^>]* width="):
        assert not re.search(text, parts[0])


@pytest.mark.parametrize("color", [*sorted({line[0] for line in style.LINES} - {style.INK}), style.GREY])
@pytest.mark.parametrize("paper", ["#ffffff", "#14181d"])
def test_colours_stand_out_on_light_and_dark(color, paper):
    assert contrast(color, paper) >= 3  # what WCAG asks of graphics


def test_members_whose_curves_have_other_points_and_an_eighth_kind_are_drawn():
    short = dictionary_figures.TrainingCurve([1e6, 3e6], [0.2, 0.4], [10.0, 30.0])
    long = dictionary_figures.TrainingCurve([1e6, 2e6, 3e6, 4e6], [0.4, 0.4, 0.6, 0.8], [10.0, 10.0, 10.0, 10.0])
    kinds = {"topk": [short, long]} | {f"kind{number}": [short] for number in range(8)}
    upper, _ = dictionary_figures.training(kinds).axes
    assert len(upper.lines) == 9
    np.testing.assert_allclose(upper.lines[0].get_xydata(), [[1, 0.3], [2, 0.35], [3, 0.5], [4, 0.8]])
