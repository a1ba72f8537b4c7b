"""Divergences against TRL, sentence-transformers, `F.kl_div` and a loop; and ways to get them wrong."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from modules.distillation.divergence import KINDS, log_probs, logit_loss, top_logit_loss, top_outcomes
from tests.modules.alignment.oracles import lifted

BETA = {"forward": 0.0, "reverse": 1.0}  # TRL's names for them


def logits(N=7, V=13, seed=0, dtype=torch.float64):
    """Logits of a student, with gradient, and of a teacher."""
    torch.manual_seed(seed)
    return (2 * torch.randn(N, V, dtype=dtype)).requires_grad_(), 3 * torch.randn(N, V, dtype=dtype)


def value_and_gradient(loss, student):
    """The loss and its gradient, in one row of numbers."""
    (gradient,) = torch.autograd.grad(loss, student)
    return torch.cat([loss.detach().reshape(1), gradient.flatten()])


@pytest.mark.parametrize("temperature", [0.7, 1.0, 4.0])
@pytest.mark.parametrize(("kind", "beta"), [("forward", 0.0), ("reverse", 1.0), ("jsd", 0.5), ("jsd", 0.1),
                                            ("jsd", 0.93)])  # fmt: skip
def test_trl(kind, beta, temperature):
    """The generalised divergence of TRL's GKD trainer, which has no T^2; padding has the label -100."""
    theirs = lifted("trl", "experimental/gkd/gkd_trainer.py", "generalized_jsd_loss").generalized_jsd_loss
    student, teacher = logits(6)
    labels = torch.tensor([[3, -100, 5], [-100, 1, 0]])
    rows = [part.view(2, 3, -1) for part in (student, teacher)]
    expected = theirs(*rows, labels=labels, beta=beta, temperature=temperature, reduction="sum")
    keep = (labels != -100).flatten()
    loss = logit_loss(student[keep], teacher[keep], kind, beta, temperature)
    found, wanted = (value_and_gradient(one, student) for one in (loss, temperature**2 * expected))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_sentence_transformers(temperature):
    """Its distillation loss, with T^2, of scores; here the score of a candidate is a channel of the query."""
    theirs = lifted("sentence_transformers", "sentence_transformer/losses/distill_kl_div.py",
                    "compute_loss_from_embeddings").compute_loss_from_embeddings  # fmt: skip
    student, teacher = logits()
    about = SimpleNamespace(student_temperature=temperature, teacher_temperature=temperature,
                            similarity_fct=lambda a, b: (a * b).sum(-1), _checked_teacher_scale=True,
                            loss_fct=torch.nn.KLDivLoss(reduction="batchmean"))  # fmt: skip
    candidates = [row.expand(7, -1) for row in torch.eye(13, dtype=torch.float64)]
    expected = 7 * theirs(about, [student, *candidates], teacher)
    loss = logit_loss(student, teacher, "forward", temperature=temperature)
    found, wanted = (value_and_gradient(one, student) for one in (loss, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_logits_are_compared_in_fp32(kind):
    student, teacher = (part.detach().bfloat16() for part in logits(50, 400))
    exact = logit_loss(student.double(), teacher.double(), kind)
    assert logit_loss(student, teacher, kind).dtype == torch.float32
    torch.testing.assert_close(logit_loss(student, teacher, kind).double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_that_is_the_teacher_learns_nothing(kind):
    _, teacher = logits()
    student = teacher.clone().requires_grad_()
    found = value_and_gradient(logit_loss(student, teacher, kind, temperature=3.0), student)
    assert found.abs().max() < 1e-12


# --- the teacher's best tokens and a tail ------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_all_tokens_kept_is_the_whole_loss(kind):
    student, teacher = logits()
    ids, logprobs = top_outcomes(teacher, 13, 2.0)
    loss = top_logit_loss(student, ids, logprobs, kind, 0.3, 2.0)
    found, wanted = (value_and_gradient(one, student)
                     for one in (loss, logit_loss(student, teacher, kind, 0.3, 2.0)))  # fmt: skip
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_the_tail_is_one_outcome(kind):
    """An obvious loop over tokens: K of them, and the sum of the others."""
    student, teacher = logits()
    expected = 0.0
    for row in range(7):
        q, p = ((part[row] / 1.5).softmax(0) for part in (student, teacher))
        best = p.argsort(descending=True)[:4].tolist()
        outcomes = [(p[i], q[i]) for i in best]
        rest = [i for i in range(13) if i not in best]
        outcomes.append((sum(p[i] for i in rest), sum(q[i] for i in rest)))
        for a, b in outcomes:
            m = 0.3 * a + 0.7 * b
            one, other = a * (a / b).log(), b * (b / a).log()
            jsd = 0.3 * a * (a / m).log() + 0.7 * b * (b / m).log()
            expected = expected + 1.5**2 * {"forward": one, "reverse": other, "jsd": jsd}[kind]
    loss = top_logit_loss(student, *top_outcomes(teacher, 4, 1.5), kind, 0.3, 1.5)
    found, wanted = (value_and_gradient(one, student) for one in (loss, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sure_teacher_and_rounded_probabilities(kind):
    """Stored in half precision, the probabilities kept may sum to more than 1: still a number."""
    student, teacher = logits(dtype=torch.float32)
    ids, logprobs = top_outcomes(40 * teacher, 5)
    for stored in (logprobs, logprobs.half(), logprobs + 1e-3):
        found = value_and_gradient(top_logit_loss(student, ids, stored, kind), student)
        assert found.isfinite().all()


# --- ways to get it wrong, each seen -----------------------------------------------------------------------

SABOTEURS = {
    "temperature on the student only": lambda s, t, keep: 4 * F.kl_div(
        (s / 2).log_softmax(-1), t.log_softmax(-1), log_target=True, reduction="none")[keep].sum(),
    "temperature without its square": lambda s, t, keep: F.kl_div(
        (s / 2).log_softmax(-1), (t / 2).log_softmax(-1), log_target=True, reduction="none")[keep].sum(),
    "padding in the divergence": lambda s, t, keep: 4 * F.kl_div(
        (s / 2).log_softmax(-1), (t / 2).log_softmax(-1), log_target=True, reduction="sum"),
    "batchmean for a mean over tokens": lambda s, t, keep: 4 * keep.sum() * F.kl_div(
        *((part[keep] / 2).log_softmax(-1).view(2, 2, -1) for part in (s, t)), log_target=True,
        reduction="batchmean"),
    "teacher and student exchanged": lambda s, t, keep: 4 * F.kl_div(
        (t / 2).log_softmax(-1), (s / 2).log_softmax(-1), log_target=True, reduction="none")[keep].sum(),
}  # fmt: skip


@pytest.mark.parametrize("name", SABOTEURS)
def test_wrong_losses_differ_from_the_right_one(name):
    """So the comparisons above would see them: by far more than their bounds."""
    student, teacher = logits(6)
    keep = torch.tensor([True, False, True, True, False, True])
    right = F.kl_div(log_probs(student, 2.0), log_probs(teacher, 2.0), log_target=True, reduction="none")
    right = 4 * right[keep].sum()
    torch.testing.assert_close(logit_loss(student[keep], teacher[keep], "forward", temperature=2.0), right)
    assert abs(SABOTEURS[name](student, teacher, keep) / right - 1) > 0.05
