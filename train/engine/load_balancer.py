"""Balance the experts over one optimizer step: the loss of modules/experts/balance.py by scope, and
DeepSeek's bias.

Loads need to be even over many tokens, not within a few. A micro-batch of Python code should be free to use
the experts that know Python; a loss that asks for even loads within it forbids that. Scopes of f and P:

    sequence   each row by itself, weighted by its number of real tokens
    batch      this process's micro-batch
    global     all micro-batches of all processes in one optimizer step

Micro-batch m with n_m of the step's n real tokens adds n_m/n times its loss, so the loss of the step is the
sum over micro-batches and processes. It is a mean over layers, so an even load gives 1 (kl: 0) at any depth.

Global statistics have a difficulty: gradients flow one micro-batch at a time, through its own P_m, while the
loss L(f, P) depends on P = sum_m n_m/n P_m. The chain rule solves it for every form alike:

    dL/dw = sum_i g_i dP_i/dw = sum_m n_m/n sum_i g_i dP_m,i/dw,      g_i = dL/dP_i at the global f and P

so micro-batch m contributes n_m/n (L + sum_i g_i (P_m,i - its value)) with constant L and g: the value and
the gradient of one big batch. For switch/hard that is E * sum f_i P_m,i, the loss of Qwen (arXiv 2501.11873).
The statistics of all processes are either `exact`, from a pass without gradient over the whole step first, or
`running`: those of the step so far, at no extra cost. A running f differs from the exact one by at most 2 (1
- share of the step seen), summed over experts, and is exact in the last micro-batch.

The bias needs no loss (DeepSeek, arXiv 2408.15664): after each optimizer step, an expert that got less than
the mean becomes a little more attractive, b_i += rate * sign(mean - count_i). It enters the choice of experts
only, not their weights. Moves are centred, as in torchtitan. Adding the same number to all biases changes no
choice, but without centring all drift upwards when few experts are busy and many idle. Measured with token
frequencies like those of text (1/rank): a drift of 0.13 after 4000 steps of 0.001, where biases differ by
0.08.
"""

import torch

from modules.experts.balance import balance_value, expert_sums, max_vio, shares, z_loss
from utils.distributed import sum_scalars


class LoadBalancer:
    """Count one optimizer step, compute its loss terms and move its biases.

        begin_step -> [count per micro-batch, if needs_counting_pass] -> loss per micro-batch -> end_step

    Only these calls count. Nothing is hooked into a module's forward, so neither evaluation nor the second
    forward of gradient checkpointing can count. Statistics live for one step. Only the biases outlive it, as
    buffers of the model, so resuming needs nothing else. All processes make the same calls, because they
    exchange sums: `running` global statistics once per micro-batch, everything else once per step.

    Args:
        config: form, measure, scope, statistics, and the three weights.
        routers: one per MoE layer, in the order of the layers (L of them).
    """

    def __init__(self, config, routers):
        self.config, self.routers = config, list(routers)
        self.shared = config.weight > 0 and config.scope == "global"
        # True: each step begins with a pass of `count` over all its micro-batches
        self.needs_counting_pass = self.shared and config.statistics == "exact"
        self.begin_step(0)

    def begin_step(self, tokens: float) -> None:
        """Begin a step with this many real tokens, in all micro-batches of all processes."""
        self.tokens = max(tokens, 1)
        self.pending = []  # (L, 2, E) per micro-batch of this process: counts and probabilities
        self.total = None  # (L, 2, E) fp64, of all processes

    @torch.no_grad()
    def count(self, routings, mask) -> None:
        """Add one micro-batch to the statistics. routings: one per layer; mask (B, T), True if real."""
        self.pending.append(self.sums(routings, mask).sum(2))

    def loss(self, routings, mask):
        """Return this micro-batch's share of the step's loss; without a counting pass, count it as well.

        -> terms {"balance", "z"} whose weight is above 0, weight applied, and measures: the same without
        weight and without gradient, for the log.
        """
        sums, values = self.sums(routings, mask), {}
        if not self.needs_counting_pass:
            self.pending.append(sums.detach().sum(2))
        if self.config.weight > 0:
            values["balance"] = self.balance(sums, routings[0].indices.shape[1])
        if self.config.z_loss > 0:
            values["z"] = sum(z_loss(r.logits, mask) for r in routings) / self.tokens / len(routings)
        weights = {"balance": self.config.weight, "z": self.config.z_loss}
        terms = {name: weights[name] * value for name, value in values.items()}
        return terms, {name: value.detach() for name, value in values.items()}

    def balance(self, sums, K: int):
        """Return the unweighted share of one micro-batch, a scalar. sums (L, 2, B, E)."""
        form, measure = self.config.form, self.config.measure
        if self.config.scope != "sequence":
            sums = sums.sum(2, keepdim=True)  # (L, 2, B or 1, E)
        f, P = shares(sums[:, 0], sums[:, 1], K)
        if self.shared:
            self.exchange()
            if self.total is None:
                raise RuntimeError("exact statistics: call count for every micro-batch before the first loss")
            counts, probs = self.total.to(P.dtype).to(P.device)[:, :, None].unbind(1)
            value = first_order(P, *shares(counts, probs, K), form, measure)
        else:
            value = balance_value(f, P, form, measure)  # (L, B or 1)
        share = sums[:, 0].sum(-1).detach() / K / self.tokens
        return (share * value).sum(1).mean()

    @torch.no_grad()
    def end_step(self, share=1.0) -> dict:
        """Move the biases after the last backward of a step; return `max_vio` and `dead` for the log.

        `max_vio` is that of the worst layer, `dead` the number of experts in all layers that got no token.
        `loads` keeps the shares (L, E). Biases move by `share` of their rate, which follows the learning
        rate, so that the choice of experts settles with everything else (0 leaves them where they are).
        """
        self.exchange()
        counts = self.total[:, 0]  # (L, E)
        self.loads = counts / counts.sum(-1, keepdim=True).clamp(min=1)
        rate = share * self.config.bias_rate
        if rate > 0:
            for router, count in zip(self.routers, counts, strict=True):
                direction = (count.mean() - count).sign()
                bias = router.e_score_correction_bias
                bias += rate * (direction - direction.mean()).to(bias)
        return {"max_vio": max(map(max_vio, counts)), "dead": int((counts == 0).sum())}

    def exchange(self) -> None:
        """Add to the total what all processes have counted since the last exchange, if anything."""
        if self.pending:
            new = torch.stack(self.pending).cpu().double().sum(0)
            new = torch.tensor(sum_scalars(new.flatten().tolist()), dtype=torch.float64).view(new.shape)
            self.total = new if self.total is None else self.total + new
            self.pending = []

    def sums(self, routings, mask):
        """Return counts and probabilities of each expert in each row, by layer (L, 2, B, E)."""
        return torch.stack([torch.stack(expert_sums(routing, mask)) for routing in routings])


def first_order(P, step_f, step_P, form: str, measure: str):
    """Return L(f, P) of the whole step, linear in one micro-batch's P: (L, 1, E) each -> (L, 1)."""
    with torch.enable_grad():
        step_P = step_P.detach().requires_grad_()
        value = balance_value(step_f, step_P, form, measure)
        (slope,) = torch.autograd.grad(value.sum(), step_P)
    return value.detach() + (slope * (P - P.detach())).sum(-1)
