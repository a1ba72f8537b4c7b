"""Tiny policies, their rollouts, and a loop that is not the engine's."""

import zlib

import torch

from load_data.chat.chat_template import ChatTemplate
from model.tinyseek import TinySeek
from tests.inference.tools import byte_tokenizer
from tests.modules.tools import shake
from tests.train.tools import NoEvaluation, machine, small_config
from train.engine.policy_loss import PolicyLoss
from train.engine.rollouts import Rollouts
from train.engine.stage import Stage
from train.engine.trainer import Trainer

TOKENIZER = byte_tokenizer()
TEMPLATE = ChatTemplate(TOKENIZER)
MOE = ("model.n_routed_experts=4", "model.num_experts_per_tok=2", "model.n_shared_experts=1",
       "model.moe_intermediate_size=8", "balance.weight=0.01", "balance.bias_rate=0.001")  # fmt: skip


def rl_config(*settings, steps=4):
    """3 prompts with 4 answers of at most 5 tokens, in micro-batches of 5 rows."""
    return small_config(
        f"model.vocab_size={TOKENIZER.vocab_size}", "model.max_position_embeddings=48",
        "data.sequence_length=48", "train.batch_size=5", "rl.prompts=3", "rl.group_size=4",
        "rl.max_new_tokens=5", "optim.schedule=cosine", "optim.warmup_steps=0", *settings, steps=steps,
    )  # fmt: skip


def make_policy(config, seed=0, dtype=torch.float32):
    """Random weights; some answers end by themselves."""
    policy = shake(TinySeek(config.model), seed).to(dtype)
    policy.lm_head.weight.data[next(iter(TEMPLATE.stop_ids))] *= 1.5
    return policy.train()


def judge(items, rows):
    """A reward from the question and the answer, which differs between most pairs."""
    pairs = zip(items, rows, strict=True)
    return [zlib.crc32((item.messages[-1]["content"] + row.text).encode()) % 97 / 10 for item, row in pairs]


def rollouts(config, policy, judge=judge, **changes):
    """The source; `changes` to the machine."""
    return Rollouts(policy, TEMPLATE, ["arithmetic"], config, machine(**changes), judge)


def losses(config, policy, step):
    """Terms and measures of a step, each summed over its micro-batches, and the loss."""
    loss, totals = PolicyLoss(policy, config, machine()), {}
    loss.before_step(policy, step.micro_batches)
    for batch in step.micro_batches:
        terms, measures = loss(policy, batch, step.weight)
        for name, value in (terms | {f"measured {name}": value for name, value in measures.items()}).items():
            totals[name] = totals.get(name, 0) + value
    return totals, loss


def make_run(out, config, policy, reference=None, resume=False, judge=judge, **changes):
    """A `Trainer` of a policy."""
    stage = Stage(
        "toy", "Toy", policy, rollouts(config, policy, judge, **changes),
        PolicyLoss(policy, config, machine()), NoEvaluation(), TOKENIZER, "digest",
        frozen={"reference": reference} if reference else {},
    )  # fmt: skip
    return Trainer(stage, config, machine(**changes), out, resume)
