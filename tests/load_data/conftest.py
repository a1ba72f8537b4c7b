"""What several tests of this folder use."""

import inspect
import json
import textwrap

import pytest

from config.schema import RunConfig, TokenizerConfig
from load_data.tokenization.train_tokenizer import learn_merges


@pytest.fixture(scope="session")
def source_text():
    """Some 60 kB of real Python source."""
    return "".join(inspect.getsource(module) for module in (textwrap, json, json.decoder, json.encoder))


@pytest.fixture(scope="session")
def bpe(source_text):
    """A small byte-level tokenizer."""
    return learn_merges(TokenizerConfig(vocab_size=600), [source_text])


@pytest.fixture
def run_config(tmp_path):
    """A function: the configuration for some paths, characters as tokens, with a cache of the test's own."""

    def make(*paths, kind="char", **data):
        config = RunConfig()
        config.train.max_steps = 1
        config.tokenizer.kind, config.tokenizer.vocab_size = kind, 300
        config.data.paths, config.data.cache_dir = [str(path) for path in paths], str(tmp_path / "cache")
        for name, value in data.items():
            setattr(config.data, name, value)
        return config.validate()

    return make


@pytest.fixture
def write(tmp_path):
    """A function: write a file below the test's folder (bytes, text or records) and give its path."""

    def make(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list):
            content = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        return path

    return make
