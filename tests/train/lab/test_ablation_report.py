"""The pictures of an ablation show the numbers they are given."""

import pytest
from matplotlib.figure import Figure

from utils.errors import UserError
from train.lab.ablation_report import over_seeds, plot_losses, plot_results

RESULTS = {
    "base": {
        "train_flops_per_token": 2e9,
        "runs": [
            {"val_bpb": b, "tokens": 4000, "seconds": 8.0, "curve": [[0, 9.0], [1000, 5 + b], [2000, b]]}
            for b in (1.0, 1.2, 1.1)
        ],
    },
    "other": {
        "train_flops_per_token": 1e9,
        "runs": [
            {"val_bpb": 2.0, "tokens": 4000, "seconds": 2.0, "curve": [[0, 9.0], [1000, 6.0], [2000, 2.0]]}
        ],
    },
}


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))
    return figures


def test_medians_over_tokens_flops_and_seconds(tmp_path, drawn):
    plot_losses(RESULTS, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    (figure,) = drawn
    lines = [{line.get_label(): line for line in axes.get_lines()} for axes in figure.axes]
    places = {"base": [[1, 2], [2, 4], [2, 4]], "other": [[1, 2], [1, 2], [0.5, 1]]}
    for name, losses in (("base", [6.1, 1.1]), ("other", [6.0, 2.0])):
        for panel, x in zip(lines, places[name], strict=True):
            assert panel[name].get_xdata() == pytest.approx(x)
            assert panel[name].get_ydata() == pytest.approx(losses)
    box = figure.axes[0].collections[0].get_paths()[0].get_extents()  # the band of the base
    assert (box.x0, box.x1, box.y0, box.y1) == pytest.approx((1, 2, 1.0, 6.2))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["base", "other"]
    assert all(axes.get_xlabel() for axes in figure.axes)
    assert len({line.get_color() for line in lines[0].values()}) == 2


def test_every_seed_is_a_dot_and_the_median_a_bar(tmp_path, drawn):
    plot_results(RESULTS, tmp_path / "bpb.png")
    (axes,) = drawn[0].axes
    points = [line.get_xydata().tolist() for line in axes.get_lines()]
    assert points == [[[1.0, 0], [1.2, 0], [1.1, 0]], [[1.1, 0]], [[2.0, 1]], [[2.0, 1]]]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["base", "other"]
    bottom, top = axes.get_ylim()
    assert bottom > 1 > 0 > top  # the base on top, all dots inside
    grey = axes.patches[0].get_extents().transformed(axes.transData.inverted())
    assert (grey.x0, grey.x1) == pytest.approx((1.0, 1.2))


def test_only_what_all_seeds_have_is_compared():
    """A run that was ended early has no later points; the untrained model is left out."""
    curves = [[(0, 9), (10, 5), (20, 4)], [(0, 9), (10, 6)], [[0, 9], [10, 7], [15, 3]]]
    assert over_seeds(curves) == {10: [5, 6, 7]}


def test_a_dozen_cells_have_colors_and_nothing_measured_is_no_error(tmp_path, drawn):
    run = {"val_bpb": 1.0, "tokens": 10, "seconds": 1.0, "curve": [(0, 9.0)]}
    results = {name: {"train_flops_per_token": 1.0, "runs": [run]} for name in ["base", *"abcdefghijkl"]}
    plot_losses(results, tmp_path / "loss.png")
    plot_results(results, tmp_path / "bpb.png")
    assert len(drawn[0].axes[0].get_lines()) == 13


def test_a_picture_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "a file").touch()
    with pytest.raises(UserError, match="cannot write"):
        plot_results(RESULTS, tmp_path / "a file" / "bpb.png")
