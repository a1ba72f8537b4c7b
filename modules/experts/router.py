"""The router of a mixture of experts: a linear layer that scores E experts per token and chooses K of them.

    logits = x W^T                    s = sigmoid(logits)  or  softmax(logits)
    chosen = the K experts with the largest s_i + b_i
    g_i    = s_i / sum of the chosen s  (norm_topk_prob)  *  routed_scaling_factor

    x: (N, C)   W: (E, C)   b: (E,)   ->   logits and s (N, E), chosen and g (N, K)

The choice has no gradient: W is trained through the weights g alone. b steers the choice towards idle experts
(balancing without a loss, arXiv 2408.15664); it is not a parameter and never part of the weights. With groups
a token takes only the `topk_group` best of `n_group` groups of experts: with one group per machine, it then
visits few machines. `topk_method` ranks a group by the sum of its two largest s_i + b_i (`noaux_tc`, as in
DeepSeek-V3, arXiv 2412.19437) or by the largest (`group_limited_greedy`, DeepSeek-V2, arXiv 2405.04434).

Sigmoid scores each expert by itself, as in DeepSeek-V3 (arXiv 2412.19437); softmax runs over all experts, as
in Switch (arXiv 2101.03961) and Qwen3Moe. Names as in `DeepseekV3TopkRouter`.
Trap: compute in fp32, under autocast too. Where bf16 cannot tell two scores apart, another expert is chosen:
a jump, not a rounding error. TF32, in which GPUs multiply fp32 if the trainer allows it, would do the same.
Trap: K = 1 with norm_topk_prob makes every weight s/s = 1, whose gradient is zero: the language-model loss
would not train the router. `config/model.py` refuses it.
"""

from typing import NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable


class Routing(NamedTuple):
    """The experts and weights of N tokens; fp64 if the model is in fp64, otherwise fp32."""

    logits: torch.Tensor  # (N, E)
    scores: torch.Tensor  # (N, E), sigmoid or softmax of the logits, with gradient
    indices: torch.Tensor  # (N, K) int64, the chosen experts
    weights: torch.Tensor  # (N, K), factors of the chosen experts' outputs, with gradient


def first_bits(x):
    """Cut fp32 to the 11 bits that TF32 keeps. (A compiler would leave out a cast to bf16 and back.)"""
    return (x.view(torch.int32) & -0x2000).view(torch.float32)


class ExactLinear(torch.autograd.Function):
    """x (N, C), W (E, C) -> x W^T (N, E), without autocast; TF32 may round gradients only, which
    choose no expert. Trap: a compiler traces the backward pass under the autocast around the model, so
    autocast must be off there as well, or the gradient is rounded to bf16."""

    @staticmethod
    def forward(ctx, x, weight):
        """Multiply."""
        ctx.save_for_backward(x, weight)
        with torch.autocast(x.device.type, enabled=False):
            if x.dtype != torch.float32 or not torch.backends.cuda.matmul.allow_tf32:
                return x @ weight.T
            first, first_weight = first_bits(x), first_bits(weight)  # the remainders are below 2^-10 of them
            return first @ first_weight.T + (x - first) @ first_weight.T + x @ (weight - first_weight).T

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        """grad (N, E) -> gradients of x and W."""
        x, weight = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            return grad @ weight, grad.T @ x if ctx.needs_input_grad[1] else None


class TopkRouter(nn.Module):
    """`forward(x)`: (N, C) -> `Routing` of N tokens."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        experts = config.n_routed_experts
        self.weight = nn.Parameter(torch.empty(experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(experts, dtype=torch.float32))

    def _apply(self, fn, recurse=True):
        """Move and cast, but never cast the bias to bf16 or fp16: it changes in steps of about 0.001."""
        exact = self.e_score_correction_bias
        super()._apply(fn, recurse)
        moved = self.e_score_correction_bias
        if moved.dtype in (torch.bfloat16, torch.float16):
            self.e_score_correction_bias = exact.to(moved.device, torch.float32)
        return self

    def forward(self, x) -> Routing:
        """x (N, C) -> Routing."""
        config = self.config
        wide = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        x = x.to(wide)
        noise = config.router_jitter_noise
        if self.training and noise and self.weight.requires_grad:  # to explore, as in Switch
            x = x * torch.empty_like(x).uniform_(1 - noise, 1 + noise)
        logits = ExactLinear.apply(x, self.weight.to(wide))  # (N, E)
        return choose_experts(logits, self.e_score_correction_bias, config)


def choose_experts(logits, bias, config) -> Routing:
    """Return the experts for logits (N, E) and bias (E,), and their weights."""
    scores = logits.sigmoid() if config.scoring_func == "sigmoid" else logits.softmax(dim=-1)
    choice = scores.detach() + bias
    if config.n_group > 1:
        count = 1 if config.topk_method == "group_limited_greedy" else 2
        choice = keep_best_groups(choice, config.n_group, config.topk_group, count)
    indices = choice.topk(config.num_experts_per_tok, dim=-1).indices  # (N, K)
    weights = scores.gather(1, indices)
    if config.norm_topk_prob:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)  # sigmoids may all underflow
    return Routing(logits, scores, indices, weights * config.routed_scaling_factor)


def keep_best_groups(choice, groups: int, kept: int, count: int):
    """Mask (N, E) by -inf outside of the `kept` groups whose `count` best experts have the largest sum.

    A mask of 0 would not do: it could win against experts with a negative bias.
    """
    grouped = choice.unflatten(1, (groups, -1))  # (N, groups, E/groups)
    ranking = grouped.topk(count, dim=-1).values.sum(dim=-1)  # (N, groups)
    dropped = torch.ones_like(ranking, dtype=torch.bool)
    dropped.scatter_(1, ranking.topk(kept, dim=-1).indices, False)
    return grouped.masked_fill(dropped[..., None], -torch.inf).flatten(1)


def routing_codes(routings: list[Routing]):
    """Return a number (N,) for each token that tells which experts it chose in all layers, in any order: the
    sum of one random number for each of them. Equal choices have equal codes."""
    indices = torch.stack([routing.indices for routing in routings])  # (L, N, K)
    L, E = len(routings), routings[0].logits.shape[1]
    table = torch.randint(2**48, (L, E), generator=torch.Generator().manual_seed(0)).to(indices.device)
    return table.gather(1, indices.flatten(1)).view_as(indices).sum(dim=(0, 2))


def lesson():
    """Print one token's scores, choice and weights, and the effect of the bias and the groups."""
    from config.model import ModelConfig

    generator = torch.Generator().manual_seed(5)
    weight, x = torch.randn(6, 16, generator=generator) * 0.3, torch.randn(1, 16, generator=generator)
    print("6 experts, 2 chosen; the same logits each time")
    for name, bias, settings in (
        ("sigmoid, normed", 0.0, {}),
        ("sigmoid, as it is", 0.0, {"norm_topk_prob": False}),
        ("softmax, normed", 0.0, {"scoring_func": "softmax"}),
        ("softmax, as it is", 0.0, {"scoring_func": "softmax", "norm_topk_prob": False}),
        ("bias of 0.7 for expert 0", 0.7, {}),
        ("best of 3 groups only", 0.0, {"n_group": 3}),
    ):
        config = ModelConfig(hidden_size=16, n_routed_experts=6, num_experts_per_tok=2, **settings)
        router = TopkRouter(config)
        router.weight.data, router.e_score_correction_bias[0] = weight, bias
        routing = router(x)
        scores = " ".join(f"{s:.2f}" for s in routing.scores[0].tolist())
        weights = " ".join(f"{w:.2f}" for w in routing.weights[0].tolist())
        print(f"  {name:25s} scores {scores}   chosen {routing.indices[0].tolist()}   weights {weights}")
    print("bias and groups change the choice; the weights come from the scores alone")


if __name__ == "__main__":
    lesson()
