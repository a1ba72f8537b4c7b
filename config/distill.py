"""Settings of distillation (train/distill_train.py)."""

from dataclasses import dataclass

from config.checks import option
from utils.errors import UserError

ANSWERS = ("given", "labels", "teacher", "solutions")


@dataclass
class DistillConfig:
    """What a student learns from."""

    top_k: int | None = option(None, at_least=1)
    temperature: float = option(1.0, above=0)
    # the text (train/engine/teacher_answers.py, student_samples.py, teacher_logits.py)
    answers: str = option("given", choices=ANSWERS)
    questions: int = option(4000, at_least=1)  # that the teacher answers; not for `given`
    on_policy: float = option(0.0, at_least=0, at_most=1)  # share of steps on the student's own samples
    answer_temperature: float | None = option(None, at_least=0)  # None: 0 for the teacher, 1 for own samples
    max_new_tokens: int = option(64, at_least=1)  # of an answer that a model writes
    store_logits: bool = False  # compute those of the teacher once, and keep them in --out

    def check(self):
        """Require what the settings need from one another."""
        if self.on_policy and self.answer_temperature == 0:
            raise UserError("distill.on_policy learns from samples: set distill.answer_temperature above 0")
