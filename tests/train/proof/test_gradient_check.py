"""The proof of gradients, and its saboteurs: each way of not training must be caught by name."""

import copy
import weakref

import pytest
import torch
from torch import nn

from utils.device import random_state
from utils.errors import UserError
from train.proof.gradient_check import prove_gradients_before
from train.proof.trial import Trial, leaves


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


def loss_fn(model, batch):
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"])


def test_a_healthy_model_passes_and_nothing_is_touched(batches):
    model = Toy()
    model.first.weight.grad = torch.full_like(model.first.weight, 7.0)
    weights = copy.deepcopy(model.state_dict())
    report = prove(model, loss_fn, batches)
    assert (report.trainable, report.frozen) == (24 + 18, 12)
    assert report.starts_at_zero == ["last.weight"]
    assert report.reached_by == {"loss": 2}
    assert "42 parameters are trainable, 12 frozen" in str(report)
    assert "last.weight" in str(report) and len(str(report).splitlines()) <= 5
    # without the noise in the zeros, the same healthy model would look cut off
    loss_fn(twin := copy.deepcopy(model), batches[0]).backward()
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


def no_grad_loss(model, batch):
    with torch.no_grad():
        return loss_fn(model, batch)


@pytest.mark.parametrize(
    "sabotage",
    [
        no_grad_loss,
        lambda model, batch: loss_fn(model, batch).detach(),
        lambda model, batch: loss_fn(model, batch).detach().requires_grad_(True),
        lambda model, batch: loss_fn(model, batch).item(),
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


def test_a_gradient_of_zeros_counts_as_cut_off(batches):
    def silenced(model, batch):
        return loss_fn(model, batch) + 0 * model.spare.sum()

    model = Toy()
    model.spare = nn.Parameter(torch.ones(3))
    with pytest.raises(UserError, match=r"cut off.*spare \(in Toy\)"):
        prove(model, silenced, batches)


def test_each_term_must_reach_something(batches):
    def terms(model, batch):
        return {"ce": loss_fn(model, batch), "balance": model.first.weight.pow(2).sum()}

    report = prove(Toy(), terms, batches)
    assert report.reached_by == {"ce": 2, "balance": 1}

    def one_dead(model, batch):
        return {"ce": loss_fn(model, batch), "balance": 0 * model.first.weight.sum()}

    with pytest.raises(UserError, match="balance reaches no trainable parameter"):
        prove(Toy(), one_dead, batches)


def test_a_term_must_reach_what_it_claims(batches):
    """A balance loss that lost its graph would leave the router the gradient of the other term."""
    model = Toy()

    def terms(one, batch):
        return {"ce": loss_fn(one, batch), "balance": one.last.weight.square().sum()}

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
    report = prove(Stack(), lambda m, _: {"a": use(m, 0), "b": use(m, 2)}, [None])
    assert report.idle == ["1 of 3 experts of experts"] and "1 of 3 experts" in str(report)
    everyone = prove(Stack(), lambda m, _: use(m, 0) + use(m, 1) + use(m, 2), [None])
    assert everyone.idle == []


def test_a_loss_of_another_model_is_refused(batches):
    other = Toy()
    with pytest.raises(UserError, match="computed from the model it is given"):
        prove(Toy(), lambda model, batch: loss_fn(other, batch), batches)


def test_a_frozen_parameter_that_gets_a_gradient_is_named(batches):
    def thaw(model, batch):
        model.norm.weight.requires_grad_(True)
        return loss_fn(model, batch)

    with pytest.raises(UserError, match=r"frozen, yet.*norm\.weight"):
        prove(Toy(), thaw, batches)


def test_nan_gradients_are_refused(batches):
    def root_of_zero(model, batches):  # a finite loss with an infinite slope
        return loss_fn(model, batches) + (model.first.weight * 0).sum().abs().sqrt()

    with pytest.raises(UserError, match=r"not finite.*first\.weight"):
        prove(Toy(), root_of_zero, batches)
    with pytest.raises(UserError, match="loss is nan"):
        prove(Toy(), lambda model, batch: loss_fn(model, batch) * float("nan"), batches)


def test_the_tensor_on_the_wrong_device_is_named(batches):
    model = Toy()
    model.last = nn.Linear(6, 3, bias=False, device="meta")
    with pytest.raises(UserError, match=r"parameter last\.weight is on meta; the others are on cpu"):
        prove(model, loss_fn, batches)
    batches[0]["y"] = batches[0]["y"].to("meta")
    with pytest.raises(UserError, match=r"batches\[0\]\['y'\] is on meta"):
        prove(Toy(), loss_fn, batches)


# --- micro-batches --------------------------------------------------------------------------------


def halves(batches):
    """The batch as two micro-batches with labels, as the engine names them, and one without any."""
    x, y = batches[0]["x"], batches[0]["y"][:, None].repeat(1, 2)
    labels = (y[:4], y[4:], y[4:] * 0 - 100)
    return [{"x": rows, "labels": some} for rows, some in zip((x[:4], x[4:], x[4:]), labels, strict=True)]


def summed(model, batch):
    """As in the engine: a sum, to which a micro-batch without labels adds nothing."""
    rows = nn.functional.cross_entropy(model(batch["x"]), batch["labels"][:, 0], reduction="sum")
    return {"ce": rows / 8}


def test_one_micro_batch_is_in_memory_at_a_time(batches):
    """When the next one runs, the activations of the last are gone; `prepare` comes before each pass."""
    calls, graphs = [], []

    def loss(model, batch):
        assert not [graph for graph in graphs if graph() is not None]
        hidden = model(batch["x"])
        graphs.append(weakref.ref(hidden))
        calls.append("loss")
        return {"ce": hidden.square().sum(), "norm": hidden.exp().mean()}

    prove(Toy(), loss, halves(batches), prepare=lambda model, given: calls.append(len(given)))
    assert calls == [3, "loss", "loss", "loss"] * 2  # zeros first


def test_each_micro_batch_with_a_label_must_train(batches):
    report = prove(Toy(), summed, halves(batches))
    assert report.reached_by == {"ce": 2}
    first = halves(batches)[0]["x"][0, 0]
    for change in (lambda loss, model: loss * 0, lambda loss, model: 0 * loss + model.last.weight.sum()):

        def partly(model, batch, change=change):
            terms = summed(model, batch)
            return terms if batch["x"][0, 0] == first else {"ce": change(terms["ce"], model)}

        with pytest.raises(UserError, match=r"some labelled micro-batches and not by others: first\.weight"):
            prove(Toy(), partly, halves(batches))


# --- parts of matrices ----------------------------------------------------------------------------


def test_rows_and_columns_without_gradient_are_counted(batches):
    def masked(model, batch):
        x = torch.cat([batch["x"][:, :3], torch.zeros(8, 1)], dim=1)
        return nn.functional.cross_entropy(model(x), batch["y"])

    with pytest.raises(UserError, match=r"part of a matrix .*: first\.weight \(1 of 4 .* dimension 1\);"):
        prove(Toy(), masked, batches)


def test_dropout_is_not_taken_for_a_cut(batches):
    """Two rows, dropout of a half: a quarter of the columns gets nothing in one pass, and all do in some."""

    class Dropped(Toy):
        def forward(self, x):
            return self.last(nn.functional.dropout(self.first(x), 0.5))

    several, one = 0, [{"x": batches[0]["x"][:1], "y": batches[0]["y"][:1]}]
    for seed in range(5):
        torch.manual_seed(seed)
        model = Dropped()
        nn.init.normal_(model.last.weight)
        trial = Trial(model, loss_fn, one * 2, lambda *_: None)
        trial.measure()
        several += bool(trial.without_gradient()[0])
        assert trial.dead_slices()[0] == []
    assert several  # or this test shows nothing


def test_rows_of_a_vocabulary_may_be_missed_and_its_columns_not():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.head = nn.Embedding(5, 3), nn.Linear(3, 2)

        def forward(self, ids):
            return self.head(self.words(ids))

    ids = torch.tensor([1, 3])
    report = prove_gradients_before(Table(), lambda m, _: m(ids).square().sum(), [None])
    assert report.reached_by == {"loss": 3}
    with pytest.raises(UserError, match=r"words\.weight \(1 of 3 .*1\).*head\.weight \(1 of 3 .*1\)"):
        keep = torch.tensor([1.0, 0.0, 1.0])
        prove_gradients_before(Table(), lambda m, _: m.head(m.words(ids) * keep).square().sum(), [None])


def test_a_part_whose_gradient_vanishes_is_named(batches):
    faint = lambda scale: lambda m, b: loss_fn(m, b) + scale * m.extra(b["x"]).square().sum()  # noqa: E731
    for scale, fine in ((1e-3, True), (1e-11, False)):
        model = Toy()
        model.extra = nn.Linear(4, 2, bias=False)
        if fine:
            ratios = prove(model, faint(scale), batches).ratios
            assert len(ratios) == 3 and ratios["extra.weight"] < ratios["first.weight"]
        else:
            with pytest.raises(UserError, match=r"\de-\d\d of the usual.*: extra\.weight \(in Linear\)"):
                prove(model, faint(scale), batches)


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
    loss = lambda model, batch: calls.append(1) or loss_fn(model, batch)  # noqa: E731
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
        prove(model, lambda m, b: (m(b["x"]) * m.table).sum(), batches)

    def broken(model, batch):
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        prove(model, broken, batches)


def test_a_forward_that_writes_into_a_weight_is_named(batches):
    def careless(model, batch):
        model.norm.bias.data += 1e-6
        return loss_fn(model, batch)

    model = Toy()
    with pytest.raises(UserError, match=r"forward itself changes norm\.bias \(in LayerNorm\)"):
        prove(model, careless, batches)
    assert not model.norm.bias.any()
