"""The proof of gradients, and its saboteurs: each way of not training must be caught by name."""

import copy

import pytest
import torch
from torch import nn

from utils.device import random_state
from utils.errors import UserError
from utils.gradient_check import WeightWitness, prove_gradients_before


class Toy(nn.Module):
    """Two layers, the second of which starts at zero, and a frozen norm."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 6, bias=False)
        self.drop = nn.Dropout(0.5)
        self.norm = nn.LayerNorm(6)
        self.last = nn.Linear(6, 3, bias=False)
        nn.init.zeros_(self.last.weight)
        self.norm.requires_grad_(False)

    def forward(self, x):
        return self.last(self.norm(self.drop(torch.tanh(self.first(x)))))


@pytest.fixture
def batches():
    return [{"x": torch.randn(8, 4, generator=torch.Generator().manual_seed(1)), "y": torch.arange(8) % 3}]


def loss_fn(model, batches):
    return sum(nn.functional.cross_entropy(model(batch["x"]), batch["y"]) for batch in batches)


def test_a_healthy_model_passes_and_nothing_is_touched(batches):
    model = Toy()
    model.first.weight.grad = torch.full_like(model.first.weight, 7.0)
    weights = copy.deepcopy(model.state_dict())
    report = prove_gradients_before(model, loss_fn, batches)
    assert report.trainable == {"first": 24, "last": 18}
    assert report.frozen == {"norm": 12}
    assert report.starts_at_zero == ["last.weight"]
    assert report.reached_by == {"loss": 2}
    assert "first 24" in str(report)
    assert "last.weight" in str(report)
    # without the noise in the zeros, the same healthy model would look cut off
    loss_fn(twin := copy.deepcopy(model), batches).backward()
    assert not twin.first.weight.grad.any()
    # the model and its gradients are as before
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(model.first.weight.grad, torch.full_like(model.first.weight, 7.0))
    assert model.last.weight.grad is None


def test_random_states_are_left_alone(batches):
    model = Toy().train()  # its dropout draws numbers
    before = random_state()
    prove_gradients_before(model, loss_fn, batches)
    after = random_state()
    assert torch.equal(before["torch"], after["torch"])
    assert before["python"] == after["python"]
    assert before["numpy"] == after["numpy"]


def test_random_states_are_left_alone_by_a_failure(batches):
    model = Toy().train()
    before = random_state()
    with pytest.raises(UserError):
        prove_gradients_before(model, lambda m, b: loss_fn(m, b).detach(), batches)
    assert torch.equal(before["torch"], random_state()["torch"])


def no_grad_loss(model, batches):
    with torch.no_grad():
        return loss_fn(model, batches)


@pytest.mark.parametrize(
    "sabotage",
    [
        no_grad_loss,
        lambda model, batches: loss_fn(model, batches).detach(),
        lambda model, batches: loss_fn(model, batches).detach().requires_grad_(True),
        lambda model, batches: loss_fn(model, batches).item(),
    ],
    ids=["no_grad", "detached", "requires_grad patched on", "item"],
)
def test_a_loss_without_a_graph_is_refused(sabotage, batches):
    with pytest.raises(UserError, match="no graph"):
        prove_gradients_before(Toy(), sabotage, batches)


def test_it_works_where_the_caller_had_switched_gradients_off(batches):
    with torch.no_grad():
        assert prove_gradients_before(Toy(), loss_fn, batches).reached_by == {"loss": 2}


def test_everything_frozen_is_refused(batches):
    with pytest.raises(UserError, match="everything is frozen"):
        prove_gradients_before(Toy().requires_grad_(False), loss_fn, batches)


def test_a_parameter_cut_off_is_named_with_its_module(batches):
    model = Toy()
    model.spare = nn.Linear(2, 2, bias=False)
    with pytest.raises(UserError, match=r"spare\.weight \(in Linear\)"):
        prove_gradients_before(model, loss_fn, batches)
    report = prove_gradients_before(model, loss_fn, batches, may_be_unreached=lambda name: "spare" in name)
    assert report.unreached == ["spare.weight"]
    assert "spare.weight" in str(report)


def test_a_gradient_of_zeros_counts_as_cut_off(batches):
    def silenced(model, batches):
        return loss_fn(model, batches) + 0 * model.spare.sum()

    model = Toy()
    model.spare = nn.Parameter(torch.ones(3))
    with pytest.raises(UserError, match=r"cut off.*spare \(in Toy\)"):
        prove_gradients_before(model, silenced, batches)


def test_each_term_must_reach_something(batches):
    def terms(model, batches):
        return {"ce": loss_fn(model, batches), "balance": model.first.weight.pow(2).sum()}

    report = prove_gradients_before(Toy(), terms, batches)
    assert report.reached_by == {"ce": 2, "balance": 1}

    def one_dead(model, batches):
        constant = torch.ones(1, requires_grad=True)
        return {"ce": loss_fn(model, batches), "balance": (constant * 2).sum()}

    with pytest.raises(UserError, match="balance reaches no trainable parameter"):
        prove_gradients_before(Toy(), one_dead, batches)


def test_a_term_must_reach_what_it_claims(batches):
    """A balance loss that lost its graph would leave the router the gradient of the other term."""
    model = Toy()

    def terms(one, batches):
        return {"ce": loss_fn(one, batches), "balance": one.last.weight.square().sum()}

    first = {"balance": lambda name: name.startswith("first")}
    with pytest.raises(UserError, match=r"balance does not reach .*: first\.weight \(in Linear\)"):
        prove_gradients_before(model, terms, batches, claims=first)
    fine = {"balance": lambda name: name.startswith("last"), "absent": lambda name: True}
    assert prove_gradients_before(model, terms, batches, claims=fine).reached_by == {"ce": 2, "balance": 1}


class Stack(nn.Module):
    """Three experts in one parameter, of which each row uses the one that it names."""

    def __init__(self):
        super().__init__()
        self.experts = nn.Parameter(torch.ones(3, 4, 2))

    def forward(self, x, expert):
        return torch.einsum("bi,bio->bo", x, self.experts[expert])


def test_experts_without_a_token_are_counted_apart():
    """Used by one term each: two of the three; by none: the third. Not an error, as a batch may miss some."""
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    use = lambda model, number: model(x, torch.full((2,), number)).sum()  # noqa: E731
    report = prove_gradients_before(Stack(), lambda m, _: {"a": use(m, 0), "b": use(m, 2)}, [])
    assert report.unreached == ["1 of 3 experts of experts"] and "1 of 3 experts" in str(report)
    everyone = prove_gradients_before(Stack(), lambda m, _: use(m, 0) + use(m, 1) + use(m, 2), [])
    assert everyone.unreached == []


def test_a_loss_of_another_model_is_refused(batches):
    other = Toy()
    with pytest.raises(UserError, match="computed from the model it is given"):
        prove_gradients_before(Toy(), lambda model, batches: loss_fn(other, batches), batches)


def test_a_frozen_parameter_that_gets_a_gradient_is_named(batches):
    def thaw(model, batches):
        model.norm.weight.requires_grad_(True)
        return loss_fn(model, batches)

    with pytest.raises(UserError, match=r"frozen, yet.*norm\.weight"):
        prove_gradients_before(Toy(), thaw, batches)


def test_nan_gradients_are_refused(batches):
    def root_of_zero(model, batches):  # a finite loss with an infinite slope
        return loss_fn(model, batches) + (model.first.weight * 0).sum().abs().sqrt()

    with pytest.raises(UserError, match=r"not finite.*first\.weight"):
        prove_gradients_before(Toy(), root_of_zero, batches)
    with pytest.raises(UserError, match="loss is nan"):
        prove_gradients_before(Toy(), lambda model, batches: loss_fn(model, batches) * float("nan"), batches)


def test_the_tensor_on_the_wrong_device_is_named(batches):
    model = Toy()
    model.last = nn.Linear(6, 3, bias=False, device="meta")
    with pytest.raises(UserError, match=r"parameter last\.weight is on meta; the others are on cpu"):
        prove_gradients_before(model, loss_fn, batches)
    batches[0]["y"] = batches[0]["y"].to("meta")
    with pytest.raises(UserError, match=r"batches\[0\]\.y is on meta"):
        prove_gradients_before(Toy(), loss_fn, batches)


# --- after ----------------------------------------------------------------------------------------


def train(model, batches, optimizer, steps=5, loss=loss_fn):
    witness = WeightWitness(model)
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
    assert "1 had no gradient" in witness.prove_moved(may_be_unreached=lambda name: "spare" in name)


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
