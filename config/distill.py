"""Settings of distillation: what a student learns from a teacher, see modules/distillation/."""

from dataclasses import dataclass

from config.checks import option
from utils.errors import UserError


@dataclass
class DistillConfig:
    """Distillation (train/distill_train.py): the kinds can be combined; a student may also learn alone."""

    task: str = option("text", choices=("text", "dialogues"))  # the form of the data
    teacher: str | None = None  # a checkpoint; None: the latest result that fits the task, in --out or out/
    ce_weight: float = option(1.0, at_least=0)  # of the data itself
    # probabilities of the next token (divergence.py)
    logits: str = option("forward", choices=("none", "forward", "reverse", "jsd"))
    logits_weight: float = option(1.0, above=0)
    beta: float = option(0.5, above=0, below=1)  # of jsd
    temperature: float = option(1.0, above=0)
    top_k: int | None = option(None, at_least=1)  # the teacher's most likely tokens and a tail; None: all
    # states after layers, through a projection (hidden.py)
    hidden: str = option("none", choices=("none", "mse", "cosine"))
    hidden_weight: float = option(1.0, above=0)
    layer_map: str = option("uniform", choices=("uniform", "last"))
    layers: list[int] | None = None  # instead of a map: the teacher's layer for each of the student's, from 0
    # attention of the student's last layer and the layer that it meets (relations.py)
    attention: str = option("none", choices=("none", "maps", "relations"))
    attention_weight: float = option(1.0, above=0)
    relation_heads: int | None = option(None, at_least=1)  # None: the most that all heads allow

    # the text (train/engine/teacher_answers.py, student_samples.py, teacher_logits.py), of dialogues only
    answers: str = option("given", choices=("given", "labels", "teacher", "solutions"))
    questions: int = option(4000, at_least=1)  # that the teacher answers
    on_policy: float = option(0.0, at_least=0, at_most=1)  # share of steps on the student's own samples
    answer_temperature: float | None = option(None, at_least=0)  # None: 0 for the teacher, 1 for own samples
    max_new_tokens: int = option(64, at_least=1)  # of an answer that either of them writes
    store_logits: bool = False  # compute the teacher's top_k once, and keep them in the cache

    @property
    def kinds(self) -> list[str]:
        """The kinds that compare a student with its teacher, token by token."""
        return [kind for kind in ("logits", "hidden", "attention") if getattr(self, kind) != "none"]

    def check(self):
        """Require a term that trains the output head."""
        if not self.ce_weight and self.logits == "none":
            raise UserError(
                "distill.ce_weight=0 needs distill.logits: nothing else trains the student's output head"
            )
        for name in ("answers", "on_policy", "store_logits"):
            if self.task == "text" and getattr(self, name) != getattr(DistillConfig, name):
                raise UserError(f"distill.{name} is for dialogues: set distill.task=dialogues")
        if self.on_policy and (self.logits == "none" or self.answer_temperature == 0):
            raise UserError(
                "distill.on_policy compares the two models on samples: set distill.logits to a divergence, "
                "and distill.answer_temperature above 0"
            )
        if self.store_logits and (self.logits == "none" or not self.top_k):
            raise UserError(
                "distill.store_logits keeps the teacher's best tokens: set distill.top_k, and distill.logits "
                "to a divergence"
            )
