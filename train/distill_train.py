"""Distillation: a small student learns from a large teacher, and from the data.

    python train/distill_train.py                  the pre-trained model in out/ teaches one of half its size
    python train/distill_train.py --config skills --init out/TinySeek_Distill_final.pkl
    python train/distill_train.py --set distill.teacher=big.pkl --set distill.hidden=mse --out out/student

What makes this stage: its data are those of train/pre_train.py, or with `distill.task=dialogues` those of
train/sft_train.py; its loss compares the student with a frozen teacher, in the probabilities of the next
token, in hidden states and in attention, beside the cross-entropy (train/engine/distill_loss.py); all
parameters of the student are trainable, and those of a projection to the teacher's width; it saves the
student alone. Without `--init` the student is new and takes the teacher's tokenizer. Either model may be
dense or have experts. In dialogues, the answers may be the teacher's (`distill.answers`) or samples of the
student (`distill.on_policy`).
"""

import sys, pathlib; sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # repository root

import utils  # noqa: F401  sets how threads wait; must precede torch
from load_data.chat.chat_data import chosen_skills
from load_data.packing import prepare_pretraining
from train.engine.command import chat_command, parse_command
from train.engine.distill_dialogues import prepare_dialogues, taught_source
from train.engine.distill_stage import lent_sections, open_student, open_teacher, with_teacher
from train.engine.fine_tuning import dialogue_stage, train_and_score
from train.engine.machine import start_machine
from train.engine.text_stage import text_stage
from train.engine.trainer import Trainer
from utils.distributed import finish
from utils.errors import UserError, run_main

STAGE, SHORT = "distill_train", "Distill"


def main():
    """Train a student beside its teacher, on text or on dialogues."""
    command = parse_command(STAGE, SHORT, __doc__, lent=lent_sections)
    config, machine = command.config, start_machine(command.config)
    if config.distill.task == "text" and chosen_skills(config.data.paths):
        raise UserError(f"--data {' '.join(config.data.paths)}: dialogues; set distill.task=dialogues too")
    teacher = open_teacher(command, machine)
    student = open_student(command, teacher, machine)
    if config.distill.task == "text":
        data = machine.read(prepare_pretraining, config, student.tokenizer)
        machine.say("\n".join(data.summary))
        stage = text_stage(STAGE, SHORT, student.model, data, config, machine)
        stage = with_teacher(stage, teacher, config, machine)
        Trainer(stage, config, machine, command.out, command.resume).run()
    else:
        data = prepare_dialogues(student, teacher, config, machine)
        stage = dialogue_stage(STAGE, SHORT, student, data, config, machine)
        stage = with_teacher(stage, teacher, config, machine)
        stage.source = taught_source(stage.source, student, teacher, data, config, machine)
        train_and_score(stage, data, command, machine)
    machine.say(f"\nnext: {chat_command(SHORT, command.out)}")
    finish()


if __name__ == "__main__":
    run_main(main)
