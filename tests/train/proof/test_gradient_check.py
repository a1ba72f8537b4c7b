"""The proof of gradients, and its saboteurs: each way of not training must be caught by name."""

import copy

import pytest
import torch
from torch import nn

from utils.device import random_state
from utils.errors import UserError
from train.proof.gradient_check import leaves, prove_gradients_before


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


def prove(model, loss, batches, **changes):
    """The norm of `Toy` is frozen on purpose."""
    trains = lambda name: "norm" not in name  # noqa: E731
    return prove_gradients_before(model, loss, batches, **{"trains": trains} | changes)


def loss_fn(model, batches):
    return sum(nn.functional.cross_entropy(model(batch["x"]), batch["y"]) for batch in batches)


def test_a_healthy_model_passes_and_nothing_is_touched(batches):
    model = Toy()
    model.first.weight.grad = torch.full_like(model.first.weight, 7.0)
    weights = copy.deepcopy(model.state_dict())
    report = prove(model, loss_fn, batches)
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
    prove(model, loss_fn, batches)
    after = random_state()
    assert torch.equal(before["torch"], after["torch"])
    assert before["python"] == after["python"]
    assert before["numpy"] == after["numpy"]


def test_random_states_are_left_alone_by_a_failure(batches):
    model = Toy().train()
    before = random_state()
    with pytest.raises(UserError):
        prove(model, lambda m, b: loss_fn(m, b).detach(), batches)
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
        prove(Toy(), sabotage, batches)


def test_it_works_where_the_caller_had_switched_gradients_off(batches):
    with torch.no_grad():
        assert prove(Toy(), loss_fn, batches).reached_by == {"loss": 2}


def test_everything_frozen_is_refused(batches):
    with pytest.raises(UserError, match="everything is frozen"):
        prove(Toy().requires_grad_(False), loss_fn, batches)


def test_a_parameter_cut_off_is_named_with_its_module(batches):
    model = Toy()
    model.spare = nn.Linear(2, 2, bias=False)
    model.spare.weight.grad = torch.ones(2, 2)  # an old gradient proves nothing
    with pytest.raises(UserError, match=r"spare\.weight \(in Linear\)"):
        prove(model, loss_fn, batches)
    report = prove(model, loss_fn, batches, may_be_unreached=lambda name: "spare" in name)
    assert report.unreached == ["spare.weight"]
    assert "spare.weight" in str(report)


def test_a_gradient_of_zeros_counts_as_cut_off(batches):
    def silenced(model, batches):
        return loss_fn(model, batches) + 0 * model.spare.sum()

    model = Toy()
    model.spare = nn.Parameter(torch.ones(3))
    with pytest.raises(UserError, match=r"cut off.*spare \(in Toy\)"):
        prove(model, silenced, batches)


def test_each_term_must_reach_something(batches):
    def terms(model, batches):
        return {"ce": loss_fn(model, batches), "balance": model.first.weight.pow(2).sum()}

    report = prove(Toy(), terms, batches)
    assert report.reached_by == {"ce": 2, "balance": 1}

    def one_dead(model, batches):
        return {"ce": loss_fn(model, batches), "balance": 0 * model.first.weight.sum()}

    with pytest.raises(UserError, match="balance reaches no trainable parameter"):
        prove(Toy(), one_dead, batches)


def test_a_term_must_reach_what_it_claims(batches):
    """A balance loss that lost its graph would leave the router the gradient of the other term."""
    model = Toy()

    def terms(one, batches):
        return {"ce": loss_fn(one, batches), "balance": one.last.weight.square().sum()}

    first = {"balance": lambda name: name.startswith("first")}
    with pytest.raises(UserError, match=r"balance does not reach .*: first\.weight \(in Linear\)"):
        prove(model, terms, batches, claims=first)
    fine = {"balance": lambda name: name.startswith("last"), "absent": lambda name: True}
    assert prove(model, terms, batches, claims=fine).reached_by == {"ce": 2, "balance": 1}


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
    report = prove(Stack(), lambda m, _: {"a": use(m, 0), "b": use(m, 2)}, [])
    assert report.unreached == ["1 of 3 experts of experts"] and "1 of 3 experts" in str(report)
    everyone = prove(Stack(), lambda m, _: use(m, 0) + use(m, 1) + use(m, 2), [])
    assert everyone.unreached == []


def test_a_loss_of_another_model_is_refused(batches):
    other = Toy()
    with pytest.raises(UserError, match="computed from the model it is given"):
        prove(Toy(), lambda model, batches: loss_fn(other, batches), batches)


def test_a_frozen_parameter_that_gets_a_gradient_is_named(batches):
    def thaw(model, batches):
        model.norm.weight.requires_grad_(True)
        return loss_fn(model, batches)

    with pytest.raises(UserError, match=r"frozen, yet.*norm\.weight"):
        prove(Toy(), thaw, batches)


def test_nan_gradients_are_refused(batches):
    def root_of_zero(model, batches):  # a finite loss with an infinite slope
        return loss_fn(model, batches) + (model.first.weight * 0).sum().abs().sqrt()

    with pytest.raises(UserError, match=r"not finite.*first\.weight"):
        prove(Toy(), root_of_zero, batches)
    with pytest.raises(UserError, match="loss is nan"):
        prove(Toy(), lambda model, batches: loss_fn(model, batches) * float("nan"), batches)


def test_the_tensor_on_the_wrong_device_is_named(batches):
    model = Toy()
    model.last = nn.Linear(6, 3, bias=False, device="meta")
    with pytest.raises(UserError, match=r"parameter last\.weight is on meta; the others are on cpu"):
        prove(model, loss_fn, batches)
    batches[0]["y"] = batches[0]["y"].to("meta")
    with pytest.raises(UserError, match=r"batches\[0\]\.y is on meta"):
        prove(Toy(), loss_fn, batches)


# --- zeros ----------------------------------------------------------------------------------------


class Nest(nn.Module):
    """x + B1(x + B2(x + .. )), each B zero: one more wakes up with every step."""

    def __init__(self, depth):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(depth))
        for layer in self.layers:
            nn.init.zeros_(layer.weight)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        out = x
        for layer in self.layers:
            out = x + layer(out)
        return self.head(out)


@pytest.mark.parametrize("depth", [1, 3])
def test_zeros_behind_zeros_wake_up_one_after_the_other(batches, depth):
    calls = []
    loss = lambda model, batches: calls.append(1) or loss_fn(model, batches)  # noqa: E731
    report = prove_gradients_before(Nest(depth), loss, batches)
    assert report.starts_at_zero == [f"layers.{n}.weight" for n in range(depth)]
    assert report.reached_by == {"loss": depth + 2} and len(calls) == depth + 1


class Product(nn.Module):
    """y = head((W + B A) x), as LoRA does."""

    def __init__(self):
        super().__init__()
        self.base, self.head = nn.Linear(4, 5, bias=False), nn.Linear(5, 3, bias=False)
        self.lora_A, self.lora_B = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.zeros(5, 2))
        self.requires_grad_(False)
        self.lora_A.requires_grad_(True), self.lora_B.requires_grad_(True)

    def forward(self, x):
        return self.head(self.base(x) + x @ self.lora_A.T @ self.lora_B.T)


def lora(name):
    return name.startswith("lora_")


def test_one_factor_at_zero_is_fine_and_two_are_not(batches):
    model = Product()
    assert prove_gradients_before(model, loss_fn, batches, trains=lora).starts_at_zero == ["lora_B"]
    model.lora_A.data.zero_()
    with pytest.raises(UserError, match=r"neither can move: lora_A \(in Product\), lora_B"):
        prove_gradients_before(model, loss_fn, batches, trains=lora)
    fine = dict(trains=lora, may_be_unreached=lora)
    with pytest.raises(UserError, match="reaches no trainable parameter"):
        prove_gradients_before(model, loss_fn, batches, **fine)


def test_a_frozen_zero_in_the_way_is_named_and_one_beside_it_is_fine(batches):
    model = Product()
    model.base.bias = nn.Parameter(torch.zeros(5), requires_grad=False)
    prove_gradients_before(model, loss_fn, batches, trains=lora)
    nn.init.zeros_(model.head.weight)
    with pytest.raises(UserError, match=r"lora_A \(in Product\), lora_B .*frozen at zero: head\.weight"):
        prove_gradients_before(model, loss_fn, batches, trains=lora)


def test_gradients_are_finite_at_the_true_zeros_too(batches):
    def length(model, batches):  # its slope at zero is 0/0
        return loss_fn(model, batches) + model.last.weight.square().sum().sqrt()

    with pytest.raises(UserError, match=r"not finite.*last\.weight"):
        prove(Toy(), length, batches)


# --- the graph ------------------------------------------------------------------------------------


class Square(torch.autograd.Function):
    """A function with a backward of its own."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad * ctx.saved_tensors[0]


def test_the_leaves_of_a_graph_are_those_that_get_a_gradient():
    a, b, c = (torch.randn(2, requires_grad=True) for _ in range(3))
    with torch.no_grad():
        hidden = c * 2
    loss = (Square.apply(a) * hidden + Square.apply(a * b.detach())).sum() + torch.stack([b, b])[0].sum()
    found = list(leaves(loss))
    assert len(found) == 2 and {id(leaf) for leaf in found} == {id(a), id(b)}


def test_a_stranger_in_the_graph_is_refused_and_gets_no_gradient(batches):
    stranger = torch.ones(2, 3, requires_grad=True)
    with pytest.raises(UserError, match=r"loss depends on a tensor that is no parameter .*: \(2, 3\)"):
        prove(Toy(), lambda m, b: loss_fn(m, b) + Square.apply(stranger).sum(), batches)
    model = Toy()
    with pytest.raises(UserError, match=r"no parameter of the copy: first\.weight of the original"):
        prove(model, lambda m, b: loss_fn(m, b) + model.first.weight.sum(), batches)
    assert stranger.grad is None and model.first.weight.grad is None


def test_a_plain_tensor_matters_only_if_the_loss_depends_on_it(batches):
    model = Toy()
    model.table, model.count = torch.ones(3), torch.zeros(1, dtype=torch.long)
    prove(model, loss_fn, batches)
    assert not model.table.requires_grad
    with pytest.raises(UserError, match=r": table, neither parameter nor buffer"):
        prove(model, lambda m, b: loss_fn(m, b) * m.table.sum(), batches)


def test_a_plain_tensor_on_another_device_is_named_if_the_forward_meets_it(batches):
    model = Toy()
    model.table = torch.ones(8, 3, device="meta")
    prove(model, loss_fn, batches)
    with pytest.raises(UserError, match=r"table on meta; use register_buffer"):
        prove(model, lambda m, b: (m(b[0]["x"]) * m.table).sum(), batches)

    def broken(model, batches):
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        prove(model, broken, batches)


def test_a_forward_that_writes_into_a_weight_is_named(batches):
    def careless(model, batches):
        model.norm.bias.data += 1e-6
        return loss_fn(model, batches)

    model = Toy()
    with pytest.raises(UserError, match=r"forward itself changes norm\.bias \(in LayerNorm\)"):
        prove(model, careless, batches)
    assert not model.norm.bias.any()
