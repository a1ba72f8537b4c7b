"""A selector over whole models: choose which of A candidates answers a question.

    logits = W2 silu(W1 norm(h))        choice = the candidate with the largest logit

    h: (.., C) -> logits (.., A)        h: the base model's hidden state at the last token of the question

A mixture of experts decides for each token and layer, in the middle of the network, and must be trained with
its experts. A selector decides once for a whole answer, in front of finished models. It is a classifier, and
its labels cost nothing: run all candidates on questions with known answers and compare their losses. Its
quality is measured in nats: the loss of its choices minus the loss of the best choices (its regret). Related:
LoraRetriever (arXiv 2402.09997), which finds adapters by the prompt and combines them.

The last token of the question, where the answer begins, is the only one that has attended to all of it.
"""

import torch
import torch.nn.functional as F
from torch import nn

from modules.norm import RMSNorm


class Selector(nn.Module):
    """`forward(h)`: (.., C) -> logits (.., A), through `width` hidden units; width 0 is a linear selector."""

    def __init__(self, hidden_size: int, candidates: int, width: int):
        super().__init__()
        self.norm = RMSNorm(hidden_size)
        self.up_proj = nn.Linear(hidden_size, width) if width else None
        self.out_proj = nn.Linear(width or hidden_size, candidates)

    def forward(self, h):
        """(.., C) -> (.., A)."""
        h = self.norm(h)
        if self.up_proj is not None:
            h = F.silu(self.up_proj(h))
        return self.out_proj(h)


def choices(losses, logits):
    """Score the choices. losses (N, A) of each candidate on each question, logits (N, A).

    -> accuracy: share of questions for which the best candidate was chosen; regret: nats lost against perfect
    choices; and the mean losses of the selector, the best choices, and each candidate alone (A,).
    """
    chosen = logits.argmax(dim=1, keepdim=True)  # (N, 1)
    got, best = losses.gather(1, chosen)[:, 0], losses.min(dim=1).values  # (N,) each
    right = (got == best).double().mean().item()  # two candidates with the same loss are both right
    return {
        "accuracy": right, "regret": (got - best).mean().item(), "selector": got.mean().item(),
        "best": best.mean().item(), "alone": losses.mean(dim=0).tolist(),
    }  # fmt: skip


def lesson():
    """Train a selector on the losses of three specialists, each good at one kind of question."""
    torch.manual_seed(0)
    C, A, N = 16, 3, 600
    kinds = torch.randint(A, (N,))
    h = torch.randn(A, C)[kinds] + 0.8 * torch.randn(N, C)
    losses = 2.0 + 0.3 * torch.randn(N, A).abs()
    losses[torch.arange(N), kinds] -= 1.5  # each is good at one kind of question
    selector = Selector(C, A, width=16)
    optimizer = torch.optim.AdamW(selector.parameters(), lr=1e-2)
    print("a selector over three specialists; nats per answer on 200 unseen questions")
    for step in range(101):
        if step in (0, 10, 30, 100):
            found = choices(losses[400:], selector(h[400:]).detach())
            print(f"  step {step:3d}: right {found['accuracy']:4.0%}  chosen {found['selector']:.2f}", end="")
            print(f"  best {found['best']:.2f}  regret {found['regret']:.2f}")
        loss = F.cross_entropy(selector(h[:400]), losses[:400].argmin(dim=1))
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    print("  each specialist alone:", " ".join(f"{loss:.2f}" for loss in found["alone"]))


if __name__ == "__main__":
    lesson()
