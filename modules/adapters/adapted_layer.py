"""The parts that all adapted layers share: the changed weight, new factors, and merging.

    W' = W + s B A        s = lora_alpha / r, with rsLoRA lora_alpha / sqrt(r)        (DoRA: see dora.py)

    W, W': (out, in)   A: (R, in)   B: (out, R), or a stack of E of each

Adapters stand beside W, which is never written to. Merging replaces W by W': one adapter then costs nothing
at inference, and the others wait. W is kept so that it can be restored, since (W + d) - d is not W.

    merge(model, name)    unmerge(model)    fold(model, name): merge for good and return to a plain model

LoRA: Hu et al., arXiv 2106.09685. rsLoRA: Kalajdzievski, arXiv 2312.03732. Names as in `peft`.
Trap: bf16 keeps 8 bits. W' is computed in fp32 and rounded once, and still little may be left of a small
change (the lesson has numbers). Merge in fp32, or leave the adapter beside the weights.
Trap: while merged, the model's state dict holds W' under the name of W, and the adapter as well. Fold a model
before saving it as a plain one.
"""

import math

import torch
from torch import nn

from config.adapters import LoraConfig
from modules.adapters.adapter_switch import AdapterSwitch
from modules.adapters.dora import dora_factor, row_norms
from utils.errors import UserError


def scaling(config: LoraConfig) -> float:
    """Return s above. With alpha / r, training slows down as the rank grows, unlike with alpha / sqrt(r)."""
    return config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)


def effective_weight(weight, A, B, scale: float, magnitude=None):
    """Return W' (.., out, in) in fp32, or in fp64 if a part is in fp64.

    weight (.., out, in), A (.., R, in), B (.., out, R), magnitude (.., out) for DoRA.
    """
    wide = torch.promote_types(torch.promote_types(weight.dtype, A.dtype), torch.float32)
    with torch.autocast(weight.device.type, enabled=False):  # it would round B A to bf16
        whole = weight.to(wide) + scale * (B.to(wide) @ A.to(wide))
        return whole if magnitude is None else whole * dora_factor(magnitude, whole)[..., None]


class Adapted(nn.Module):
    """A layer that holds adapters; it takes the place of a plain layer and uses its parameters.

    `MATRICES` names the layer's weights, and `stores(matrix)` gives their `lora_A`, `lora_B` and
    `lora_magnitude_vector`: dictionaries from an adapter's name to its parameter. `empty_store()` makes a
    home for one of these three kinds, `empty_layer()` a plain layer of the same shape.
    """

    MATRICES: tuple[str, ...] = ()

    def __init__(self, layer: nn.Module, switch: AdapterSwitch):
        super().__init__()
        self.switch, self.kept = switch, {}
        for name, parameter in layer._parameters.items():  # a bias may be None
            self.register_parameter(name, parameter)
        self.lora_A, self.lora_B, self.lora_magnitude_vector = (self.empty_store() for _ in range(3))
        self.train(layer.training)

    @property
    def idle(self) -> bool:
        """Whether the weights alone are the layer now: no adapter is selected, or one is merged."""
        return self.switch.merged is not None or self.switch.choice is None

    def plain(self) -> nn.Module:
        """Return a plain layer with the present weights."""
        with torch.device("meta"):  # no memory and no random numbers for weights that are replaced
            layer = self.empty_layer()
        for name, parameter in self._parameters.items():
            layer.register_parameter(name, parameter)
        return layer.train(self.training)

    @torch.no_grad()
    def add(self, name: str, config: LoraConfig) -> None:
        """Create the parameters of an adapter: A uniform in +-1/sqrt(in) (He's rule with a = sqrt(5), as in
        peft), B zero, so that the adapter starts without effect, and m the lengths of W's rows.

        They are fp32 even where W is bf16, which would round away an optimizer's small steps.
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
        """Return W' of one matrix under one adapter, in fp32 or fp64, with gradient."""
        A, B, magnitude = self.stores(matrix)
        scale = scaling(self.switch.configs[name])
        return effective_weight(getattr(self, matrix), A[name], B[name], scale, magnitude.get(name))

    @torch.no_grad()
    def merge(self, name: str) -> None:
        """Replace W by a new parameter W' (other models may share W), if the layer has the adapter."""
        for matrix in self.MATRICES if name in self.stores(self.MATRICES[0])[0] else ():
            weight = self.kept[matrix] = getattr(self, matrix)
            whole = self.effective(matrix, name).to(weight.dtype)
            setattr(self, matrix, nn.Parameter(whole, weight.requires_grad))

    def unmerge(self) -> None:
        """Restore W, on the device and in the dtype that the model has now."""
        for matrix, weight in self.kept.items():
            weight.data = weight.data.to(getattr(self, matrix))
            setattr(self, matrix, weight)
        self.kept.clear()


def adapted_layers(model: nn.Module) -> list[Adapted]:
    """Return all layers with adapters."""
    return [layer for layer in model.modules() if isinstance(layer, Adapted)]


def replace_layer(model: nn.Module, path: str, layer: nn.Module) -> None:
    """Put `layer` in the place of the submodule at `path`."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, layer)


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
    if switch.merged is not None:
        raise UserError(f"adapter {switch.merged!r} is merged into the weights already: unmerge it first")
    switch.check_known(name)
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
        if isinstance(layer, Adapted):
            replace_layer(model, path, layer.plain())


@torch.no_grad()
def lesson():
    """Merge small changes into a matrix in fp32 and in bf16; measure the error and try to undo them."""
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
