"""Evaluation against a plain loop: `F.cross_entropy` over the whole held-out text, bits against its UTF-8
bytes."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from config.adapters import PrefixConfig
from config.schema import TokenizerConfig
from load_data.chat.chat_data import encode
from load_data.chat.chat_loader import count_eval_rows, eval_chat_batches
from load_data.chat.chat_template import ChatTemplate
from load_data.tokenization.token_kinds import token_kinds
from load_data.tokenization.tokenizer import CharTokenizer
from load_data.tokenization.train_tokenizer import learn_merges
from model.tinyseek import TinySeek
from modules.experts.balance import max_vio
from modules.adapters.prefix import add_prefix
from tests.inference.tools import byte_tokenizer, tiny_model
from tests.train.tools import machine, small_config
from train.engine import evaluation as evaluation_module
from train.engine.evaluation import Evaluation, text_evaluation
from utils.distributed import World

TEXT = "def größe(x):\n    return x * 2  # 大きさ, \N{ROCKET}\n" * 40
LENGTH = 16


@pytest.fixture(scope="module", params=["char", "bpe"])
def case(request):
    """A tokenizer, held-out tokens that do not fill the last window, and a model with random weights."""
    if request.param == "char":
        tokenizer = CharTokenizer("".join(sorted(set(TEXT))))
    else:
        config = TokenizerConfig(kind="bpe", vocab_size=320)
        tokenizer = learn_merges(config, [TEXT])
    tokens = np.array(tokenizer.encode(TEXT), dtype=np.uint16)[:213]
    config = small_config(f"model.vocab_size={tokenizer.vocab_size}", f"data.sequence_length={LENGTH}")
    torch.manual_seed(3)
    return tokenizer, tokens, TinySeek(config.model).eval()


def plain_loop(model, tokenizer, tokens):
    """Window after window, logits of each, everything added up; bytes counted by decoding what was
    predicted."""
    nats, sure, count, size = 0.0, 0.0, 0, 0
    for start in range(0, len(tokens) - 1, LENGTH):
        row = torch.from_numpy(tokens[start : start + LENGTH + 1].astype(np.int64))
        with torch.no_grad():
            logits = model(row[None, :-1]).logits[0].double()
        nats += F.cross_entropy(logits, row[1:], reduction="sum").item()
        sure += logits.softmax(-1)[torch.arange(len(row) - 1), row[1:]].sum().item()
        count += len(row) - 1
    raw = b"".join(tokenizer.id_to_bytes[token] for token in tokens[1:])
    size = len(raw)
    loss = nats / count
    return {
        "val_loss": loss,
        "val_ppl": math.exp(loss),
        "val_conf": sure / count,
        "val_bpb": nats / math.log(2) / size,
    }


def evaluate(case, max_batches=None, batch_size=3, world=None):
    """Our evaluation of the case."""
    tokenizer, tokens, model = case
    place = machine(world=world or World())
    with torch.no_grad():
        return text_evaluation(tokens, tokenizer, LENGTH, batch_size, place)(model, max_batches)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_all_of_the_text_against_a_plain_loop(case, batch_size):
    expected = plain_loop(case[2], case[0], case[1])
    assert evaluate(case, batch_size=batch_size) == pytest.approx(expected, rel=1e-6)


def test_bytes_are_those_of_the_text(case):
    """A model that knows nothing needs log2(V) bits a token; the bytes are those of the text itself."""
    tokenizer, tokens, model = case
    uniform = TinySeek(model.config)
    torch.nn.init.zeros_(uniform.model.embed_tokens.weight)
    text = tokenizer.decode(tokens[1:])
    tokens_of = len(tokens) - 1
    values = evaluate((tokenizer, tokens, uniform))
    assert "\N{REPLACEMENT CHARACTER}" not in text and len(text.encode()) > len(text)
    assert values["val_bpb"] == pytest.approx(
        tokens_of * math.log2(tokenizer.vocab_size) / len(text.encode())
    )
    assert values["val_ppl"] == pytest.approx(tokenizer.vocab_size) and values["val_conf"] == pytest.approx(
        1 / tokenizer.vocab_size
    )


@pytest.mark.parametrize("max_batches", [None, 1, 2])
def test_two_processes_measure_what_one_does(case, monkeypatch, max_batches):
    """Their sums are added up; here one after the other, in `test_factoring.py` with real processes. With a
    bound, two processes of 2 rows look at the windows of one process of 4."""
    sums = []

    def add(values):
        if len(values) == 4:  # not the exchange of shapes
            sums.append(values)
        return values

    monkeypatch.setattr(evaluation_module, "sum_scalars", add)
    for rank in (0, 1):
        evaluate(case, max_batches, batch_size=2, world=World(rank, 2, rank))
    total = [first + second for first, second in zip(*sums)]
    sums.clear()
    evaluate(case, max_batches, batch_size=4)
    assert total == pytest.approx(sums[0], rel=1e-6)


def test_the_number_of_batches_is_what_a_whole_evaluation_takes(case):
    """From it the engine estimates how long the last evaluation will take."""
    tokenizer, tokens, model = case
    seen = []

    def count(module, given, *rest):
        seen.append(given[0].shape[0])

    handle = model.register_forward_pre_hook(count)
    evaluate(case, batch_size=4)
    handle.remove()
    evaluation = text_evaluation(tokens, tokenizer, LENGTH, 4, machine())
    assert evaluation.batches == len(seen) == 4 and sum(seen) == -(-212 // LENGTH)


# --- dialogues ----------------------------------------------------------------------------------------------

BYTES = byte_tokenizer()
EXPERTS = {"n_routed_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
DIALOGUES = [
    [("user", "one"), ("assistant", "größe ✓")],
    [("user", "2"), ("assistant", "b"), ("user", "again?"), ("assistant", "    x = 1")],
    [("system", "Be short."), ("user", "?"), ("assistant", "!")],
    [("user", "last"), ("assistant", "a longer answer than the others")],
]


def as_samples(template):
    """The dialogues above in ids."""
    dialogues = [[{"role": role, "content": text} for role, text in turns] for turns in DIALOGUES]
    return [encode(template, messages, 65)[0] for messages in dialogues]


def chat_evaluation(samples, packing, batch_size, max_batches=None, tokenizer=BYTES):
    """Our evaluation of dialogues: a function of the model, as the engine calls it, and the object."""
    rows = {"packing": packing, "pad_id": tokenizer.pad_id}

    def held_out(bound):
        return eval_chat_batches(samples, 64, batch_size, bound, **rows)

    count = count_eval_rows(samples, 64, packing)
    evaluation = Evaluation(held_out, count, batch_size, tokenizer, machine())

    def measure(model):
        with torch.no_grad():
            return evaluation(model, max_batches)

    return measure, evaluation


def one_by_one(model, samples, tokenizer=BYTES):
    """Each dialogue alone and unpadded; what its learned tokens lose, their bytes, and who got each token."""
    names, kind_of = token_kinds(tokenizer)
    nats, sure, count, raw = 0.0, 0.0, 0, b""
    experts = getattr(model.config, "n_routed_experts", 0)
    loads = torch.zeros(model.config.num_hidden_layers, len(names), experts)
    for sample in samples:
        ids = torch.from_numpy(sample.ids.astype(np.int64))
        with torch.no_grad():
            output = model(ids[None, :-1])
        logits = output.logits[0].double()
        for place in range(len(ids) - 1):
            if sample.targets[place + 1]:
                target = int(ids[place + 1])
                nats += F.cross_entropy(logits[place], ids[place + 1]).item()
                sure += logits[place].softmax(-1)[target].item()
                count += 1
                raw += tokenizer.id_to_bytes[target]
            for layer, routing in enumerate(output.routings):
                for expert in routing.indices[place].tolist():
                    known = int(ids[place]) < tokenizer.vocab_size
                    kind = kind_of[ids[place]] if known else names.index("other")
                    loads[layer, kind, expert] += 1
    loss = nats / count
    values = {"val_loss": loss, "val_ppl": math.exp(loss), "val_conf": sure / count}
    return values | {"val_bpb": nats / math.log(2) / len(raw)}, loads


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_dialogues_against_one_by_one(packing, batch_size):
    """Packed or padded, in any batches: only learned tokens count, only real ones are traffic."""
    model = tiny_model(**EXPERTS)
    samples = as_samples(ChatTemplate(BYTES))
    expected, loads = one_by_one(model, samples)
    measure, evaluation = chat_evaluation(samples, packing, batch_size)
    values = measure(model)
    assert {name: values[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert torch.equal(evaluation.loads.float(), loads)
    places = sum(len(sample.ids) - 1 for sample in samples)
    assert evaluation.loads.sum(dim=(1, 2)).tolist() == [2 * places] * 2  # two experts for each
    layers = loads.sum(dim=1)
    assert values["val_max_vio"] == pytest.approx(max(max_vio(layer) for layer in layers))
    assert values["val_dead"] == int((layers == 0).sum())
    assert evaluation.batches == -(-(count_eval_rows(samples, 64, packing)) // batch_size)


def test_learned_embeddings_are_ids_beyond_the_vocabulary():
    """Prompt tuning: they are read like other tokens, are no labels, and are of no kind, whatever kind the
    last id of the vocabulary is (here a letter)."""
    letters = sorted({letter for turns in DIALOGUES for _, text in turns for letter in text + "\nz"} - {"✓"})
    tokenizer, model = CharTokenizer("".join(letters), parts=()), tiny_model(**EXPERTS)
    assert token_kinds(tokenizer)[1][-1] != token_kinds(tokenizer)[0].index("other")
    add_prefix(model, PrefixConfig(kind="prompt", length=2))
    with torch.no_grad():
        model.model.embed_tokens.prompt.normal_()
    samples = as_samples(ChatTemplate(tokenizer, "tinyseek", 2, model.config.vocab_size))
    assert max(int(sample.ids.max()) for sample in samples) >= model.config.vocab_size
    expected, loads = one_by_one(model, samples, tokenizer)
    measure, evaluation = chat_evaluation(samples, True, 2, tokenizer=tokenizer)
    values = measure(model)
    assert {name: values[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert torch.equal(evaluation.loads.float(), loads)


def test_a_part_of_the_dialogues():
    """One row of the unpacked four: the first; two: the first and the third."""
    model, samples = tiny_model(), as_samples(ChatTemplate(BYTES))
    for bound, chosen in ((1, samples[:1]), (2, samples[::2])):
        measure, _ = chat_evaluation(samples, False, 1, bound)
        assert measure(model) == pytest.approx(one_by_one(model, chosen)[0], rel=1e-5)
