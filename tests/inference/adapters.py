"""Checkpoints of adapters and gates with random weights, as training would leave them."""

import torch

from config.load import to_dict
from config.schema import RunConfig
from inference.generation.load import load_full
from model.adapters import attach
from modules.adapters.selector import Selector
from tests.inference.tools import byte_tokenizer, run_config, tiny_model, write_checkpoint
from utils.checkpoint import load_checkpoint, save_checkpoint, weights_digest

STAGES = {"Lora": "lora_train", "MixLora": "mixlora_train", "Prefix": "prefix_train", "Gate": "gate_train"}
MOE = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 8}
ADAPTED = {  # what an adapter is like: its stage, and the settings of its run
    "lora": ("Lora", {"lora": {"r": 3}}),
    "dora": ("Lora", {"lora": {"r": 2, "use_dora": True, "target_modules": ["attention", "dense"]}}),
    "mixlora": ("MixLora", {"mixlora": {"num_experts": 3, "r": 2, "shared_expert": True}, "lora": {"r": 2}}),
    "prefix": ("Prefix", {"prefix": {"length": 5}}),
    "prompt": ("Prefix", {"prefix": {"kind": "prompt", "length": 2}}),
}


def write_base(path, seed=0, short="SFT", **changes):
    """A whole model of any shape; returns the path."""
    model = tiny_model(seed, **changes)
    return write_checkpoint(path, short, weights=model.state_dict(), config=run_config(model))


def run_settings(model_config, sections) -> RunConfig:
    """The configuration of a run on a model, with `sections` of settings."""
    config = RunConfig(model=model_config)
    config.train.max_steps = 10
    for section, values in sections.items():
        for name, value in values.items():
            setattr(getattr(config, section), name, value)
    return config


@torch.no_grad()
def shake_added(model, added, seed):
    """Random values for the new parameters, none of which is left at zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name in added:
            scale = 1.0 if "prefix" in name or "prompt" in name else 0.2
            parameter += scale * torch.randn(parameter.shape, generator=generator)


def write_adapter(path, base, /, like="lora", seed=1, **changes):
    """An adapter of the checkpoint `base`, `like` one of `ADAPTED`; `changes` are sections of settings or
    entries of the file. Returns the path."""
    short, sections = ADAPTED[like]
    entries = {key: changes.pop(key) for key in list(changes) if key not in ("data", "lora", "prefix")}
    full = load_full(base)
    model, tokenizer = full.model, full.tokenizer
    digest = weights_digest(model.state_dict())
    config = run_settings(model.config, sections | changes)
    torch.manual_seed(seed)  # LoRA's A is drawn
    added = attach(model, short, config)
    shake_added(model, added, seed)
    data = {
        "stage": STAGES[short], "short": short, "config": to_dict(config), "step": 7, "tokens": 99,
        "weights": {name: tensor for name, tensor in model.state_dict().items() if name in added},
        "tokenizer": tokenizer.to_json(), "base": {"digest": digest, "path": str(base)},
    }  # fmt: skip
    save_checkpoint(path, {key: value for key, value in (data | entries).items() if value is not None})
    return path


def write_gate(path, base, candidates, seed=1, favours=None, width=4):
    """A gate over `candidates`, paths or the word `base`; with `favours` it always chooses that number."""
    saved = load_checkpoint(base)
    config = run_settings(load_full(base).model.config, {"gate": {"width": width}})
    torch.manual_seed(seed)
    gate = Selector(config.model.hidden_size, len(candidates), width)
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter += 0.5 * torch.randn(parameter.shape)
        if favours is not None:
            gate.out_proj.bias[favours] += 1000
    digests = [
        weights_digest(load_checkpoint(base if one == "base" else one)["weights"]) for one in candidates
    ]
    records = [{"path": str(one), "digest": d} for one, d in zip(candidates, digests, strict=True)]
    save_checkpoint(path, {
        "stage": "gate_train", "short": "Gate", "config": to_dict(config), "step": 7, "tokens": 99,
        "weights": {f"selector.{name}": tensor for name, tensor in gate.state_dict().items()},
        "tokenizer": byte_tokenizer().to_json(),
        "base": {"digest": weights_digest(saved["weights"]), "path": str(base), "candidates": records},
    })  # fmt: skip
    return path
