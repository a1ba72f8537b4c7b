"""Quantised models: saved and loaded bit for bit, used by every command, and refused where they cannot be."""

import sys

import pytest
import torch
import torch.nn.functional as F

from config.quant import QuantConfig
from inference import evaluate, export_gguf, long_context, quantize
from inference.generation.generator import Generator
from inference.generation.load import find_model, load_adapter, load_full
from inference.generation.sampling import SamplingParams
from inference.generation.speculative import SpeculativeGenerator
from inference.quantize import contents, table
from model.quantized import held_bytes, quantized_paths
from tests.inference.adapters import write_adapter
from tests.inference.gguf_models import TOKENIZER as GGUF
from tests.inference.gguf_models import random_model
from tests.inference.quantization.tools import FORMATS, MLA, MOE, quantized, write_quantized, write_source
from tests.inference.test_chat import run as run_chat
from tests.inference.tools import run_config, write_checkpoint
from tests.train.tools import same_bits
from train.engine.command import parse_command
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.errors import UserError, run_main

IDS = torch.randint(0, 260, (2, 12), generator=torch.Generator().manual_seed(0))
GREEDY = SamplingParams(temperature=0, max_new_tokens=10)
SHAPES = {"untied": {"tie_word_embeddings": False, "attention_bias": True}, "mla": MLA,
          "mtp": {"mtp": "sequential"}, "dense": {"n_routed_experts": 0}}  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A pre-trained model with experts."""
    return write_source(tmp_path_factory.mktemp("source"))


@pytest.fixture
def call(monkeypatch, capsys):
    """(exit code, standard output, standard error) of quantize.py in this process."""

    def call(*arguments, main=quantize.main, name="quantize.py"):
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        for stream in ("stdout", "stderr"):
            monkeypatch.setattr(getattr(sys, stream), "reconfigure", lambda **_: None, raising=False)
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            run_main(main)
        return (ended.value.code, *capsys.readouterr())

    return call


# ------------------------------------------------------------------------------------------ there and back


@torch.no_grad()
def check_round_trip(path, quant, tmp_path):
    """Quantise, save, load: the same logits, bit for bit, near those of the source. Returns
    what was loaded, and the rows of the table."""
    loaded, rows = quantized(path, quant)
    plain = load_full(path)
    tied = quant.head and plain.model.config.tie_word_embeddings  # two layers, one matrix
    assert len(rows) == len(quantized_paths(plain.model, quant)) - tied
    save_checkpoint(tmp_path / "small.pkl", contents(loaded))
    again = load_full(tmp_path / "small.pkl")
    logits, true = again.model(IDS).logits, plain.model(IDS).logits
    assert torch.equal(logits, loaded.model(IDS).logits)
    assert 0 < (logits - true).norm() < 0.6 * true.norm()
    state, before = again.model.state_dict(), plain.model.state_dict()
    stay = {name for name in before if name in state and not name.endswith("proj.bias")}
    assert any("mlp.gate." in name for name in stay) or not plain.model.config.n_routed_experts
    assert same_bits({name: state[name] for name in stay}, {name: before[name] for name in stay})
    assert again.digest != plain.digest and again.config.quant == quant
    return again, rows


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_loaded_computes_what_was_saved(source, tmp_path, name):
    again, rows = check_round_trip(source, FORMATS[name], tmp_path)
    for row in rows:
        assert 0 < row.weight_error < (0.02 if FORMATS[name].bits == 8 else 0.35)
        calibrated = name.startswith(("gptq", "awq", "smooth", "head"))
        assert (row.output_error is not None) == (calibrated and "layers" in row.path)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape(tmp_path, shape):
    """Biases, latent attention, a second head; with the head in 8 bits. Cached text equals uncached text."""
    path = write_source(tmp_path, **SHAPES[shape])
    again, _ = check_round_trip(path, QuantConfig("gptq", 4, 8, head=True), tmp_path)
    prompts = IDS.tolist()
    texts = Generator(again.model).generate(prompts, GREEDY)
    for prompt, text in zip(prompts, texts, strict=True):
        logits = again.model(torch.tensor([[*prompt, *text[:-1]]])).logits[0, len(prompt) - 1 :]
        picked = logits.gather(1, torch.tensor(text)[:, None])[:, 0]
        assert (logits.amax(dim=-1) - picked).max() < 1e-4
    if shape == "mtp":
        drafted = SpeculativeGenerator(again.model, 0, 2).generate(prompts[:1], GREEDY)
        assert [*drafted[0]] == [*texts[0]]


@torch.no_grad()
def test_numbers_of_the_table(source, tmp_path):
    """Bits, bytes and errors by hand; the sum is the memory that the model holds."""
    loaded, rows = quantized(source, FORMATS["rtn4"])
    plain, by_path = load_full(source), {row.path: row for row in rows}
    row = by_path["model.layers.0.self_attn.q_proj"]  # (32, 24), groups of 8: 12 bytes and 3 scales in a row
    assert (row.numbers, row.before, row.after) == (32 * 24, 4 * 32 * 24, 32 * (12 + 3 * 2))
    weight = plain.model.model.layers[0].self_attn.q_proj.weight
    now = loaded.model.model.layers[0].self_attn.q_proj.weight
    assert row.weight_error == pytest.approx(float((now - weight).norm() / weight.norm()))
    saved = sum(one.before - one.after for one in rows)
    assert held_bytes(plain.model) - held_bytes(loaded.model) == saved
    save_checkpoint(tmp_path / "small.pkl", contents(loaded))
    assert held_bytes(load_full(tmp_path / "small.pkl").model) == held_bytes(loaded.model)
    lines = table(rows, loaded.model, FORMATS["rtn4"])
    line = next(line for line in lines if line.startswith("model.layers.*.self_attn.q_proj"))
    assert "6.000" in line and " 2 " in line  # 4 + 16 / 8 bits, in each of two layers
    full = "\n".join(lines[lines.index("in full precision:") :])
    assert all(word in full for word in ("embed_tokens", "gate", "q_norm", "a router", "--head"))


@torch.no_grad()
def test_output_errors_are_those_of_the_inputs(source):
    """Of one layer, against the product of what it reads; GPTQ and AWQ make them smaller than rounding."""
    errors = {}
    for name in ("gptq4", "awq4"):
        rows = quantized(source, FORMATS[name])[1]
        errors[name] = sum(row.output_error for row in rows) / sum(row.weight_error for row in rows)
    assert errors["gptq4"] < 0.85 and errors["awq4"] < 1.05


def test_a_tied_head_and_the_embedding_are_one_store(source, tmp_path):
    again, rows = check_round_trip(source, QuantConfig("rtn", 8, head=True), tmp_path)
    model = again.model
    assert model.lm_head.store is model.model.embed_tokens.store
    size = sum(buffer.nbytes for buffer in model.lm_head.store.buffers())
    assert size == 269 * (24 + 4) and held_bytes(model) < held_bytes(load_full(source).model) / 2
    assert torch.equal(model.model.embed_tokens(IDS), F.embedding(IDS, model.lm_head.weight))
    loss = model(IDS, labels=IDS).loss_sum
    log_probs = model(IDS).logits.log_softmax(-1).gather(2, IDS[..., None])
    torch.testing.assert_close(loss, -log_probs.sum())


# --------------------------------------------------------------------------------------------- the commands


def test_the_command(source, tmp_path, call):
    """Without flags: the latest model, 8 bits, beside it; chat does not take it for the latest model."""
    code, out, err = call("--out", source.parent)
    made = source.parent / "TinySeek_Pre_rtn8.pkl"
    assert code == 0 and f"saved {made}" in err and "weights in memory" in out
    assert load_full(made).config.quant == QuantConfig("rtn", 8)
    assert load_checkpoint(made)["source"] == str(source) and find_model(source.parent) == source
    code, _, err = call("--out", source.parent)
    assert code == 2 and "is there already; --overwrite replaces it" in err
    code, out, _ = call("--checkpoint", source, "--method", "gptq", "--group", 8, "--rows", 4, "--to", made,
                        "--overwrite")  # fmt: skip
    assert code == 0 and load_full(made).config.quant == QuantConfig("gptq", 4, 8)
    assert "%" in next(line for line in out.splitlines() if "experts" in line).split("3.000")[-1]
    made.unlink()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method", "gptq", "--group", 7], "q_proj: groups of 7 do not divide rows of 24; this model"),
        (["--bits", 4, "--group", 16], "rows of 24; this model takes one scale per row"),
        (["--bits", 5], "quant.bits=5 must be one of 4, 8"),
        (["--method", "nf4", "--bits", 8], "quant.method=nf4 has 4 bits: take --bits 4"),
        (["--method", "nf4", "--group", 8], "leave --group out"),
        (["--method", "smoothquant", "--asymmetric"], "leave --asymmetric out"),
        (["--double"], "--double (quant.double_quant) is for quant.method=nf4"),
        (["--data", "skills"], "--data is for calibration, and --method rtn has none"),
        (["--method", "awq", "--group", 8, "--data", "gone.txt"], "gone.txt"),
        (["--rows", 0], "--rows 0 must be at least 1"),
        (["--method", "gptq", "--group", 8, "--seed", -3], "--seed -3 must be at least 0"),
        (["--to", "."], "--to . is a folder: name a file in it"),
        (["--method", "magic"], "--method: invalid choice: 'magic'"),
        (["--group", 1], "quant.group_size=1 must be at least 2"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_bad_calls(source, tmp_path, call, arguments, words):
    code, out, err = call("--checkpoint", source, "--to", tmp_path / "a.pkl", *arguments)
    line = err.strip().splitlines()[-1]
    assert code == 2 and line.startswith("error: ") and words in line and "Traceback" not in err
    assert not (tmp_path / "a.pkl").exists()


def test_quantised_once_only(source, tmp_path, call):
    """Nor over its own source, nor trained on."""
    small = write_quantized(tmp_path / "small.pkl", source, FORMATS["nf4"])
    code, _, err = call("--checkpoint", small)
    assert code == 2 and "small.pkl is quantised already (nf4): name the model it was made from" in err
    code, _, err = call("--checkpoint", source, "--to", source, "--overwrite")
    assert code == 2 and "is there already" in err
    with pytest.raises(UserError, match="codes of nf4.* in full precision .*TinySeek_Pre_final.pkl"):
        parse_command("sft_train", "SFT", "", ["--init", str(small), "--out", str(tmp_path)])


def test_no_training_claims_to_be_quantised(tmp_path):
    with pytest.raises(UserError, match="quant.method=rtn is for finished models: .* inference/quantize.py"):
        parse_command("pre_train", "Pre", "", ["--out", str(tmp_path), "--set", "quant.method=rtn"])


def test_rounded_training_is_for_one_stage_and_used_when_finished(source, tmp_path):
    with pytest.raises(UserError, match="qat.bits=4 is for train/sft_train.py"):
        parse_command("pre_train", "Pre", "", ["--out", str(tmp_path), "--set", "qat.bits=4"])
    entries = load_checkpoint(source)
    entries["config"] |= {"qat": {"bits": 4, "kind": "ste"}}  # without scales, the names are those of a model
    save_checkpoint(tmp_path / "a.pkl", entries)
    with pytest.raises(UserError, match="of an unfinished training with qat.bits=4: end it with --resume"):
        load_full(tmp_path / "a.pkl")


def test_chat_and_evaluate(tmp_path, monkeypatch, capsys, call):
    source = write_source(tmp_path, "SFT")
    small = write_quantized(tmp_path / "small.pkl", source, FORMATS["awq4"])
    loaded = load_full(small)
    ids = loaded.template.prompt([{"role": "user", "content": "1 + 1?"}])
    answer = Generator(loaded.model).generate([ids], GREEDY, loaded.template.stop_ids)[0]
    text = loaded.tokenizer.decode(answer)
    code, out, err = run_chat(monkeypatch, capsys, "--checkpoint", small, "--prompt", "1 + 1?",
                              "--temperature", "0", "--max-new-tokens", "10")  # fmt: skip
    assert code == 0 and out.strip() == text.strip() and "small.pkl (sft, step 1,234, cpu)" in err
    code, out, _ = call("--checkpoint", small, "--skills", "lists", "--count", 2, "--data",
                        tmp_path / "dialogues.jsonl", main=evaluate.main)  # fmt: skip
    assert code == 0 and "lists=" in out and "data=" in out


@torch.no_grad()
def test_longer_contexts(source, tmp_path):
    """The copy with another configuration has the same codes."""
    loaded = load_full(write_quantized(tmp_path / "small.pkl", source, FORMATS["gptq4"]))
    copy = long_context.with_config(loaded.model, loaded.model.config, loaded.config.quant)
    assert torch.equal(copy(IDS).logits, loaded.model(IDS).logits)


def test_adapters_are_refused(tmp_path):
    """LoRA cannot be folded into codes, and an adapter belongs to the weights that it was trained on."""
    source = write_source(tmp_path, "SFT")
    adapter = write_adapter(tmp_path / "TinySeek_Lora_final.pkl", source)
    small = load_full(write_quantized(tmp_path / "small.pkl", source, FORMATS["rtn8"]))
    with pytest.raises(UserError, match="was trained on other weights .*name its own base with --checkpoint"):
        load_adapter(adapter, small)


def test_gguf_holds_the_numbers_of_the_codes(tmp_path, call):
    gguf = pytest.importorskip("gguf")
    model = random_model(**MOE)
    entries = {"weights": model.state_dict(), "config": run_config(model), "tokenizer": GGUF.to_json()}
    source = write_checkpoint(tmp_path / "a.pkl", **entries)
    small = write_quantized(tmp_path / "small.pkl", source, FORMATS["nf4"])
    code, _, err = call(small, "--out", tmp_path / "a.gguf", main=export_gguf.main)
    assert code == 0 and "the numbers that the codes stand for" in err
    tensors = {one.name: one.data for one in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    weight = load_full(small).model.model.layers[1].self_attn.o_proj.weight
    assert torch.equal(torch.from_numpy(tensors["blk.1.attn_output.weight"].copy()), weight)


# ------------------------------------------------------------------------------------------- strange files


def test_strange_files_are_refused(source, tmp_path):
    """Wrong shapes and types, formats that contradict each other, sizes that no memory has."""
    good = load_checkpoint(write_quantized(tmp_path / "good.pkl", source, FORMATS["awq4"]))
    weights, config, bad = good["weights"], good["config"], tmp_path / "bad.pkl"
    name = "model.layers.0.self_attn.q_proj.store.codes"
    huge = {"model": config["model"] | {"intermediate_size": 2**40}}
    cases = {
        r"1 of another shape \(.*store.codes \(2, 12\) where the model has \(32, 12\)": {
            "weights": weights | {name: weights[name][:2]}},
        r"1 of another type \(.*store.codes torch.float32 where the model has torch.uint8": {
            "weights": weights | {name: weights[name].float()}},
        r"1 missing \(.*store.codes": {"weights": {key: weights[key] for key in weights if key != name}},
        "unexpected": {"config": config | {"quant": {"method": "none"}}},
        "quant.method=nf4 has 4 bits": {"config": config | {"quant": {"method": "nf4", "bits": 8}}},
        "quant.method='magic' must be one of": {"config": config | {"quant": {"method": "magic"}}},
        "section quant must be an object": {"config": config | {"quant": 7}},
        "groups of 7 do not divide": {"config": config | {"quant": config["quant"] | {"group_size": 7}}},
        "of another shape": {"config": config | huge},
    }  # fmt: skip
    for words, change in cases.items():
        save_checkpoint(bad, good | change)
        with pytest.raises(UserError, match=words):
            load_full(bad)
    for quant in (7, {"method": 3}, None):
        save_checkpoint(bad, good | {"config": config | {"quant": quant}})
        with pytest.raises(UserError):
            arguments = ["--init", str(bad), "--out", str(tmp_path / "new"), "--set", "optim.lr=no"]
            parse_command("sft_train", "SFT", "", arguments)
