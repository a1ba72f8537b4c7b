"""Compare training an adapter with training the whole model, in memory and in time.

    python train/lab/benchmark_adapters.py                                        the default model
    python train/lab/benchmark_adapters.py --config gpu_small --steps 5 --set train.batch_size=1
    python train/lab/benchmark_adapters.py --config dense --set lora.r=64

One step is forward, backward, clipping and AdamW, on random tokens; the contenders take turns, step by step.
Bytes are counted from the existing tensors:

    weights, gradients, optimizer     AdamW holds two numbers for each trainable one
    fixed           kept by the forward pass for the backward pass, independent of the batch: weights in bf16,
                    experts with their LoRA added, the gradient of the output head (modules/cross_entropy.py)
    activations     also kept, but growing with the rows of the batch

An adapter needs few gradients and optimizer states, but gradients still flow back to its first layer, so
activations stay. The sum exceeds the peak, because activations are freed as gradients appear.
"""

import sys, pathlib; sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # repository root

import statistics
from dataclasses import replace

import utils  # noqa: F401  sets OMP_WAIT_POLICY, so it must precede torch
import torch

from config.load import load_config
from model.adapters import attach
from model.tinyseek import TinySeek
from train.lab.benchmark import ratio, take_turns
from train.engine.machine import start_machine
from train.engine.optimizers import build_optimizers
from utils.errors import Parser, run_main

MB = 1e6


def main():
    """Print one table."""
    parser = Parser(__doc__)
    parser.add_argument("--config", default="laptop", metavar="NAME|FILE.json")
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value", dest="settings")
    parser.add_argument("--steps", type=int, default=10, help="measured turns of each contender (default 10)")
    args = parser.parse_args()
    config = load_config(args.config, args.settings)
    shape, data = config.model, config.data
    shape.vocab_size = shape.vocab_size or config.tokenizer.vocab_size
    shape.zero_init_residual = False  # as in a trained model
    machine = start_machine(config)
    rows, length = config.train.batch_size, data.sequence_length
    batch = torch.randint(shape.vocab_size, (rows, length + 1), device=machine.device)
    print(f"training, {rows} x {length} tokens, {machine.dtype}; megabytes of 10^6 bytes")
    contenders = {name: Contender(config, *change, batch, machine) for name, change in kinds(config).items()}
    seconds = take_turns({name: one.step for name, one in contenders.items()}, max(1, args.steps), machine)
    for line in table({name: one.measure() for name, one in contenders.items()}, seconds):
        print(line)


def kinds(config) -> dict[str, tuple]:
    """Return name -> adapter (None: the whole model is trained) and the targets of its LoRA."""
    default = config.lora.target_modules
    found = {"full": (None, default), "LoRA, attention": ("Lora", ["attention"])}
    found[f"LoRA, {'+'.join(default)}"] = ("Lora", default)
    if config.model.n_routed_experts and "experts" not in default:
        found["LoRA, experts too"] = ("Lora", [*default, "experts"])
    if not config.model.n_routed_experts or config.model.n_shared_experts:
        found["MixLoRA"] = ("MixLora", default)
    plain = config.model.attention_kind != "mla" and config.model.sliding_window is None
    if config.prefix.kind == "prompt" or plain:
        found["prefix"] = ("Prefix", default)
    return found


class Contender:
    """A model, its trainable parameters and its optimizer."""

    def __init__(self, config, kind, targets, batch, machine):
        self.machine, self.clip = machine, config.optim.grad_clip or float("inf")
        self.inputs, self.labels = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
        self.model, self.own = TinySeek(config.model).to(machine.device).train(), None
        if kind:
            lora = replace(config.lora, target_modules=targets)
            self.own = attach(self.model, kind, replace(config, lora=lora))
        self.trainable = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizers = build_optimizers(self.model, replace(config.optim, optimizer="adamw"))

    def loss(self, inputs, labels):
        """Return the mean loss per token; (B, T) each -> ()."""
        with self.machine.autocast():
            return self.model(inputs, labels).loss_sum / labels.numel()

    def step(self, keep: bool = False) -> None:
        """Take one optimizer step; `keep` leaves the gradients in place."""
        self.loss(self.inputs, self.labels).backward()
        torch.nn.utils.clip_grad_norm_(self.trainable, self.clip)
        for optimizer in self.optimizers:
            optimizer.step()
        if not keep:
            self.model.zero_grad()

    def measure(self) -> dict[str, int]:
        """Return the bytes of each part, and the counts of all and of trainable parameters."""
        weights = list(self.model.parameters())
        fixed, activations = self.saved()
        self.step(keep=True)
        states = [state for optimizer in self.optimizers for state in optimizer.state.values()]
        saved = [w for name, w in self.model.state_dict().items() if self.own is None or name in self.own]
        found = {
            "numbers": sum(weight.numel() for weight in weights),
            "trained": sum(weight.numel() for weight in self.trainable),
            "weights": size(weights),
            "gradients": size([weight.grad for weight in weights if weight.grad is not None]),
            "optimizer": size([part for state in states for part in state.values()]),
            "fixed": fixed, "activations": activations, "checkpoint": size(saved),
        }  # fmt: skip
        self.model.zero_grad()
        return found

    def saved(self) -> tuple[int, int]:
        """Return the bytes that a forward pass keeps for the backward pass, without parameters: those that
        one more row leaves unchanged, and the rest. A storage counts once, however many tensors view it."""
        known = {weight.untyped_storage().data_ptr() for weight in self.model.parameters()}

        def kept(*batch) -> list:
            tensors = []  # held, so that no address is reused
            with torch.autograd.graph.saved_tensors_hooks(lambda t: tensors.append(t) or t, lambda t: t):
                self.loss(*batch)
            return [t for t in tensors if t.untyped_storage().data_ptr() not in known]

        now = kept(self.inputs, self.labels)
        more = kept(*(torch.cat([ids, ids[:1]]) for ids in (self.inputs, self.labels)))
        fixed = size([t for t, other in zip(now, more, strict=True) if t.shape == other.shape])
        return fixed, size(now) - fixed


def size(tensors) -> int:
    """Return the bytes of the tensors' storages, each counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def table(found: dict[str, dict], seconds: dict[str, list[float]]) -> list[str]:
    """Return the lines of a Markdown table. Ratios are to the first contender."""
    parts = ("weights", "gradients", "optimizer", "fixed", "activations")
    heads = ["trainable", "numbers", "share", *parts, "sum", "ratio", "ms/step", "ratio", "checkpoint"]
    rows, first = [heads, ["---"] * len(heads)], next(iter(found))
    totals = {name: sum(one[part] for part in parts) for name, one in found.items()}
    for name, one in found.items():
        rows.append(
            [name, f"{one['trained']:,}", f"{one['trained'] / one['numbers']:.1%}"]
            + [f"{one[part] / MB:.1f}" for part in parts]
            + [f"{totals[name] / MB:.1f}", f"{totals[name] / totals[first]:.2f}"]
            + [f"{1000 * statistics.median(seconds[name]):.0f}"]
            + [f"{ratio(seconds[first], seconds[name]):.2f}", f"{one['checkpoint'] / MB:.2f}"]
        )
    return [f"| {row[0]:30} | " + " | ".join(f"{cell:>11}" for cell in row[1:]) + " |" for row in rows]


if __name__ == "__main__":
    run_main(main)
