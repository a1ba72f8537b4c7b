"""GRPO and its family: from the command line, and whether each of them learns."""

import copy
import sys
import zlib

import pytest
import torch

from config.rl import RECIPES
from inference.generation.exchange import Request
from load_data.skills.verifiers import REWARDS
from tests.inference.tools import run_config, tiny_model, write_checkpoint
from tests.train.policies import losses, make_policy, rl_config, rollouts
from train import grpo_train
from train.engine import answer_rows
from utils.checkpoint import load_checkpoint
from utils.errors import UserError
from utils.log import read_log

MOE = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 8}


def call(monkeypatch, *flags):
    """`python train/grpo_train.py FLAGS`."""
    monkeypatch.setattr(sys, "argv", ["grpo_train.py", *map(str, flags)])
    grpo_train.main()


def base_in(folder, **changes):
    """A random model with a context for short questions."""
    model = tiny_model(max_position_embeddings=128, **changes)
    about = {"weights": model.state_dict(), "config": run_config(model)}
    return write_checkpoint(folder / "TinySeek_SFT_final.pkl", "SFT", **about)


def test_from_the_command_line(tmp_path, monkeypatch, capsys):
    """Experts and a second head; the reference, the log, the answers before and after, and what is saved."""
    monkeypatch.setattr("train.engine.policy_stage.HELD_OUT", 4)
    base = base_in(tmp_path, mtp="sequential", **MOE)
    monkeypatch.setitem(REWARDS, "any", lambda item, text: zlib.crc32(text.encode()) % 97 / 97)
    settings = ("rl.prompts=2", "rl.group_size=3", "rl.max_new_tokens=4", "train.log_every=1",
                "data.sequence_length=96", "rl.reward=any", "model.dropout=0.1", "rl.tools=true",
                "rl.think=true", "rl.think_budget=1")  # fmt: skip
    asked, respond = [], answer_rows.respond

    def noted(*given, **options):
        asked.append(given[4])
        return respond(*given, **options)

    monkeypatch.setattr(answer_rows, "respond", noted)
    flags = ["--data", "skills:arithmetic,lists", "--device", "cpu", "--max-steps", 2, "--out", tmp_path]
    call(monkeypatch, *flags, *(word for setting in settings for word in ("--set", setting)))
    said, saved = capsys.readouterr().out, load_checkpoint(tmp_path / "TinySeek_GRPO_final.pkl")
    assert "model.dropout is set to 0: answers are sampled and compared without noise" in said
    assert "gradients proven: pg trains" in said and said.splitlines()[-1].endswith(f"--out {tmp_path}")
    before = load_checkpoint(base)["weights"]
    assert saved["weights"].keys() == before.keys() and saved["base"] is None
    changed = {name for name in before if not torch.equal(before[name], saved["weights"][name])}
    assert changed == {name for name in before if not name.startswith("mtp.")}
    first = next(row for row in read_log(tmp_path / "grpo_train" / "log.txt") if "pg" in row)
    assert {"reward", "right", "no_signal", "length", "truncated", "rollout_ms", "rollout_tok_s",
            "update_tok_s", "kl", "entropy", "clip_frac", "ratio", "route_gap"} <= first.keys()  # fmt: skip
    assert "calls" in first and set(asked) == {Request(True, 1, True)}  # evaluations, too, think and call
    assert abs(first["kl"]) < 1e-6 and abs(first["ratio"] - 1) < 1e-5
    shown = (tmp_path / "grpo_train" / "samples.txt").read_text(encoding="utf-8")
    starts = [line.split()[0] for line in shown.splitlines() if line]
    assert starts.count("question") == 8 == starts.count("before") == starts.count("after")


@pytest.mark.parametrize("words, said", [
    (["--data", "python"], "no questions that a rule can judge"),
    (["--set", "rl.recipe=ppo"], "ppo_train.py"),
    (["--set", "rl.reward=kind"], "rules: right, within"),
])  # fmt: skip
def test_what_the_command_refuses(words, said, tmp_path, monkeypatch):
    base_in(tmp_path)
    settings = ["--set", "data.sequence_length=64"]
    with pytest.raises(UserError, match=said):
        call(monkeypatch, "--out", tmp_path, "--max-steps", 1, "--device", "cpu", *settings, *words)


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if recipe.advantage != "gae"])
def test_every_recipe_learns_a_trivial_task(name):
    """The reward is the share of letters in answers of two bytes: at first a fifth, then most."""
    config = rl_config(f"rl.recipe={name}", "rl.prompts=2", "rl.group_size=16", "rl.max_new_tokens=2",
                       "rl.overlong=0", "train.batch_size=32")  # fmt: skip
    policy = make_policy(config)
    with torch.no_grad():  # almost equal probabilities
        policy.lm_head.weight *= 0.2
    models = {"model": policy, "reference": copy.deepcopy(policy)}

    def letters(items, rows):
        return [sum(one.isascii() and one.isalpha() for one in row.text) / 2 for row in rows]

    source, rewards = rollouts(config, policy, letters), []
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.03, weight_decay=0.0)
    for _ in range(20):
        step = source.next_step(models)
        rewards.append(source.numbers["reward"])
        if step.weight:
            totals, _ = losses(config, policy, step)
            sum(value for term, value in totals.items() if "measured" not in term).backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.3, rewards
