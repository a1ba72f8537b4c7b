"""The engine against plain loops: the same weights as ten obvious lines, however a step is divided.

The oracle is always a loop written here: all sequences of a step in one batch, `F.cross_entropy` over the
labels, `torch.optim.AdamW`. Tolerances are those of fp32 sums in another order; where the order is the same,
bits are compared.
"""

import math
import os
import signal

import pytest
import torch

from tests.train.tools import (
    PLAIN,
    ListLoader,
    NoEvaluation,
    largest_difference,
    make_loader,
    make_trainer,
    next_token_loss,
    obvious_loop,
    same_bits,
    small_config,
    small_model,
    uneven_steps,
    weights_of,
    without_timing,
)
from train.engine import trainer as engine
from train.engine.step_log import StepLog
from train.engine.stopping import STOPPING
from utils.checkpoint import final_name, find_checkpoints, load_checkpoint
from utils.errors import UserError
from utils.log import read_log


ROUNDING = 2e-6  # weights of size about 0.1, a few steps of AdamW at 0.01


def steps_of(config, count):
    """The first steps of the loader that `make_trainer` uses."""
    loader = make_loader(config)
    return [loader.next_step() for _ in range(count)]


# ------------------------------------------------------------------------------------------- the same weights


@pytest.mark.parametrize(("batch_size", "accumulation"), [(8, 1), (2, 4), (1, 8)])
def test_the_engine_equals_an_obvious_loop(tmp_path, batch_size, accumulation):
    """One big batch, and the same eight sequences in four and in eight parts."""
    config = small_config(
        *PLAIN, f"train.batch_size={batch_size}", f"train.accumulation_steps={accumulation}"
    )
    trainer = make_trainer(tmp_path, config)
    trainer.run()
    weights, losses = obvious_loop(config, steps_of(config, 6))
    assert largest_difference(weights_of(trainer.model), weights) < ROUNDING
    logged = [row["loss"] for row in read_log(tmp_path / "toy" / "log.txt") if "loss" in row]
    assert logged == pytest.approx(losses, rel=2e-5)
    assert largest_difference(weights_of(small_model(config)), weights) > 0.01  # it did move


def test_labels_spread_unevenly_weigh_the_same(tmp_path):
    """Each token counts once, whatever micro-batch it is in. A mean of means is off by far more than
    rounding."""
    config = small_config(*PLAIN)
    trainer = make_trainer(tmp_path, config, loader=ListLoader(uneven_steps()))
    trainer.run()
    weights, losses = obvious_loop(config, uneven_steps())
    assert largest_difference(weights_of(trainer.model), weights) < ROUNDING
    rows = [row for row in read_log(tmp_path / "toy" / "log.txt") if "epoch" in row]
    assert [row["loss"] for row in rows if "loss" in row] == pytest.approx(losses, rel=2e-5)
    # the step without a label: no loss, no NaN, counted from then on
    assert [row.get("skipped", 0) for row in rows] == [0, 0, 1, 1, 1, 1] and "loss" not in rows[2]


def test_a_log_line_is_the_mean_over_the_steps_that_were_taken(tmp_path):
    """Logged every sixth step; the mean of five losses, since one of six steps was skipped."""
    config = small_config(*PLAIN, "train.log_every=6")
    make_trainer(tmp_path, config, loader=ListLoader(uneven_steps())).run()
    _, losses = obvious_loop(config, uneven_steps())
    (row,) = [row for row in read_log(tmp_path / "toy" / "log.txt") if "epoch" in row]
    assert len(losses) == 5 and row["loss"] == pytest.approx(sum(losses) / 5, rel=2e-5)
    assert row["ppl"] == pytest.approx(math.exp(sum(losses) / 5), rel=2e-5)


def test_the_log_the_curves_and_the_checkpoints_of_a_run(tmp_path, curves):
    """What design promises: keys in order, tokens and epochs counted, the rate, and two checkpoints on the
    way."""
    config = small_config("train.accumulation_steps=2", "train.save_every=2", "train.eval_every=3",
                          "train.eval_batches=7", "optim.schedule=wsd", "optim.warmup_steps=1",
                          "optim.decay_fraction=0.5", steps=8)  # fmt: skip
    evaluation = NoEvaluation()
    make_trainer(tmp_path, config, evaluate=evaluation).run()
    # one batch to warm up; then before the first step, at 3 and 6, and all of it at the end
    assert evaluation.calls == [1, 7, 7, 7, None]
    rows = read_log(tmp_path / "toy" / "log.txt")
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in rows if "val_loss" in row] == [0, 3, 6, 8]
    assert [row["step"] for row in steps] == list(range(1, 9))
    assert [row["tokens"] for row in steps] == [64 * n for n in range(1, 9)]  # 4 sequences x 8 tokens x 2
    keys = "step tokens epoch loss ce ppl conf grad_norm lr tok_s data_ms step_ms"
    assert set(steps[0]) == set(keys.split())
    expected = [0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    assert [row["lr"] / config.optim.lr for row in steps] == pytest.approx(expected)
    assert steps[0]["ppl"] == pytest.approx(math.exp(steps[0]["ce"]), rel=1e-4)
    names = [path.name for path in find_checkpoints(tmp_path, "Toy")]
    assert names.pop(0) == "TinySeek_Toy_stable.pkl"
    assert len(names) == 2 and all(name.endswith("_0.pkl") for name in names)
    final = load_checkpoint(tmp_path / final_name("Toy"))
    assert final["step"] == 8 and "training" not in final and final["evaluation"] == {"val_loss": 0.5}
    assert (tmp_path / "toy" / "curves.png").stat().st_size > 1000


# --------------------------------------------------------------------------------------------- exact resuming


class Stop(Exception):
    """Stands in for a crash."""


def run_until(out, config, stop_at, resume=False, kill=None):
    """Run, and crash (or send oneself the signal `kill`) within the loss of step `stop_at`; None never
    stops."""
    calls = 0

    def loss(model, batch, tokens):
        nonlocal calls
        if model is trainer.model:  # a step, and not the proof before it
            calls += 1
            if trainer.step + 1 == stop_at:
                if kill is None:
                    raise Stop
                os.kill(os.getpid(), kill)
        return next_token_loss(model, batch, tokens)

    trainer = make_trainer(out, config, loss=loss, resume=resume)
    trainer.run()
    return calls


def resumable_config(optimizer, steps=10):
    """Dropout, so that random states matter; logging, evaluating and saving at steps that do not coincide."""
    return small_config(
        f"optim.optimizer={optimizer}",
        "model.dropout=0.2",
        "model.attention_dropout=0.2",
        "train.log_every=3",
        "train.eval_every=4",
        "train.save_every=2",
        steps=steps,
    )


def result(out):
    """What must be equal bit by bit: final weights, and the log without its timing."""
    weights = load_checkpoint(out / final_name("Toy"))["weights"]
    return weights, without_timing(read_log(out / "toy" / "log.txt"))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The results of runs that were never stopped, by optimizer."""
    results = {}
    for optimizer in ("adamw", "muon"):
        out = tmp_path_factory.mktemp(optimizer)
        run_until(out, resumable_config(optimizer), None)
        results[optimizer] = result(out)
    return results


@pytest.mark.parametrize(("optimizer", "stops"), [
    ("adamw", [1]), ("muon", [2, 3]), ("adamw", [5, 6]), ("muon", [9, 10]), ("adamw", [10, 10]),
])  # fmt: skip
def test_a_crash_leaves_no_trace(tmp_path, unbroken, optimizer, stops):
    for number, stop in enumerate(stops):
        with pytest.raises(Stop):
            run_until(tmp_path, resumable_config(optimizer), stop, resume=number > 0)
    run_until(tmp_path, resumable_config(optimizer), None, resume=True)
    weights, log = result(tmp_path)
    assert same_bits(weights, unbroken[optimizer][0])
    assert log == unbroken[optimizer][1]
    saved = [load_checkpoint(path)["step"] for path in find_checkpoints(tmp_path, "Toy")]
    assert saved == [10, 10]  # the newest are the last ones: before and after the last evaluation


@pytest.mark.parametrize(("number", "stop"), [
    (signal.SIGINT, 1), (signal.SIGTERM, 4), (signal.SIGHUP, 5), (signal.SIGINT, 10),
])  # fmt: skip
def test_a_signal_leaves_a_checkpoint_and_no_trace(tmp_path, unbroken, number, stop, capsys):
    """Step 4 is one that evaluates, 5 one that does nothing, 10 the last; the step at hand is finished."""
    handlers = [signal.getsignal(each) for each in STOPPING]
    with pytest.raises(SystemExit) as caught:
        run_until(tmp_path, resumable_config("adamw"), stop, kill=number)
    assert caught.value.code == 128 + number
    assert handlers == [signal.getsignal(each) for each in STOPPING]
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "stopped by" in line]
    assert number.name in line and f"step {stop};" in line and "--resume" in line
    assert load_checkpoint(find_checkpoints(tmp_path, "Toy")[-1])["step"] == stop
    assert run_until(tmp_path, resumable_config("adamw"), None, resume=True) == 10 - stop
    weights, log = result(tmp_path)
    assert same_bits(weights, unbroken["adamw"][0])
    assert log == unbroken["adamw"][1]


def test_a_crash_in_the_last_evaluation_loses_no_step(tmp_path, unbroken):
    """The checkpoint before it holds the last weights."""

    class Interrupted(NoEvaluation):
        def __call__(self, model, max_batches):
            if max_batches is None:
                raise KeyboardInterrupt
            return super().__call__(model, max_batches)

    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path, resumable_config("adamw"), evaluate=Interrupted()).run()
    assert run_until(tmp_path, resumable_config("adamw"), None, resume=True) == 0
    weights, log = result(tmp_path)
    assert same_bits(weights, unbroken["adamw"][0])
    assert log == unbroken["adamw"][1]


def test_resuming_a_finished_run_changes_nothing(tmp_path, capsys):
    run_until(tmp_path, resumable_config("adamw"), None)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert run_until(tmp_path, resumable_config("adamw"), None, resume=True) == 0
    assert "is finished at step 10; to give it more steps: --resume --max-steps N" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_resuming_with_a_later_end_goes_on(tmp_path):
    run_until(tmp_path, resumable_config("adamw"), None)
    assert run_until(tmp_path, resumable_config("adamw", steps=14), None, resume=True) == 4
    _, log = result(tmp_path)
    assert [row["step"] for row in log if "loss" in row] == [3, 6, 9, 10, 12, 14]
    assert load_checkpoint(tmp_path / final_name("Toy"))["step"] == 14


def test_resuming_with_nothing_to_resume_starts(tmp_path, unbroken):
    run_until(tmp_path / "new", resumable_config("adamw"), None, resume=True)
    assert same_bits(result(tmp_path / "new")[0], unbroken["adamw"][0])


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("optim.lr=0.02", "optim.lr=0.01"),
        ("train.seed=3", "train.seed=0"),
        ("model.dropout=0.1", "model.dropout=0.2"),
        ("train.batch_size=8", "train.batch_size=4"),
        ("train.accumulation_steps=2", "train.accumulation_steps=1"),
    ],
)
def test_resuming_with_other_settings_is_refused(tmp_path, setting, words):
    run_until(tmp_path, resumable_config("adamw", steps=1), None)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    config = resumable_config("adamw")
    section, _, rest = setting.partition(".")
    key, _, value = rest.partition("=")
    setattr(getattr(config, section), key, type(getattr(getattr(config, section), key))(value))
    with pytest.raises(UserError, match=words):
        make_trainer(tmp_path, config, resume=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


# ------------------------------------------------------------------------------------- the best of all epochs


class Scripted:
    """An evaluation that finds at each step what `losses` says; remembers the weights that it was shown."""

    batches = 3

    def __init__(self, losses):
        self.losses, self.calls, self.seen, self.trainer = losses, [], {}, None

    def __call__(self, model, max_batches):
        step = self.trainer.step
        if step:
            self.calls.append((step, max_batches))
        self.seen[step] = weights_of(model)
        loss = self.losses.get(step, 9.0) if max_batches is None else 0.0
        return {"val_loss": loss, "quality": -loss, "at": float(step)}


def run_for_the_best(out, losses, stop=None, resume=False):
    """Ten steps, three to an epoch, a checkpoint after every second; a crash at the beginning of step
    `stop`."""

    def loss(model, batch, tokens):
        if stop and model is trainer.model and trainer.step + 1 == stop:
            raise Stop
        return next_token_loss(model, batch, tokens)

    config = resumable_config("adamw")
    config.train.eval_every = 6
    evaluation, loader = Scripted(losses), ListLoader(uneven_steps(count=3))
    trainer = make_trainer(out, config, loader=loader, loss=loss, evaluate=evaluation, resume=resume)
    trainer.stage.keep_best, evaluation.trainer = "quality", trainer
    return trainer, evaluation, trainer.run()


BESTS = {  # held-out losses after each epoch and at the end, and the step that is kept
    "the first": ({3: 1.0, 6: 2.0, 9: 3.0, 10: 4.0}, 3),
    "one on the way": ({3: 3.0, 6: 1.0, 9: 2.0, 10: 1.5}, 6),
    "a tie": ({3: 2.0, 6: 1.0, 9: 1.0, 10: 1.0}, 6),
    "the last": ({3: 4.0, 6: 3.0, 9: 2.0, 10: 1.0}, 10),
    "none": (dict.fromkeys((3, 6, 9, 10), math.nan), 10),
}


@pytest.mark.parametrize("name", BESTS)
def test_the_result_is_the_best_of_all_epochs(tmp_path, name):
    """Weights, evaluation, step and tokens of the result belong together, and the model in memory is it."""
    losses, best = BESTS[name]
    trainer, evaluation, returned = run_for_the_best(tmp_path, losses)
    # the step that ends an epoch measures all that is held out, also where a part was due
    assert evaluation.calls == [(step, None) for step in (3, 6, 9, 10)]
    final = load_checkpoint(tmp_path / final_name("Toy"))
    assert same_bits(final["weights"], evaluation.seen[best])
    assert same_bits(weights_of(trainer.model), evaluation.seen[best])
    assert not same_bits(evaluation.seen[3], evaluation.seen[10])
    assert (final["step"], final["tokens"]) == (best, best * 4 * 2 * 8)  # micro-batches, rows, tokens
    assert final["evaluation"]["at"] == returned["at"] == best
    (last,) = {load_checkpoint(path)["step"] for path in find_checkpoints(tmp_path, "Toy")}
    assert last == 10  # what goes on, goes on from the last weights


@pytest.mark.parametrize(("name", "stops"), [
    ("the first", [2, 4, 7]), ("one on the way", [5, 8, 10]), ("the last", [4, 10]),
])  # fmt: skip
def test_a_crash_before_at_and_after_the_best_leaves_no_trace(tmp_path, name, stops):
    """Step 3 is evaluated before it is saved with step 4: stopped in between, it is evaluated again."""
    losses, _ = BESTS[name]
    run_for_the_best(tmp_path / "unbroken", losses)
    expected = load_checkpoint(tmp_path / "unbroken" / final_name("Toy"))
    for number, stop in enumerate(stops):
        with pytest.raises(Stop):
            run_for_the_best(tmp_path / "broken", losses, stop, resume=number > 0)
    for _ in range(2):  # the second time it is finished, and nothing changes
        run_for_the_best(tmp_path / "broken", losses, resume=True)
        final = load_checkpoint(tmp_path / "broken" / final_name("Toy"))
        assert same_bits(final.pop("weights"), expected["weights"])
        assert final == {key: value for key, value in expected.items() if key != "weights"}
        assert result(tmp_path / "broken")[1] == result(tmp_path / "unbroken")[1]


# ---------------------------------------------------------------------------------------- what must not go on


def spoiled(at, how):
    """The loss of pre-training, spoiled from step `at` on by `how(loss, model)`; step 0 is the proof."""

    def loss(model, batch, tokens):
        terms, measures = next_token_loss(model, batch, tokens)
        if at == 0 or (model is trainer[0].model and trainer[0].step + 1 == at):
            terms = {"ce": how(terms["ce"], model)}
        return terms, measures

    trainer = []
    return loss, trainer


def infinite_gradient(loss, model):
    """A finite loss whose gradient is not: the square root at 0."""
    weight = model.model.norm.weight
    return loss + (weight - weight.detach()).abs().sum().sqrt()


@pytest.mark.parametrize(
    ("how", "what"),
    [
        (lambda loss, model: loss * float("nan"), "the loss is nan"),
        (lambda loss, _: loss * float("inf"), "the loss is inf"),
        (infinite_gradient, "the gradient norm is (nan|inf)"),
    ],
    ids=["nan", "inf", "gradient"],
)
def test_what_is_not_finite_stops_the_run(tmp_path, how, what):
    """With the step, the last good checkpoint and advice; that checkpoint is from before, and finite."""
    loss, holder = spoiled(5, how)
    trainer = make_trainer(tmp_path, small_config("train.save_every=2"), loss=loss)
    holder.append(trainer)
    with pytest.raises(
        UserError, match=what + r" at step 5; the last good .*TinySeek_Toy2_0\.pkl.*optim\.lr"
    ):
        trainer.run()
    saved = load_checkpoint(tmp_path / "TinySeek_Toy2_0.pkl")
    assert saved["step"] == 4 and all(torch.isfinite(weight).all() for weight in saved["weights"].values())
    assert not (tmp_path / final_name("Toy")).exists()


def test_numbers_may_stay_on_the_device_until_a_line_is_due(tmp_path, monkeypatch):
    """As on a GPU, which nothing should wait for: the same weights and log, and a NaN is still noticed."""
    waits = []
    monkeypatch.setattr("train.engine.trainer.synchronize", lambda device: waits.append(trainer.step))
    fetch = StepLog.fetch
    monkeypatch.setattr(StepLog, "fetch", lambda log: waits.append(trainer.step) or fetch(log))
    settings = ("train.log_every=3", "train.save_every=4", "model.dropout=0.1")
    results = []
    for lazy in (False, True):
        trainer = make_trainer(tmp_path / str(lazy), small_config(*settings, steps=8))
        trainer.lazy = lazy
        waits.clear()
        trainer.run()
        results.append(result(tmp_path / str(lazy)))
        assert set(waits) == ({3, 4, 6, 8} if lazy else set(range(1, 9)))  # lines, a checkpoint, the end
    assert same_bits(results[0][0], results[1][0]) and results[0][1] == results[1][1]
    loss, holder = spoiled(6, lambda loss, model: loss * float("nan"))
    trainer = make_trainer(tmp_path / "nan", small_config(*settings, steps=8), loss=loss)
    holder.append(trainer)
    trainer.lazy = True
    with pytest.raises(UserError, match=r"the loss is nan at step \d; the last good .*_Toy1_0\.pkl"):
        trainer.run()
    assert load_checkpoint(find_checkpoints(tmp_path / "nan", "Toy")[-1])["step"] == 4


def no_graph(model, batch, tokens):
    """A loss under no_grad."""
    with torch.no_grad():
        return next_token_loss(model, batch, tokens)


def cut(model, batch, tokens):
    """The first layer's MLP does not count."""
    model.model.layers[0].mlp.register_forward_hook(lambda module, given, output: output.detach())
    return next_token_loss(model, batch, tokens)


@pytest.mark.parametrize(
    ("loss", "words"),
    [(no_graph, "ce has no graph"), (cut, r"cut off.*layers\.0\.mlp"),
     (spoiled(0, lambda loss, model: loss * float("nan"))[0], "nan on the first batch")],
    ids=["no_grad", "detach", "nan"],
)  # fmt: skip
def test_the_proof_comes_before_the_first_step(tmp_path, loss, words):
    """Nothing is trained, and nothing of an older run is removed."""
    (tmp_path / "TinySeek_Toy1_0.pkl").write_bytes(b"of an older run")
    trainer = make_trainer(tmp_path, small_config(), loss=loss)
    before = weights_of(trainer.model)
    with pytest.raises(UserError, match=words):
        trainer.run()
    assert trainer.step == 0 and same_bits(weights_of(trainer.model), before)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "TinySeek_Toy1_0.pkl"]


@pytest.mark.parametrize("frozen_first", [False, True])
def test_freezing_after_the_optimizer_was_built_is_noticed(tmp_path, frozen_first):
    """By mistake a parameter is frozen, or unfrozen, too late for the optimizer to know."""
    model = small_model(small_config())
    weight = model.model.layers[1].mlp.up_proj.weight.requires_grad_(not frozen_first)
    trainer = make_trainer(tmp_path, small_config(), model=model)
    weight.requires_grad_(frozen_first)
    with pytest.raises(
        UserError, match=r"after the optimizer was built: model\.layers\.1\.mlp\.up_proj\.weight"
    ):
        trainer.run()


def test_a_frozen_parameter_stays_as_it_is(tmp_path):
    model = small_model(small_config())
    model.model.layers[0].requires_grad_(False)
    before = weights_of(model)
    trainer = make_trainer(tmp_path, small_config(), model=model)
    trainer.stage.trains = lambda name: "layers.0." not in name
    trainer.run()
    after = weights_of(model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if "layers.0." not in name}


def test_data_without_any_label_is_an_error(tmp_path):
    batch = {"input_ids": torch.zeros(2, 8, dtype=torch.long), "labels": torch.full((2, 8), -100)}
    with pytest.raises(UserError, match="no label"):
        make_trainer(tmp_path, small_config(), loader=ListLoader([[batch]])).run()


def test_a_first_step_without_labels_is_no_error(tmp_path):
    steps = uneven_steps()
    trainer = make_trainer(tmp_path, small_config(), loader=ListLoader([steps[2], steps[0], steps[1]]))
    trainer.run()
    assert trainer.skipped == 2  # of six steps


def test_an_overflow_under_fp16_leaves_out_the_whole_step(tmp_path):
    """The scaler alone would leave out only the optimizer whose own gradients overflowed, and clipping by a
    norm of NaN would give the other one NaN. Played on the CPU: the scaler is there, the numbers are fp32."""
    loss, holder = spoiled(3, infinite_gradient)
    config = small_config("optim.optimizer=muon", steps=5)
    trainer = make_trainer(tmp_path, config, loss=loss, scaled=True)
    holder.append(trainer)
    seen = []
    one_step = trainer.one_step

    def watched(*arguments):
        one_step(*arguments)
        seen.append((weights_of(trainer.model), trainer.scaler.get_scale()))

    trainer.one_step = watched
    trainer.run()
    weights, scales = zip(*seen)
    changed = [not same_bits(one, other) for one, other in zip(weights, weights[1:])]
    assert changed == [True, False, True, True]
    assert scales[2] == scales[1] / 2
    assert all(torch.isfinite(weight).all() for weight in weights[-1].values())


def test_processes_agree_before_anything_is_sent(tmp_path, monkeypatch):
    """Weights of other shapes would abort the exchange, and other data would be trained on unnoticed: both
    are compared first, with frozen parameters and shapes, and then the weights of the first are sent."""
    said = []
    compare, send = "same_on_all_ranks", "broadcast_parameters"
    monkeypatch.setattr(engine.distributed, compare, lambda text, what: said.append((what, text)))
    monkeypatch.setattr(engine.distributed, send, lambda model: said.append(("sent", "")))
    config = small_config()
    model = small_model(config)
    model.lm_head.weight.requires_grad_(False)
    make_trainer(tmp_path, config, model=model)
    (parts, text), sent, (data, digest), *_ = said
    assert "trainable parameters" in parts and (data, digest) == ("training data", "digest")
    assert "model.layers.0.mlp.up_proj.weight (24, 16) True" in text.splitlines() and sent[0] == "sent"
    assert any(line.endswith("False") for line in text.splitlines())
