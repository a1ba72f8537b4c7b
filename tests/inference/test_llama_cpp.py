"""llama.cpp itself (python -m pip install llama-cpp-python) runs our GGUF files: the same ids give the same
logits and greedy text, and the same text the same ids where it has the pattern of the tokenizer."""

import random

import pytest
import tokenizers
import torch

from inference.generation.generator import Generator
from inference.generation.sampling import SamplingParams
from load_data.tokenization.hf_tokenizer import HfTokenizer
from inference.gguf_files.vocabulary import PATTERNS
from tests.inference.gguf_models import MLA, SHAPES, TOKENIZER, YARN, backend_of, export

F32 = 0  # a type of ggml, here of the cache; by default it is fp16
LATENT = MLA | {"num_hidden_layers": 3}
MORE = SHAPES | {
    "latent, YaRN": ("deepseek2", LATENT | {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}}),
    "latent, YaRN without": ("deepseek2", LATENT | {"rope_scaling": YARN | {"attention_factor": 1.0}}),
}


@pytest.fixture(autouse=True)
def package():
    """Every test needs the package."""
    return pytest.importorskip("llama_cpp")


def opened(path, **settings):
    """The engine on a file. Trap: a failed assertion in it ends the process, and the tests with it."""
    import llama_cpp

    return llama_cpp.Llama(
        str(path), n_ctx=128, n_threads=1, logits_all=True, type_k=F32, type_v=F32, flash_attn=False,
        verbose=False, **settings,
    )  # fmt: skip


def ids_of(engine, text, special=False):
    """The ids that llama.cpp cuts a text into."""
    return engine.tokenize(text.encode("utf-8"), add_bos=False, special=special)


@pytest.mark.parametrize("shape", MORE)
@torch.no_grad()
def test_logits_and_greedy_text(monkeypatch, tmp_path, shape):
    """Both round sums of some hundred numbers in fp32, in different orders, for logits of about 1.5 up to 6:
    a difference of 1e-4 is what a few hundred roundings of 2^-24 can add up to."""
    model, path = export(monkeypatch, tmp_path, **MORE[shape][1])
    engine = opened(path)
    ids = torch.randint(7, TOKENIZER.vocab_size, (1, 96), generator=torch.Generator().manual_seed(1))
    engine.eval(ids[0].tolist())
    theirs, ours = torch.from_numpy(engine.scores[:96].copy()), model(ids).logits[0]
    assert (ours - theirs).abs().max() < 1e-4 and ours.std() > 1
    prompt, written = ids[0, :9].tolist(), []
    engine.reset()
    engine.eval(prompt)
    for _ in range(64):
        written.append(int(engine.scores[engine.n_tokens - 1].argmax()))
        engine.eval(written[-1:])
    params, generator = SamplingParams(temperature=0, max_new_tokens=64), Generator(model, TOKENIZER.eos_id)
    (own,) = generator.generate([prompt], params, frozenset(), lambda row, token: None)
    assert list(own) == written and len(set(written)) > 5


@pytest.mark.parametrize("dtype, bits", [("f16", 11), ("bf16", 8)])
@torch.no_grad()
def test_matrices_in_16_bits(monkeypatch, tmp_path, dtype, bits):
    """The engine rounds activations to the type of the matrices too: each of about 20 products in a row errs
    by 2^-bits of its size, and all of them by less than 20 * 2^-bits of that of the logits."""
    model, path = export(monkeypatch, tmp_path, "--dtype", dtype)
    engine, ids = opened(path), torch.arange(7, 103)
    engine.eval(ids.tolist())
    theirs, ours = torch.from_numpy(engine.scores[:96].copy()), model(ids[None]).logits[0]
    assert 1e-5 < (ours - theirs).std() / ours.std() < 20 * 2.0**-bits


def random_texts(count, seed=0):
    """Words, numbers, signs, white space, contractions, other scripts and emoji, in any order."""
    generator = random.Random(seed)
    parts = "the x self Hello don't I'LL 42 12345 ( ( ) : ; -- ! ?! , . \n \n\n \r\n \t return é ö 你好"
    parts = [*parts.split(" "), " ", "  ", "\n    ", "\u00a0", "'s", "\u200b", "e\u0301", "Ω", "٣", "😀"]
    return ["".join(generator.choices(parts, k=generator.randint(1, 30))) for _ in range(count)]


def trained(pattern, whole):
    """A small tokenizer of the kind that is imported, trained on texts of that kind."""
    backend = backend_of(pattern, whole)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<|endoftext|>", "<s>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    backend.train_from_iterator(random_texts(300, seed=1), trainer)
    return backend


@pytest.mark.parametrize("pattern, whole", PATTERNS)
def test_imported_tokenizers_cut_text_alike(monkeypatch, tmp_path, pattern, whole):
    import llama_cpp

    settings = '{"eos_token": "<|endoftext|>", "bos_token": "<s>", "add_bos_token": true}'
    text = trained(pattern, whole).to_str()
    tokenizer = HfTokenizer({"tokenizer.json": text, "tokenizer_config.json": settings})
    _, path = export(monkeypatch, tmp_path, tokenizer=tokenizer, vocab_size=tokenizer.vocab_size + 2)
    engine = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    for one in random_texts(300):
        assert ids_of(engine, one) == tokenizer.encode(one), one
    assert engine.tokenize(b"x") == [1, *tokenizer.encode("x")]  # with BOS


def test_our_tokenizer(monkeypatch, tmp_path):
    """Special tokens become ids only where the template writes them; words and numbers are cut alike."""
    import llama_cpp

    _, path = export(monkeypatch, tmp_path)
    engine = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    for text in ("the thing 42", "the\n\n  the", "你好 é 1234 <|im_end|>"):
        assert ids_of(engine, text) == TOKENIZER.encode(text)
    marks = TOKENIZER.special_ids
    assert ids_of(engine, "User：the<|im_end|>", special=True) == [
        marks["User："], *TOKENIZER.encode("the"), marks["<|im_end|>"]
    ]
    assert engine.token_eos() == marks["<|endoftext|>"] and engine._model.token_eot() == marks["<|im_end|>"]
    assert "Assistant：" in engine.metadata["tokenizer.chat_template"]
