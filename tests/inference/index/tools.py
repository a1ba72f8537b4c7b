"""A model of text embeddings with random weights over bytes."""

from config.load import to_dict
from config.schema import RunConfig
from inference.index.reader import TextReader
from model.embedder import Embedder
from tests.inference.tools import byte_tokenizer
from tests.modules.tools import shake
from utils.checkpoint import save_checkpoint

WIDTH = 16


def tiny_reader(seed=0, document_length=65) -> TextReader:
    """A reader whose tokens are bytes. A passage may have `document_length` - 1 of them."""
    config, tokenizer = RunConfig(), byte_tokenizer()
    config.train.max_steps = 1
    config.embed.document_length, config.embed.query_length = document_length, 33
    encoder = config.encoder
    encoder.vocab_size, encoder.hidden_size, encoder.intermediate_size = tokenizer.vocab_size, WIDTH, 16
    encoder.num_hidden_layers, encoder.num_attention_heads = 1, 2
    model = shake(Embedder.from_config(config.embed, encoder), seed)
    return TextReader(model.eval(), tokenizer, config.validate())


def tiny_checkpoint(path, seed=0):
    """Save `tiny_reader(seed)` as its training would; return the path."""
    reader = tiny_reader(seed)
    entries = {"stage": "embed_train", "short": "Embed", "step": 1, "tokenizer": reader.tokenizer.to_json()}
    save_checkpoint(path, entries | {"config": to_dict(reader.config), "weights": reader.model.state_dict()})
    return path
