"""The witness: weights that did not move, or moved and should not have, are named with the cause."""

import pytest
import torch
from torch import nn

from utils.errors import UserError
from train.proof.weight_witness import WeightWitness


class Toy(nn.Module):
    """Two layers, the second of which starts at zero, and a frozen norm."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 6, bias=False)
        self.norm = nn.LayerNorm(6).requires_grad_(False)
        self.last = nn.Linear(6, 3, bias=False)
        nn.init.zeros_(self.last.weight)

    def forward(self, x):
        return self.last(self.norm(torch.tanh(self.first(x))))


@pytest.fixture
def batches():
    return [{"x": torch.randn(8, 4, generator=torch.Generator().manual_seed(1)), "y": torch.arange(8) % 3}]


def loss_fn(model, batches):
    return sum(nn.functional.cross_entropy(model(batch["x"]), batch["y"]) for batch in batches)


def train(model, batches, optimizer, steps=5, loss=loss_fn, witness=None):
    witness = witness or WeightWitness(model)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model, batches).backward()
        optimizer.step()
        witness.note_step(optimizer)
    return witness


def adamw(parameters, lr=1e-2):
    return torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=lr, weight_decay=0.1)


def test_trained_weights_have_moved(batches):
    model = Toy()
    words = train(model, batches, adamw(model.parameters())).prove_moved()
    assert "2 trainable tensors moved" in words
    assert "2 frozen" in words


def test_what_lies_before_zeros_waits_for_the_second_step(batches):
    """LoRA's A before a B of zeros: after one step it is excused."""
    model = Toy()
    words = train(model, batches, adamw(model.parameters()), steps=1).prove_moved()
    assert "1 trainable tensors moved" in words and "1 had no gradient (allowed)" in words

    def cut(model, batches):  # the zeros alone learn, for ever
        hidden = [model.norm(torch.tanh(model.first(batch["x"]))).detach() for batch in batches]
        pairs = zip(hidden, batches, strict=True)
        return sum(nn.functional.cross_entropy(model.last(h), batch["y"]) for h, batch in pairs)

    model = Toy()
    with pytest.raises(UserError, match=r"first\.weight .*no gradient reached it"):
        train(model, batches, adamw(model.parameters()), steps=2, loss=cut).prove_moved()
    model = Toy()
    nn.init.normal_(model.last.weight)  # no zeros: nothing to wait for
    with pytest.raises(UserError, match=r"first\.weight .*no gradient reached it"):
        train(model, batches, adamw(model.parameters()), steps=1, loss=cut).prove_moved()


def test_a_small_learning_rate_still_counts_as_movement(batches):
    model = Toy()
    words = train(model, batches, adamw(model.parameters(), lr=1e-6), steps=3).prove_moved()
    assert "2 trainable tensors moved" in words


def test_a_parameter_that_is_not_in_the_optimizer_is_named(batches):
    model = Toy()
    witness = train(model, batches, adamw(model.last.parameters()))
    with pytest.raises(UserError, match=r"first\.weight \(in Linear\).*not in the optimizer"):
        witness.prove_moved()


def test_a_learning_rate_of_zero_is_named(batches):
    model = Toy()
    witness = train(model, batches, adamw(model.parameters(), lr=0.0))
    with pytest.raises(UserError, match=r"first\.weight.*learning rate was 0"):
        witness.prove_moved()


@pytest.mark.parametrize("steps", [1, 200])
def test_weight_decay_alone_is_not_learning(batches, steps):
    def silenced(model, batches):  # gradients of zero: AdamW decays, and nothing else happens
        return loss_fn(model, batches) * 0

    model = Toy()
    start = model.first.weight.detach().clone()
    witness = train(model, batches, adamw(model.parameters()), steps, silenced)
    assert not torch.equal(start, model.first.weight)
    with pytest.raises(UserError, match=r"first\.weight.*weight decay alone"):
        witness.prove_moved()


def test_no_gradient_at_all_is_not_learning_either(batches):
    model = Toy()  # AdamW passes over a parameter whose gradient is None: it does not even decay
    model.spare = nn.Linear(2, 2, bias=False)
    witness = train(model, batches, adamw(model.parameters()))
    with pytest.raises(UserError, match=r"spare\.weight.*no gradient reached it"):
        witness.prove_moved()


def test_a_frozen_tensor_that_changed_is_named(batches):
    model = Toy()
    witness = train(model, batches, adamw(model.parameters()))
    with torch.no_grad():
        model.norm.bias[2] = -0.0  # one bit
    with pytest.raises(UserError, match=r"frozen, yet changed.*norm\.bias"):
        witness.prove_moved()


def test_weights_that_became_nan_are_named(batches):
    model = Toy()
    witness = train(model, batches, adamw(model.parameters()))
    with torch.no_grad():
        model.last.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match=r"NaN.*last\.weight"):
        witness.prove_moved()


class Router(nn.Module):
    """As far as it matters here: a bias that is moved by counting."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6, 6))
        self.register_buffer("e_score_correction_bias", torch.zeros(6))
        self.register_buffer("table", torch.zeros(2, dtype=torch.long), persistent=False)

    def forward(self, x):
        return (x @ self.weight) * (1 + self.e_score_correction_bias)


def routed(trainable):
    """A model whose router is trainable or frozen."""
    model = Toy()
    model.norm = nn.Sequential(model.norm, Router().requires_grad_(trainable))
    return model


def test_the_bias_of_a_router_moves_with_it_and_not_without(batches):
    for trainable in (True, False):
        model = routed(trainable)
        witness = train(model, batches, adamw(model.parameters()))
        witness.prove_moved()
        model.norm[1].e_score_correction_bias[3] += 0.01
        if trainable:
            witness.prove_moved()
        else:
            with pytest.raises(UserError, match=r"norm\.1\.e_score_correction_bias \(in Router\).*frozen"):
                witness.prove_moved()


def test_other_buffers_must_stay(batches):
    model = routed(True)
    witness = train(model, batches, adamw(model.parameters()))
    model.norm[1].table[1] = 1
    with pytest.raises(UserError, match=r"buffer .*changed.*norm\.1\.table"):
        witness.prove_moved()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_updates_that_are_rounded_away_are_named(batches, dtype, weight_decay):
    def loss(model, batches):  # in fp32, on weights in half precision
        x = torch.tanh(batches[0]["x"] @ model.first.weight.float().T)
        return nn.functional.cross_entropy(model.norm(x) @ model.last.weight.float().T, batches[0]["y"])

    torch.manual_seed(0)
    model = Toy()
    nn.init.normal_(model.last.weight)
    nn.init.uniform_(model.first.weight, 0.5, 1)
    model.first.to(dtype), model.last.to(dtype)
    optimizer = torch.optim.AdamW([model.first.weight], lr=1e-5, weight_decay=weight_decay)
    optimizer.add_param_group({"params": [model.last.weight], "lr": 1e-1})
    witness = train(model, batches, optimizer, loss=loss)
    with pytest.raises(UserError, match=rf"first\.weight .*rounded away in {dtype}") as caught:
        witness.prove_moved()
    assert "last.weight" not in str(caught.value)


def test_learning_in_half_precision_over_many_steps_is_not_taken_for_rounding(batches):
    """200 roundings could hide any movement, but decay never makes a number larger."""
    model = nn.Linear(4, 3, bias=False).to(torch.bfloat16)
    start = model.weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    loss = lambda model, batches: nn.functional.cross_entropy(  # noqa: E731
        batches[0]["x"] @ model.weight.float().T, batches[0]["y"]
    )
    witness = train(model, batches, optimizer, steps=200, loss=loss)
    assert 0 < (start - model.weight).norm() / start.norm() < 200 * torch.finfo(torch.bfloat16).eps
    assert "1 trainable tensors moved" in witness.prove_moved()


def test_a_number_that_shrinks_faster_than_by_decay_has_learned(batches):
    """No element grows here: only their size tells it from decay."""
    model = nn.Linear(4, 3, bias=False)
    nn.init.uniform_(model.weight, 0.5, 1)
    loss = lambda model, batches: model.weight.square().sum()  # noqa: E731
    assert "1 trainable" in train(model, batches, adamw(model.parameters()), loss=loss).prove_moved()


def test_parameters_that_come_or_go_during_training_are_named(batches):
    for change in (lambda m: setattr(m, "late", nn.Parameter(torch.ones(2))), lambda m: delattr(m, "norm")):
        model = Toy()
        witness = train(model, batches, adamw(model.parameters()))
        change(model)
        with pytest.raises(UserError, match="added or removed during training: (late|norm.bias)"):
            witness.prove_moved()


def test_a_buffer_that_is_gone_has_changed(batches):
    model = routed(True)
    witness = train(model, batches, adamw(model.parameters()))
    del model.norm[1].table
    with pytest.raises(UserError, match=r"buffer .*changed.*norm\.1\.table"):
        witness.prove_moved()


def test_a_parameter_that_was_replaced_is_not_in_the_optimizer(batches):
    model = Toy()
    witness = train(model, batches, adamw(model.parameters()), steps=1)
    model.first.weight = nn.Parameter(witness.start["first.weight"].clone())
    with pytest.raises(UserError, match=r"first\.weight .*not in the optimizer"):
        witness.prove_moved()


def test_without_a_step_nothing_is_compared():
    assert "no step" in WeightWitness(Toy()).prove_moved()


def test_a_tensor_that_stops_training_is_named_and_short_gaps_are_not(batches):
    """30 steps: a gap of three is a tenth, and reported; four are too many."""
    words = {}
    for gap in (0, 2, 3, 4):
        model = Toy()
        optimizer, witness = adamw(model.parameters()), WeightWitness(model)
        nn.init.normal_(model.last.weight)
        for step in range(30):
            model.first.requires_grad_(step >= gap)
            train(model, batches, optimizer, steps=1, witness=witness)
        words[gap] = witness
    assert "some steps" not in words[0].prove_moved() + words[2].prove_moved()
    assert "without gradient in some steps: first.weight" in words[3].prove_moved()
    with pytest.raises(UserError, match=r"trained in 26 of 30 steps only: first\.weight \(in Linear\)"):
        words[4].prove_moved()
