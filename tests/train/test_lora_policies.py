"""Policies that are adapters: the reference is the base in the same memory, only the adapter moves, and its
file is an adapter like any other. From the command line: GRPO, PPO and DPO, stopped and resumed."""

import copy
import json
from functools import partial

import pytest
import torch

from config.rl import RECIPES
from inference.fast.decoder import refusal
from inference.generation.load import find_base, find_model, load_adapter, load_full
from load_data.skills.verifiers import REWARDS
from modules.adapters.lora_model import switch_of
from tests.inference.tools import run_config, tiny_model, write_checkpoint
from tests.train import policies
from tests.train.engine.test_fine_tuning import call, call_until
from tests.train.policies import TOKENIZER, losses, make_policy, rl_config, rollouts
from tests.train.tools import machine, same_bits, without_timing
from train import dpo_train, grpo_train, ppo_train
from train.engine.command import Command
from train.engine.fine_tuning import Base
from train.engine.policy_base import policy_parts
from train.engine.policy_loss import PolicyLoss, token_logprobs
from train.proof.gradient_check import prove_gradients_before
from utils.checkpoint import load_checkpoint, weights_digest
from utils.errors import UserError
from utils.log import read_log

EVERYWHERE = ('lora.target_modules=["attention", "dense", "shared", "experts"]', "lora.use_dora=true")
MOE = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 8}


def adapted(config, dtype=torch.float32, seed=0):
    """A policy under LoRA, the fields of its stage, and a copy of the base that is apart from both."""
    policy = make_policy(config, seed, dtype)
    apart = copy.deepcopy(policy)
    command = Command(config, None, None, None, False, "toy_lora", "GRPOLora", lora=True)
    parts = policy_parts(Base(policy, TOKENIZER, {"path": "p", "digest": "d"}), command, machine(), True)
    return policy, parts, apart


def logprobs(model, step):
    """Of the sampled tokens of a step."""
    with torch.no_grad():
        return [token_logprobs(model, model(batch["input_ids"], padding_mask=batch["padding_mask"],
                                            last_only=True).hidden, batch["labels"], 1.0)[0]
                for batch in step.micro_batches]  # fmt: skip


def test_the_reference_is_the_base_in_the_same_memory():
    """Before updates and after them: it scores as a copy of the base does, which no update has changed, and
    as the policy with its adapter switched off."""
    config = rl_config(*policies.MOE, *EVERYWHERE)
    policy, parts, apart = adapted(config)
    reference = parts["frozen"]["reference"]
    source = rollouts(config, policy)
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=0.01)
    places = {name: part.data_ptr() for name, part in policy.state_dict().items()}
    assert all(places[name] == part.data_ptr() for name, part in reference.state_dict().items())
    for update in range(2):
        step = source.next_step({"model": policy, "reference": reference})
        true, found = logprobs(apart, step), logprobs(reference, step)
        assert all(map(torch.equal, found, true))
        off = max((one - two).abs().max() for one, two in zip(logprobs(policy, step), true, strict=True))
        assert off > 1e-3 if update else off < 1e-5
        switch_of(policy).use(None)
        assert all(map(torch.equal, logprobs(policy, step), true))
        switch_of(policy).use("default")
        totals, _ = losses(config, policy, step)
        (totals["pg"] + totals["kl"]).backward()
        optimizer.step()
        optimizer.zero_grad()
    own = {name: part for name, part in policy.state_dict().items() if name not in parts["own"]}
    assert same_bits(own, apart.state_dict()) and same_bits(reference.state_dict(), apart.state_dict())
    assert parts["own"] == policy.state_dict().keys() - apart.state_dict().keys()


def test_the_first_update_has_ratio_1_and_no_distance():
    """In fp64 to 1e-10, with adapters on experts too; routes are compared though no router trains."""
    config = rl_config("rl.temperature=0.7", *policies.MOE, *EVERYWHERE)
    policy, parts, _ = adapted(config, torch.float64)
    step = rollouts(config, policy).next_step({"model": policy, **parts["frozen"]})
    totals, loss = losses(config, policy, step)
    assert totals["measured ratio"].item() == pytest.approx(1, abs=1e-10)
    assert abs(totals["measured kl"].item()) < 1e-10 and "balance" not in totals
    assert loss.after_step(1.0)["route_gap"] == 0


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if recipe.advantage != "gae"])
def test_the_proof_wakes_the_adapter_and_no_clip_hides_it(name):
    """One answer, whose ratio is not 1 once B is not 0; half of the seeds would fail at gspo's clip."""
    config = rl_config(f"rl.recipe={name}", "train.batch_size=1")
    for seed in range(3 if name == "gspo" else 1):
        policy, parts, _ = adapted(config, seed=seed)
        sample, loss = rollouts(config, policy).sample(), PolicyLoss(policy, config, machine())
        terms = partial(lambda loss, weight, *given: loss(*given, weight)[0], loss, sample.weight)
        about = {"prepare": loss.before_step, "claims": loss.claims(), "trains": parts["trains"]}
        report = prove_gradients_before(policy, terms, sample.micro_batches, **about)
        assert report.reached_by["pg"] == sum(map(parts["trains"], policy.state_dict()))


# --- from the command line ----------------------------------------------------------------------------------


def flags(tmp_path, out, script, *settings):
    """A base with dropout, experts and a second head; four short steps on rewards, or on pairs."""
    base = tmp_path / "TinySeek_SFT_final.pkl"
    if not base.is_file():
        model = tiny_model(5, max_position_embeddings=128, mtp="sequential", dropout=0.1, **MOE)
        write_checkpoint(base, "SFT", weights=model.state_dict(), config=run_config(model))
        pairs = [{"prompt": f"say {n}", "chosen": f"{n}!", "rejected": f"no {n * 7}"} for n in range(20)]
        (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)), encoding="utf-8")
    rows = ["skills:arithmetic"] if script is not dpo_train else [tmp_path / "pairs.jsonl"]
    own = ("dpo.lora=true",) if script is dpo_train else (
        "rl.lora=true", "rl.prompts=2", "rl.group_size=3", "rl.max_new_tokens=4", "rl.reward=any",
        "rl.updates=2")  # fmt: skip
    fixed = ("data.sequence_length=64", f"data.cache_dir={tmp_path / 'cache'}", "data.val_fraction=0.3",
             "train.log_every=1", "train.batch_size=4", "train.save_every=3", "train.dtype=fp32", "lora.r=2",
             "lora.lora_dropout=0.2", "optim.lr=0.003", "optim.warmup_steps=0")  # fmt: skip
    words = ["--init", base, "--out", out, "--device", "cpu", "--max-steps", 4, "--data", *rows]
    return [*words, *(f"--set={setting}" for setting in (*fixed, *own, *settings))]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "short"), [(grpo_train, "GRPOLora"), (ppo_train, "PPOLora"), (dpo_train, "DPOLora")]
)
def test_an_adapter_from_the_command_line(script, short, tmp_path, monkeypatch, capsys):
    """What is said, saved and loaded; a run that was stopped ends as if it were not."""
    monkeypatch.setattr("train.engine.policy_stage.HELD_OUT", 1)
    monkeypatch.setattr("train.engine.fine_tuning.SCORED_DIALOGUES", 2)
    monkeypatch.setitem(REWARDS, "any", lambda item, text: len(text.encode()) % 3)
    one, two = (flags(tmp_path, tmp_path / name, script) for name in "ab")
    call(monkeypatch, script, one)
    said, path = capsys.readouterr().out, tmp_path / "a" / f"TinySeek_{short}_final.pkl"
    for setting in ("model.dropout", "lora.lora_dropout"):
        assert f"{setting} is set to 0: answers are sampled and compared without noise" in said
    assert said.splitlines()[-1] == f"next: python inference/chat.py --adapter {path}"
    saved, base = load_checkpoint(path), load_full(tmp_path / "TinySeek_SFT_final.pkl")
    before = load_checkpoint(base.path)["weights"]
    assert saved["base"] == {"digest": weights_digest(before), "path": str(base.path)}
    assert saved["weights"] and not saved["weights"].keys() & before.keys()
    zeros = [name for name, part in saved["weights"].items() if ".lora_B." in name and not part.any()]
    assert zeros == [name for name in zeros if name.startswith("mtp.")] and zeros  # all others have moved
    first = next(row for row in read_log(tmp_path / "a" / saved["stage"] / "log.txt") if "loss" in row)
    if script is dpo_train:
        assert first["margin"] == 0
    elif script is grpo_train:
        assert abs(first["kl"]) < 1e-6 and abs(first["ratio"] - 1) < 1e-5 and "route_gap" in first

    loaded = load_adapter(path, base)
    assert loaded.answers and not refusal(loaded.model)  # folded into the weights, for the fast decoder
    assert find_base("--adapter", path) == base.path and same_bits(base.model.state_dict(), before)
    ids = torch.tensor([TOKENIZER.encode("hello")])
    assert not torch.equal(base.model(ids).logits, loaded.model(ids).logits)
    with pytest.raises(UserError, match="no model in"):
        find_model(tmp_path / "a")
    with pytest.raises(UserError, match=f"is a finished run of {script.STAGE}_lora: .* --adapter "):
        call(monkeypatch, script, one)

    if script is dpo_train:  # resumed in tests/train/test_preference.py, and adapters in test_fine_tuning.py
        return
    call_until(monkeypatch, script, two, 4)  # the checkpoint of step 3 holds a rollout with an update left
    call(monkeypatch, script, [*two, "--resume"])
    again = load_checkpoint(tmp_path / "b" / path.name)
    assert same_bits(saved.pop("weights"), again.pop("weights")) and saved == again
    logs = [read_log(tmp_path / name / saved["stage"] / "log.txt") for name in "ab"]
    assert without_timing(logs[0]) == without_timing(logs[1])


def test_the_base_must_be_unchanged(tmp_path, monkeypatch):
    """As for other adapters: its checkpoint does not hold the settings of the base."""
    words = flags(tmp_path, tmp_path / "a", grpo_train, "model.rope_theta=77")
    with pytest.raises(UserError, match="model.rope_theta=77.0 is not what the base was trained with"):
        call(monkeypatch, grpo_train, words)
