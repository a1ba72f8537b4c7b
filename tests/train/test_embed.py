"""Training of embeddings: the loss of a step however it is divided, two processes, resuming, the evaluation,
and the command."""

import importlib
import json
import os
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from config.load import load_config, preset_names, to_dict
from inference.generation.load import load_embedder
from load_data.embed_data import EncodedPairs, Texts
from load_data.embed_loader import EmbedLoader, eval_pairs
from model.embedder import Embedder
from tests.inference.tools import run_config, tiny_model, write_checkpoint
from tests.processes import both_ways
from tests.train.tools import TOKENIZER, largest_difference, machine, same_bits, weights_of, without_timing
from train.embed_train import STAGE
from train.engine.command import inherited_sections
from train.engine.contrastive_loss import ContrastiveLoss, EmbedSource, vectors_of
from train.engine.retrieval import RetrievalEvaluation, measures, ranks_of
from train.engine.stage import Stage
from train.engine.trainer import Trainer
from utils import distributed
from utils.checkpoint import load_checkpoint
from utils.distributed import World
from utils.errors import UserError
from utils.log import read_log

SHAPE = ["hidden_size=16", "num_hidden_layers=1", "num_attention_heads=2", "intermediate_size=24",
         "vocab_size=64", "initializer_range=0.2"]  # fmt: skip
PLAIN = ["optim.optimizer=adamw", "optim.lr=0.01", "optim.warmup_steps=0", "optim.schedule=cosine",
         "optim.eps=0.001", "train.dtype=fp32", "train.device=cpu", "train.log_every=1",
         "embed.temperature=0.2"]  # fmt: skip


def small_config(*settings, steps=4):
    """A tiny encoder; `eps` because Adam divides rounding by its size."""
    fixed = [*(f"encoder.{one}" for one in SHAPE), *PLAIN, f"train.max_steps={steps}"]
    return load_config(None, [*fixed, "train.max_seconds=null", *settings], stage="embed_train")


def small_model(config):
    """The same weights every time."""
    torch.manual_seed(1)
    return Embedder.from_config(config.embed, config.encoder)


def some_pairs(count=20, seed=3):
    """Texts of 1 to 9 ids; every third query has two wrong documents, and some texts occur twice."""
    rng = np.random.default_rng(seed)
    text = lambda: rng.integers(8, 60, rng.integers(1, 10)).tolist()  # noqa: E731
    queries, documents, first = [], [], [0]
    for number in range(count):
        queries.append(text() if number % 7 else [9, 9])
        documents += [text() if number % 5 else [11, 12, 13]] + [text() for _ in range(2 * (number % 3 == 0))]
        first.append(len(documents))
    return EncodedPairs(Texts(queries), Texts(documents), np.array(first))


def loader_of(config, world=None):
    train, world = config.train, world or World()
    return EmbedLoader(some_pairs(), train.batch_size, train.accumulation_steps, world.rank, world.size,
                       train.seed, pad_id=3)  # fmt: skip


def make_trainer(out, config, world=None, resume=False):
    """The stage of the script on these pairs."""
    here = machine(world=world or World())
    loss = ContrastiveLoss(config.embed, here)

    def held_out(most):
        return eval_pairs(some_pairs(9, seed=4), 3, most, here.world.rank, here.world.size, 3)

    stage = Stage(
        name="toy", short="Toy", model=small_model(config), source=EmbedSource(loader_of(config, world)),
        loss=loss, evaluate=RetrievalEvaluation(held_out, 9, 3, loss, here), tokenizer=TOKENIZER,
        data_digest="digest",
    )  # fmt: skip
    return Trainer(stage, config, here, out, resume)


def obvious_loss(model, indices, temperature):
    """The mean loss of these pairs as one batch: every text by itself, and one query at a time."""
    queries, documents, first = some_pairs()
    one = lambda ids: model(torch.from_numpy(ids.astype(np.int64))[None])[0]  # noqa: E731
    asked = [(queries[i].tolist(), one(queries[i])) for i in indices]
    right = [(documents[first[i]].tolist(), one(documents[first[i]])) for i in indices]
    wrong = [n for i in indices for n in range(first[i] + 1, first[i + 1])]
    wrong = [(documents[n].tolist(), one(documents[n])) for n in wrong]
    score = lambda a, b: (a[1] @ b[1] / temperature).exp()  # noqa: E731
    total = 0
    for query, own in zip(asked, right):
        rivals = [other for asker, other in zip(asked, right) if asker[0] != query[0]] + wrong
        askers = [asker for asker, other in zip(asked, right) if other[0] != own[0] and asker[0] != query[0]]
        best = score(query, own)
        to_documents = best + sum(score(query, other) for other in rivals if other[0] != own[0])
        to_queries = best + sum(score(asker, own) for asker in askers)
        total = total - (best / to_documents).log() / 2 - (best / to_queries).log() / 2
    return total / len(indices)


def gradients(config, double=True):
    """The loss and the gradients of the first step, as the trainer computes them."""
    model, loss = small_model(config), ContrastiveLoss(config.embed, machine())
    model = model.double() if double else model
    step = EmbedSource(loader_of(config)).next_step()
    torch.manual_seed(5)
    loss.before_step(model, step.micro_batches)
    total = 0
    for batch in step.micro_batches:
        term = loss(model, batch, step.weight)[0]["nce"]
        term.backward()
        total += term.item()
    return total, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("division", [(12, 1), (4, 3), (1, 12)])
@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_a_step_is_one_batch_however_it_is_divided(division, temperature):
    """Value and every gradient in fp64. Here a temperature that does not reach the loss, a copy of the right
    document among the negatives, and negatives of the own micro-batch alone would each show."""
    size, accumulation = division
    config = small_config(f"train.batch_size={size}", f"train.accumulation_steps={accumulation}",
                          f"embed.temperature={temperature}")  # fmt: skip
    total, found = gradients(config)
    model = small_model(config).double()
    loss = obvious_loss(model, loader_of(config).take(12), temperature)
    loss.backward()
    assert total == pytest.approx(loss.item(), rel=1e-9)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-7, atol=1e-9, msg=name)


def test_both_passes_draw_the_same_dropout():
    """Otherwise the gradients would be those of other vectors than the ones they are multiplied with."""
    config = small_config("encoder.dropout=0.3", "train.batch_size=4", "train.accumulation_steps=3",
                          "embed.matryoshka=[4]")  # fmt: skip
    _, found = gradients(config)
    model, loss = small_model(config).double(), ContrastiveLoss(config.embed, machine())
    step = EmbedSource(loader_of(config)).next_step()
    torch.manual_seed(5)
    (loss.losses([vectors_of(model, batch) for batch in step.micro_batches]).sum() / step.weight).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-9, atol=1e-12)


def train_in(out):
    """One of several processes, or the only one: 12 pairs a step, two epochs."""
    world = distributed.start() if "RANK" in os.environ else World()
    settings = {2: ("train.batch_size=3", "train.accumulation_steps=2"), 1: ("train.batch_size=12",)}
    run = make_trainer(out, small_config(*settings[world.size]), world)
    found = run.run()
    if world.is_first:
        torch.save({"weights": weights_of(run.model), "found": found}, out / "seen.pt")


def test_two_processes_equal_one(tmp_path):
    """The negatives of a query cross processes and micro-batches."""
    one, two = both_ways(train_in, tmp_path)
    assert largest_difference(one["weights"], two["weights"]) < 1e-5
    assert two["found"] == pytest.approx(one["found"], rel=1e-4)
    assert largest_difference(one["weights"], weights_of(small_model(small_config()))) > 1e-3
    logs = [read_log(tmp_path / name / "toy" / "log.txt") for name in "ab"]
    for a, b in zip(*([row for row in log if "loss" in row] for log in logs), strict=True):
        assert [b[key] for key in ("loss", "cos", "tokens")] == pytest.approx(
            [a[key] for key in ("loss", "cos", "tokens")], rel=1e-4)  # fmt: skip


def test_a_run_that_was_killed_resumes_exactly(tmp_path):
    """Killed in step 4, a checkpoint after step 2, with dropout, over two epochs."""
    config = small_config("train.batch_size=4", "train.accumulation_steps=2", "train.save_every=2",
                          "encoder.dropout=0.2", steps=5)  # fmt: skip
    whole = make_trainer(tmp_path / "a", config)
    whole.run()
    killed, taken = make_trainer(tmp_path / "b", config), []

    def after_step(factor):
        taken.append(factor)
        if len(taken) == 4:
            raise KeyboardInterrupt
        return {}

    killed.stage.loss.after_step = after_step
    with pytest.raises(KeyboardInterrupt):
        killed.run()
    rest = make_trainer(tmp_path / "b", config, resume=True)
    assert rest.step == 2
    rest.run()
    assert same_bits(weights_of(whole.model), weights_of(rest.model)) and rest.stage.source.epoch >= 1
    logs = [without_timing(read_log(tmp_path / name / "toy" / "log.txt")) for name in "ab"]
    assert logs[0] == logs[1] and len(logs[0]) > 5


def test_ranks_count_half_of_the_equals():
    scores = torch.tensor([[3.0, 1, 2, 0], [9, 4, 4, 4], [1, 1, 1, 1], [5, 6, 7, 4]])
    assert ranks_of(scores).tolist() == [1, 3, 2.5, 4]
    found = measures(scores)
    assert found == pytest.approx({"mrr": (1 + 1 / 3 + 0.4 + 0.25) / 4, "recall1": 0.25, "recall10": 1})
    assert measures(torch.zeros(30, 30)) == pytest.approx({"mrr": 1 / 15.5, "recall1": 0, "recall10": 0})


def test_the_evaluation_scores_every_query_against_every_document(tmp_path):
    """Wrong documents too; against vectors made one by one. With a bound it measures fewer pairs."""
    run = make_trainer(tmp_path, small_config())
    run.model.eval()
    queries, documents, first = some_pairs(9, seed=4)
    with torch.no_grad():
        found = run.stage.evaluate(run.model, None)
        asked, told = ([run.model(torch.from_numpy(ids.astype(np.int64))[None])[0] for ids in texts]
                       for texts in (queries, documents))  # fmt: skip
        part = run.stage.evaluate(run.model, 1)
    ranks = []
    for number, query in enumerate(asked):
        scores = [F.cosine_similarity(query, document, dim=0).item() for document in told]
        own = scores[first[number]]
        copies = documents.keys == documents.keys[first[number]]  # rounding decides between equal texts
        higher = sum(one > own for one, copy in zip(scores, copies) if not copy)
        ranks.append(1 + higher + (copies.sum() - 1) / 2)
    assert found["val_mrr"] == pytest.approx(sum(1 / rank for rank in ranks) / len(ranks), abs=1e-6)
    assert found["val_recall10"] == sum(rank <= 10 for rank in ranks) / len(ranks)
    assert run.stage.evaluate.batches == 3 and part["val_loss"] < found["val_loss"]


# --- the command ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A file of questions about numbers, some with wrong answers."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number in range(60):
            record = {"query": f"question number {number}", "positive": f"the answer is {number}"}
            record |= {"negatives": [f"the answer is not {number}"]} if number % 2 else {}
            file.write(json.dumps(record) + "\n")
    return path


SMALL = [*(f"encoder.{one}" for one in SHAPE if "vocab" not in one), *PLAIN, "train.batch_size=8"]


def run(monkeypatch, pairs, out, *words, steps=3, small=SMALL):
    """Run the script, and return the checkpoint that it leaves."""
    small = [*small, "tokenizer.kind=char", "data.val_fraction=0.3", "train.dtype=fp32", "train.device=cpu",
             f"data.cache_dir={out.parent / 'cache'}"]  # fmt: skip
    sets = [part for setting in small for part in ("--set", setting)]
    words = ["embed_train", "--data", str(pairs), "--out", str(out), "--max-steps", str(steps), *sets, *words]
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    importlib.import_module("train.embed_train").main()
    return load_checkpoint(out / "TinySeek_Embed_final.pkl")


def test_a_run_from_nothing_is_resumed_and_continued(pairs, tmp_path, monkeypatch, capsys):
    """An encoder from nothing, more steps, and a run from its weights, which keeps how texts are read."""
    words = ["--set", "embed.words=false", "--set", "embed.pooling=attention"]
    first = run(monkeypatch, pairs, tmp_path / "a", *words, steps=2)
    more = run(monkeypatch, pairs, tmp_path / "a", *words, "--resume", steps=4)
    assert (first["step"], more["step"], more["short"]) == (2, 4, "Embed")
    said = capsys.readouterr().out
    assert "held-out queries, " in said and "weights proven" in said and "nce trains" in said
    path = tmp_path / "a" / "TinySeek_Embed_final.pkl"
    model, tokenizer, config = load_embedder(path)
    assert not config.embed.words and same_bits(model.state_dict(), more["weights"])
    search = f'next: python inference/search.py --model {path} "how are checkpoints written" train/engine'
    assert said.splitlines()[-1] == search
    later = run(monkeypatch, pairs, tmp_path / "b", "--init", path, "--set", "optim.lr=1e-4", steps=1)
    assert later["tokenizer"] == more["tokenizer"] and later["config"]["embed"] == more["config"]["embed"]
    assert largest_difference(later["weights"], more["weights"]) < 2e-4  # a step of Adam


@pytest.mark.parametrize("name", preset_names("embed_train"))
def test_a_preset_is_built_and_stepped(name, pairs, tmp_path, monkeypatch):
    """As it is, apart from the tokenizer and the base of the decoder."""
    base = tiny_model(seed=5, max_position_embeddings=256)
    path = write_checkpoint(tmp_path / "base.pkl", "Pre", weights=base.state_dict(), config=run_config(base))
    words = ["--config", name, *(["--init", path] if name == "decoder" else [])]
    saved = run(monkeypatch, pairs, tmp_path / "a", *words, steps=1, small=["train.batch_size=8"])
    preset = to_dict(load_config(name, stage="embed_train"))
    changed = {"base": "decoder"} if name == "decoder" else {}
    assert saved["config"]["embed"] == preset["embed"] | changed
    assert saved["config"]["optim"] == preset["optim"] and saved["step"] == 1


def test_an_encoder_with_idle_biases_is_trained(pairs, tmp_path, monkeypatch):
    """BERT's recipe, also of MiniLM: nothing rotates the keys, so their biases change nothing, and the proof
    of training would refuse them."""
    recipe = ["encoder.position_embedding_type=absolute", "encoder.attention_bias=true",
              "encoder.norm_order=post", "encoder.norm=layer_norm"]  # fmt: skip
    saved = run(monkeypatch, pairs, tmp_path / "a", steps=1, small=[*SMALL, *recipe])
    biases = {name: part for name, part in saved["weights"].items() if name.endswith("_proj.bias")}
    assert {name.split(".")[-2] for name, part in biases.items() if not part.any()} == {"k_proj"}


def test_other_stages_refuse_a_model_of_embeddings(tmp_path):
    """Its settings are those of an encoder or of a decoder, but its head is gone."""
    for section in ("encoder", "model"):
        config = {"embed": {"base": {"model": "decoder"}.get(section, section)}, section: {}, "tokenizer": {}}
        found = {"stage": STAGE, "short": "Embed", "config": config, "weights": {}, "tokenizer": "{}"}
        assert section in inherited_sections(found, "a.pkl", ("encoder", "model"))
        with pytest.raises(UserError, match="--init a.pkl: an embedding model, without the head"):
            inherited_sections(found, "a.pkl", (section,))


def test_a_decoder_becomes_a_model_of_embeddings(pairs, tmp_path, monkeypatch):
    """Its body is that of the checkpoint, without the heads; the first token alone is refused."""
    base = tiny_model(seed=5, mtp="parallel", max_position_embeddings=256)
    path = write_checkpoint(tmp_path / "base.pkl", "Pre", weights=base.state_dict(), config=run_config(base))
    words = ["--config", "decoder", "--init", path, "--set", "optim.lr=1e-4"]
    saved = run(monkeypatch, pairs, tmp_path / "a", *words, steps=1)
    assert saved["config"]["embed"]["base"] == "decoder" and saved["config"]["embed"]["pooling"] == "last"
    body = {f"body.{name.removeprefix('model.')}": part for name, part in base.state_dict().items()
            if name.startswith("model.")}  # fmt: skip
    assert largest_difference(saved["weights"], body) < 2e-4
    assert not load_embedder(tmp_path / "a" / "TinySeek_Embed_final.pkl")[0].training
    weighted = run(monkeypatch, pairs, tmp_path / "c", *words, "--set", "embed.pooling=attention", steps=1)
    assert weighted["weights"].keys() - body.keys() == {"query"}
    assert 0 < weighted["weights"]["query"].abs().max() < 2e-4  # one step of Adam from zeros
    with pytest.raises(UserError, match="set embed.pooling=last"):
        run(monkeypatch, pairs, tmp_path / "b", *words, "--set", "embed.pooling=cls")
    with pytest.raises(UserError, match="model.max_position_embeddings=256 is less than the 300 tokens"):
        run(monkeypatch, pairs, tmp_path / "b", *words, "--set", "embed.document_length=300")
    with pytest.raises(UserError, match=r"embed.matryoshka=\[8, 99\] goes beyond model.hidden_size=24"):
        run(monkeypatch, pairs, tmp_path / "b", *words, "--set", "embed.matryoshka=[8, 99]")
    assert not (tmp_path / "b").exists()
