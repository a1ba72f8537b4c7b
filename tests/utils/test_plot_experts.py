"""Pictures of experts: the numbers drawn against numbers computed by hand, and logs that cannot be drawn."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from utils.errors import UserError
from utils.log import RunLog
from utils.plot_experts import plot_expert_load, plot_expert_tokens


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))
    return figures


def write_log(path, layers, steps=(10, 20, 25), experts=12):
    """A log in which the load of expert e at step s in layer l is in proportion to 1 + e * s * l."""
    log = RunLog(path)
    for step in steps:
        row = {"step": step}
        for layer in layers:
            loads = [1 + expert * step * layer for expert in range(experts)]
            row |= {f"L{layer}E{expert}": load / sum(loads) for expert, load in enumerate(loads)}
        log.write(row)
    log.close()
    return path


def panels_of(figure):
    """The axes with a heat map: all but the colour bar."""
    return [axes for axes in figure.axes if axes.images]


def test_load_is_drawn_in_units_of_the_mean_one_panel_per_layer(tmp_path, drawn):
    layers = [1, 2, 10]  # not in the order of their letters
    log = write_log(tmp_path / "experts.txt", layers)
    plot_expert_load(log, tmp_path / "deep" / "e.png")
    assert (tmp_path / "deep" / "e.png").read_bytes().startswith(b"\x89PNG")
    panels = panels_of(drawn[0])
    assert len(panels) == 3
    for axes, layer in zip(panels, layers):
        expected = [[(1 + e * s * layer) / (1 + 5.5 * s * layer) for s in (10, 20, 25)] for e in range(12)]
        (image,) = axes.images
        assert np.allclose(image.get_array(), expected, rtol=1e-5)
        violation = (1 + 11 * 25 * layer) / (1 + 5.5 * 25 * layer) - 1
        assert axes.get_title() == f"Layer {layer}: MaxVio {violation:.2f} at step 25"
        assert [text.get_text() for text in axes.get_xticklabels()] == ["10", "20", "25"]
        assert axes.get_xticks().tolist() == [0, 1, 2]
        assert axes.get_xlabel() == "step (optimizer updates)"
        assert axes.get_ylabel() == "expert"
        assert (image.norm.vmin, image.norm.vcenter, image.norm.vmax) == (0, 1, 3)
        bottom, top = axes.get_ylim()
        assert bottom < top  # expert 0 at the bottom


def test_loads_that_do_not_add_up_to_one_are_shares_all_the_same(tmp_path, drawn):
    (tmp_path / "e.txt").write_text(
        "step=1  L0E0=30  L0E1=10  L0E1x=9\nstep=2  val_loss=3\nstep=3  L0E0=0  L0E1=8\n"
    )
    plot_expert_load(tmp_path / "e.txt", tmp_path / "e.png")
    (axes,) = panels_of(drawn[0])
    assert axes.images[0].get_array().tolist() == [[1.5, 0], [0.5, 2]]
    assert axes.get_title() == "Layer 0: MaxVio 1.00 at step 3"


def test_a_long_log_has_few_labels_each_at_its_step(tmp_path, drawn):
    steps = [1, *range(10, 1000, 10)]
    plot_expert_load(write_log(tmp_path / "e.txt", [0], steps, experts=64), tmp_path / "e.png")
    (axes,) = panels_of(drawn[0])
    labels = [int(text.get_text()) for text in axes.get_xticklabels()]
    assert 4 <= len(labels) <= 8
    assert labels == [steps[column] for column in axes.get_xticks()]
    assert len(axes.get_yticks()) <= 8


BROKEN = {
    "": "no expert's load",
    "step=1  loss=2\n": "no expert's load",
    "L0E0=0.5  L0E1=0.5\n": "no expert's load",
    "step=1  xL0E0=1  L0E0x=1\n": "no expert's load",
    "step=1  L0E0=0  L0E1=0\n": "step 1: L0E0 to L0E1",
    "step=1  L0E0=0.5  L0E1=0.5\nstep=2  L0E0=1\n": "step 2: L0E0 to L0E1",
    "step=1  L0E0=1.5  L0E1=-0.5\n": "step 1: L0E0 to L0E1",
    "step=1  L0E0=nan  L0E1=1\n": "step 1: L0E0 to L0E1",
    "step=1  L0E0=0.5  L0E1=nan\n": "step 1: L0E0 to L0E1",
    "step=1  L3E0=inf  L3E1=1\n": "step 1: L3E0 to L3E1",
    "what is this\nstep=1\n": "line 1: no key=value pairs",
}


@pytest.mark.parametrize("text", BROKEN)
def test_a_broken_log_is_one_line_and_no_picture(tmp_path, text):
    (tmp_path / "e.txt").write_text(text)
    with pytest.raises(UserError, match=BROKEN[text]):
        plot_expert_load(tmp_path / "e.txt", tmp_path / "e.png")
    assert not (tmp_path / "e.png").exists()


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    log = write_log(tmp_path / "e.txt", [0])
    with pytest.raises(UserError, match="nowhere.txt: cannot read the log"):
        plot_expert_load(tmp_path / "nowhere.txt", tmp_path / "e.png")
    with pytest.raises(UserError, match="cannot write"):
        plot_expert_load(log, log / "e.png")


def test_shares_of_tokens_are_drawn_as_they_are(tmp_path, drawn):
    shares = np.random.default_rng(0).dirichlet([1] * 5, size=(4, 3))  # 4 layers, 3 kinds, 5 experts
    shares[:, 1] = np.nan  # a kind that did not occur
    plot_expert_tokens(shares, ["number", "sign", "word"], tmp_path / "deep" / "t.png")
    assert (tmp_path / "deep" / "t.png").read_bytes().startswith(b"\x89PNG")
    panels = panels_of(drawn[0])
    assert [axes.get_title() for axes in panels] == ["Layer 0", "Layer 1", "Layer 2", "Layer 3"]
    for axes, share in zip(panels, shares):
        (image,) = axes.images
        assert np.array_equal(image.get_array().filled(np.nan), share, equal_nan=True)
        assert image.get_clim() == (0, np.nanmax(shares))  # one scale for all
        assert [text.get_text() for text in axes.get_yticklabels()] == ["number", "sign", "word"]
        assert axes.get_xlabel() == "expert"
        bottom, top = axes.get_ylim()
        assert bottom > top  # the first kind on top
    (bar,) = [axes for axes in drawn[0].axes if not axes.images]
    assert bar.get_ylabel() == "share (even would be 20%)"
    assert drawn[0].get_suptitle().endswith("\ngrey: no tokens of this kind here (sign)")


def test_nothing_is_said_of_grey_where_every_kind_occurs(tmp_path, drawn):
    plot_expert_tokens([[[0.25, 0.75]]], ["word"], tmp_path / "t.png")
    assert "grey" not in drawn[0].get_suptitle()
