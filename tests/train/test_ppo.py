"""PPO: values before the update, advantages by token, a critic that learns, and what is saved."""

import os
import statistics
import sys

import pytest
import torch

from config.rl import RLConfig
from inference.generation.load import load_full
from load_data.skills.verifiers import REWARDS
from tests.inference.tools import run_config, tiny_model, write_checkpoint
from tests.processes import fork
from tests.train.policies import MOE, TOKENIZER, make_policy, rl_config, rollouts
from tests.train.tools import NoEvaluation, largest_difference, machine, same_bits, without_timing
from train import ppo_train
from train.engine.actor_critic import with_critic
from train.engine.answer_rows import Row, explained, set_advantages
from train.engine.policy_loss import PolicyLoss
from train.engine.stage import Stage
from train.engine.trainer import Trainer
from utils import distributed
from utils.checkpoint import find_checkpoints, load_checkpoint
from utils.distributed import World
from utils.errors import UserError
from utils.log import read_log


def plain(text) -> float:
    """A reward that a random model can earn more of: the share of characters that are ASCII."""
    return sum(letter < "\x80" for letter in text) / max(len(text), 1)


def judge(items, rows):
    """The reward of each answer."""
    return [plain(row.text) for row in rows]


ALONE = World()


def ppo_run(out, *settings, steps=4, judge=judge, resume=False, world=ALONE):
    """A `Trainer` of a tiny policy, its critic, and a reference with other weights."""
    config = rl_config("rl.recipe=ppo", "rl.updates=2", *settings, steps=steps)
    policy = make_policy(config)
    stage = Stage(
        "ppo_train", "PPO", policy, rollouts(config, policy, judge, world=world),
        PolicyLoss(policy, config, machine(world=world)), NoEvaluation(), TOKENIZER, "digest",
        frozen={"reference": make_policy(config, seed=1)} if config.rl.chosen().kl_weight else {},
    )  # fmt: skip
    return Trainer(with_critic(stage, config), config, machine(world=world), out, resume)


# --- advantages -------------------------------------------------------------------------------------------


def slow_estimates(row, rl, kl_weight):
    """Advantages and returns of one answer, token by token from its end."""
    found, value, advantage = [], 0.0, 0.0  # nothing comes after the last token
    for t in reversed(range(len(row.answer))):
        reward = row.reward if t == len(row.answer) - 1 else 0.0
        reward -= kl_weight * (row.old[t] - row.reference[t])
        advantage = reward + rl.gamma * value - row.values[t] + rl.gamma * rl.lam * advantage
        value = row.values[t]
        found.append((advantage, advantage + value))
    return found[::-1]


def test_advantages_of_tokens():
    """The reward is at the last token, the distance to the reference at each; an answer that was cut ends as
    any other; whitening is over all tokens of all answers."""
    torch.manual_seed(0)
    numbers = lambda n: torch.randn(n).tolist()  # noqa: E731
    rows = [
        Row([1, 2], [3] * n, "", numbers(n), reward=reward, reference=numbers(n), values=numbers(n))
        for n, reward in ((1, 0.0), (5, 1.0), (3, 0.0), (5, 0.5))
    ]
    rows[1].truncated = True
    rl = RLConfig(recipe="ppo", gamma=0.9, lam=0.8)
    set_advantages([rows[:2], rows[2:]], rl, rl.chosen())
    slow = [slow_estimates(row, rl, 0.05) for row in rows]
    every = [advantage for row in slow for advantage, _ in row]
    mean, deviation = statistics.fmean(every), (statistics.variance(every) + 1e-8) ** 0.5
    for row, expected in zip(rows, slow, strict=True):
        assert row.returns == pytest.approx([each for _, each in expected], abs=1e-9)
        white = [(advantage - mean) / deviation for advantage, _ in expected]
        assert row.advantages == pytest.approx(white, abs=1e-9)
    assert rows[1].returns[-1] == pytest.approx(1 - 0.05 * (rows[1].old[-1] - rows[1].reference[-1]))
    returns, values = ([x for row in rows for x in getattr(row, name)] for name in ("returns", "values"))
    rest = statistics.pvariance([one - other for one, other in zip(returns, values)])
    assert explained(rows) == pytest.approx(max(0, 1 - rest / statistics.pvariance(returns)), abs=1e-9)


# --- the critic -------------------------------------------------------------------------------------------


def test_the_critic_starts_from_the_policy_and_judges_before_the_update(tmp_path):
    """Its first values are 0. Those of a rollout are what it says before any update on it; they stay the
    same in the second update, and carry no gradient. The value loss is that of an obvious loop."""
    run = ppo_run(tmp_path)
    stage, policy, critic = run.stage, run.model["policy"], run.model["critic"]
    assert same_bits(policy.model.state_dict(), critic.model.state_dict()) and not critic.score.weight.any()
    with torch.no_grad():
        critic.score.weight.normal_(generator=torch.Generator().manual_seed(0))
    first = stage.source.next_step(stage.trained | stage.frozen)
    with torch.no_grad():
        critic.score.weight *= -1
        policy.lm_head.weight *= 1.01
    second = stage.source.next_step(stage.trained | stage.frozen)
    total = tokens = clipped = 0
    for one, other in zip(first.micro_batches, second.micro_batches, strict=True):
        mask = one["labels"] != -100
        values = critic(one["input_ids"], padding_mask=one["padding_mask"])  # the opposite
        assert torch.equal(one["old_values"], other["old_values"]) and not one["old_values"].requires_grad
        torch.testing.assert_close(values[mask], -one["old_values"][mask], rtol=1e-4, atol=1e-5)
        for v, old, aim in zip(*(x[mask].tolist() for x in (values, one["old_values"], one["returns"]))):
            near = min(max(v, old - 0.2), old + 0.2)
            total, tokens = total + max((v - aim) ** 2, (near - aim) ** 2) / 2, tokens + 1
            clipped += (near - aim) ** 2 > (v - aim) ** 2
    stage.loss.before_step(stage.model, second.micro_batches)
    terms = [stage.loss(stage.model, batch, second.weight)[0] for batch in second.micro_batches]
    assert second.weight == tokens and len(terms) > 1 and clipped
    assert sum(each["value"].item() for each in terms) == pytest.approx(total / tokens, rel=1e-4)
    reached = torch.autograd.grad(terms[0]["value"], list(policy.parameters()), allow_unused=True)
    assert all(gradient is None for gradient in reached)


def blind(critic):
    """Let the critic answer without a graph."""
    critic.forward = torch.no_grad()(critic.forward)


@pytest.mark.parametrize("spoil, words", [
    (lambda critic: critic.requires_grad_(False), "requires_grad changed after the optimizer was built"),
    (blind, "value has no graph behind it"),
])  # fmt: skip
def test_a_critic_that_cannot_learn_is_refused(spoil, words, tmp_path):
    run = ppo_run(tmp_path)
    spoil(run.model["critic"])
    with pytest.raises(UserError, match=words):
        run.run()


def test_a_critic_that_was_frozen_before_is_refused(tmp_path):
    stage, config = (run := ppo_run(tmp_path)).stage, run.config
    stage.model["critic"].requires_grad_(False)
    with pytest.raises(UserError, match="frozen, though this stage trains it: critic.model.embed_tokens"):
        Trainer(stage, config, machine(), tmp_path / "b").run()


@pytest.mark.parametrize("value", [0.5, 2.5])
def test_a_critic_that_expects_something_is_proven_too(value, tmp_path):
    """As in a resumed run: the clip of the value does not hide that the critic can learn."""
    run = ppo_run(tmp_path)
    (batch,), critic = run.stage.source.sample().micro_batches, run.model["critic"]
    with torch.no_grad():
        hidden = critic.model(batch["input_ids"], padding_mask=batch["padding_mask"]).hidden
        hidden = hidden[batch["labels"] != -100]  # (N, C)
        weight = torch.linalg.lstsq(hidden, torch.full((len(hidden), 1), value)).solution
        critic.score.weight.copy_(weight.T)
        assert ((hidden @ weight - value).abs() < 0.3).all()
    run.prove_before()


@pytest.mark.slow
def test_policy_and_critic_learn(tmp_path):
    """With experts. Half of all bytes are ASCII at first, then most; a critic that still expected nothing
    would have an error of half the squared reward."""
    settings = ("rl.updates=1", "rl.prompts=4", "rl.group_size=16", "rl.max_new_tokens=2", "rl.kl_weight=0",
                "train.batch_size=64", "optim.lr=0.02", "rl.critic_lr=1", *MOE)  # fmt: skip
    run = ppo_run(tmp_path, *settings, steps=24)
    with torch.no_grad():  # almost equal probabilities
        run.model["policy"].lm_head.weight *= 0.2
    run.run()
    log = [row for row in read_log(tmp_path / "ppo_train" / "log.txt") if "reward" in row]
    before, after = (statistics.fmean(row["reward"] for row in rows) for rows in (log[:2], log[-2:]))
    assert after > before + 0.2, (before, after)
    assert statistics.fmean(row["value"] for row in log[-2:]) < after**2 / 2 / 3


# --- what is saved ----------------------------------------------------------------------------------------


class Stop(Exception):
    """Stands in for a crash."""


def test_stopped_between_two_updates_it_ends_as_if_it_were_not(tmp_path, monkeypatch):
    """The checkpoint of step 3 holds a rollout with one update left. What is saved is the policy alone, an
    ordinary model, and on the way the critic beside it."""
    whole = ppo_run(tmp_path / "a", "train.save_every=3", steps=5)
    whole.run()
    step = Trainer.one_step

    def one_step(self, *arguments):
        if self.step == 4:
            raise Stop
        step(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Trainer, "one_step", one_step)
        ppo_run(tmp_path / "b", "train.save_every=3", steps=5).run()
    stopped = load_checkpoint(find_checkpoints(tmp_path / "b", "PPO")[-1])
    assert stopped["step"] == 3 and stopped["training"]["loader"]["left"] == 1
    assert stopped["weights"].keys() == whole.model["policy"].state_dict().keys()
    assert {name.partition(".")[0] for name in stopped["training"]["others"]} == {"critic"}
    rest = ppo_run(tmp_path / "b", "train.save_every=3", steps=5, resume=True)
    assert rest.step == 3
    rest.run()
    assert same_bits(whole.model.state_dict(), rest.model.state_dict())
    logs = [read_log(tmp_path / name / "ppo_train" / "log.txt") for name in "ab"]
    assert without_timing(logs[0]) == without_timing(logs[1])
    saved = load_full(tmp_path / "b" / "TinySeek_PPO_final.pkl").model
    assert same_bits(saved.state_dict(), whole.model["policy"].state_dict())


def train_in(out):
    """One of two processes, or the only one; the first keeps what it saw."""
    world = distributed.start() if "RANK" in os.environ else ALONE
    # eps: Adam divides the rounding of a gradient by its size
    run = ppo_run(out, *MOE, "optim.eps=0.001", "balance.statistics=exact", world=world)
    run.run()
    if world.is_first:
        rows = [(row.prompt, row.answer) for row in run.stage.source.rows]
        torch.save({"weights": run.model.state_dict(), "rows": rows}, out / "seen.pt")
    distributed.finish()


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    """Advantages are whitened over the answers of both."""
    for name in "ab":
        (tmp_path / name).mkdir()
    assert fork(train_in, tmp_path / "b", processes=2).returncode == 0
    train_in(tmp_path / "a")
    one, two = (torch.load(tmp_path / name / "seen.pt", weights_only=True) for name in "ab")
    assert one["rows"] == two["rows"] and len(one["rows"]) == 12
    assert largest_difference(one["weights"], two["weights"]) < 1e-5


def test_from_the_command_line(tmp_path, monkeypatch, capsys):
    """The script, and a recipe that it is not for."""
    monkeypatch.setitem(REWARDS, "right", lambda item, answer: plain(answer))
    monkeypatch.setattr("train.engine.policy_stage.HELD_OUT", 2)
    model = tiny_model(5, max_position_embeddings=128)
    changes = {"weights": model.state_dict(), "config": run_config(model)}
    base = write_checkpoint(tmp_path / "TinySeek_SFT_final.pkl", "SFT", **changes)
    flags = ["--init", base, "--out", tmp_path, "--max-steps", 2, "--device", "cpu", "--data"]
    flags += ["skills:arithmetic", "--set", "rl.prompts=4", "--set", "rl.max_new_tokens=5"]
    monkeypatch.setattr(sys, "argv", ["ppo_train", *map(str, flags)])
    ppo_train.main()
    said = capsys.readouterr().out
    assert "value trains" in said and "starts at zero: critic.score.weight" in said
    saved = load_checkpoint(tmp_path / "TinySeek_PPO_final.pkl")["weights"]
    assert saved.keys() == model.state_dict().keys()
    sys.argv += ["--overwrite", "--set", "rl.recipe=grpo"]
    with pytest.raises(UserError, match="rl.advantage=mean_std uses no critic: set rl.recipe=ppo"):
        ppo_train.main()
