"""LoRA on a whole model: add adapters to chosen layers, merge them into the weights, return to a plain model.

    add_lora(model, config, "mine")            adapters beside the weights; the new one is in use
    switch_of(model).use("mine")               select another one, or one per row (adapter_switch.py)
    merge(model, "mine"), unmerge(model)       replace each W by W' (see lora.py), and restore W
    fold(model, "mine")                        merge for good: a plain model again

A merged adapter costs nothing at inference; the others are idle. W is kept so that it can be restored, since
(W + d) - d is not W.

Trap: bf16 keeps 8 bits. W' is computed in fp32 and rounded once, yet little of a small change may be
left (the lesson has numbers). Merge in fp32, or leave the adapter beside the weights.
Trap: while merged, the model's state dict holds W' under the name of W, and the adapter as well. Fold a model
before saving it as a plain one.
"""

from dataclasses import replace

import torch
from torch import nn

from config.adapters import LoraConfig
from modules.adapters.adapter_switch import AdapterSwitch
from modules.adapters.lora import LoraExperts, LoraLayer, LoraLinear, effective_weight
from modules.adapters.qlora import LoraQuantLinear
from modules.experts.moe import Experts
from modules.quantized.layers import QuantLinear
from utils.errors import UserError

GROUPS = {"self_attn": "attention", "mlp": "dense", "shared_experts": "shared"}  # linear layers, by parent
KINDS = {nn.Linear: LoraLinear, QuantLinear: LoraQuantLinear, Experts: LoraExperts}
ALONE = "shared_expert_gate"  # a row under `mlp`, in no group: a target by its name only
REFUSED = {
    "lm_head": "the loss reads its weight directly, and the embedding may share it",
    "gate": "a router is trained as a whole or not at all",
}


def add_lora(model: nn.Module, config: LoraConfig, name: str = "default") -> None:
    """Add an adapter to the layers that `config.target_modules` names, and use it. Nothing is frozen.

    A target is a group: `attention` (linear layers under `self_attn`), `dense` (the plain feed-forwards
    `mlp`), `shared` and `experts` (of mixtures); or the last part of a linear layer's name, as `q_proj`.

    Raises `UserError`, and leaves the model unchanged, for a target that matches nothing, the output head or
    the router, an empty list of targets, an adapter name that is taken or invalid, a merged model, dropout on
    experts, or DoRA on a weight with a row of zeros.
    """
    config.check()
    targets, adapted = find_targets(model, config.target_modules), adapted_layers(model)
    switch = adapted[0].switch if adapted else AdapterSwitch()
    if name in switch.configs:
        raise UserError(f"the model has an adapter {name!r} already: choose another name")
    if not name or "." in name or hasattr(nn.ParameterDict(), name):
        raise UserError(f"an adapter cannot be called {name!r}: use letters and digits, no dot")
    switch.check(None)
    if config.use_dora:
        for path, layer in targets.items():
            weights = [getattr(layer, matrix) for matrix in kind_of(layer).MATRICES]
            if not all(w.any(dim=-1).all() for w in weights):
                raise UserError(f"{path} has a row of zeros, which has no direction: set lora.use_dora=false")
    for path, layer in targets.items():
        if not isinstance(layer, LoraLayer):
            layer = kind_of(layer)(layer, switch)
            model.set_submodule(path, layer)
        layer.add(name, config)
    switch.configs[name] = replace(config)
    switch.use(name)


def kind_of(layer: nn.Module) -> type[LoraLayer]:
    """Return the class that a layer has with adapters."""
    kinds = [kind for plain, kind in KINDS.items() if isinstance(layer, plain)]
    return kinds[0] if kinds else type(layer)


def target_labels(model: nn.Module) -> dict[str, set[str]]:
    """Return the words that name each layer in `target_modules`, by path; without the layers refused."""
    labels = {}
    for path, layer in model.named_modules():
        *_, parent, name = ["", *path.split(".")]
        if isinstance(layer, (Experts, LoraExperts)):
            labels[path] = {"experts"}
        elif isinstance(layer, (nn.Linear, QuantLinear, LoraLinear)) and name not in REFUSED:
            labels[path] = {name, name if name == ALONE else GROUPS.get(parent, name)}
    return labels


def find_targets(model: nn.Module, wanted: list[str]) -> dict[str, nn.Module]:
    """Return the layers that `target_modules` names, by path. Errors as in `add_lora`."""
    labels = target_labels(model)
    there = set().union(*labels.values())
    offer = f"this model has {', '.join(sorted(there)) or 'no linear layer'}"
    for target in wanted:
        if target in REFUSED:
            raise UserError(f"lora.target_modules: no adapter on {target}, {REFUSED[target]}")
        if target not in {*there, *GROUPS.values(), "experts"}:
            raise UserError(f"lora.target_modules: nothing is called {target!r}; {offer}")
    found = {path: model.get_submodule(path) for path, names in labels.items() if names & set(wanted)}
    if not found:
        raise UserError(f"lora.target_modules={wanted} matches nothing in this model; {offer}")
    return found


def adapted_layers(model: nn.Module) -> list[LoraLayer]:
    """Return all layers with adapters."""
    return [layer for layer in model.modules() if isinstance(layer, LoraLayer)]


def switch_of(model: nn.Module) -> AdapterSwitch:
    """Return the switch that selects the adapter in use. Raise `UserError` if the model has no adapter."""
    for layer in adapted_layers(model):
        return layer.switch
    raise UserError("the model has no adapter: add one first")


def merge(model: nn.Module, name: str) -> None:
    """Merge an adapter into the weights; until `unmerge` it is in use, whatever was selected. The changed
    weights are new parameters, so models that share the base are not affected.

    Raises `UserError` for an unknown adapter, or if one is merged already.
    """
    switch = switch_of(model)
    switch.check(name)
    for layer in adapted_layers(model):
        layer.merge(name)
    switch.merged = name


def unmerge(model: nn.Module) -> None:
    """Restore the original parameters, bit by bit, and the selection of adapters. Raise `UserError` if none
    is merged."""
    switch = switch_of(model)
    if switch.merged is None:
        raise UserError("no adapter is merged into the weights: there is nothing to unmerge")
    for layer in adapted_layers(model):
        layer.unmerge()
    switch.merged = None


def fold(model: nn.Module, name: str | None) -> None:
    """Merge one adapter for good (None: none of them), remove all adapters and leave a plain model.

    Raises `UserError` for an unknown adapter, or if another one is merged.
    """
    if switch_of(model).merged != name:
        merge(model, name)
    for path, layer in list(model.named_modules()):
        if isinstance(layer, LoraLayer):
            model.set_submodule(path, plain_layer(layer))


def plain_layer(layer: LoraLayer) -> nn.Module:
    """Return a plain layer with the current weights of a layer with adapters."""
    with torch.device("meta"):  # no memory and no random numbers for weights that are replaced
        if isinstance(layer, LoraExperts):
            plain = Experts(*layer.down_proj.shape, layer.implementation)
        else:
            plain = nn.Linear(*layer.weight.T.shape, bias=layer.bias is not None)
    plain._parameters.update(layer._parameters)
    return plain.train(layer.training)


@torch.no_grad()
def lesson():
    """Merge small changes into a matrix in fp32 and in bf16; measure the error and try to undo them."""
    torch.manual_seed(0)
    size, rank = 256, 8
    A, B = torch.randn(rank, size), torch.randn(size, rank)
    print("size of the change of W    error of the merged change     weights not restored by subtraction")
    print("                            in fp32         in bf16           in fp32         in bf16")
    for share in (1e-1, 1e-2, 1e-3, 1e-4):
        errors, altered = [], []
        for dtype in (torch.float32, torch.bfloat16):
            W = (torch.randn(size, size) / size**0.5).to(dtype)
            merged = effective_weight(W, A, B, share / (size * rank) ** 0.5)
            change, stored = merged - W.float(), merged.to(dtype)
            errors.append((stored.double() - W - change).norm() / change.norm())
            altered.append((stored - change.to(dtype) != W).float().mean())
        print(f"  {share:7.2%} of its size       {errors[0]:8.4%}        {errors[1]:8.1%}          "
              f"{altered[0]:8.1%}        {altered[1]:8.1%}")  # fmt: skip


if __name__ == "__main__":
    lesson()
