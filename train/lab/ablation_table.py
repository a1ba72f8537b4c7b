"""The table of an ablation: costs, medians over seeds, and which differences are more than noise."""

import math
from statistics import median

import torch

from config.load import from_dict, to_dict
from config.schema import RunConfig
from model.tinyseek import TinySeek
from utils.cost import cost_card


def cost_of(config: RunConfig, vocab_size: int) -> dict:
    """Return what the model of a cell costs, from its settings alone."""
    config = from_dict(to_dict(config), "a cell")
    config.model.vocab_size = vocab_size
    length = config.data.sequence_length
    with torch.device("meta"):
        card = cost_card(TinySeek(config.model), config.train.batch_size * length, length)
    return {
        "parameters": card.parameters,
        "active_parameters": card.active_parameters,
        "train_flops_per_token": card.train_flops(),
        "cache_bytes_per_token": card.kv_cache_bytes(),
    }


def against(base: list[float], values: list[float]) -> str:
    """Return the difference of two medians, and whether it exceeds noise by the rule in `foot`."""
    difference = median(values) - median(base)
    if min(len(base), len(values)) < 2:
        return f"{difference:+.4f} (one seed)"
    overlap = min(values) <= max(base) and min(base) <= max(values)
    if overlap or abs(difference) <= max(base) - min(base):
        return f"{difference:+.4f} indistinguishable"
    return f"{difference:+.4f}"


def table(about: dict) -> str:
    """Return the results as Markdown: a row for each cell, then the meaning of the columns."""
    results = about["cells"]
    base = [run["val_bpb"] for run in results["base"]["runs"]]
    head = ["cell", "what changes", "parameters", "active", "MFLOP per token", "val_bpb", "min to max",
            "against base", "tokens/s", "seconds", "max_vio", "cache bytes per token"]  # fmt: skip
    rows = [head, ["---"] * 2 + ["---:"] * (len(head) - 2)]
    for name, result in results.items():
        runs = result["runs"]
        column = {key: [run[key] for run in runs] for key in ("val_bpb", "tok_s", "seconds", "max_vio")}
        bpb = column["val_bpb"]
        loads = [value for value in column["max_vio"] if value is not None]
        rows.append([
            name + ("*" if any(run["cut"] for run in runs) else ""), result["words"],
            f"{result['parameters']:,}", f"{result['active_parameters']:,}",
            f"{result['train_flops_per_token'] / 1e6:.2f}",
            f"{median(bpb):.4f}", f"{min(bpb):.4f} to {max(bpb):.4f}",
            "" if name == "base" else against(base, bpb),
            f"{median(column['tok_s']):,.0f}", f"{median(column['seconds']):.1f}",
            f"{median(loads):.2f}" if loads else "-", f"{result['cache_bytes_per_token']:,}",
        ])  # fmt: skip
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n\n" + foot(about) + "\n"


def foot(about: dict) -> str:
    """Return the notes below the table."""
    results, steps, count = about["cells"], about["base"]["train"]["max_steps"], len(about["seeds"])
    tokens = max(run["tokens"] for run in results["base"]["runs"])
    lines = [
        f"`{about['command']}`: {steps} steps ({tokens:,} tokens) in every run; seeds "
        f"{', '.join(map(str, about['seeds']))}; {about['machine']}.",
        "val_bpb is bits per byte on all held-out data after the last step: the median over seeds, and their "
        "range. MFLOP per token is a training step; seconds are the median step times the steps, without "
        "evaluations; max_vio is (max - mean) / mean of the expert load in the worst layer; the cache is in "
        "bf16.",
        "Rule: a difference of medians is *indistinguishable* when the ranges over seeds overlap, or when it "
        "is not larger than the range of the base.",
    ]
    if count >= 2:
        chance = 2 / math.comb(2 * count, count)
        lines[-1] += (
            f" With {count} seeds, two equal cells have disjoint ranges with probability "
            f"2 / {math.comb(2 * count, count)} = {chance:.1%}: among many cells, one such difference proves "
            "little."
        )
    if any(run["cut"] for result in results.values() for run in result["runs"]):
        lines.append(
            "\\* ended by --minutes before its last step: fewer tokens and an earlier decay, not comparable."
        )
    others = [(name, cell) for name, cell in results.items() if name != "base"]
    changes = [f"- {name}: `{' '.join(cell['settings'])}`" for name, cell in others]
    return "\n\n".join([*lines, "\n".join(changes)])
