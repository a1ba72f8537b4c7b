"""Training with experts through the real engine: balance over a whole step however it is divided, the bias
once per step, evaluation that counts nothing, and the proof that finds a constant balance loss."""

import math
import runpy
import sys

import pytest
import torch

from model.tinyseek import TinySeek
from modules.experts.balance import max_vio
from tests.processes import fork, script
from tests.train.tools import (
    PLAIN,
    PRE_TRAIN,
    ListLoader,
    largest_difference,
    machine,
    make_trainer,
    small_config,
    weights_of,
    without_timing,
)
from train.engine.language_model_loss import LanguageModelLoss
from utils.checkpoint import load_checkpoint
from utils.errors import UserError
from utils.log import read_log

EXPERTS = ("model.n_routed_experts=4", "model.num_experts_per_tok=2", "model.n_shared_experts=1",
           "model.moe_intermediate_size=12")  # fmt: skip


def moe_config(*settings, steps=2):
    return small_config(*PLAIN, *EXPERTS, *settings, steps=steps)


def moe_model(config, seed=1) -> TinySeek:
    """Weights large enough that routers have opinions."""
    torch.manual_seed(seed)
    model = TinySeek(config.model)
    for name, parameter in model.named_parameters():
        if name.endswith("mlp.gate.weight"):
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def steps_of_batches(micro_batches, count=2, rows=8, seed=3):
    """The same `rows` rows a step, divided into so many micro-batches of different kinds of text: the first
    rows use the lower half of the vocabulary, the others the upper half."""
    generator = torch.Generator().manual_seed(seed)
    steps = []
    for _ in range(count):
        ids = torch.randint(0, 32, (rows, 9), generator=generator)
        ids[rows // 2 :] += 32
        whole = {"input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()}
        parts = {key: value.chunk(micro_batches) for key, value in whole.items()}
        steps.append([{key: parts[key][n] for key in parts} for n in range(micro_batches)])
    return steps


def train(out, config, batches, model=None):
    model = model or moe_model(config)
    loss = LanguageModelLoss(model, config, machine())
    trainer = make_trainer(out, config, model=model, loader=ListLoader(batches), loss=loss)
    trainer.run()
    return trainer


def log_of(trainer):
    return [row for row in read_log(trainer.out / "toy" / "log.txt") if "loss" in row]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["switch", "kl"])
@pytest.mark.parametrize("measure", ["hard", "soft"])
def test_exact_global_balance_does_not_depend_on_how_a_step_is_divided(tmp_path, form, measure):
    """A weight so large that a wrong balance gradient would show in every weight; micro-batches of one kind
    of text each, on which batch balance differs."""
    settings = ["balance.weight=1.0", f"balance.form={form}", f"balance.measure={measure}",
                "balance.statistics=exact", "balance.z_loss=0.01", "balance.bias_rate=0.01"]  # fmt: skip
    config = moe_config(*settings)
    whole = train(tmp_path / "1", config, steps_of_batches(1))
    parts = train(tmp_path / "4", config, steps_of_batches(4))
    assert largest_difference(weights_of(whole.model), weights_of(parts.model)) < 5e-6
    for one, other in zip(log_of(whole), log_of(parts), strict=True):
        for key in ("loss", "ce", "balance", "z", "max_vio", "dead"):
            assert one[key] == pytest.approx(other[key], rel=2e-5), key
    by_batch = train(tmp_path / "b", moe_config(*settings, "balance.scope=batch"), steps_of_batches(4))
    assert largest_difference(weights_of(whole.model), weights_of(by_batch.model)) > 1e-3


def test_dropout_and_noise_do_not_make_the_counting_pass_count_others(tmp_path, monkeypatch):
    """The pass that counts must route as the pass that trains, though both draw random numbers."""
    config = moe_config("balance.weight=0.1", "balance.statistics=exact", "model.dropout=0.3",
                        "model.router_jitter_noise=0.3")  # fmt: skip
    model = moe_model(config)
    loss = LanguageModelLoss(model, config, machine())
    counted, trained = [], []
    count, term = loss.balancer.count, loss.balancer.loss
    chosen = lambda routings: torch.stack([routing.indices for routing in routings])  # noqa: E731

    def note_count(routings, mask):
        counted.append(chosen(routings))
        return count(routings, mask)

    def note_loss(routings, mask):
        trained.append(chosen(routings))
        return term(routings, mask)

    monkeypatch.setattr(loss.balancer, "count", note_count)
    monkeypatch.setattr(loss.balancer, "loss", note_loss)
    (batches,) = steps_of_batches(3, count=1, rows=6)
    loss.before_step(model, batches)
    for batch in batches:
        loss(model, batch, 48)
    assert len(counted) == len(trained) == 3
    assert all(torch.equal(a, b) for a, b in zip(counted, trained, strict=True))
    assert not torch.equal(counted[0], chosen(model(batches[0]["input_ids"]).routings))  # noise there is


def biases(model):
    return torch.stack(
        [m.e_score_correction_bias for m in model.modules() if hasattr(m, "e_score_correction_bias")]
    )


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_the_bias_moves_once_per_step_by_the_counts_of_all_micro_batches(tmp_path, micro_batches):
    """Counted by a loop from outside, before the step."""
    config = moe_config("balance.bias_rate=0.05", steps=1)
    model = moe_model(config)
    (batches,) = steps_of_batches(micro_batches, count=1)
    expected = []
    for layer in range(2):
        counts = [0.0] * 4
        for batch in batches:
            routing = model(batch["input_ids"]).routings[layer]
            for expert in routing.indices.flatten().tolist():
                counts[expert] += 1
        mean = sum(counts) / 4
        signs = [(mean > count) - (mean < count) for count in counts]
        expected.append([0.05 * (sign - sum(signs) / 4) for sign in signs])
    trainer = train(tmp_path, config, [batches], model)
    torch.testing.assert_close(biases(model), torch.tensor(expected))
    assert biases(model).abs().max() > 0.02
    before = biases(model).clone()
    trainer.held_out.measure(None)  # an evaluation
    model(batches[0]["input_ids"], labels=batches[0]["labels"])  # a forward
    assert torch.equal(biases(model), before)


def test_a_balance_loss_that_became_a_constant_is_found_before_the_first_step(tmp_path, monkeypatch):
    """`.item()` on the way, as in a project of the field: the routers still learn from the other term, so
    only the claim of the term itself can show it."""
    config = moe_config("balance.weight=0.1")
    model = moe_model(config)
    loss = LanguageModelLoss(model, config, machine())
    whole = loss.balancer.loss

    def broken(routings, mask):
        terms, measures = whole(routings, mask)
        anywhere = routings[0].weights.sum() * 0 + model_of["model"].model.norm.weight.sum()
        return terms | {"balance": terms["balance"].item() + 0.001 * anywhere}, measures

    model_of = {}
    monkeypatch.setattr(loss.balancer, "loss", broken)
    call = loss.__call__

    def watched(model, batch, tokens):
        model_of["model"] = model
        return call(model, batch, tokens)

    trainer = make_trainer(tmp_path, config, model=model, loader=ListLoader(steps_of_batches(1)),
                           loss=Spy(loss, watched))  # fmt: skip
    with pytest.raises(UserError, match=r"balance does not reach .*mlp\.gate\.weight"):
        trainer.run()


class Spy:
    """A loss whose call is another one's."""

    def __init__(self, loss, call):
        self.loss, self.call = loss, call
        self.before_step, self.after_step, self.claims = loss.before_step, loss.after_step, loss.claims

    def __call__(self, *arguments):
        return self.call(*arguments)


@pytest.mark.parametrize("settings", [
    ["balance.form=switch", "balance.measure=hard"], ["balance.form=switch", "balance.measure=soft"],
    ["balance.form=kl", "balance.measure=hard"], ["balance.form=kl", "balance.measure=soft"],
])  # fmt: skip
@pytest.mark.parametrize("scope", ["sequence", "batch", "global"])
def test_routers_learn_from_the_language_model_from_every_balance_and_from_z(tmp_path, settings, scope):
    config = moe_config("balance.weight=0.1", "balance.z_loss=0.1", f"balance.scope={scope}", *settings)
    model = moe_model(config)
    loss = LanguageModelLoss(model, config, machine())
    (batches,) = steps_of_batches(1, count=1)
    loss.before_step(model, batches)
    terms, measures = loss(model, batches[0], 64)
    assert set(terms) == {"ce", "balance", "z"} and not any(m.requires_grad for m in measures.values())
    for name, term in terms.items():
        model.zero_grad()
        term.backward(retain_graph=True)
        for layer in model.model.layers:
            assert layer.mlp.gate.weight.grad.abs().max() > 1e-7, name


def test_the_log_shows_the_load_of_every_expert_and_the_worst_layer(tmp_path):
    """Against counts by a loop; shares of a layer add up to one."""
    config = moe_config(steps=1)
    model = moe_model(config)
    (batches,) = steps_of_batches(2, count=1)
    counts = torch.zeros(2, 4)
    for batch in batches:
        for layer, routing in enumerate(model(batch["input_ids"]).routings):
            for expert in routing.indices.flatten().tolist():
                counts[layer, expert] += 1
    trainer = train(tmp_path, config, [batches], model)
    (row,) = read_log(tmp_path / "toy" / "experts.txt")
    for layer in range(2):
        for expert in range(4):
            share = counts[layer, expert] / counts[layer].sum()
            assert row[f"L{layer}E{expert}"] == pytest.approx(float(share), rel=1e-5)
    worst = max(float(layer.max() / layer.mean() - 1) for layer in counts)
    (logged,) = log_of(trainer)
    assert logged["max_vio"] == pytest.approx(worst, rel=1e-5) and logged["dead"] == int((counts == 0).sum())


def test_padding_is_no_traffic(tmp_path):
    """Padded columns with wild tokens change neither the load, nor the balance loss, nor its gradient."""
    config = moe_config("balance.weight=1.0", "balance.z_loss=0.1")
    (batches,) = steps_of_batches(1, count=1)
    ids, labels = batches[0]["input_ids"], batches[0]["labels"]
    mask = torch.ones_like(ids)
    wide = {
        "input_ids": torch.cat([ids, torch.full((8, 5), 7)], dim=1),
        "labels": torch.cat([labels, torch.full((8, 5), -100)], dim=1),
        "padding_mask": torch.cat([mask, torch.zeros(8, 5, dtype=torch.long)], dim=1),
    }
    results = []
    for batch in (batches[0], wide):
        model = moe_model(config)
        loss = LanguageModelLoss(model, config, machine())
        loss.before_step(model, [batch])
        terms, _ = loss(model, batch, 64)
        sum(terms.values()).backward()
        grad = model.model.layers[0].mlp.gate.weight.grad
        results.append([terms["balance"], terms["z"], grad, loss.balancer.end_step()["max_vio"]])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def pre_train(out, text, *settings):
    """Arguments of the real script with experts."""
    fixed = ["train.dtype=fp32", "tokenizer.kind=char", "train.eval_batches=1000", *EXPERTS,
             "model.zero_init_residual=true", f"data.cache_dir={out.parent / 'cache'}"]  # fmt: skip
    sets = [part for setting in [*fixed, *settings] for part in ("--set", setting)]
    words = ["--config", "tiny", "--data", text, "--out", out, "--device", "cpu", "--max-steps", 3, *sets]
    return list(map(str, words))


@pytest.mark.slow
def test_two_processes_of_two_micro_batches_equal_one_of_a_whole_batch(tmp_path, monkeypatch, capsys):
    """Exact global balance, the bias, z-loss, a sequential second head; and the pictures of the experts."""
    text = tmp_path / "text.txt"
    text.write_text((PRE_TRAIN.read_text(encoding="utf-8") + "\n") * 2, encoding="utf-8")
    settings = ["balance.weight=0.1", "balance.statistics=exact", "balance.bias_rate=0.01",
                "balance.z_loss=0.001", "model.mtp=sequential"]  # fmt: skip
    whole = pre_train(tmp_path / "big", text, *settings, "train.batch_size=8")
    monkeypatch.setattr(sys, "argv", ["train", *whole])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(PRE_TRAIN), run_name="__main__")
    assert not ended.value.code
    assert "experts on held-out data: max_vio by layer" in capsys.readouterr().out
    halves = pre_train(tmp_path / "two", text, *settings, "train.batch_size=2", "train.accumulation_steps=2")
    done = fork(script, "train.pre_train", *halves, processes=2)
    assert done.returncode == 0, done.stderr
    (big, big_log), (other, log) = (
        (load_checkpoint(out / "TinySeek_Pre_final.pkl"), read_log(out / "pre_train" / "log.txt"))
        for out in (tmp_path / "big", tmp_path / "two")
    )
    for picture in ("experts.png", "expert_tokens.png", "curves.png"):
        assert (tmp_path / "two" / "pre_train" / picture).stat().st_size > 10_000
    assert largest_difference(big["weights"], other["weights"]) < 2e-5
    for row, expected in zip(without_timing(log), without_timing(big_log), strict=True):
        assert row == pytest.approx(expected, rel=1e-4)
    loads = [read_log(tmp_path / one / "pre_train" / "experts.txt") for one in ("big", "two")]
    for row, expected in zip(*loads, strict=True):
        assert row == pytest.approx(expected, rel=1e-4)
    assert math.isfinite(log[-1]["val_max_vio"]) and {"mtp", "balance", "z", "max_vio"} <= set(log[2])


def test_evaluation_measures_the_load_over_all_held_out_tokens():
    """`max_vio` of counts added up over batches, not a mean of batches."""
    counts = torch.tensor([[8.0, 0.0], [0.0, 8.0]])
    assert max_vio(counts.sum(0)) == 0 and max_vio(counts[0]) == 1
