"""Figures of what a latent dimension does: what is drawn is what was given."""

from __future__ import annotations

import io
from itertools import combinations

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from pyro_vae import plots


def test_traversals_are_ranked_by_kl() -> None:
    decoded = torch.arange(4.0)[:, None, None, None, None].expand(4, 5, 1, 3, 3)
    kl = torch.tensor([0.1, 2.0, 0.0, 1.0])
    figure = plots.traversals(decoded, kl, torch.linspace(-2, 2, 5), top=3, limits=(0, 3))
    (ax,) = figure.axes
    assert [tick.get_text()[:2] for tick in ax.get_yticklabels()] == ["z1", "z3", "z0"]
    picture = torch.as_tensor(ax.images[0].get_array().tolist())
    assert (3 * picture[[0, 4, 8], 0]).tolist() == pytest.approx([1.0, 3.0, 0.0])
    assert "from -2.0 to 2.0" in ax.get_title("left")
    (ax,) = plots.traversals(decoded[:3], kl[:3], dims=[3, 5, "top"]).axes
    assert [tick.get_text().split(",")[0] for tick in ax.get_yticklabels()] == ["z5", "z3", "top"]


def test_rows_are_drawn_with_their_names() -> None:
    x = torch.arange(6.0)[:, None, None, None].expand(6, 1, 3, 5).reshape(2, 3, 1, 3, 5)
    (ax,) = plots.image_rows(x, ["upper", "lower"], limits=(0, 5)).axes
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["upper", "lower"]
    picture = torch.as_tensor(ax.images[0].get_array().tolist())
    assert list(ax.get_yticks()) == [1.0, 5.0]
    box, (high, wide) = ax.get_window_extent(), picture.shape[:2]
    on_screen = torch.tensor([box.x0, box.width / wide, box.height / high]) * 96 / ax.figure.dpi
    assert torch.allclose(on_screen, on_screen.round(), atol=1e-4)  # no pixel wider than another
    assert on_screen[1] == pytest.approx(on_screen[2].item())
    places = [[picture[int(y), 6 * t] * 5 for t in range(3)] for y in ax.get_yticks()]
    assert torch.tensor(places).flatten().tolist() == pytest.approx([0, 1, 2, 3, 4, 5])
    assert ax.get_title("left") == ""


def test_latent_means_lie_on_the_axes_of_their_dimensions() -> None:
    means = torch.randn(7, 3) * torch.tensor([1.0, 0.1, 2.0])
    (ax,) = plots.latent(means).axes
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("E[z0 | x]", "E[z2 | x]")
    drawn = torch.as_tensor(ax.collections[0].get_offsets().tolist())
    assert drawn.flatten().tolist() == pytest.approx(means[:, [0, 2]].flatten().tolist())
    assert "largest variance" in ax.get_title()
    (ax,) = plots.latent(means, names=np.array(["a", "b", "c"])).axes  # type: ignore[arg-type]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("E[a | x]", "E[c | x]")
    (ax,) = plots.latent(means[:, :2], torch.arange(7)).axes
    assert ax.get_title() == "posterior means"
    (ax,) = plots.latent(means[:, :1], torch.arange(7) // 4).axes
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("E[z0 | x]", "rows, in order")
    drawn = torch.cat([torch.tensor(c.get_offsets().tolist()) for c in ax.collections])
    assert drawn[:, 0].tolist() == pytest.approx(means[:, 0].tolist())
    assert (drawn[:, 1].diff() > 0).all()
    assert plots.latent(means[:1]).axes
    (ax,) = plots.latent(means, torch.tensor([0, 0, -1, -1, 1, 1, 1])).axes
    assert [text.get_text() for text in ax.texts] == ["?", "0", "1"]  # -1 is an unknown class
    (ax,) = plots.latent(means, torch.arange(7) // 4 - 1, class_names=["yes"]).axes
    assert [text.get_text() for text in ax.texts] == ["?", "yes"]


@pytest.mark.parametrize("count", [1, 2, 4, 5, 9, 30])
@pytest.mark.parametrize("scale", [1.0, 1e6])
def test_columns_of_tables(count: int, scale: float) -> None:
    data, samples = torch.randn(97, count) * scale + scale, torch.randn(53, count) * scale
    names = [f"a rather long name of column number {d}" for d in range(count)]
    figure = plots.columns(data, samples, names)
    shown = min(count, 9)
    assert len(figure.axes) == shown
    for d, ax in enumerate(figure.axes):
        assert names[d].startswith(ax.get_title().removesuffix("..."))
        held, drawn = (p.get_path().vertices for p in ax.patches)
        low, high = data[:, d].min(), data[:, d].max()
        inside = ((samples[:, d] >= low) & (samples[:, d] <= high)).double().mean()
        assert held[:, 0].min() == pytest.approx(low.item())
        for outline, share in ((held, 1.0), (drawn, inside.item())):
            assert outline_total(outline) == pytest.approx(share)
    first = "the first 9 of 30 columns" if count == 30 else "each column"
    assert figure.get_suptitle() == f"{first}, share of rows"
    FigureCanvasAgg(figure).draw()
    labels = [
        label.get_window_extent()
        for ax in figure.axes
        for label in (ax.title, *ax.get_xticklabels(), ax.xaxis.get_offset_text())
        if label.get_text()
    ]
    assert not any(a.overlaps(b) for a, b in combinations(labels, 2))


def outline_total(vertices: np.ndarray) -> float:
    """Sum of the heights of a histogram's bins, from its outline, there (and back on the axis)."""
    steps = zip(vertices, vertices[1:])
    heights = [a[1] for a, b in steps if b[0] > a[0]]
    return float(sum(heights))


def test_integers_have_a_bin_each() -> None:
    data = torch.tensor([[3.0], [3.0], [5.0], [3.0]])
    (ax,) = plots.columns(data, data).axes
    assert sorted({round(x, 3) for x in ax.patches[1].get_path().vertices[:, 0]}) == [
        2.5, 3.5, 4.5, 5.5,
    ]  # fmt: skip
    assert ax.get_title() == "column 0"
    assert plots.columns(torch.ones(7, 1), torch.zeros(7, 1)).axes
    assert plots.columns(torch.full((7, 1), torch.nan), torch.zeros(7, 1)).axes


def test_codes_are_named() -> None:
    data = torch.arange(60.0)[:, None] % torch.tensor([2, 3, 30, 7])
    towns = [f"a town of number {d}" for d in range(30)]
    known = {"smokes": ["no", "yes"], "grade": [1, 2.5, "$"], "town": towns, "visits": ()}
    for figure in (plots.columns(data, data, known), plots.pairs(data, data, known)):
        FigureCanvasAgg(figure).draw()
        axes = {ax.get_title() or ax.get_xlabel(): ax for ax in figure.axes}
        for name, shown in (("smokes", ["no", "yes"]), ("grade", ["1", "2.5", r"\$"])):
            assert [tick.get_text() for tick in axes[name].get_xticklabels()] == shown
            assert list(axes[name].get_xticks()) == [*range(len(shown))]
    (ax,) = [ax for ax in plots.columns(data, data, known).axes if ax.get_title() == "town"]
    assert list(ax.get_xticks()) == [*range(0, 30, 3)]
    assert {tick.get_text() for tick in ax.get_xticklabels()} == {"a town of..."}
    x, y = torch.tensor(plots.pairs(data[:, :2], data[:, :2]).axes[0].lines[0].get_xydata()).T
    noise = torch.stack([x - x.round(), y - y.round()])
    assert torch.corrcoef(noise)[0, 1].abs() < 0.5  # a noise of its own for each column


def test_pairs_are_of_the_columns_whose_ranks_go_together() -> None:
    data = torch.randn(53, 7)
    data[:, 5] = -(data[:, 1] * 4).exp()
    data[:, 3] = (data[:, 4] > 0).float()
    data[:, 6] = 2.0
    data[::5, 2] = torch.nan
    samples = torch.randn(31, 7)
    figure = plots.pairs(data, samples, list("abcdefg"))
    above, below = figure.axes[:4], figure.axes[4:]
    assert [(ax.get_xlabel(), ax.get_ylabel()) for ax in below[:2]] == [("b", "f"), ("d", "e")]
    for ax, rows in ((above[0], data), (below[0], samples)):
        assert torch.equal(torch.tensor(ax.lines[0].get_xydata()).float(), rows[:, [1, 5]])
    assert above[0].get_ylim() == below[0].get_ylim() == (data[:, 5].min(), data[:, 5].max())
    codes = torch.tensor(above[1].lines[0].get_xdata())
    assert torch.equal(codes.round().float(), data[:, 3])
    assert len(plots.pairs(data[:, 1:3], samples[:, 1:3]).axes) == 2
    data[:, 0], data[:, 2] = torch.nan, torch.arange(53)  # empty cells go with nothing
    pairs = {ax.get_xlabel() for ax in plots.pairs(data, samples, list("abcdefg")).axes}
    assert "a" not in pairs


def test_the_factor_matrix_is_drawn_as_it_is() -> None:
    information = torch.rand(2, 3)
    ax, _ = plots.factor_matrix(information, ["x", "y"]).axes
    assert torch.equal(torch.as_tensor(ax.images[0].get_array().tolist()), information)
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["x", "y"]


def test_curves_over_epochs() -> None:
    epochs, kl = torch.arange(4), torch.rand(4, 12)
    ax, bars = plots.unit_kl(epochs, kl, [f"z{d % 2}[{d // 2}]" for d in range(12)]).axes
    assert [bar.get_height() for bar in bars.patches[:6]] == sorted(kl[-1, ::2].tolist())[::-1]
    ax, bars = plots.unit_kl(epochs, kl).axes
    order = kl[-1].argsort(descending=True)
    assert [tick.get_text() for tick in bars.get_xticklabels()] == [f"z{d}" for d in order]
    for count in (1, 2, 4):
        (short,) = plots.terms(epochs[:count], {"kl": kl[:count, 0]}).axes
        assert all(tick == round(tick) for tick in short.get_xticks())
    assert [list(line.get_ydata()) for line in ax.lines] == kl.T[order].tolist()
    named = {text.get_text(): text.get_position()[1] for text in ax.texts}
    assert list(named) == [f"z{d}" for d in reversed(order[:10].tolist())]
    heights = torch.tensor(list(named.values()))
    assert (heights.diff() > 0.05).all()
    assert heights.max() <= 1
    (ax,) = plots.terms(epochs, {"total_correlation": kl[:, 0], "kl": kl[:, 1]}).axes
    assert {t.get_text() for t in ax.texts} == {"total correlation", "kl"}
    assert list(ax.lines[1].get_ydata()) == kl[:, 1].tolist()
    for figure in (
        plots.unit_kl(epochs[:1], kl[:1]),
        plots.terms(epochs[:1], {"kl": kl[:1, 0]}),
        plots.curves([{"epoch": 1, "elbo": -3.0}]),
    ):
        assert figure.axes[0].lines[0].get_marker() == "."  # a line of one point is not seen


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"images \[D, T, C, H, W\] and kl \[D\]"):
        plots.traversals(torch.zeros(4, 5, 1, 3, 3), torch.zeros(3))
    with pytest.raises(ValueError, match=r"images \[R, T, C, H, W\] and R names; got .* and 1"):
        plots.image_rows(torch.zeros(2, 5, 1, 3, 3), ["one"])
    with pytest.raises(ValueError, match=r"a matrix \[F, D\] and F names"):
        plots.factor_matrix(torch.zeros(2, 3), ["x"])


def test_an_audit_shows_every_gap_and_the_reach() -> None:
    gap, reliable = torch.tensor([0.02, 7.0, -0.01, 0.4, 0.1]), torch.tensor([1, 1, 1, 0, 0]) > 0
    (ax,) = plots.audit(gap, reliable, 0.3).axes
    good, doubtful, line = ax.lines
    assert list(good.get_xdata()) == [0, 1, 4]
    assert list(good.get_ydata()) == pytest.approx([-0.01, 0.02, 7.0])
    assert list(doubtful.get_ydata()) == pytest.approx([0.1, 0.4])
    assert list(line.get_ydata()) == [0.3, 0.3]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        "reliable: 3",
        "doubtful: 2",
    ]


def test_the_style_is_of_the_figures_alone() -> None:
    before = dict(matplotlib.rcParams)
    with plots.style():
        assert matplotlib.rcParams["axes.prop_cycle"].by_key()["color"] == list(plots.PALETTE)
    kl = torch.rand(3)
    first, second = (plots.terms(torch.arange(3), {"kl": kl}) for _ in range(2))
    assert first.axes[0].lines[0].get_color() == plots.PALETTE[0]
    assert plots.svg(first) == plots.svg(second)
    assert b"prefers-color-scheme: dark" in plots.svg(first)
    assert dict(matplotlib.rcParams) == before


def test_a_notebook_shows_a_figure_at_its_size() -> None:
    figure = plots.images(torch.rand(4, 1, 3, 5), "four")
    data, shown = figure._repr_png_()
    picture = Image.open(io.BytesIO(data))
    assert picture.size == (2 * shown["width"], 2 * shown["height"])
    assert picture.getpixel((picture.width - 1, 0))[3] == 0  # no ground beside the title


@pytest.mark.parametrize("kind", ["skewed", "far"])
def test_skewed_columns_are_not_squeezed(kind: str) -> None:
    z = torch.randn(2003, 2, generator=torch.Generator().manual_seed(0))
    data = (3 * z).exp() if kind == "skewed" else z
    if kind == "far":
        data[7] = 1e6
    (ax, _) = plots.columns(data, data).axes
    heights = max(patch.get_xy()[:, 1].max() for patch in ax.patches)
    assert heights < 0.5
    ax = plots.pairs(data, data).axes[0]
    assert ax.get_xscale() == ("log" if kind == "skewed" else "linear")
    x = torch.tensor(ax.lines[0].get_xdata()).double()
    low, high = map(ax.transData.transform, zip(ax.get_xlim(), ax.get_ylim()))
    points = ax.transData.transform(torch.stack([x, x], 1).numpy())
    share = torch.tensor((points[:, 0] - low[0]) / (high[0] - low[0])).histc(10, 0, 1) / len(x)
    assert share.max() < 0.6


def test_rows_at_the_ends_of_a_logarithmic_axis_are_counted() -> None:
    data = torch.full((100, 1), 5.1)
    data[51:] *= 100
    (ax,) = plots.columns(data, data).axes
    assert ax.get_xscale() == "log"
    shares = ax.patches[0].get_xy()[:, 1].round(6)
    assert {0.49, 0.51} <= {*shares.tolist()}


def test_samples_below_zero_on_a_logarithmic_axis_are_left_out() -> None:
    data = torch.randn(100, 2, generator=torch.Generator().manual_seed(0)).mul(3).exp()
    (above, below) = plots.pairs(data, -data).axes
    assert below.get_xscale() == "log"
    assert (below.get_xlim(), below.get_ylim()) == (above.get_xlim(), above.get_ylim())
    low, high = below.get_xlim()
    assert 0 < low <= data[:, 0].min() * 1.001
    assert high >= data[:, 0].max() * 0.999
