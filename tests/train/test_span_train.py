"""Training of an encoder-decoder: its loss against the obvious one, divisions, two processes, resuming, and
the command from its flags to its answers."""

import importlib
import os
import sys

import pytest
import torch
import torch.nn.functional as F

from config.load import load_config, preset_names, to_dict
from config.objectives import SpanConfig
from inference.generation.sampling import SamplingParams
from inference.import_hf import import_model
from inference.seq2seq import written
from load_data.seq2seq import Seq2SeqLoader, collate, framed_pair
from load_data.spans import SpanLoader, SpanPairs
from load_data.tokenization.tokenizer import SENTINELS
from model.encoder_decoder import EncoderDecoder
from tests.inference.hf.others import write_other_tokenizer
from tests.inference.tools import write_checkpoint
from tests.processes import both_ways
from tests.train.tools import TOKENIZER as LETTERS
from tests.train.tools import largest_difference, machine, same_bits, weights_of, without_timing
from train.engine.seq2seq_stage import score, seq2seq_stage
from train.engine.token_loss import TokenLoss
from train.engine.trainer import Trainer
from utils import distributed
from utils.checkpoint import load_checkpoint
from utils.distributed import World
from utils.errors import UserError
from utils.log import read_log

TOKENIZER = LETTERS.with_special(SENTINELS)
SHAPE = ["hidden_size=16", "num_hidden_layers=1", "num_decoder_layers=2", "num_attention_heads=2",
         "head_dim=8", "intermediate_size=24", "initializer_range=0.2"]  # fmt: skip
PLAIN = ["optim.optimizer=adamw", "optim.lr=0.01", "optim.warmup_steps=0", "optim.schedule=cosine",
         "optim.eps=0.001", "train.dtype=fp32", "train.device=cpu", "train.log_every=1"]  # fmt: skip


def small_config(*settings, steps=4):
    """A tiny model over letters; `eps` as in other tests: Adam divides rounding by its size."""
    fixed = [*(f"seq2seq.{one}" for one in SHAPE), *PLAIN, f"train.max_steps={steps}"]
    config = load_config(None, [*fixed, "train.max_seconds=null", *settings], stage="span_train")
    config.seq2seq.vocab_size = TOKENIZER.vocab_size
    return config


def small_model(config):
    """The same weights every time."""
    torch.manual_seed(1)
    return EncoderDecoder(config.seq2seq)


def some_pairs(count=24):
    """Words and the same words backwards: sources and targets of 2 to 11 ids."""
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(8, 34, (1 + n % 10,), generator=generator).tolist() for n in range(count)]
    return [framed_pair(TOKENIZER, row, row[::-1]) for row in rows]


def make_trainer(out, config, world=None, resume=False, spans=False):
    """The stage of the script, on these pairs or on windows with spans taken out."""
    train, world, pairs = config.train, world or World(), some_pairs()
    steps = (train.batch_size, train.accumulation_steps, world.rank, world.size, train.seed)
    loader = Seq2SeqLoader(pairs[4:], *steps, pad_id=TOKENIZER.pad_id, start_id=0)
    if spans:
        letters = torch.randint(8, 34, (200,), generator=torch.Generator().manual_seed(4)).numpy()
        loader = SpanLoader(SpanPairs(letters, 20, SpanConfig(), TOKENIZER), *steps, start_id=0)
    here = machine(world=world)
    stage = seq2seq_stage("toy", "Toy", small_model(config), loader, pairs[:4], TOKENIZER, config, here,
                          data_digest="digest")  # fmt: skip
    return Trainer(stage, config, here, out, resume)


def obvious_loss(model, pairs):
    """Every target token by itself, in fp64, without a batch and so without padding: (sum, count)."""
    total = count = 0
    for source, target in pairs:
        written = [0]  # the decoder's start, and then what it should have written
        for wanted in target:
            logits = model(torch.tensor([source]), decoder_input_ids=torch.tensor([written])).logits[0, -1]
            total = total + F.cross_entropy(logits, torch.tensor(wanted))
            count, written = count + 1, [*written, wanted]
    return total, count


def test_the_loss_is_that_of_every_token_by_itself():
    """A label at padding, an input that is not shifted, a padding that is seen: each changes the number."""
    model = small_model(small_config()).double()
    pairs = some_pairs()[:7]
    total, count = obvious_loss(model, pairs)
    batch = collate(pairs, TOKENIZER.pad_id, 0)
    assert (batch["labels"] != -100).sum() == count and not batch["padding_mask"].all()
    terms, measures = TokenLoss()(model, batch, count)
    torch.testing.assert_close(terms["ce"], total / count, rtol=1e-12, atol=0)
    expected = torch.autograd.grad(total / count, [*model.parameters()])
    found = torch.autograd.grad(terms["ce"], [*model.parameters()])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert 0 < measures["conf"] < 1


def test_a_target_depends_on_its_source():
    """Without it the loss would fall as well, as that of a language model."""
    model = small_model(small_config()).double()
    batch = collate(some_pairs()[:6], TOKENIZER.pad_id, 0)
    other = batch | {key: batch[key].roll(1, 0) for key in ("input_ids", "padding_mask")}
    losses = [TokenLoss()(model, one, 1.0)[0]["ce"].item() for one in (batch, other)]
    assert abs(losses[0] - losses[1]) > 1e-3


@pytest.mark.parametrize("division", [(2, 4), (1, 8)])
def test_micro_batches_equal_one_batch(tmp_path, division):
    """Targets differ in length, so a mean of means would be another number."""
    size, accumulation = division
    whole = make_trainer(tmp_path / "a", small_config("train.batch_size=8"))
    parts = [f"train.batch_size={size}", f"train.accumulation_steps={accumulation}"]
    divided = make_trainer(tmp_path / "b", small_config(*parts))
    whole.run(), divided.run()
    assert largest_difference(weights_of(whole.model), weights_of(divided.model)) < 1e-5


def train_in(out):
    """One of several processes, or the only one: two epochs of windows."""
    world = distributed.start() if "RANK" in os.environ else World()
    run = make_trainer(out, small_config(f"train.batch_size={4 // world.size}"), world, spans=True)
    found = run.run()
    if world.is_first:
        torch.save({"weights": weights_of(run.model), "found": found}, out / "seen.pt")


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    one, two = both_ways(train_in, tmp_path)
    assert largest_difference(one["weights"], two["weights"]) < 1e-5
    assert two["found"] == pytest.approx(one["found"], rel=1e-4)
    assert largest_difference(one["weights"], weights_of(small_model(small_config()))) > 1e-3


def test_a_run_that_was_killed_resumes_exactly(tmp_path):
    """Killed in step 4, a checkpoint after step 2: the same spans are taken out again, over two epochs."""
    config = small_config("train.batch_size=4", "train.save_every=2", steps=5)
    whole = make_trainer(tmp_path / "a", config, spans=True)
    whole.run()
    killed, taken = make_trainer(tmp_path / "b", config, spans=True), []

    def after_step(factor):
        taken.append(factor)
        if len(taken) == 4:
            raise KeyboardInterrupt
        return {}

    killed.stage.loss.after_step = after_step
    with pytest.raises(KeyboardInterrupt):
        killed.run()
    rest = make_trainer(tmp_path / "b", config, resume=True, spans=True)
    assert rest.step == 2
    rest.run()
    assert same_bits(weights_of(whole.model), weights_of(rest.model)) and rest.stage.source.epoch >= 1
    logs = [without_timing(read_log(tmp_path / name / "toy" / "log.txt")) for name in "ab"]
    assert logs[0] == logs[1] and len(logs[0]) > 5


def test_a_task_is_learned_and_written():
    """Four words backwards, by heart: greedy answers are the targets, for a batch of different lengths.

    An input that is not shifted would show each label to the decoder: the loss would fall, and no answer
    would be right."""
    pairs, config = some_pairs()[2:6], small_config("seq2seq.hidden_size=32")
    model = small_model(config)
    optimizer, batch = torch.optim.Adam(model.parameters(), lr=0.01), collate(pairs, TOKENIZER.pad_id, 0)
    for _ in range(150):
        loss = TokenLoss()(model, batch, float((batch["labels"] != -100).sum()))[0]["ce"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    sources = [pair.source for pair in pairs]
    answers = written(model, TOKENIZER, sources, SamplingParams(temperature=0, max_new_tokens=20))
    assert answers == [pair.target[:-1] for pair in pairs]


def test_scores():
    found = score([" ['milk'] ", "a b"], ["['milk']", "b"])
    assert found == pytest.approx({"exact": 50.0, "rouge_l": 250 / 3})


# --- the command ------------------------------------------------------------------------------------------

pytestmark = pytest.mark.usefixtures("part_of_the_library")


def command(out, *words, steps=4):
    """The words of a run of the script on letters as tokens."""
    small = [*(f"seq2seq.{one}" for one in SHAPE), *PLAIN, "tokenizer.kind=char", "data.skill_samples=40",
             "train.batch_size=2", "data.worked_examples=20", f"data.cache_dir={out.parent / 'cache'}",
             "train.eval_batches=2", "span.target_length=100"]  # fmt: skip
    sets = [part for setting in small for part in ("--set", setting)]
    return ["--out", str(out), "--max-steps", str(steps), *sets, *map(str, words)]


def run(monkeypatch, *words):
    """Run the script, and return the checkpoint that it leaves."""
    monkeypatch.setattr(sys, "argv", ["span_train", *words])
    importlib.import_module("train.span_train").main()
    return load_checkpoint(f"{words[1]}/TinySeek_Span_final.pkl")


@pytest.mark.slow
@pytest.mark.parametrize("name", preset_names("span_train"))
def test_a_preset_is_built_and_stepped(name, tmp_path, monkeypatch, capsys):
    """As it is, but for two short steps on few characters. The run says itself that every weight moved."""
    monkeypatch.setattr("load_data.task_pairs.SCORED", 2)
    small = ["tokenizer.kind=char", "data.skill_samples=20", "data.worked_examples=20", "train.batch_size=1",
             "train.eval_batches=1", "train.dtype=fp32", f"data.cache_dir={tmp_path / 'cache'}"]  # fmt: skip
    sets = [part for setting in small for part in ("--set", setting)]
    words = ["--out", str(tmp_path / "out"), "--config", name, "--max-steps", "2", "--limit", "8"]
    found = run(monkeypatch, *words, *sets)
    preset = to_dict(load_config(name, stage="span_train"))
    assert found["config"]["span"] == preset["span"] and found["config"]["optim"] == preset["optim"]
    assert found["step"] == 2 and "weights proven" in capsys.readouterr().out


def test_a_run_on_spans_is_resumed_with_more_steps(tmp_path, monkeypatch, capsys):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {n} of some text that repeats\n" for n in range(400)), encoding="utf-8")
    words = ["--data", text, "--set", "data.sequence_length=40"]
    first = run(monkeypatch, *command(tmp_path / "a", *words, steps=2))
    more = run(monkeypatch, *command(tmp_path / "a", *words, "--resume", steps=3))
    assert (first["step"], more["step"], more["short"]) == (2, 3, "Span")
    assert first["tokenizer"] == more["tokenizer"] and SENTINELS[31] in more["tokenizer"]
    assert capsys.readouterr().out.count("--- written ---") == 6


def test_lists_from_spans_and_their_score(tmp_path, monkeypatch, capsys):
    text = tmp_path / "text.txt"
    text.write_text("Please buy milk and eggs. 我要买苹果和牛奶。\n" * 200, encoding="utf-8")
    spans = run(monkeypatch, *command(tmp_path / "a", "--data", text, "--set", "data.sequence_length=40"))
    monkeypatch.setattr("load_data.task_pairs.SCORED", 5)
    words = ["--config", "lists", "--init", tmp_path / "a" / "TinySeek_Span_final.pkl"]
    task = run(monkeypatch, *command(tmp_path / "b", *words))
    assert task["tokenizer"] == spans["tokenizer"] and not same_bits(task["weights"], spans["weights"])
    said = capsys.readouterr().out
    assert "5 held-out sources, in percent: exact=0.00  rouge_l=" in said and "train: 40 pairs" in said
    final = tmp_path / "b" / "TinySeek_Span_final.pkl"
    say = f'next: python inference/seq2seq.py --checkpoint {final} --prompt "Please buy milk and eggs."'
    assert said.splitlines()[-1] == say
    scores = (tmp_path / "b" / "span_train" / "scores.txt").read_text(encoding="utf-8")
    assert scores.startswith("exact=0.00")


@pytest.mark.slow
def test_an_imported_t5_goes_on_with_spans_and_lists(tmp_path, monkeypatch, capsys):
    """Its own sentinels, its end of text, its start token; the settings are the imported ones."""
    from transformers import T5Config, T5ForConditionalGeneration

    shape = {"vocab_size": 120, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    torch.manual_seed(0)
    theirs = T5ForConditionalGeneration(T5Config(**shape, feed_forward_proj="gated-gelu", pad_token_id=0,
                                                 decoder_start_token_id=0))  # fmt: skip
    theirs.save_pretrained(tmp_path / "hf")
    write_other_tokenizer(tmp_path / "hf", "t5")
    import_model(tmp_path / "hf", tmp_path / "t5", overwrite=False)
    base = load_checkpoint(tmp_path / "t5" / "TinySeek_Span_final.pkl")
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox\n" * 400, encoding="utf-8")
    small = [*PLAIN, "train.batch_size=2", "data.sequence_length=40", f"data.cache_dir={tmp_path / 'cache'}",
             "train.eval_batches=1", "span.target_length=100", "data.skill_samples=20",
             "optim.lr=0.0005"]  # fmt: skip
    sets = [part for setting in small for part in ("--set", setting)]
    monkeypatch.setattr("load_data.task_pairs.SCORED", 2)
    for name, words in (("a", ["--data", str(text)]), ("b", ["--data", str(text), "--config", "lists"])):
        init = ["--init", str(tmp_path / "t5" / "TinySeek_Span_final.pkl"), "--max-steps", "2"]
        found = run(monkeypatch, "--out", str(tmp_path / name), *init, *sets, *words)
        assert found["config"]["seq2seq"] == base["config"]["seq2seq"] and found["step"] == 2
        # Two steps of Adam move no weight by more than 2 x 20 x 0.0005, and decay by a little.
        assert 0 < largest_difference(found["weights"], base["weights"]) < 0.03
    said = capsys.readouterr().out
    assert "<extra_id_0>" in said and "</s>" in said and "percent: exact=0.00" in said


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--init", "PRE"], "section model, and this stage trains one of section seq2seq"),
        (["--set", "span.task=sums"], "span.task='sums' must be one of spans, docstrings, lists"),
        (["--set", "data.sequence_length=210"], "gives 35 spans, and the tokenizer has sentinels for 31"),
        (["--set", "data.sequence_length=2"], "data.sequence_length=2 must be at least 3"),
        (["--set", "seq2seq.decoder_start_token_id=900"], "decoder_start_token_id=900 must be below"),
        (["--set", "seq2seq.vocab_size=20"], "seq2seq.vocab_size=20 is less than"),
        (["--config", "lists", "--set", "span.target_length=2"], "span.task=lists has no train pair"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(tmp_path, monkeypatch, words, error):
    text = tmp_path / "text.txt"
    text.write_text("some text that repeats\n" * 2000, encoding="utf-8")
    words = [str(write_checkpoint(tmp_path / "pre.pkl")) if word == "PRE" else word for word in words]
    with pytest.raises(UserError, match=error):
        run(monkeypatch, *command(tmp_path / "out", "--data", text, *words))
    assert not (tmp_path / "out").exists()
