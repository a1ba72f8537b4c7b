"""What the tests of training share."""

import pytest


@pytest.fixture
def curves():
    """A test that asks for this looks at the picture of the curves."""


@pytest.fixture(autouse=True)
def no_curves(request, monkeypatch):
    """Draw no curves elsewhere: it takes longer than the training of most tests."""
    if "curves" not in request.fixturenames:
        monkeypatch.setattr("train.engine.trainer.plot_curves", lambda log, png: None)
