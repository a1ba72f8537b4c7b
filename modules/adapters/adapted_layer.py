"""What all adapted layers share: the changed weight, new factors, and merging.

    W' = W + s B A        s = lora_alpha / r, with rsLoRA lora_alpha / sqrt(r)        DoRA:
    modules/adapters/dora.py

    W, W': (out, in)   A: (R, in)   B: (out, R), or a stack of E of each

Adapters stand beside W, which nobody writes to. Merging puts W' in the place of W: then one adapter costs
nothing at inference, and the others wait. W is kept aside for the way back, since (W + d) - d is not W.

    merge(model, name)    unmerge(model)    fold(model, name): merged for good, a plain model again

LoRA: Hu et al., arXiv 2106.09685. rsLoRA: Kalajdzievski, arXiv 2312.03732. Names as in `peft`.
Trap: weights in bf16 have 8 bits. W' is computed in fp32 and rounded once, and yet little may be left of a
small change (the lesson has numbers). Merge in fp32, or leave the adapter beside the weights.
Trap: while merged, the model's state dict holds W' under the name of W, and the adapter once more. What is
saved to be loaded as a plain model must be folded.
"""

import math

import torch
from torch import nn

from config.adapters import LoraConfig
from modules.adapters.adapter_switch import AdapterSwitch
from modules.adapters.dora import dora_factor, row_norms
from utils.errors import UserError


def scaling(config: LoraConfig) -> float:
    """s above. With alpha / r learning slows down as the rank grows, with alpha / sqrt(r) it does not."""
    return config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)


def effective_weight(weight, A, B, scale: float, magnitude=None):
    """W' (.., out, in) in fp32, or fp64 if a part is in fp64. weight (.., out, in), A (.., R, in),
    B (.., out, R), magnitude (.., out) for DoRA."""
    wide = torch.promote_types(torch.promote_types(weight.dtype, A.dtype), torch.float32)
    with torch.autocast(weight.device.type, enabled=False):  # it would round B A to bf16
        whole = weight.to(wide) + scale * (B.to(wide) @ A.to(wide))
        return whole if magnitude is None else whole * dora_factor(magnitude, whole)[..., None]


class Adapted:
    """The part that all adapted layers have in common; mixed into the class of the plain layer.

    `MATRICES` names the layer's weights, and `stores(matrix)` gives their `lora_A`, `lora_B` and
    `lora_magnitude_vector`: dictionaries from an adapter's name to its parameter.
    """

    MATRICES: tuple[str, ...] = ()
    PLAIN: type[nn.Module]

    @classmethod
    def attach(cls, layer: nn.Module, switch: AdapterSwitch) -> None:
        """Make a plain layer one that can hold adapters.

        The object stays and changes its class: its parameters keep their identity and names, and whoever
        holds the layer (parents, hooks, the optimizer) need not hear of it.
        """
        layer.__class__ = cls
        layer.switch, layer.kept = switch, {}
        for kind in ("lora_A", "lora_B", "lora_magnitude_vector"):
            setattr(layer, kind, cls.empty_store())

    def detach(self) -> None:
        """The way back: the plain layer, with the weights as they are now."""
        del self.lora_A, self.lora_B, self.lora_magnitude_vector, self.switch, self.kept
        self.__class__ = self.PLAIN

    @torch.no_grad()
    def add(self, name: str, config: LoraConfig) -> None:
        """New parameters: A uniform in +-1/sqrt(in) (He's rule with a = sqrt(5), as in peft), B zero, so that
        the adapter starts without effect; m the lengths of W's rows.

        In fp32 even where W is in bf16: an optimizer's small steps would be rounded away there.
        """
        for matrix in self.MATRICES:
            weight, (A, B, magnitude) = getattr(self, matrix), self.stores(matrix)
            dtype = torch.promote_types(weight.dtype, torch.float32)
            *stack, out, width = weight.shape
            place = {"dtype": dtype, "device": weight.device}
            bound = width**-0.5
            A[name] = nn.Parameter(torch.empty(*stack, config.r, width, **place).uniform_(-bound, bound))
            B[name] = nn.Parameter(torch.zeros(*stack, out, config.r, **place))
            if config.use_dora:
                magnitude[name] = nn.Parameter(row_norms(weight.to(dtype)))

    def effective(self, matrix: str, name: str):
        """W' of one matrix under one adapter, in fp32 or fp64, with gradient."""
        A, B, magnitude = self.stores(matrix)
        scale = scaling(self.switch.configs[name])
        return effective_weight(getattr(self, matrix), A[name], B[name], scale, magnitude.get(name))

    @torch.no_grad()
    def merge(self, name: str) -> None:
        """Put W' in the place of W, as a parameter of its own: other models may share W. Nothing happens to a
        layer without that adapter."""
        for matrix in self.MATRICES if name in self.stores(self.MATRICES[0])[0] else ():
            weight = self.kept[matrix] = getattr(self, matrix)
            whole = self.effective(matrix, name).to(weight.dtype)
            setattr(self, matrix, nn.Parameter(whole, weight.requires_grad))

    def unmerge(self) -> None:
        """Put W back, moved if the model was moved meanwhile."""
        for matrix, weight in self.kept.items():
            weight.data = weight.data.to(getattr(self, matrix))
            setattr(self, matrix, weight)
        self.kept.clear()


def adapted_layers(model: nn.Module) -> list[Adapted]:
    """All layers with adapters."""
    return [layer for layer in model.modules() if isinstance(layer, Adapted)]


def switch_of(model: nn.Module) -> AdapterSwitch:
    """The switch of a model, to say who is used. Raises `UserError` where nothing is adapted."""
    for layer in adapted_layers(model):
        return layer.switch
    raise UserError("the model has no adapter: add one first")


def merge(model: nn.Module, name: str) -> None:
    """Make an adapter a part of the weights; until `unmerge` it is the one in use, whatever was chosen. The
    changed weights are new parameters: the base's own stay as they are, for others that share them.

    Raises `UserError` for an unknown adapter, or if one is merged already.
    """
    switch = switch_of(model)
    if switch.merged is not None:
        raise UserError(f"adapter {switch.merged!r} is merged into the weights already: unmerge it first")
    switch.check_known(name)
    for layer in adapted_layers(model):
        layer.merge(name)
    switch.merged = name


def unmerge(model: nn.Module) -> None:
    """The parameters of before again, bit by bit, and the choice of adapters. Raises `UserError` if none is
    merged."""
    switch = switch_of(model)
    if switch.merged is None:
        raise UserError("no adapter is merged into the weights: there is nothing to take out")
    for layer in adapted_layers(model):
        layer.unmerge()
    switch.merged = None


def fold(model: nn.Module, name: str | None) -> None:
    """A plain model again: one adapter (None: none of them) stays in the weights, which are new parameters as
    in `merge`; all adapters are removed.

    Raises `UserError` for an unknown adapter, or if another one is merged.
    """
    if switch_of(model).merged != name:
        merge(model, name)
    for layer in adapted_layers(model):
        layer.detach()


@torch.no_grad()
def lesson():
    """Small changes merged into a matrix in fp32 and in bf16: what arrives, and can it be undone?"""
    torch.manual_seed(0)
    size, rank = 256, 8
    A, B = torch.randn(rank, size), torch.randn(size, rank)
    print("a change of W, by size     error of the merged change     weights not as before, once subtracted")
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
