"""Two real processes in which one goes another way: all of them notice, none waits for ever.

One group of processes for all cases: to start one takes longer than the cases.
"""

from pathlib import Path

import pytest
import torch

from load_data.loader import eval_windows
from tests.inference.tools import byte_tokenizer, tiny_model
from tests.processes import fork
from tests.train.tools import machine, make_trainer, same_bits, small_config, weights_of
from train.engine.evaluation import Evaluation
from utils import checkpoint, distributed
from utils.errors import UserError


def drifting(out, world):
    """T7: the second process scales a gain after every step."""
    trainer = make_trainer(out, small_config(steps=2), world=world)
    whole = trainer.update

    def update(witness):
        norm = whole(witness)
        if world.rank:
            trainer.model.model.norm.weight.data *= 1.01
        return norm

    trainer.update = update
    trainer.run()


def full_disk(out, world):
    """T8: the first process cannot write its checkpoint."""
    save = checkpoint.save_checkpoint

    def refuse(path, data):
        raise UserError(f"could not write {path}: No space left on device")

    checkpoint.save_checkpoint = refuse
    try:
        make_trainer(out, small_config(steps=2), world=world).run()
    finally:
        checkpoint.save_checkpoint = save


def bad_data(out, world):
    """T8: what the first process prepares for the others goes wrong; they do not try."""
    with distributed.rank_zero_first():
        raise UserError("a bad file" if world.is_first else "tried as well")


def locked(out, world):
    """T4, T8: the first process, which holds the lock for all, finds the folder in use."""
    first = make_trainer(out, small_config(steps=2), world=world)
    try:
        make_trainer(out, small_config(steps=2), world=world)
    finally:
        first.checkpoints.close()


def recomputed(out, world):
    """Two steps of two processes, with gradient checkpointing and without."""
    ends = []
    for wanted in (False, True):
        config = small_config(f"train.gradient_checkpointing={wanted}", "model.dropout=0.2", steps=2)
        trainer = make_trainer(out / str(wanted), config, world=world)
        trainer.run()
        ends.append(weights_of(trainer.model))
    if not same_bits(*ends):
        raise UserError("other weights")


def one_row(world):
    """T2: one held-out row and two processes; a model with experts. Returns what was measured."""
    model = tiny_model(n_routed_experts=5, num_experts_per_tok=2, moe_intermediate_size=8)
    tokenizer = byte_tokenizer()
    ids = torch.arange(17).numpy().astype("uint16") % 7
    place = machine(world=world)
    held_out = lambda bound: eval_windows(ids, 16, 2, bound, world.rank, world.size)  # noqa: E731
    evaluation = Evaluation(held_out, 1, 2, tokenizer, place)
    with torch.no_grad():
        values = evaluation(model.eval(), None)
    return {"values": values, "loads": evaluation.loads}


def processes_main(out):
    """What each process runs; a line for each case, and in the end the second process leaves the first."""
    world, lines = distributed.start("cpu"), []
    for case in (drifting, full_disk, bad_data, locked, recomputed):
        try:
            case(Path(out) / case.__name__, world)
            lines.append(f"{case.__name__}: no error")
        except UserError as error:
            lines.append(f"{case.__name__}: {error}")
    torch.save(one_row(world), Path(out) / f"row_{world.rank}.pt")
    (Path(out) / f"lines_{world.rank}.txt").write_text("\n".join(lines), encoding="utf-8")
    if world.rank:
        raise UserError("only I have a bad day")
    distributed.barrier()


@pytest.mark.slow
def test_all_processes_notice_what_happens_to_one(tmp_path):
    done = fork(processes_main, tmp_path, processes=2, grace=30, timeout=60)
    texts = [(tmp_path / f"lines_{rank}.txt").read_text(encoding="utf-8") for rank in (0, 1)]
    first, second = (text.split("\n") for text in texts)
    failed = "another process of this run has failed; its error line says why"
    assert all("weights, which have drifted apart" in lines[0] for lines in (first, second))
    assert "No space left on device" in first[1] and second[1] == f"full_disk: {failed}"
    assert first[2] == "bad_data: a bad file" and second[2] == f"bad_data: {failed}"
    assert "is in use by another run (toy, process" in first[3] and second[3] == f"locked: {failed}"
    assert first[4] == second[4] == "recomputed: no error"
    one, two = (torch.load(tmp_path / f"row_{rank}.pt") for rank in (0, 1))
    assert one["values"] == two["values"] and torch.equal(one["loads"], two["loads"])
    assert one["loads"].sum() == 2 * 2 * 16  # layers, experts of a token, tokens
    alone = one_row(distributed.World())
    assert alone["values"] == pytest.approx(one["values"])
    assert torch.equal(alone["loads"], one["loads"].double())
    assert done.exit_codes == [2, 2] and done.stderr.splitlines() == [  # one line each, no traceback
        "error: only I have a bad day",
        "error: another process of this run has ended; its error line says why",
    ]
