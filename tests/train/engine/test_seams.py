"""The engine is ready for stages that do not exist yet: toys of each kind, saved, stopped and resumed.

(i) a source that writes its own text with the model before it trains on it, (ii) a frozen teacher in the
loss, (iii) a policy and a critic with optimizers of their own, (iv) batches that hold pictures.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.train.tools import NoEvaluation, machine, same_bits, small_config, weights_of
from train.engine.stage import Loss, Stage, Step
from train.engine.trainer import Trainer
from utils.checkpoint import load_checkpoint
from utils.errors import UserError

VOCABULARY = 11


class Toy(nn.Module):
    """Logits of the next token from the token itself, and perhaps a picture of 5 numbers."""

    def __init__(self, outputs=VOCABULARY, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed_tokens, self.head = nn.Embedding(VOCABULARY, 6), nn.Linear(6, outputs)
        self.look = nn.Linear(5, 6)

    def forward(self, ids, pixels=None):
        hidden = self.embed_tokens(ids)  # (B, T, C)
        return self.head(hidden if pixels is None else hidden + self.look(pixels)[:, None])


class Rollouts:
    """Samples text from the policy, with the generators that the engine seeds, and trains on it."""

    epoch, epoch_progress = 0, 0.0

    def __init__(self):
        self.drawn, self.seen = 0, []

    def roll(self, model, rows=3):
        ids = torch.zeros(rows, 1, dtype=torch.long)
        with torch.no_grad():
            for _ in range(4):
                chances = model(ids[:, -1:], torch.zeros(rows, 5))[:, 0].softmax(-1)
                ids = torch.cat([ids, torch.multinomial(chances, 1)], dim=1)
        return ids

    def batch(self, ids):
        return {"input_ids": ids[:, :-1], "targets": ids[:, 1:], "pixels": ids[:, :1].expand(-1, 5) + 0.5}

    def next_step(self, models, progress):
        ids = self.roll(models.get("policy", models.get("model")))
        self.drawn += 1
        self.seen.append(ids)
        return Step([self.batch(ids)], float(ids[:, 1:].numel()), ids[:, 1:].numel())

    def sample(self):
        ids = torch.arange(33).view(3, 11) % VOCABULARY
        return Step([self.batch(ids)], 30.0, 30)

    def state_dict(self):
        return {"drawn": self.drawn}

    def load_state_dict(self, state):
        self.drawn = state["drawn"]


class Reinforce(Loss):
    """Cross-entropy of the sampled text: no labels, no `step_tokens`."""

    def __call__(self, model, batch, weight):
        logits = model(batch["input_ids"], batch["pixels"]).flatten(0, 1)
        return {"ce": F.cross_entropy(logits, batch["targets"].flatten(), reduction="sum") / weight}, {}


class Distill(Loss):
    """KL to a frozen teacher, which the loss holds."""

    def __init__(self, teacher, spoil=False):
        self.teacher, self.spoil = teacher, spoil

    def __call__(self, model, batch, weight):
        if self.spoil:
            self.teacher.head.weight.data += 1e-3
        logits, aim = (m(batch["input_ids"], batch["pixels"]).log_softmax(-1) for m in (model, self.teacher))
        return {"kl": F.kl_div(logits, aim, reduction="sum", log_target=True) / weight}, {}


class ActorCritic(Loss):
    """A policy and a critic, each with a term of its own."""

    def claims(self):
        return {"value": lambda name: name.startswith("critic.")}

    def __call__(self, model, batch, weight):
        terms, _ = Reinforce()(model["policy"], batch, weight)
        value = model["critic"](batch["input_ids"], batch["pixels"])[..., 0]
        return terms | {"value": (value - batch["targets"]).square().sum() / weight}, {}


def train(out, model, loss, steps=6, resume=False, **changes):
    config = small_config("train.save_every=2", "optim.warmup_steps=0", steps=steps)
    stage = Stage("toy", "Toy", model, Rollouts(), loss, NoEvaluation(), None, "digest", **changes)
    trainer = Trainer(stage, config, machine(), out, resume)
    trainer.run()
    return trainer


class Stop(Exception):
    """Stands in for a crash."""


def stopped(loss, at):
    """The same loss, which raises at its call number `at` after the proof."""
    calls = []

    def after_step(factor):
        calls.append(factor)
        if len(calls) == at:
            raise Stop
        return {}

    loss.after_step = after_step
    return loss


def make(kind):
    """(model, loss, further fields of the stage)."""
    if kind == "rollouts":
        return Toy(), Reinforce(), {}
    if kind == "teacher":
        teacher = Toy(seed=5)
        return Toy(), Distill(teacher), {"frozen": {"teacher": teacher}}
    critic = replace(small_config().optim, optimizer="muon", muon_lr=0.003)
    models = nn.ModuleDict({"policy": Toy(), "critic": Toy(1, seed=7)})
    return models, ActorCritic(), {"optim": {"critic": critic}, "result": "policy"}


@pytest.mark.parametrize("kind", ["rollouts", "teacher", "policy and critic"])
def test_a_run_of_a_new_kind_resumes_bit_by_bit(tmp_path, kind):
    """Stopped after step 5, whose checkpoint is that of step 4: the same samples, the same weights."""
    model, loss, more = make(kind)
    before = weights_of(model["policy"] if "result" in more else model)
    whole = train(tmp_path / "a", model, loss, **more)
    model, loss, more = make(kind)
    with pytest.raises(Stop):
        train(tmp_path / "b", model, stopped(loss, 5), **more)
    model, loss, more = make(kind)
    rest = train(tmp_path / "b", model, loss, resume=True, **more)
    assert rest.stage.source.drawn == 6 and whole.step == rest.step == 6
    for one, two in zip(whole.stage.source.seen[-2:], rest.stage.source.seen, strict=True):
        assert torch.equal(one, two)
    assert len({tuple(ids.flatten().tolist()) for ids in whole.stage.source.seen}) > 3  # they were sampled
    saved, again = (load_checkpoint(tmp_path / name / "TinySeek_Toy_final.pkl")["weights"] for name in "ab")
    assert same_bits(saved, again) and same_bits(weights_of(whole.model), weights_of(model))
    assert same_bits(saved, weights_of(model["policy"] if "result" in more else model))
    assert before.keys() == saved.keys()
    assert all(not torch.equal(before[name], saved[name]) for name in saved)
    if kind == "policy and critic":
        assert [type(each).__name__ for each in whole.optimizers] == ["AdamW", "Muon", "AdamW"]


def test_another_teacher_is_not_resumed(tmp_path):
    model, loss, more = make("teacher")
    train(tmp_path, model, loss, **more)
    other = Toy(seed=6)
    with pytest.raises(UserError, match="was trained with other frozen models"):
        train(tmp_path, Toy(), Distill(other), steps=8, resume=True, frozen={"teacher": other})


def test_a_teacher_that_changes_is_noticed(tmp_path):
    teacher = Toy(seed=5)
    with pytest.raises(UserError, match="the frozen model teacher was changed by training"):
        train(tmp_path, Toy(), Distill(teacher, spoil=True), frozen={"teacher": teacher})
