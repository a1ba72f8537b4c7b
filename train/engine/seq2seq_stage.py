"""Shared by the runs of encoder-decoders: their stage, and the score of what they write."""

from collections.abc import Sequence
from functools import partial

from inference.generation.rouge import rouge_l
from load_data.loader import TokenLoader
from load_data.seq2seq import Pair, eval_pairs
from load_data.tokenization.tokenizer import Tokenizer
from model.encoder_decoder import EncoderDecoder
from train.engine.evaluation import Evaluation
from train.engine.machine import Machine
from train.engine.stage import LoaderSource, Stage
from train.engine.token_loss import TokenLoss


def seq2seq_stage(
    name: str, short: str, model: EncoderDecoder, loader: TokenLoader, held_out: Sequence[Pair],
    tokenizer: Tokenizer, config, machine: Machine, **more,
) -> Stage:  # fmt: skip
    """Return a stage that trains all of `model`; `more`: further fields of the stage."""
    size, world = config.train.batch_size, machine.world
    ids = {"pad_id": tokenizer.pad_id, "start_id": config.seq2seq.decoder_start_token_id}
    batches = partial(eval_pairs, held_out, size, rank=world.rank, world_size=world.size, **ids)
    parts = {"embeddings": ("embed_tokens.", "lm_head."), "encoder": "encoder.", "decoder": "decoder."}
    counts = {part: sum(p.numel() for one, p in model.named_parameters() if one.startswith(prefix))
              for part, prefix in parts.items()}  # fmt: skip
    total = sum(p.numel() for p in model.parameters())
    shown = ", ".join(f"{part} {count:,}" for part, count in counts.items())
    machine.say(f"parameters  {total:,} ({shown})")
    return Stage(
        name=name, short=short, model=model, source=LoaderSource(loader), loss=TokenLoss(),
        evaluate=Evaluation(batches, len(held_out), size, tokenizer, machine), tokenizer=tokenizer, **more,
    )  # fmt: skip


def score(answers: list[str], expected: list[str]) -> dict[str, float]:
    """Return the share of answers that are exactly as expected, and their mean ROUGE-L, in percent."""
    pairs = [(answer.strip(), right.strip()) for answer, right in zip(answers, expected, strict=True)]
    exact = sum(answer == right for answer, right in pairs)
    overlap = sum(rouge_l(answer, right) for answer, right in pairs)
    return {"exact": 100 * exact / len(pairs), "rouge_l": 100 * overlap / len(pairs)}
