"""Distillation of logits: a student learns the probabilities that a teacher gives to every next token.

    p = softmax(teacher / T)    q = softmax(student / T)         T: temperature, the same on both sides
    forward    KL(p, q) = sum p log(p / q)           q covers every token that the teacher holds possible
    reverse    KL(q, p) = sum q log(q / p)           q keeps to tokens that the teacher finds likely
    jsd        b KL(p, m) + (1 - b) KL(q, m),  m = b p + (1 - b) q          between the two
    loss     = T^2 * divergence, summed over tokens

    student, teacher: logits (N, V) of the N labelled tokens -> ()

T^2 (Hinton et al., arXiv 1503.02531): the gradient of softened logits shrinks by 1 / T twice, and would
otherwise lose weight against the cross-entropy. jsd: Agarwal et al., "GKD", arXiv 2306.13649.

If only the K most likely tokens of a teacher are kept, all others count as one more outcome, the tail, with
the probability that is left. The student is treated alike:

    ids, logprobs (N, K), at temperature T   ->   distributions over K + 1 outcomes

Without a tail both sides would be renormalised over the K tokens, and nothing would keep the student from
giving most of its probability to other tokens.

Traps: compute probabilities in fp32 or wider. Leave out rows without a label (padding, questions) before the
call. `F.kl_div(.., reduction="batchmean")` on (B, T, V) divides by B, not by the number of tokens.
"""

import torch

KINDS = ("forward", "reverse", "jsd")


def logit_loss(student, teacher, kind, beta=0.5, temperature=1.0):
    """Return the loss, summed over tokens. student, teacher (N, V) -> ()."""
    student, teacher = log_probs(student, temperature), log_probs(teacher, temperature)
    return temperature**2 * divergence(student, teacher, kind, beta)


def log_probs(logits, temperature):
    """Return log softmax(logits / temperature) (N, V), in fp32 or wider."""
    return (wide(logits) / temperature).log_softmax(dim=-1)


def wide(tensor):
    """Return a tensor in fp32 or wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def divergence(student, teacher, kind, beta=0.5):
    """Return the divergence of log-probabilities (N, V), summed over the N tokens."""
    if kind == "forward":
        return kl(teacher, student)
    if kind == "reverse":
        return kl(student, teacher)
    log_beta, log_rest = torch.tensor([beta, 1 - beta], dtype=student.dtype, device=student.device).log()
    mixture = torch.logaddexp(teacher + log_beta, student + log_rest)
    return beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)


def kl(p, q):
    """Return the sum of KL(p, q) over all rows of log-probabilities (N, V)."""
    return (p.exp() * (p - q)).sum()


def top_outcomes(teacher, k, temperature=1.0):
    """Return what is kept of a teacher: ids and log-probabilities (N, K) of its k most likely tokens."""
    logprobs, ids = log_probs(teacher, temperature).topk(k, dim=-1)
    return ids, logprobs


def top_logit_loss(student, ids, logprobs, kind, beta=0.5, temperature=1.0):
    """Return the loss against a teacher of which only `top_outcomes` at this temperature are known.

    student (N, V), ids and logprobs (N, K) -> (), summed over tokens.
    """
    student = wide(student) / temperature
    chosen, teacher = student.gather(1, ids), logprobs.to(student.dtype)  # (N, K)
    if ids.shape[1] < student.shape[1]:
        rest = student.scatter(1, ids, -torch.inf).logsumexp(dim=-1, keepdim=True)
        # Rounded probabilities may sum to 1 or more, and the log of an empty tail is no number.
        mass = teacher.exp().sum(dim=-1, keepdim=True).clamp(max=1 - torch.finfo(teacher.dtype).eps)
        chosen, teacher = torch.cat([chosen, rest], 1), torch.cat([teacher, torch.log1p(-mass)], 1)
    # The softmax of these K + 1 scores is that of all V, with less work.
    return temperature**2 * divergence(chosen.log_softmax(dim=-1), teacher, kind, beta)


def lesson():
    """Print the student that each divergence likes best if it can have only one of two peaks."""
    places = torch.arange(24.0)
    peaks = [height - ((places - centre) / 2).square() for centre, height in ((6.0, 0.0), (17.0, -0.3))]
    teacher = torch.logaddexp(*peaks)[None]  # (1, 24)
    grid = [(c / 4, w) for c in range(93) for w in (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 9.0)]
    students = [-((places - centre) / width).square()[None] for centre, width in grid]
    print("a teacher with peaks at 6 and 17, of width 2; the best student that can have only one:")
    for kind in KINDS:
        losses = [logit_loss(student, teacher, kind).item() for student in students]
        (centre, width), loss = min(zip(grid, losses, strict=True), key=lambda found: found[1])
        print(f"  {kind:8s} centre {centre:5.2f}  width {width:.1f}  {loss:.3f} nats")


if __name__ == "__main__":
    lesson()
