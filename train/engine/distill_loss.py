"""The loss of a student beside a teacher, by terms, each a mean over tokens of the whole step.

    loss = ce_weight * CE + lambda * CE(token after the next) + alpha * balance + beta * z
         + logits_weight * divergence of the probabilities    over the tokens with a label
         + hidden_weight * distance of the projected states   over all real tokens
         + attention_weight * KL of maps or relations         over all real tokens

The terms are defined in modules/distillation/. The log shows each one without its weight. The teacher is
frozen, in evaluation mode and without gradient, and computes logits only where there is a label. A batch may
carry them, computed before (teacher_logits.py): `teacher_ids` and `teacher_logprobs`, (B, T, K) each, the
`top_outcomes` at `distill.temperature`. A batch with the entry `own` holds samples of the student
(student_samples.py): their cross-entropy is logged, but not learned.
"""

import torch
import torch.nn.functional as F
from torch import nn

from config.schema import RunConfig
from load_data.loader import IGNORED
from modules.distillation.divergence import logit_loss, top_logit_loss, top_outcomes, wide
from modules.distillation.hidden import hidden_loss
from modules.distillation.relations import attention_kl, relation_loss
from train.engine.language_model_loss import LanguageModelLoss, about, real_tokens
from train.engine.recorder import Recorder
from train.engine.stage import Batch, within
from utils.distributed import sum_scalars
from utils.errors import UserError

STUDENT, PROJECTION = "student", "projection"
ATTENTION = {"maps": ("q_proj", "k_proj"), "relations": ("q_proj", "k_proj", "v_proj")}  # what learns


class DistillLoss(LanguageModelLoss):
    """`loss({student, projection}, micro-batch, labels of the step)` -> (terms, measures for the log).

    Args:
        student, teacher: decoders; the teacher is not trained.
        vocabulary: the number of tokens that they share. Either model may have more ids, which are unused.
        pairs: the layers that are compared, (student's, teacher's); attention only in the last pair.
        relation_heads: the number of heads for `distill.attention=relations`.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module, vocabulary: int, pairs: list[tuple[int, int]],
        relation_heads: int, config: RunConfig, machine,
    ):  # fmt: skip
        super().__init__(student, config, machine)
        self.settings, self.teacher, self.vocabulary = config.distill, teacher, vocabulary
        self.pairs, self.relation_heads = pairs, relation_heads
        self.real = 1.0

    def recorder(self, model: nn.Module, side: int) -> Recorder:
        """Return a recorder of the student (side 0) or the teacher (side 1)."""
        layers = [pair[side] for pair in self.pairs] if self.settings.hidden != "none" else []
        return Recorder(model, layers, None if self.settings.attention == "none" else self.pairs[-1][side])

    def claims(self) -> dict:
        """Return the parameters that each term must reach."""
        claims = {term: within(STUDENT, claim) for term, claim in super().claims().items()}
        body = ("model.embed_tokens.", *(f"model.layers.{n}." for n in range(self.pairs[-1][0] + 1)))
        learns = tuple(f"model.layers.{self.pairs[-1][0]}.self_attn.{name}.weight"
                       for name in ATTENTION.get(self.settings.attention, ()))  # fmt: skip
        states = within(STUDENT, lambda name: name.startswith(body))
        return claims | {
            "logits": claims["ce"],
            "hidden": lambda name: name.startswith(f"{PROJECTION}.") or states(name),
            "attention": within(STUDENT, lambda name: name.startswith((*body[:-1], *learns))),
        }

    def before_step(self, models, micro_batches: list[Batch]) -> None:
        """Count the real tokens of the step, over all processes."""
        counts = [sum(float(real_tokens(batch).sum()) for batch in micro_batches)]
        self.real = max(*sum_scalars(counts), 1.0)
        super().before_step(models[STUDENT], micro_batches)

    def forward(self, model, batch: Batch):
        """Run the student; with a divergence, its cross-entropy comes from the same logits, (N, V)."""
        if self.settings.logits == "none":
            return super().forward(model, batch)
        keep = batch["labels"] != IGNORED
        output = super().forward(model, batch) if self.mtp else run(model, batch)
        output.logits = model.logits(output.hidden[keep])
        if output.nll is None:
            nll = F.cross_entropy(wide(output.logits), batch["labels"][keep], reduction="none")
            output.loss_sum, output.nll = nll.sum(), nll.detach()
        return output

    def __call__(self, models, batch: Batch, weight: float):
        """Return one micro-batch's share of the loss of the step."""
        settings, student = self.settings, models[STUDENT]
        with self.recorder(student, 0) as ours:
            output = self.forward(student, batch)
        taught, theirs = self.ask_teacher(batch)
        terms, measures = self.shares(output, batch, weight)
        with torch.autocast(self.machine.device.type, enabled=False):
            losses = {}
            if settings.logits != "none":
                losses["logits"] = self.logits_term(output.logits, taught) / weight
            if settings.hidden != "none":
                states = models[PROJECTION](ours.hidden), theirs.hidden
                losses["hidden"] = hidden_loss(*states, real_tokens(batch), settings.hidden) / self.real
            if settings.attention != "none":
                losses["attention"] = self.attention_term(ours, theirs, real_tokens(batch)) / self.real
        measures["ce"] = terms.pop("ce")
        main = {"ce": settings.ce_weight * measures["ce"]} if settings.ce_weight else {}
        if "own" in batch:  # the student's samples are not the truth, see student_samples.py
            main = {}
            terms.pop("mtp", None)
        scaled = {name: getattr(settings, f"{name}_weight") * loss for name, loss in losses.items()}
        return main | scaled | terms, measures | losses

    @torch.no_grad()
    def ask_teacher(self, batch: Batch) -> tuple[tuple, Recorder | None]:
        """Return what the teacher predicts at each label, and the recorder of its layers. The prediction is
        its logits (N, V) alone, or ids and log-probabilities (N, K) of its likeliest tokens; () if none is
        compared. There is no recorder if the batch holds all that is needed."""
        if self.teacher.training:
            raise UserError("the teacher is in training mode: its dropout and noise would be learned as well")
        settings, keep, taught = self.settings, batch["labels"] != IGNORED, ()
        if "teacher_ids" in batch:
            taught = batch["teacher_ids"][keep], batch["teacher_logprobs"][keep]
            if settings.kinds == ["logits"]:
                return taught, None
        with self.recorder(self.teacher, 1) as theirs:
            hidden = run(self.teacher, batch).hidden if settings.kinds else None
        if settings.logits != "none" and not taught:
            logits = self.teacher.logits(hidden[keep])[:, : self.vocabulary]
            taught = (logits,)
            if settings.top_k:
                taught = top_outcomes(logits, settings.top_k, settings.temperature)
        return taught, theirs

    def logits_term(self, logits, taught: tuple):
        """Return the divergence from the teacher, summed over labels. logits (N, V)."""
        settings = self.settings
        loss = logit_loss if len(taught) == 1 else top_logit_loss
        how = (settings.logits, settings.beta, settings.temperature)
        return loss(logits[:, : self.vocabulary], *taught, *how)

    def attention_term(self, ours: Recorder, theirs: Recorder, real):
        """Return the divergence of maps or relations, summed over real tokens."""
        bias = ours.bias()
        if self.settings.attention == "maps":
            return attention_kl(ours.scores(), theirs.scores(), bias, real)
        return relation_loss(ours.heads, theirs.heads, self.relation_heads, bias, real)


def run(model, batch: Batch):
    """Run a decoder for its hidden states; logits are computed for the last column only."""
    return model(batch["input_ids"], last_only=True, **about(batch))
