"""Cross-entropy of the next token, computed from hidden states: the output head and the loss in one piece.

    logits = h W^T     nll_n = logsumexp(logits_n) - logits_n[label_n]     loss = sum_n nll_n

In a small model the head is the largest product and the (N, V) logits are the largest tensor. Two things save
work and memory:

1. Logits are computed only where there is a label: padding and questions (label -100) are dropped first.
2. Logits are computed for one chunk of tokens at a time, and their gradient while they are still in the
   processor's cache: d logits = softmax(logits) - onehot(label) needs nothing from the backward pass, since
   the loss is a plain sum.

    hidden: (N, C)   weight: (V, C)   labels: (N,)  ->  loss sum (), nll (N,) without gradient

`plain_cross_entropy` is the textbook form, `linear_cross_entropy` the chunked one; a test compares them.
Trap: softmax and log run in fp32. bf16 keeps two to three digits: enough for products, not for a sum over V.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

CHUNK = 256  # tokens on a CPU: 256 x 6400 logits are 3 MB in bf16 and stay in the cache
MULTIPLE = 32  # rows of zeros fill up the last chunk: a CPU library keeps 640 KiB for each size of a product
GPU_CHUNK = 4096  # GPUs need large products; 4096 x 32768 logits are 0.5 GB in fp32


def plain_cross_entropy(hidden, weight, labels, softcap: float | None = None):
    """The reference: all logits at once. hidden (N, C), weight (V, C), labels (N,) -> sum (), nll (N,)."""
    logits = F.linear(hidden, weight)
    logits = soft_cap(logits if logits.dtype == torch.float64 else logits.float(), softcap)
    nll = F.cross_entropy(logits, labels, reduction="none")
    return nll.sum(), nll.detach()


def soft_cap(logits, cap: float | None):
    """Return cap * tanh(logits / cap), which stays within +-cap (Gemma 2, arXiv 2408.00118). None: no cap."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


def linear_cross_entropy(hidden, weight, labels, softcap: float | None = None):
    """Compute the same by chunks, without the rows labelled -100.

    Returns the sum over the labelled rows, and the nll of each of them, in order, without gradient.
    """
    keep = labels != -100
    if not keep.all():
        hidden, labels = hidden[keep], labels[keep]
    kind = hidden.device.type
    # As in F.linear, products run in the dtype of autocast if it is on.
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    return ChunkedCrossEntropy.apply(hidden, weight, labels, softcap, dtype, torch.is_grad_enabled())


class ChunkedCrossEntropy(torch.autograd.Function):
    """Loss and gradient in one pass over chunks of tokens; `backward` only scales the gradient."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, softcap, dtype, training):
        """hidden (N, C), weight (V, C), labels (N,) -> sum (), nll (N,)."""
        # needs_input_grad ignores no_grad: without `training`, evaluation would pay for unused gradients.
        wants_hidden, wants_weight = (training and wanted for wanted in ctx.needs_input_grad[:2])
        N, blank = len(labels), -len(labels) % MULTIPLE
        head, rows = weight.to(dtype), F.pad(hidden.to(dtype), (0, 0, 0, blank))
        labels = F.pad(labels, (0, blank))
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        nll = torch.empty(len(labels), dtype=wide, device=hidden.device)
        grad_hidden = torch.empty_like(rows) if wants_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if wants_weight else None
        chunk = CHUNK if hidden.device.type == "cpu" else GPU_CHUNK
        for start in range(0, len(labels), chunk):
            part = slice(start, start + chunk)
            label = labels[part, None]  # (n, 1)
            logits = soft_cap(rows[part] @ head.T, softcap)  # (n, V)
            probs = logits.softmax(dim=-1, dtype=wide)
            # A label's probability may underflow to 0, the largest of a row cannot: log(V) is its worst.
            below = logits.amax(dim=-1, keepdim=True).to(wide) - logits.gather(1, label)  # (n, 1)
            nll[part] = (below - probs.amax(dim=-1, keepdim=True).log()).squeeze(1)
            if not (wants_hidden or wants_weight):
                continue
            grad = probs.scatter_add_(1, label, probs.new_full(label.shape, -1.0))  # minus the one-hot label
            if softcap is not None:
                grad *= 1 - (logits / softcap).square()  # derivative of cap * tanh(x / cap)
            grad = grad.to(dtype)
            if wants_hidden:
                torch.mm(grad, head, out=grad_hidden[part])
            if wants_weight:
                grad_weight += grad.T @ rows[part]
        nll, grad_hidden = nll[:N], grad_hidden[:N] if wants_hidden else None
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        ctx.mark_non_differentiable(nll)
        return nll.sum(), nll

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_sum, _):
        """grad_sum () -> gradients of hidden and weight."""
        grad_hidden, grad_weight = ctx.saved_tensors
        hidden_dtype, weight_dtype = ctx.dtypes
        return (
            grad_hidden.to(hidden_dtype) * grad_sum if grad_hidden is not None else None,
            grad_weight.to(weight_dtype) * grad_sum if grad_weight is not None else None,
            None, None, None, None,
        )  # fmt: skip


def lesson():
    """Print the loss of guessing in several units, and what labels and chunks save."""
    for vocab, size in ((256, 1.0), (4096, 3.4)):  # bytes per token
        nats = torch.tensor(float(vocab)).log().item()
        print(
            f"guessing among {vocab:4d} tokens: loss {nats:.2f} nats, perplexity {vocab}, "
            f"{nats / 0.6931 / size:.2f} bits per byte at {size} bytes per token"
        )
    torch.manual_seed(0)
    hidden, weight = torch.randn(1024, 64), torch.randn(2048, 64) * 0.1
    labels = torch.randint(0, 2048, (1024,))
    labels[::2] = -100  # every second token belongs to a question
    plain = F.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    total, nll = linear_cross_entropy(hidden, weight, labels)
    print(f"plain {plain:.3f}, chunked {total:.3f}, over the {len(nll)} of {len(labels)} tokens with a label")
    print(f"logits held at once: {1024 * 2048 * 4 / 1e6:.1f} MB against {CHUNK * 2048 * 4 / 1e6:.1f} MB")


if __name__ == "__main__":
    lesson()
