"""An embedding model: its bodies, its file, and that padding never changes a vector."""

import pytest
import torch
import torch.nn.functional as F

from config.encoder import EncoderConfig
from config.load import to_dict
from config.model import ModelConfig
from config.schema import RunConfig
from inference.generation.load import load_embedder
from model.embedder import Embedder, embed_by_length
from tests.inference.tools import byte_tokenizer, write_checkpoint
from tests.modules.tools import shake
from utils.checkpoint import save_checkpoint
from utils.errors import UserError

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
TEXTS = [[7], [7, 8, 9, 10, 11, 12, 13], [20, 21, 22], list(range(30, 41)), [7, 8]]
POOLINGS = ("mean", "cls", "last", "attention")
WAYS = [(base, pooling) for base in ("encoder", "decoder") for pooling in POOLINGS]


def settings(base, pooling, vocabulary=64):
    """A tiny run of this kind."""
    config = RunConfig()
    config.embed.base, config.embed.pooling = base, pooling
    local = {"local_attention": 4, "global_attn_every_n_layers": 2}
    config.encoder = EncoderConfig(vocab_size=vocabulary, **local, **SIZES)
    config.model = ModelConfig(vocab_size=vocabulary, num_key_value_heads=1, head_dim=8, **SIZES)
    config.train.max_steps = 1
    return config.validate()


def embedder(base, pooling, vocabulary=64):
    """A model with random gains, and its settings."""
    config = settings(base, pooling, vocabulary)
    torch.manual_seed(0)
    model = Embedder.from_config(config.embed, config.encoder if base == "encoder" else config.model)
    return shake(model).double().eval(), config


def rows(texts, left=0, right=0):
    """The texts as rows with this much padding more than the longest needs, of a random id."""
    width = max(map(len, texts)) + left + right
    ids = torch.full((len(texts), width), 63)
    mask = torch.zeros(len(texts), width, dtype=torch.bool)
    for row, text in enumerate(texts):
        start = width - len(text) if left else 0
        ids[row, start : start + len(text)] = torch.tensor(text, dtype=torch.long)
        mask[row, start : start + len(text)] = True
    return ids, mask


@pytest.mark.parametrize(("base", "pooling"), WAYS)
def test_padding_never_changes_a_vector(base, pooling):
    """Each text alone, beside longer ones with padding on the right or the left, and sorted by length."""
    model, _ = embedder(base, pooling)
    alone = torch.cat([model(torch.tensor([text])) for text in TEXTS])
    torch.testing.assert_close(alone.norm(dim=1), torch.ones(len(TEXTS)).double())
    assert (alone @ alone.T - torch.eye(len(TEXTS)).double()).abs().max() > 0.01
    for ids, mask in (rows(TEXTS, right=3), rows(TEXTS, left=3)):
        torch.testing.assert_close(model(ids, mask), alone)
        torch.testing.assert_close(embed_by_length(model, ids, mask), alone)
    ids, mask = rows([*TEXTS, []], right=2)
    assert not model(ids, mask)[-1].any() and not embed_by_length(model, ids, mask)[-1].any()


def test_a_batch_by_length_pads_little(monkeypatch):
    monkeypatch.setattr("model.embedder.ROWS", 2)
    model, _ = embedder("encoder", "mean")
    ids, mask = rows(TEXTS, right=5)
    widths = []

    def counted(ids, mask):
        widths.append(ids.shape[1])
        return model(ids, mask)

    torch.testing.assert_close(embed_by_length(counted, ids, mask), model(ids, mask))
    assert widths == [2, 7, 11]
    assert embed_by_length(counted, ids[:1], mask[:1] & False).shape == (1, 16) and widths[-1] == 1


@pytest.mark.parametrize("base", ["encoder", "decoder"])
def test_the_body_keeps_its_names_and_its_states(base):
    model, config = embedder(base, "mean")
    assert all(name.startswith("body.") for name in model.state_dict())
    assert {"body.embed_tokens.weight", "body.norm.weight"} <= model.state_dict().keys()
    assert not any("lm_head" in name or "head." in name for name in model.state_dict())
    ids = torch.tensor([TEXTS[1]])
    hidden = model.body(ids)
    hidden = hidden if base == "encoder" else hidden.hidden
    torch.testing.assert_close(model(ids), F.normalize(hidden.mean(1), dim=-1))


@pytest.mark.parametrize("base", ["encoder", "decoder"])
def test_a_file_gives_the_model_back(base, tmp_path):
    tokenizer = byte_tokenizer()
    model, config = embedder(base, "last", tokenizer.vocab_size)
    path = tmp_path / "TinySeek_Embed_final.pkl"
    content = {"stage": "embed_train", "short": "Embed", "config": to_dict(config), "step": 3,
               "weights": model.float().state_dict(), "tokenizer": tokenizer.to_json()}  # fmt: skip
    save_checkpoint(path, content)
    found, its_tokenizer, its_config = load_embedder(path)
    assert its_tokenizer.digest == tokenizer.digest and its_config.embed == config.embed
    assert not found.training
    ids, mask = rows(TEXTS)
    assert torch.equal(found(ids, mask), model(ids, mask))
    content["weights"].pop("body.norm.weight")
    save_checkpoint(path, content)
    with pytest.raises(UserError, match=r"body\.norm\.weight"):
        load_embedder(path)


def test_a_file_of_another_kind_is_refused(tmp_path):
    path = write_checkpoint(tmp_path / "TinySeek_Pre_final.pkl")
    with pytest.raises(UserError, match="a full model of pre_train, not an embedding model; use"):
        load_embedder(path)
