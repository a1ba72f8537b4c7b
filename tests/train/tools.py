"""Small stages for tests of the engine: a tiny decoder over random tokens, everything in fp32 on one
thread."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from config.load import load_config
from load_data.loader import TokenLoader
from load_data.tokenization.tokenizer import CharTokenizer
from model.tinyseek import TinySeek
from train.engine.trainer import Trainer
from train.engine.machine import Machine
from train.engine.stage import LoaderSource, Loss, Stage
from utils.distributed import World

ROOT = Path(__file__).resolve().parents[2]
PRE_TRAIN = ROOT / "train" / "pre_train.py"
VOCABULARY = 64
PLAIN = ("optim.schedule=cosine", "optim.warmup_steps=0", "optim.grad_clip=1.0")
TOKENIZER = CharTokenizer("abcdefghijklmnopqrstuvwxyz")


def machine(**changes) -> Machine:
    """One process on the CPU in fp32."""
    return Machine(
        **{"device": torch.device("cpu"), "dtype": torch.float32, "scaled": False, "world": World()} | changes
    )


def small_config(*settings, steps=6):
    """A model of two layers and some steps; `settings` as after --set."""
    fixed = {
        "model.hidden_size": 16, "model.num_hidden_layers": 2, "model.num_attention_heads": 2,
        "model.num_key_value_heads": 1, "model.intermediate_size": 24, "model.vocab_size": VOCABULARY,
        "model.initializer_range": 0.1, "data.sequence_length": 8, "optim.optimizer": "adamw",
        "optim.lr": 0.01, "train.batch_size": 4, "train.max_steps": steps, "train.max_seconds": "null",
        "train.dtype": "fp32",
        "train.device": "cpu", "train.log_every": 1, "train.eval_every": 100, "train.save_every": 100,
    }  # fmt: skip
    return load_config("tiny", [f"{key}={value}" for key, value in fixed.items()] + list(settings))


def small_model(config) -> TinySeek:
    """The same weights every time."""
    torch.manual_seed(1)
    return TinySeek(config.model)


def random_tokens(count=2000, seed=0) -> np.ndarray:
    """(count,) ids that are not all equally likely, so that there is something to learn."""
    return np.minimum(np.random.default_rng(seed).geometric(0.1, count), VOCABULARY - 1).astype(np.uint16)


def next_token_loss(model, batch, step_tokens):
    """The loss of pre-training."""
    output = model(batch["input_ids"], labels=batch["labels"])
    return {"ce": output.loss_sum / step_tokens}, {"conf": (-output.nll).exp().sum() / step_tokens}


class FunctionLoss(Loss):
    """A `Loss` that calls a function; what hangs at the function takes the place of methods."""

    def __init__(self, function):
        self.function = function
        vars(self).update(vars(function))

    def __call__(self, model, batch, weight):
        return self.function(model, batch, weight)


class NoEvaluation:
    """Stands in where a test does not look at evaluations; remembers how it was called."""

    batches = 1

    def __init__(self):
        self.calls = []

    def __call__(self, model, max_batches):
        assert not model.training and not torch.is_grad_enabled()
        self.calls.append(max_batches)
        return {"val_loss": 0.5}


class ListLoader:
    """Gives the steps of a list, over and over: each a list of micro-batches."""

    def __init__(self, steps):
        self.steps, self.index = steps, 0
        self.epoch = 0

    def next_step(self, progress):
        self.index += 1
        return self.steps[(self.index - 1) % len(self.steps)]

    @property
    def epoch_progress(self):
        return self.index / len(self.steps)

    def state_dict(self):
        return {"index": self.index}

    def load_state_dict(self, state):
        self.index = state["index"]


def uneven_steps(micro_batches=4, count=6):
    """Steps whose micro-batches have from none to all of their labels: in the first step every second one has
    none, in the third all have none."""
    generator = torch.Generator().manual_seed(5)
    steps = []
    for step in range(count):
        batches = []
        for micro in range(micro_batches):
            ids = torch.randint(0, 64, (2, 9), generator=generator)
            labels = ids[:, 1:].clone()
            share = (0.0, 1.0, 0.1, 0.6)[(micro + step) % 4]
            share = {0: (0.6, 0.0)[micro % 2], 2: 0.0}.get(step, share)
            labels[torch.rand(labels.shape, generator=generator) >= share] = -100
            batches.append({"input_ids": ids[:, :-1].contiguous(), "labels": labels})
        steps.append(batches)
    return steps


def obvious_loop(config, steps):
    """Trains `small_model` on `steps`: each a list of batches, taken as one. Returns the weights and each
    loss."""
    model = small_model(config)
    optim = config.optim
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    gains = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": optim.weight_decay},
        {"params": gains, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps)
    losses = []
    for step, batches in enumerate(steps):
        ids, labels = (torch.cat([batch[key] for batch in batches]) for key in ("input_ids", "labels"))
        if (labels == -100).all():
            continue
        done = step / len(steps)
        cosine = (1 + math.cos(math.pi * done)) / 2
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = optim.lr * cosine
        loss = F.cross_entropy(model(ids).logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return weights_of(model), losses


def make_loader(config):
    """The loader that `make_trainer` uses."""
    train = config.train
    length, rows, accumulation = config.data.sequence_length, train.batch_size, train.accumulation_steps
    return TokenLoader(random_tokens(), length, rows, accumulation, seed=train.seed)


def make_trainer(
    out, config, model=None, loader=None, loss=next_token_loss, evaluate=None, resume=False, **changes
):
    """A `Trainer` of a toy stage."""
    loader = loader or make_loader(config)
    loss = loss if hasattr(loss, "before_step") else FunctionLoss(loss)
    stage = Stage(
        name="toy", short="Toy", model=model or small_model(config), source=LoaderSource(loader), loss=loss,
        evaluate=evaluate or NoEvaluation(), tokenizer=TOKENIZER, data_digest="digest",
    )  # fmt: skip
    return Trainer(stage, config, machine(**changes), Path(out), resume)


def weights_of(model) -> dict[str, torch.Tensor]:
    """A copy of all weights."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same_bits(first, second) -> bool:
    """True if two dictionaries of tensors are equal bit by bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def largest_difference(first, second) -> float:
    """The largest absolute difference between two dictionaries of tensors."""
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


def environment(**changes) -> dict[str, str]:
    """The environment of a subprocess: one thread, this repository, no torchrun around it."""
    inherited = {
        key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    return inherited | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg"} | changes


def run(*arguments, processes=1, timeout=120, **changes) -> subprocess.CompletedProcess:
    """Run `python ARGUMENTS`, or with more processes `torchrun ARGUMENTS`, to its end."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(torchrun if processes > 1 else []), *map(str, arguments)]
    return subprocess.run(
        command, env=environment(**changes), capture_output=True, text=True, timeout=timeout, check=False
    )


# They measure the machine, so they differ from run to run.
TIMING_KEYS = frozenset(
    {"tok_s", "data_ms", "step_ms", "eval_ms", "rollout_ms", "rollout_tok_s", "update_tok_s"}
)


def without_timing(rows: list[dict]) -> list[dict]:
    """The rows of a log without times, in which two runs of the same command differ."""
    return [{key: value for key, value in row.items() if key not in TIMING_KEYS} for row in rows]
