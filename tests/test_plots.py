"""Figures of what a latent dimension does: what is drawn is what was given."""

from __future__ import annotations

import pytest
import torch

from pyro_vae import plots


def test_traversals_are_ranked_by_kl() -> None:
    decoded = torch.arange(4.0)[:, None, None, None, None].expand(4, 5, 1, 3, 3)
    kl = torch.tensor([0.1, 2.0, 0.0, 1.0])
    figure = plots.traversals(decoded, kl, torch.linspace(-2, 2, 5), top=3, limits=(0, 3))
    (ax,) = figure.axes
    assert [tick.get_text()[:2] for tick in ax.get_yticklabels()] == ["z1", "z3", "z0"]
    picture = torch.as_tensor(ax.images[0].get_array().tolist())
    assert (3 * picture[[0, 4, 8], 0]).tolist() == pytest.approx([1.0, 3.0, 0.0])
    assert "from -2.0 to 2.0" in ax.get_title()


def test_the_factor_matrix_is_drawn_as_it_is() -> None:
    information = torch.rand(2, 3)
    ax, _ = plots.factor_matrix(information, ["x", "y"]).axes
    assert torch.equal(torch.as_tensor(ax.images[0].get_array().tolist()), information)
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["x", "y"]


def test_curves_over_epochs() -> None:
    epochs, kl = torch.arange(4), torch.rand(4, 12)
    (ax,) = plots.unit_kl(epochs, kl).axes
    assert [list(line.get_ydata()) for line in ax.lines] == kl.T.tolist()
    assert len(ax.get_legend().get_texts()) == 10
    (ax,) = plots.terms(epochs, {"total_correlation": kl[:, 0], "kl": kl[:, 1]}).axes
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["total correlation", "kl"]
    assert list(ax.lines[1].get_ydata()) == kl[:, 1].tolist()


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"images \[D, T, C, H, W\] and kl \[D\]"):
        plots.traversals(torch.zeros(4, 5, 1, 3, 3), torch.zeros(3))
    with pytest.raises(ValueError, match=r"a matrix \[F, D\] and F names"):
        plots.factor_matrix(torch.zeros(2, 3), ["x"])
