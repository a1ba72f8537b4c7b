"""Saboteurs: one healthy run of a small adapter, and every way we know to make it train nothing, or the wrong
thing, without an error of its own. Each is planted by a few lines, and each must be stopped, before the first
step or after the last, by a message that names what is wrong."""

import copy
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn

from model.adapters import attach
from tests.train.engine.test_moe_training import moe_config, moe_model
from tests.train.tools import (
    ListLoader,
    make_trainer,
    machine,
    next_token_loss,
    small_config,
    small_model,
    weights_of,
)
from train.engine.language_model_loss import LanguageModelLoss
from train.engine.optimizers import build_optimizers
from utils.checkpoint import final_name, load_checkpoint
from utils.distributed import sum_scalars
from utils.errors import UserError
from train.proof.gradient_check import FAINT, prove_gradients_before


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Drawing takes longer than training here."""
    monkeypatch.setattr("train.engine.trainer.plot_curves", lambda log, png: None)


class Lora(nn.Module):
    """The smallest adapter: y = W x + s B A x."""

    def __init__(self, base, rank=2, scale=2.0):
        super().__init__()
        self.base, self.scale = base, scale
        self.lora_A = nn.Parameter(torch.randn(rank, base.in_features) * 0.1)
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x):
        low = x.to(self.lora_A.dtype) @ self.lora_A.T @ self.lora_B.T
        return self.base(x) + (self.scale * low).to(x.dtype)


def adapters(model):
    return [module for module in model.modules() if isinstance(module, Lora)]


def healthy():
    """What a run is made of: a frozen base with adapters on two projections of each layer."""
    config = small_config("train.batch_size=4", "optim.weight_decay=0.1", steps=3)
    run = SimpleNamespace(config=config, model=small_model(config), loss=next_token_loss, loader=None)
    run.model.requires_grad_(False)
    for layer in run.model.model.layers:
        layer.self_attn.q_proj = Lora(layer.self_attn.q_proj)
        layer.self_attn.v_proj = Lora(layer.self_attn.v_proj)
    run.first = run.model.model.layers[0].self_attn.q_proj
    run.trains = lambda name: "lora_" in name
    run.own = frozenset(name for name, _ in run.model.named_parameters() if "lora_" in name)
    run.built = lambda trainer: None  # called with the trainer before it runs
    return run


def start(run, out):
    torch.manual_seed(0)
    trainer = make_trainer(out, run.config, model=run.model, loss=run.loss, loader=run.loader)
    trainer.stage.trains, trainer.stage.own = run.trains, run.own
    run.built(trainer)
    trainer.run()
    return trainer


def test_the_healthy_run_passes(tmp_path, capsys):
    run = healthy()
    before = weights_of(run.model)
    trainer = start(run, tmp_path)
    after = weights_of(trainer.model)
    assert {name for name in before if not torch.equal(before[name], after[name])} == run.own
    words = capsys.readouterr().out
    assert "starts at zero: model.layers.*.self_attn.q_proj.lora_B" in words
    assert "8 trainable tensors moved" in words and "frozen ones are unchanged" in words
    assert set(load_checkpoint(tmp_path / final_name("Toy"))["weights"]) == run.own


EXPERTS = ["model.n_routed_experts=4", "model.num_experts_per_tok=2", "model.n_shared_experts=1",
           "model.moe_intermediate_size=8", "balance.weight=0.01"]  # fmt: skip
LATENT = ["model.attention_kind=mla", "model.kv_lora_rank=8", "model.qk_nope_head_dim=8",
          "model.qk_rope_head_dim=4", "model.v_head_dim=8"]  # fmt: skip
KINDS = [
    ([], None), (["model.attention_bias=true", "model.tie_word_embeddings=false"], None), (LATENT, None),
    ([*EXPERTS, *LATENT, "model.mtp=sequential"], None), (["model.mtp=parallel"], None),
    (["model.zero_init_residual=true", *EXPERTS], None), ([], "Lora"), (["lora.use_dora=true"], "Lora"),
    (["lora.lora_dropout=0.3", *EXPERTS], "Lora"), ([], "MixLora"), (EXPERTS, "MixLora"), ([], "Prefix"),
]  # fmt: skip


def test_healthy_models_of_all_kinds_pass():
    """Ten short rows, one of which has a single label: the rules about parts of matrices and steps do not
    catch a model that trains as it should."""
    ids = torch.randint(64, (10, 9), generator=torch.Generator().manual_seed(3))
    rows = {"input_ids": ids[:9, :-1].contiguous(), "labels": ids[:9, 1:].contiguous()}
    lonely = {"input_ids": ids[9:, :-1].contiguous(), "labels": torch.full((1, 8), -100)}
    lonely["labels"][0, 0] = 5  # it attends to itself alone: no gradient for queries and keys
    for settings, adapter in KINDS:
        config = small_config(*settings)
        model = small_model(config)
        if adapter:
            attach(model, adapter, config)
        trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        loss = LanguageModelLoss(model, config, machine())
        report = prove_gradients_before(
            model, lambda m, batch, loss=loss: loss(m, batch, 73)[0], [rows, lonely],
            prepare=loss.before_step,
            claims=loss.claims(),
            trains=trainable.__contains__,
        )  # fmt: skip
        faintest = min(report.ratios.values()) / max(report.ratios.values())
        assert faintest > 100 * FAINT, (settings, adapter, report.ratios)  # far from the bound of the proof


# ---------------------------------------------------------------------------------------- planted in the loss


def changed_loss(change):
    """A planter: `change(ce, model, batch)` takes the place of the loss."""

    def plant(run):
        def loss(model, batch, tokens):
            terms, measures = next_token_loss(model, batch, tokens)
            return {"ce": change(terms["ce"], model, batch)}, measures

        run.loss = loss

    return plant


def no_grad(run):
    run.loss = torch.no_grad()(next_token_loss)


def detached_hidden_states(run):
    def loss(model, batch, tokens):
        hidden = model(batch["input_ids"]).hidden.detach()
        return {"ce": F.cross_entropy(model.logits(hidden).flatten(0, 1), batch["labels"].flatten())}, {}

    run.loss = loss


def loss_of_another_model(run):
    other = copy.deepcopy(run.model)
    run.loss = lambda model, batch, tokens: next_token_loss(other, batch, tokens)


def a_constant_term_beside_a_healthy_one(run):
    def loss(model, batch, tokens):
        terms, measures = next_token_loss(model, batch, tokens)
        return terms | {"balance": torch.tensor(terms["ce"].item() * 0.1)}, measures

    run.loss = loss


def a_term_that_misses_the_adapters(run):
    def loss(model, batch, tokens):
        terms, measures = next_token_loss(model, batch, tokens)
        return terms | {"decay": sum(a.lora_A.square().sum() for a in adapters(model))}, measures

    loss.claims = lambda: {"decay": lambda name: "lora_" in name}
    run.loss = loss


def masked_labels(run):
    ids = torch.zeros(2, 8, dtype=torch.long)
    run.loader = ListLoader([[{"input_ids": ids, "labels": torch.full_like(ids, -100)}]])


# --------------------------------------------------------------------------------- planted in what is trained


def the_wrong_half(run):
    for name, parameter in run.model.named_parameters():
        parameter.requires_grad_("lora_" not in name)


def everything_trains(run):
    run.model.requires_grad_(True)


def nothing_trains(run):
    run.model.requires_grad_(False)


def a_filter_that_misses_B(run):
    for adapter in adapters(run.model):
        adapter.lora_B.requires_grad_(False)


def unsaved(run):
    run.own = frozenset(name for name in run.own if not name.endswith("lora_A"))


# ------------------------------------------------------------------------------------ planted in the adapters


def around(layer, adapter_of):
    """The layer's forward plus that of an adapter that it keeps in its own way."""
    plain = type(layer).forward

    class Patched(type(layer)):
        def forward(self, x):
            return plain(self, x) + adapter_of(self)(x)

    layer.__class__ = Patched
    return layer


def small_adapter():
    return nn.Linear(16, 16, bias=False)


def in_a_dictionary(run):
    run.first.extra = {"q": [small_adapter()]}
    around(run.first, lambda layer: layer.extra["q"][0])


def in_a_list(run):
    run.first.extra = [nn.Parameter(torch.randn(16, 16))]
    around(run.first, lambda layer: lambda x: x @ layer.extra[0])


def in_a_shared_object(run):
    settings = SimpleNamespace(adapters={"a": torch.randn(16, 16, requires_grad=True)})
    for adapter in adapters(run.model):
        adapter.settings = settings
    around(run.first, lambda layer: lambda x: x @ layer.settings.adapters["a"])


def in_a_closure(run):
    hidden = small_adapter()
    around(run.first, lambda layer: hidden)


GLOBAL = nn.Parameter(torch.eye(16))


def in_a_global(run):
    around(run.first, lambda layer: lambda x: x @ GLOBAL)


def made_in_the_forward(run):
    around(run.first, lambda layer: small_adapter())


def a_forward_bound_to_the_original(run):
    first, plain = run.first, run.first.base
    first.forward = lambda x: plain(x) + x @ first.lora_A.T @ first.lora_B.T


def without_nn_parameter(run):
    A = run.first.lora_A.detach()
    del run.first.lora_A
    run.first.lora_A = A


def as_a_buffer(run):
    A = run.first.lora_A
    del run.first.lora_A
    run.first.register_buffer("lora_A", A)


def an_activation_kept(run):
    run.first.last = run.model(torch.zeros(1, 4, dtype=torch.long)).hidden


def on_another_device(run):
    def built(trainer):  # moved with its module it would have followed
        run.first.lora_A = nn.Parameter(run.first.lora_A.to("meta"))
        trainer.optimizers = build_optimizers(trainer.model, run.config.optim)

    run.built = built


def a_mask_on_another_device(run):
    run.first.mask = torch.ones(16, device="meta")
    around(run.first, lambda layer: lambda x: x * layer.mask)


def in_another_dtype(run):
    run.first.double()


def both_at_zero(run):
    run.first.lora_A.data.zero_()


def behind_a_frozen_zero(run):
    run.model.model.layers[0].self_attn.o_proj.weight.data.zero_()


def scale_zero(run):
    run.first.scale = 0.0


def never_called(run):
    class Bypassed(Lora):
        def forward(self, x):
            return self.base(x)

    run.first.__class__ = Bypassed


def a_lower_half_under_no_grad(run):
    layer = run.model.model.layers[0]
    kind = type(layer)
    layer.__class__ = type("Frozen", (kind,), {"forward": torch.no_grad()(kind.forward)})


def detached_on_the_way(run):
    run.first.register_forward_hook(lambda module, given, output: output.detach())


def registered_twice(run):
    run.model.model.layers[1].self_attn.q_proj = run.first


def one_A_for_two_places(run):
    run.model.model.layers[1].self_attn.q_proj.lora_A = run.first.lora_A


def one_memory_for_two_parameters(run):
    run.model.model.layers[1].self_attn.q_proj.lora_A = nn.Parameter(run.first.lora_A.data)


# ----------------------------------------------------------------------------------- planted in the optimizer


def an_optimizer_built_too_early(run):
    def built(trainer):
        trainer.model.model.layers[0].self_attn.k_proj = Lora(trainer.model.model.layers[0].self_attn.k_proj)

    run.built = built


def an_optimizer_over_a_copy(run):
    def built(trainer):
        trainer.optimizers = build_optimizers(copy.deepcopy(trainer.model), run.config.optim)

    run.built = built


def the_base_in_the_optimizer(run):
    def built(trainer):
        trainer.optimizers[0].param_groups[0]["params"].append(
            trainer.model.model.layers[1].mlp.up_proj.weight
        )

    run.built = built


def no_learning_rate(run):
    def built(trainer):
        for group in trainer.optimizers[0].param_groups:
            group["initial_lr"] = 0.0

    run.built = built


def no_learning_rate_for_some(run):
    def built(trainer):
        optimizer = trainer.optimizers[0]
        optimizer.param_groups[0]["params"].remove(run.first.lora_A)
        group = {"params": [run.first.lora_A], "lr": 0.0, "initial_lr": 0.0}
        optimizer.add_param_group(group)

    run.built = built


def a_step_that_does_nothing(run):
    run.built = lambda trainer: setattr(trainer.optimizers[0], "step", lambda: None)


def weights_put_back(run):
    def built(trainer):
        start, update = weights_of(trainer.model), trainer.update

        def undone(witness):
            norm = update(witness)
            trainer.model.load_state_dict(start)
            return norm

        trainer.update = undone

    run.built = built


def rounded_away(run):
    run.config.optim.lr = 1e-5
    for adapter in adapters(run.model):
        adapter.bfloat16()
        adapter.base.float()


# --------------------------------------------------------------------------------- planted to act in training


def a_gradient_hook_of_zeros(run):
    """Hooks of tensors are not copied, so only the end shows it."""
    run.first.lora_A.register_hook(torch.zeros_like)


def frozen_once_training_began(run):
    def loss(model, batch, tokens):
        if model is run.model:
            run.first.requires_grad_(False)
        return next_token_loss(model, batch, tokens)

    run.loss = loss


def the_forward_writes_into_the_base(run):
    def hook(module, given, output):
        with torch.no_grad():
            module.base.weight.mul_(1.001)

    run.first.register_forward_hook(hook)


def a_hook_writes_into_the_base_later(run):
    calls = []

    def hook(module, given):
        calls.append(1)
        if len(calls) == 4:
            module.base.weight.data[0, 0] += 1e-3

    run.first.register_forward_pre_hook(hook)


def nan_gradients(run):
    """A finite loss with an infinite slope, at zeros that a copy with noise in their place would not show."""
    planted = changed_loss(lambda ce, model, batch: ce + adapters(model)[0].lora_B.square().sum().sqrt())
    planted(run)


def a_frozen_router_that_is_balanced(run):
    run.config = moe_config("balance.bias_rate=0.01", steps=3)
    run.model = moe_model(run.config)
    run.loss = LanguageModelLoss(run.model, run.config, machine())  # it does not know what is frozen later
    run.model.requires_grad_(False)
    layer = run.model.model.layers[0].self_attn
    layer.q_proj = Lora(layer.q_proj)
    run.own = frozenset(run.model.state_dict())


# -------------------------------------------------------- planted in the whole model: half of it still learns


def whole(run, *settings, steps=3):
    """A model that is trained whole, with the loss of pre-training."""
    run.config = small_config("train.batch_size=4", *settings, steps=steps)
    run.model = small_model(run.config)
    run.loss = LanguageModelLoss(run.model, run.config, machine())
    run.trains, run.own = lambda name: True, frozenset(run.model.state_dict())
    run.layer = run.model.model.layers[1]


def all_heads_but_one_detached(run):
    whole(run)
    run.layer.self_attn.q_proj.register_forward_hook(
        lambda module, given, q: torch.cat([q[..., :8], q[..., 8:].detach()], dim=-1)
    )


def one_channel_masked(run):
    whole(run)
    keep = torch.arange(24) != 5
    run.layer.mlp.down_proj.register_forward_pre_hook(lambda module, x: x[0] * keep)


def only_the_second_head_trains_the_layers(run):
    whole(run, "model.mtp=parallel")
    plain = LanguageModelLoss.__call__

    class OnDetached(LanguageModelLoss):
        def __call__(self, model, batch, tokens):
            terms, measures = plain(self, model, batch, tokens)
            logits = model.logits(model(batch["input_ids"]).hidden.detach())
            return terms | {"ce": F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())}, measures

    run.loss.__class__ = OnDetached


def routers_that_learn_from_the_balance_alone(run):
    whole(run, "balance.weight=0.01", "model.n_routed_experts=4", "model.num_experts_per_tok=2",
          "model.n_shared_experts=1", "model.moe_intermediate_size=8")  # fmt: skip
    for layer in run.model.model.layers:
        layer.mlp.gate.register_forward_hook(
            lambda module, given, routing: routing._replace(weights=routing.weights.detach())
        )


def from_step(number, act):
    """A planter: `act(layer)` before the forward of the `number`th step of 20, and of all that follow."""

    def plant(run):
        whole(run, steps=20)
        plain, calls = run.loss, []

        def loss(model, batch, tokens):
            if model is run.model and len(calls) < 20:
                calls.append(1)
                if len(calls) >= number:
                    act(run.layer)
            return plain(model, batch, tokens)

        run.loss = loss

    return plant


def silence(layer):
    for parameter in layer.parameters():
        parameter.register_hook(torch.zeros_like)


def in_three_of_four_micro_batches(change):
    """A planter: `change(loss, model)` acts on all micro-batches of a step but the first."""

    def plant(run):
        whole(run, "train.accumulation_steps=4", "train.batch_size=1")
        plain, calls = run.loss, []

        def loss(model, batch, tokens):
            calls.append(1)
            return plain(model, batch, tokens) if len(calls) % 4 == 1 else change(run, model, batch, tokens)

        run.loss = loss

    return plant


def times_zero(run, model, batch, tokens):
    terms, measures = next_token_loss(model, batch, tokens)
    return {"ce": terms["ce"] * 0}, measures


def without_the_first_layer(run, model, batch, tokens):
    first = model.model.layers[0]
    handle = first.register_forward_hook(lambda module, given, out: (out[0].detach(), *out[1:]))
    try:
        return next_token_loss(model, batch, tokens)
    finally:
        handle.remove()


def a_feed_forward_times_a_billionth(run):
    whole(run)
    for layer in run.model.model.layers:
        layer.mlp.register_forward_hook(lambda module, given, output: output * 1e-9)


NO_GRAPH, STRANGE = "ce has no graph", "no parameter of the copy"
NUMBER = STRANGE + r": a number: requires_grad_\(\) on a loss that lost its graph"
FIRST = r"model\.layers\.0\.self_attn\.q_proj"
TOO_LATE = r"after the optimizer was built: "

SABOTEURS = [
    (no_grad, NO_GRAPH),
    (detached_hidden_states, NO_GRAPH),
    (changed_loss(lambda ce, model, batch: ce.detach().requires_grad_()), NUMBER),
    (changed_loss(lambda ce, model, batch: torch.tensor(ce.item(), requires_grad=True)), NUMBER),
    (changed_loss(lambda ce, model, batch: ce + torch.ones(3).requires_grad_().sum()), STRANGE + r": \(3"),
    (changed_loss(lambda ce, model, batch: ce * float("nan")), "ce is nan on the first batch"),
    (changed_loss(lambda ce, model, batch: ce * 0), "cut off.*multiplication by zero"),
    (loss_of_another_model, STRANGE + ".*another model"),
    (a_constant_term_beside_a_healthy_one, "balance has no graph"),
    (a_term_that_misses_the_adapters, r"decay does not reach .*" + FIRST + r"\.lora_B \(in Lora\)"),
    (masked_labels, "no label"),
    (the_wrong_half, r"trainable, though this stage does not.*embed_tokens\.weight.*name filter"),
    (everything_trains, r"trainable, though this stage does not.*embed_tokens\.weight.*name filter"),
    (nothing_trains, "everything is frozen"),
    (a_filter_that_misses_B, r"frozen, though this stage trains it: " + FIRST + r"\.lora_B \(in Lora\)"),
    (unsaved, r"not saved: " + FIRST + r"\.lora_A \(in Lora\)"),
    (in_a_dictionary, FIRST + r"\.extra\['q'\]\[0\] \(Linear on cpu\) is kept in a plain"),
    (in_a_list, FIRST + r"\.extra\[0\] \(Parameter on cpu\) is kept in a plain"),
    (in_a_shared_object, FIRST + r"\.settings\.adapters\['a'\] \(Tensor on cpu\) is kept in a plain"),
    (in_a_closure, STRANGE + r": \(16, 16\)"),
    (in_a_global, STRANGE + r": \(16, 16\)"),
    (made_in_the_forward, STRANGE + r": \(16, 16\).*made in the forward"),
    (a_forward_bound_to_the_original, STRANGE + ": " + FIRST + r"\.lora_[AB] of the original"),
    (without_nn_parameter, STRANGE + ": " + FIRST + r"\.lora_A.*nn\.Parameter forgotten"),
    (as_a_buffer, FIRST + r"\.lora_A wants a gradient, but is a buffer"),
    (an_activation_kept, FIRST + r"\.last .*earlier forward"),
    (on_another_device, r"parameter " + FIRST + r"\.lora_A is on meta"),
    (a_mask_on_another_device, FIRST + r"\.mask on meta"),
    (in_another_dtype, r"one dtype: " + FIRST + r"\.lora_A \(in Lora\)"),
    (both_at_zero, r"A and B both start at zero: neither can move: " + FIRST + r"\.lora_A"),
    (behind_a_frozen_zero, FIRST + r"\.lora_A .*frozen at zero: model\.layers\.0\.self_attn\.o_proj"),
    (scale_zero, r"cut off.*" + FIRST + r"\.lora_A \(in Lora\).*multiplication by zero"),
    (never_called, r"cut off.*" + FIRST + r"\.lora_A \(in Bypassed\)"),
    (a_lower_half_under_no_grad, r"cut off.*" + FIRST + r"\.lora_A.*no_grad"),
    (detached_on_the_way, r"cut off.*" + FIRST + r"\.lora_A.*detach"),
    (registered_twice, r"same numbers under 2 names: " + FIRST),
    (one_A_for_two_places, r"same numbers under 2 names: " + FIRST + r"\.lora_A .*layers\.1\."),
    (one_memory_for_two_parameters, r"same numbers under 2 names: " + FIRST + r"\.lora_A .*layers\.1\."),
    (an_optimizer_built_too_early, TOO_LATE + r"model\.layers\.0\.self_attn\.k_proj\.lora_A"),
    (an_optimizer_over_a_copy, TOO_LATE + FIRST + r"\.lora_A"),
    (the_base_in_the_optimizer, TOO_LATE + r"model\.layers\.1\.mlp\.up_proj"),
    (no_learning_rate, r"not moved.*" + FIRST + r"\.lora_A.*learning rate was 0"),
    (no_learning_rate_for_some, r"not moved by training: " + FIRST + r"\.lora_A \(in Lora\): the learn"),
    (a_step_that_does_nothing, r"not moved by training: " + FIRST),
    (weights_put_back, r"not moved by training: " + FIRST),
    (rounded_away, FIRST + r"\.lora_A.*rounded away in torch\.bfloat16"),
    (a_gradient_hook_of_zeros, r"not moved by training: " + FIRST + r"\.lora_A \(in Lora\): no gradient"),
    (frozen_once_training_began, r"not moved by training: " + FIRST + r"\.lora_A.*no gradient"),
    (the_forward_writes_into_the_base, r"forward itself changes " + FIRST + r"\.base\.weight \(in Linear\)"),
    (a_hook_writes_into_the_base_later, r"frozen, yet changed by training: " + FIRST + r"\.base\.weight"),
    (nan_gradients, r"not finite.*" + FIRST + r"\.lora_B"),
    (a_frozen_router_that_is_balanced, r"model\.layers\.0\.mlp\.gate\.e_score_correction_bias.*frozen rout"),
    (all_heads_but_one_detached, r"part of a matrix is.*layers\.1\.self_attn\.q_proj\.weight \(8 of 16 "),
    (one_channel_masked, r"gate_proj\.weight \(1 of 24 .* 0\).*down_proj\.weight \(1 of 24 .* 1\)"),
    (only_the_second_head_trains_the_layers, r"ce does not reach .*layers\.0\.self_attn\.q_proj"),
    (routers_that_learn_from_the_balance_alone, r"ce does not reach .*gate\.weight \(in TopkRouter\)"),
    (from_step(2, lambda layer: layer.requires_grad_(False)), r"in 1 of 20 steps only: .*layers\.1\."),
    (from_step(2, silence), r"trained in 1 of 20 steps only: .*layers\.1\."),
    (in_three_of_four_micro_batches(times_zero), "trained by some labelled micro-batches and not by others"),
    (in_three_of_four_micro_batches(without_the_first_layer), r"trained by some .*layers\.0\."),
    (a_feed_forward_times_a_billionth, r"only \de-\d\d of the usual.*layers\.0\.mlp\.gate_proj"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("plant", "words"), SABOTEURS, ids=[f"{n}-{plant.__name__}" for n, (plant, _) in enumerate(SABOTEURS)]
)
def test_a_saboteur_is_stopped(tmp_path, plant, words):
    run = healthy()
    plant(run)
    with pytest.raises(UserError, match=words) as caught:
        start(run, tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / final_name("Toy")).exists()


# ---------------------------------------------------------------------------------------------- two processes


def words_of(run, *arguments):
    """What it says, as a report or as an error."""
    try:
        return str(run(*arguments))
    except UserError as error:
        return str(error)


def two_processes(rank, folder):
    """Each process uses one of two adapters only; then one process freezes what the other trains."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2,
                            timeout=timedelta(seconds=60))  # fmt: skip
    torch.manual_seed(0)
    model, x = nn.ModuleList(Lora(nn.Linear(4, 4)) for _ in range(2)), torch.randn(3, 4)

    def loss(model, batch):
        sum_scalars([1.0])  # as the balance of experts: all processes must call it equally often
        return model[rank](x).square().sum()

    words = [words_of(prove_gradients_before, model, loss, [None])]
    model[1].lora_A.data.zero_()
    words.append(words_of(prove_gradients_before, model, loss, [None]))
    run = healthy()
    run.first.lora_B.requires_grad_(rank == 0)
    words.append(words_of(start, run, folder))
    torch.save(words, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_processes_agree_on_what_trains(tmp_path):
    """What one process reaches counts for all, all refuse together, and none waits for ever."""
    mp.spawn(two_processes, (tmp_path.as_posix(),), nprocs=2)
    both = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for fine, stuck, disagree in both:
        assert fine.startswith("gradients proven: loss trains 8 tensors")
        assert "A and B both start at zero: neither can move: 1.lora_A" in stuck
        assert "disagree about the trainable parameters" in disagree
