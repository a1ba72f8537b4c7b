"""Functions of TRL, torchrl and others, to compare with. Importing TRL's trainer takes six seconds, so they
are taken out of the installed sources and compiled alone."""

import ast
import importlib.util
from collections import defaultdict
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch


@cache
def lifted(package, file, *names):
    """The functions `names` of `package`/`file`, without decorators. Skips the test if not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        pytest.skip(f"{package} is not installed")
    tree = ast.parse((Path(spec.origin).parent / file).read_text(encoding="utf-8"))
    found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name in names]
    assert sorted(node.name for node in found) == sorted(names), f"{package}/{file} has another layout"
    for node in found:
        node.decorator_list = []
    future = ast.parse("from __future__ import annotations").body
    space = {"torch": torch, "nn": torch.nn, "F": torch.nn.functional}
    space |= {"nanmin": torch.min, "nanmax": torch.max}
    exec(compile(ast.Module(future + found, type_ignores=[]), file, "exec"), space)
    return SimpleNamespace(**{name: space[name] for name in names})


def trl_grpo_loss(logprobs, old, advantages, mask, reference, longest, level="token", beta=0.0, **settings):
    """`GRPOTrainer._compute_loss` of TRL, with these log-probabilities (B, T): the loss and its metrics."""
    compute = lifted("trl", "trainer/grpo_trainer.py", "_compute_loss")._compute_loss
    B, T = logprobs.shape
    metrics = defaultdict(list)
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (logprobs, torch.zeros(B, T), None),
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        importance_sampling_level=level, beta=beta, use_vllm=False, current_gradient_accumulation_steps=1,
        max_completion_length=longest, _entropy_bonus_enabled=False, _metrics={"train": metrics},
        model=SimpleNamespace(training=True), **settings,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
    )  # fmt: skip
    ids, ones = torch.zeros(B, T, dtype=torch.long), torch.ones(B, T)
    inputs = {
        "prompt_ids": ids, "prompt_mask": ones, "completion_ids": ids, "completion_mask": mask.double(),
        "advantages": advantages, "old_per_token_logps": old, "ref_per_token_logps": reference,
        "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    return compute(trainer, None, inputs), metrics


def torchrl_gae(rewards, values, gamma, lam):
    """torchrl's estimate for one answer, (T,) each: advantages and returns."""
    function = lifted("torchrl", "objectives/value/functional.py", "generalized_advantage_estimate")
    following = torch.cat([values[1:], values.new_zeros(1)])
    done = torch.zeros(len(values), 1, dtype=torch.bool)
    done[-1] = True
    column = (values[:, None], following[:, None], rewards[:, None])
    gamma, lam = values.new_tensor(gamma), values.new_tensor(lam)  # it would round numbers to fp32
    found = function.generalized_advantage_estimate(gamma, lam, *column, done)
    return tuple(each[:, 0] for each in found)


def torchrl_value_loss(values, old, returns, clip):
    """torchrl's clipped value loss (twice ours: it has no factor of 1/2)."""
    function = lifted("torchrl", "objectives/utils.py", "_clip_value_loss", "distance_loss")
    return function._clip_value_loss(old, values, clip, returns, (values - returns).square(), "l2")[0]
