"""The dialogues of distillation: whose answers a student learns, and when the teacher scores them."""

from inference.generation.load import Loaded
from load_data.chat.chat_data import ChatData, prepare_chat
from load_data.chat.chat_template import ChatTemplate
from train.engine.fine_tuning import Base
from train.engine.machine import Machine
from train.engine.stage import LoaderSource, Source
from train.engine.student_samples import StudentSamples
from train.engine.teacher_answers import prepare_answers
from train.engine.teacher_logits import store_logits


def prepare_dialogues(student: Base, teacher: Loaded, config, machine: Machine) -> ChatData:
    """Return the dialogues of the data, or questions of its skills with answers of `distill.answers`."""
    if config.distill.answers == "given":
        return machine.read(prepare_chat, config, student.tokenizer)
    template = ChatTemplate(student.tokenizer, config.data.template, 0, config.model.vocab_size)
    return machine.read(prepare_answers, config, template, teacher, machine.device)


def taught_source(
    source: LoaderSource, student: Base, teacher: Loaded, data: ChatData, config, machine: Machine
) -> Source:
    """Return `source` with the teacher's stored logits, and with samples of the student, where set."""
    if config.distill.store_logits:
        folder = store_logits(source, data, teacher, config, machine)
        machine.say(f"the teacher's logits: {folder}")
    if config.distill.on_policy:
        return StudentSamples(source, student.model, data.template, config, machine)
    return source
