"""LoRA, rsLoRA and DoRA: adapt a frozen matrix by a trainable product of two thin ones.

    LoRA    W' = W + s B A                    s = lora_alpha / r, with rsLoRA lora_alpha / sqrt(r)
    DoRA    W' = m * V / ||V||                V = W + s B A     ||V||: the length of each row

    W, V: (out, in)   A: (R, in)   B: (out, R)   m, ||V||: (out,)     or, for experts, a stack of E of each

The change B A has rank R at most: R * (out + in) numbers are trained in place of out * in. B starts at zero
and m as ||W||, so training begins with the model as it is; A is random, or A and B would stay zero.

DoRA trains magnitude and direction separately. LoRA turns and stretches a row with the same few numbers; full
fine-tuning does the two nearly independently. Stretching every row by its own factor is a change of full
rank, out of reach for B A, yet m does it with one number per row. ||V|| is a constant for the gradient
(section 4.3 of the paper): this saves the memory of a second matrix and changes accuracy little.

A linear layer adds s B (A x) to its output and never builds B A. Experts run all tokens in one fast pass
(modules/experts/grouped.py) that takes matrices, so W' is built for all E at once. That costs R products per
weight, and using it one per token: little extra for many tokens. An expert of width F needs no rank above F.

Papers: Hu et al., arXiv 2106.09685 (LoRA); Kalajdzievski, arXiv 2312.03732 (rsLoRA); Liu et al., arXiv
2402.09353 (DoRA). Names as in `peft`: `<layer>.lora_A.<adapter>`, and the base keeps its own.
Trap: without s the learning rate depends on the rank.
Trap: bf16 keeps 8 bits and loses an optimizer's small steps, so factors are fp32 even where W is bf16. The
W' of experts is rounded like W: only part of a change below 1/256 of a weight survives the forward pass.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from config.adapters import LoraConfig
from modules.adapters.adapter_switch import AdapterSwitch
from modules.experts.moe import Experts, run_experts


def wide(tensor):
    """Return the tensor in fp32, or unchanged if it is in fp64."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def scaling(config: LoraConfig) -> float:
    """Return s above. With alpha / r, training slows down as the rank grows, unlike with alpha / sqrt(r)."""
    return config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)


def effective_weight(weight, A, B, scale: float, magnitude=None):
    """Return W' (.., out, in) in fp32 or fp64.

    weight (.., out, in), A (.., R, in), B (.., out, R), magnitude (.., out) for DoRA.
    """
    with torch.autocast(weight.device.type, enabled=False):  # it would round B A to bf16
        V = wide(weight) + scale * (wide(B) @ wide(A))
        return V if magnitude is None else V * (magnitude / V.detach().norm(dim=-1))[..., None]


class LoraLayer(nn.Module):
    """A layer with adapters, in the place of a plain layer whose parameters it uses. `MATRICES` names the
    weights to adapt; `kept` holds W while an adapter is merged."""

    MATRICES = ("weight",)
    empty_store = nn.ParameterDict

    def __init__(self, layer: nn.Module, switch: AdapterSwitch):
        super().__init__()
        self.switch, self.kept = switch, {}
        self._parameters.update(layer._parameters)
        self.lora_A, self.lora_B, self.lora_magnitude_vector = (self.empty_store() for _ in range(3))
        self.train(layer.training)

    def stores(self, matrix: str):
        """Return A, B and m of one matrix, each a dictionary from an adapter's name to its parameter."""
        return self.lora_A, self.lora_B, self.lora_magnitude_vector

    @property
    def idle(self) -> bool:
        """True if the layer computes W x + b now: no adapter is selected, or one is merged into W."""
        return self.switch.active is None

    @torch.no_grad()
    def add(self, name: str, config: LoraConfig) -> None:
        """Create the parameters of an adapter. A is uniform in +-1/sqrt(in) (He's rule with a = sqrt(5))."""
        for matrix in self.MATRICES:
            weight, (A, B, magnitude) = wide(getattr(self, matrix)), self.stores(matrix)
            *stack, out, width = weight.shape
            bound = width**-0.5
            A[name] = nn.Parameter(weight.new_empty(*stack, config.r, width).uniform_(-bound, bound))
            B[name] = nn.Parameter(weight.new_zeros(*stack, out, config.r))
            if config.use_dora:
                magnitude[name] = nn.Parameter(weight.norm(dim=-1))

    def effective(self, matrix: str, name: str):
        """Return W' of one matrix under one adapter, in fp32 or fp64, with gradient."""
        A, B, magnitude = self.stores(matrix)
        scale = scaling(self.switch.configs[name])
        return effective_weight(getattr(self, matrix), A[name], B[name], scale, magnitude.get(name))

    @torch.no_grad()
    def merge(self, name: str) -> None:
        """Replace W by a new parameter W' (other models may share W), if the layer has the adapter."""
        for matrix in self.MATRICES:
            if name in self.stores(matrix)[0]:
                weight = self.kept[matrix] = getattr(self, matrix)
                whole = self.effective(matrix, name).to(weight.dtype)
                setattr(self, matrix, nn.Parameter(whole, weight.requires_grad))

    def unmerge(self) -> None:
        """Restore W, on the device and in the dtype that the model has now."""
        for matrix, weight in self.kept.items():
            weight.data = weight.data.to(getattr(self, matrix))
            setattr(self, matrix, weight)
        self.kept.clear()


class LoraLinear(LoraLayer):
    """`nn.Linear` with adapters: `forward(x)`, (B, .., in) or (N, in) -> the same with out."""

    product = nn.Linear.forward  # x -> W x + b

    def forward(self, x):
        """Multiply all rows by W at once, then add what each row's adapter gives."""
        return self.switch.by_rows(self.adapted, x, self.product(x))

    def adapted(self, name, x, base):
        """Add one adapter to base = W x + b (None, or one that is not here: return base)."""
        if name not in self.lora_A:
            return base
        A, B, magnitude = (store.get(name) for store in self.stores("weight"))
        config = self.switch.configs[name]
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(A.dtype)  # factors in fp32 on a base in bf16
        x = F.dropout(x, config.lora_dropout, self.training)
        low = F.linear(F.linear(x, A) * scaling(config), B)
        if magnitude is not None:  # W' x = W x + (m/||V|| - 1) W x + m/||V|| s B A x
            with torch.no_grad():
                V = effective_weight(self.weight, A, B, scaling(config))
            plain = base if self.bias is None else base - self.bias
            if config.lora_dropout and self.training:
                plain = F.linear(x, self.weight.to(x.dtype))  # as in peft: dropout also where m acts on W x
            factor = magnitude / V.norm(dim=-1)
            low = (factor - 1) * plain + factor * low
        return (base + low).to(base.dtype)


class LoraExperts(LoraLayer):
    """`Experts` with adapters, without dropout. Parameters: `lora_A.gate_up_proj.<adapter>` and so on."""

    MATRICES = ("gate_up_proj", "down_proj")

    def __init__(self, layer: Experts, switch: AdapterSwitch):
        super().__init__(layer, switch)
        self.implementation = layer.implementation

    def empty_store(self) -> nn.ModuleDict:
        """Return a container for the parameters of one kind."""
        return nn.ModuleDict({matrix: nn.ParameterDict() for matrix in self.MATRICES})

    def stores(self, matrix: str):
        """Return A, B and m of one matrix, each a dictionary from an adapter's name to its parameter."""
        return [store[matrix] for store in super().stores(matrix)]

    def forward(self, x, indices, weights):
        """x (N, C), indices and weights (N, K) -> (N, C), under the adapter that each token's row uses."""
        return self.switch.by_rows(self.run, x, indices, weights)

    def run(self, name, x, indices, weights):
        """Run all of x under one adapter; None, or one that this layer lacks, is the base."""
        matrices = [self.gate_up_proj, self.down_proj]
        if name in self.lora_A["down_proj"]:
            matrices = [self.effective(m, name).to(getattr(self, m).dtype) for m in self.MATRICES]
        return run_experts(self.implementation, x, indices, weights, *matrices)


def lesson():
    """Fit changes of a matrix by LoRA of several ranks and by DoRA; print the remaining error."""
    from modules.adapters.lora_model import add_lora

    torch.manual_seed(0)
    size, W = 64, torch.randn(64, 64) / 8
    changes = {f"rank {r}": torch.randn(size, r) @ torch.randn(r, size) for r in (1, 4, 64)}
    changes["longer rows"] = torch.rand(size, 1) * W
    print(f"changes of a {size} x {size} matrix: share left over (the least that rank r can leave)")
    for label, change in changes.items():
        change, texts = change * (4 / change.norm()), []
        for kind, r in (("LoRA", 1), ("LoRA", 4), ("LoRA", 16), ("DoRA", 4)):
            model = nn.Sequential(nn.Linear(size, size, bias=False))
            model[0].weight.data = W
            add_lora(model, LoraConfig(r=r, lora_alpha=r, target_modules=["0"], use_dora=kind == "DoRA"))
            optimizer = torch.optim.Adam([p for n, p in model.named_parameters() if "lora_" in n], lr=0.03)
            for _ in range(100):
                loss = (model(torch.eye(size)).T - W - change).square().sum()
                optimizer.zero_grad(), loss.backward(), optimizer.step()
            least = torch.linalg.svdvals(change)[r:].norm() / 4
            texts.append(f"{kind} r = {r}: {loss.sqrt() / 4:.0%} ({least:.0%})")
        print(f"  {label:12s}", "   ".join(texts))


if __name__ == "__main__":
    lesson()
