"""A gate over finished models: it learns to predict from the question alone which of them answers it best.

    python train/gate_train.py                               over the adapters in out/ and their base
    python train/gate_train.py --data a.jsonl b.jsonl --set gate.candidates='["base", "a.pkl", "b.pkl"]'
    python inference/chat.py --gate out/TinySeek_Gate_final.pkl

What makes this stage: its data are mixed dialogues, turn by turn, each with the loss of every candidate
(adapters on one base, whole models, or the word `base`) on its answer; its loss is the cross-entropy between
the gate and the candidate with the lowest loss; it trains the gate alone, a small classifier on the hidden
state of the base at the end of the question; it saves the gate, with hashes of the base and all candidates.
"""

import sys, pathlib; sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # repository root

import utils  # noqa: F401  sets how threads wait; must precede torch
import torch
import torch.nn.functional as F

from inference.generation.selector import BASE, candidate_records, open_candidates
from inference.generation.load import Loaded, load_full
from load_data.chat.chat_data import TRAIN, VAL, Sample, prepare_chat
from load_data.chat.chat_loader import eval_chat_batches
from load_data.loader import IGNORED
from model.adapters import ADAPTERS
from model.selecting import SelectingModel
from modules.adapters.selector import choices
from train.engine.command import chat_command, parse_command
from train.engine.trainer import Trainer
from train.engine.fine_tuning import chat_source, check_same_model
from train.engine.selector_data import ROWS, answer_losses, selector_samples, turns_of
from train.engine.machine import start_machine
from train.engine.stage import Loss, Stage
from utils.checkpoint import final_name, load_checkpoint
from utils.distributed import finish
from utils.errors import UserError, run_main

STAGE, SHORT = "gate_train", "Gate"


def main():
    """Measure the losses of all candidates, then train a classifier."""
    command = parse_command(STAGE, SHORT, __doc__, bases=("SFT", "Pre"))
    config, machine = command.config, start_machine(command.config)
    base = load_full(command.init_path, machine.device)
    check_same_model(config.model, base.config.model)
    config.gate.candidates = config.gate.candidates or adapters_beside(base, command.out)
    if len(config.gate.candidates) < 2:
        raise UserError(f"gate.candidates={config.gate.candidates}: needs at least two candidates")
    candidates = open_candidates(config.gate.candidates, base)
    machine.say(f"base: {base.path}\ncandidates: {', '.join(config.gate.candidates)}")
    data = machine.read(prepare_chat, config, base.tokenizer)
    sides = [turns_of([*data.dialogues(side)], base, config.data.sequence_length) for side in (TRAIN, VAL)]
    tables = [answer_losses(candidates, turns, machine) for turns in sides]  # (turns, A) each
    samples = [selector_samples(base, turns, table) for turns, table in zip(sides, tables, strict=True)]
    del sides  # messages take more memory than ids

    model = SelectingModel(base.model, len(candidates), config.gate.width)
    own = frozenset(name for name in model.state_dict() if name.startswith("selector."))
    records = candidate_records(candidates, base)
    digest = "+".join([data.digest, *(one["digest"] for one in records)])  # candidates decide the labels
    stage = Stage(
        name=STAGE, short=SHORT, model=model, loss=SelectorLoss(),
        source=chat_source(samples[0], base.tokenizer, config, machine),
        evaluate=SelectorEvaluation(samples[1], tables[1], machine),
        tokenizer=base.tokenizer, data_digest=digest, trains=own.__contains__, own=own, keep_best="val_acc",
        base={"digest": base.digest, "path": str(base.path), "candidates": records},
    )  # fmt: skip
    Trainer(stage, config, machine, command.out, command.resume).run()
    report(stage.evaluate, model, config.gate.candidates, machine)
    machine.say(f"\nnext: {chat_command(SHORT, command.out)}")
    finish()


def adapters_beside(base: Loaded, out: pathlib.Path) -> list[str]:
    """Return the base, and all its adapters in `out` or else in its own folder."""
    found = []
    for short in ADAPTERS:
        for folder in dict.fromkeys((out, base.path.parent)):
            path = folder / final_name(short)
            if path.is_file() and (load_checkpoint(path).get("base") or {}).get("digest") == base.digest:
                found.append(str(path))
                break
    if not found:
        raise UserError(
            f"{base.path} has no adapter beside it, so there is nothing to choose from: train one with "
            'python train/lora_train.py, or name candidates with --set gate.candidates=\'["base", "FILE"]\''
        )
    return [BASE, *found]


class SelectorLoss(Loss):
    """Cross-entropy at the last token of each question; its label is the number of the best candidate."""

    def __call__(self, model, batch: dict, weight: float):
        """Return the cross-entropy, and the accuracy for the log."""
        about = {key: batch[key] for key in ("position_ids", "document_ids", "padding_mask")}
        place = batch["labels"] != IGNORED
        logits, best = model(batch["input_ids"], **about)[place], batch["labels"][place]  # (N, A), (N,)
        right = (logits.argmax(dim=1) == best).sum()
        return {"ce": F.cross_entropy(logits, best, reduction="sum") / weight}, {"acc": right / weight}


class SelectorEvaluation:
    """`evaluation(model, max_batches)` -> accuracy and regret of the gate on held-out questions.

    samples: N labelled questions; table (N, A): the loss of each candidate on the answers. Afterwards `found`
    has the comparison of the gate with all candidates.
    """

    def __init__(self, samples: list[Sample], table: torch.Tensor, machine):
        self.samples, self.table, self.machine = samples, table, machine
        self.batches = -(-len(samples) // ROWS)  # in every process

    def __call__(self, model, max_batches: int | None) -> dict[str, float]:
        """Run the first `max_batches` batches of `ROWS` questions, or all, in every process."""
        samples, parts = self.samples[: ROWS * (max_batches or self.batches)], []
        longest = max(len(sample.ids) for sample in samples)
        for batch in eval_chat_batches(samples, longest, ROWS, packing=False, pad_id=0):
            logits = model(batch["input_ids"].to(self.machine.device)).cpu().double()  # (B, T, A)
            parts.append(logits[batch["labels"] != IGNORED])
        logits, table = torch.cat(parts), self.table[: len(samples)]  # (N, A) each
        self.found = choices(table, logits)
        loss = F.cross_entropy(logits, table.argmin(dim=1)).item()
        return {"val_loss": loss, "val_acc": self.found["accuracy"], "val_regret": self.found["regret"]}


def report(evaluation: SelectorEvaluation, model, names: list[str], machine) -> None:
    """Print nats per answer token: of each candidate, of the gate, and of the best choice for each turn."""
    model.eval()
    with torch.no_grad(), machine.autocast():
        evaluation(model, None)
    found = evaluation.found
    losses = [*found["alone"], found["selector"], found["best"]]
    machine.say("nats per token of held-out answers:")
    for name, loss in zip([*names, "the gate", "best choice"], losses, strict=True):
        machine.say(f"  {loss:.4f}  {name}")
    share, regret, turns = found["accuracy"], found["regret"], len(evaluation.table)
    machine.say(f"the gate is right on {share:.1%} of {turns} turns and loses {regret:.4f} nats")


if __name__ == "__main__":
    run_main(main)
