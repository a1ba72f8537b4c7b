"""GGUF files read back with the package gguf: every weight bit for bit, the metadata, the tokenizer, and what
cannot be expressed. test_llama_cpp.py runs the files."""

import json
import math
import re
import sys

import pytest
import tokenizers
import torch

from inference.generation.load import load_full
from inference.gguf_files.vocabulary import PATTERNS, pattern_of
from load_data.chat.chat_template import ChatTemplate
from load_data.tokenization.hf_tokenizer import HfTokenizer
from load_data.tokenization.tokenizer import CharTokenizer, split_and_spell
from tests.inference.gguf_models import MLA, MOE, SHAPES, SOFTMAX, TOKENIZER, YARN, backend_of
from tests.inference.gguf_models import command, export, random_model
from tests.inference.tools import byte_tokenizer, run_config, write_checkpoint

OURS = {  # llama.cpp's names of weights within a layer, and ours
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "post_attention_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm", "attn_q_a": "self_attn.q_a_proj", "attn_q_b": "self_attn.q_b_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm", "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "ffn_gate_inp": "mlp.gate", "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj", "ffn_down_shexp": "mlp.shared_experts.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
}  # fmt: skip


@pytest.fixture(autouse=True)
def package():
    """Every test needs the package."""
    return pytest.importorskip("gguf")


def read(path):
    """The metadata and the tensors of a file."""
    import gguf

    reader = gguf.GGUFReader(path)
    tensors = {}
    for one in reader.tensors:
        data = gguf.quants.dequantize(one.data, one.tensor_type)
        tensors[one.name] = torch.from_numpy(data.copy()).view(*reversed(one.shape.tolist()))
    return {name: field.contents() for name, field in reader.fields.items()}, tensors


def turn(weight, heads, last, interleaved):
    """Bring the `last` rows of each head from one order of rotated channels into the other, `interleaved`."""
    weight = weight.view(heads, -1, *weight.shape[1:]).clone()
    pairs = weight[:, -last:].clone()
    first, second = pairs.chunk(2, dim=1) if interleaved else (pairs[:, 0::2], pairs[:, 1::2])
    pairs = torch.stack([first, second], 2).flatten(1, 2) if interleaved else torch.cat([first, second], 1)
    weight[:, -last:] = pairs
    return weight.flatten(0, 1)


def restored(tensors, config, architecture):
    """Our state dictionary from the tensors of a file."""
    H, G, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    rope, turned, state = config.qk_rope_head_dim, {}, {}
    if (architecture in ("llama", "deepseek2")) != config.rope_interleaved:
        turned = {"attn_q": (H, D), "attn_k": (G, D), "attn_q_norm": (1, D), "attn_k_norm": (1, D)}
        if architecture == "deepseek2":
            turned = {"attn_q": (H, rope), "attn_q_b": (H, rope), "attn_kv_a_mqa": (1, rope)}
    for name, tensor in tensors.items():
        if not name.startswith("blk."):
            continue
        _, layer, part, kind = name.split(".")
        if part in turned:
            tensor = turn(tensor, *turned[part], config.rope_interleaved)
        if part in OURS:
            state[f"model.layers.{layer}.{OURS[part]}.{kind}"] = tensor
        elif part == "exp_probs_b":
            state[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"] = tensor
        elif part == "ffn_down_exps":
            state[f"model.layers.{layer}.mlp.experts.down_proj"] = tensor
        elif part == "ffn_gate_exps":
            both = [tensor, tensors[f"blk.{layer}.ffn_up_exps.weight"]]
            state[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = torch.cat(both, dim=1)
        elif part == "attn_k_b":  # (H, R, nope), (H, Dv, R)
            assert tensor.shape == (H, config.kv_lora_rank, config.qk_nope_head_dim)
            both = torch.cat([tensor.mT, tensors[f"blk.{layer}.attn_v_b.weight"]], dim=1)
            state[f"model.layers.{layer}.self_attn.kv_b_proj.weight"] = both.flatten(0, 1)
        else:
            assert part in ("attn_v_b", "ffn_up_exps"), name
    state["model.embed_tokens.weight"] = tensors["token_embd.weight"]
    state["model.norm.weight"] = tensors["output_norm.weight"]
    state["lm_head.weight"] = tensors.get("output.weight", tensors["token_embd.weight"])
    if config.n_routed_experts and architecture in ("llama", "qwen3moe", "qwen2moe"):  # without steering
        zeros = torch.zeros(config.n_routed_experts)
        for layer in range(config.num_hidden_layers):
            state[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"] = zeros
    return state


@pytest.mark.parametrize("shape", SHAPES)
def test_every_weight_is_in_the_file(monkeypatch, tmp_path, shape):
    architecture, changes = SHAPES[shape]
    model, path = export(monkeypatch, tmp_path, **changes)
    keys, tensors = read(path)
    assert keys["general.architecture"] == architecture
    found, own = restored(tensors, model.config, architecture), model.state_dict()
    assert found.keys() == own.keys()
    for name, weight in own.items():
        assert torch.equal(found[name], weight), name
    extra = {"rope_freqs.weight"} if shape == "Llama" else set()
    assert {name for name in tensors if not name.startswith("blk.")} - extra <= {
        "token_embd.weight", "output_norm.weight", "output.weight"
    }
    untied = not model.config.tie_word_embeddings or architecture == "qwen2moe"
    assert ("output.weight" in tensors) == untied


SHAPE_KEYS = {
    "vocab_size": TOKENIZER.vocab_size + 3, "context_length": 128, "embedding_length": 24, "block_count": 2,
    "feed_forward_length": 40, "attention.head_count": 4, "rope.freq_base": 10000,
    "attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
}  # fmt: skip
GROUPED_KEYS = {"attention.head_count_kv": 2, "attention.key_length": 8, "attention.value_length": 8}
EXPERT_KEYS = {
    "expert_count": 8, "expert_used_count": 3, "expert_feed_forward_length": 20, "expert_shared_count": 2,
    "expert_shared_feed_forward_length": 40, "leading_dense_block_count": 1,
}  # fmt: skip
YARN_KEYS = {
    "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32,
}  # fmt: skip
KEYS = {  # worked out by hand
    "dense": GROUPED_KEYS | YARN_KEYS | {
        "rope.dimension_count": 8, "rope.scaling.attn_factor": pytest.approx(1.3 / (0.1 * math.log(4) + 1)),
    },
    "dense, biases, interleaved": GROUPED_KEYS | {
        "rope.dimension_count": 8, "rope.scaling.type": "linear", "rope.scaling.factor": 2.0,
    },
    "experts": GROUPED_KEYS | EXPERT_KEYS | {
        "rope.dimension_count": 4, "expert_gating_func": 2, "expert_weights_norm": True,
        "expert_weights_scale": pytest.approx(1.7), "expert_group_count": 4, "expert_group_used_count": 2,
    },
    "Mixtral": GROUPED_KEYS | {  # as wide as one expert
        "feed_forward_length": 20, "rope.dimension_count": 8, "expert_count": 8, "expert_used_count": 3,
        "expert_feed_forward_length": 20, "expert_shared_count": 0, "expert_shared_feed_forward_length": 0,
        "leading_dense_block_count": 0, "expert_gating_func": 1, "expert_weights_norm": True,
        "expert_weights_scale": 1.0,
    },
    "latent, experts": EXPERT_KEYS | YARN_KEYS | {
        "rope.dimension_count": 4, "attention.head_count_kv": 1, "attention.key_length": 20,
        "attention.value_length": 16, "attention.key_length_mla": 10, "attention.value_length_mla": 10,
        "attention.kv_lora_rank": 16, "attention.q_lora_rank": 10, "expert_gating_func": 2,
        "expert_weights_norm": False, "expert_weights_scale": 1.0, "expert_group_count": 2,
        "expert_group_used_count": 1, "rope.scaling.yarn_log_multiplier": pytest.approx(0.07),
        "rope.scaling.attn_factor": 1.0,
    },
}  # fmt: skip


@pytest.mark.parametrize("shape", KEYS)
def test_metadata(monkeypatch, tmp_path, shape):
    architecture, changes = SHAPES[shape]
    keys, _ = read(export(monkeypatch, tmp_path, **changes)[1])
    found = {name.partition(".")[2]: value for name, value in keys.items() if name.startswith(architecture)}
    assert found == SHAPE_KEYS | KEYS[shape]
    assert keys["general.name"] == "model" and keys["general.file_type"] == 0


def test_frequencies_of_llama3(monkeypatch, tmp_path):
    """The file divides each frequency; the rule again, one frequency after the other."""
    _, path = export(monkeypatch, tmp_path, **SHAPES["Llama"][1])
    divisors, expected = read(path)[1]["rope_freqs.weight"].tolist(), []
    for pair in range(4):
        wavelength = 2 * math.pi * 10000 ** (pair / 4)
        blend = (32 / wavelength - 0.25) / (4.0 - 0.25)
        blend = min(max(blend, 0.0), 1.0)
        expected.append(1 / ((1 - blend) / 8.0 + blend))
    assert divisors == pytest.approx(expected) and 1 < expected[1] < 8


def test_names_of_the_metadata_are_those_of_the_package(monkeypatch, tmp_path):
    import gguf

    known = {
        value.replace("{arch}", "deepseek2")
        for group in vars(gguf.Keys).values() if isinstance(group, type)
        for name, value in vars(group).items() if isinstance(value, str) and not name.startswith("_")
    }  # fmt: skip
    for shape in ("latent, experts", "Qwen2-MoE"):
        architecture, changes = SHAPES[shape]
        keys, _ = read(export(monkeypatch, tmp_path, "--overwrite", **changes)[1])
        names = {name.replace(architecture, "deepseek2") for name in keys if not name.startswith("GGUF.")}
        assert names - known == set()


@pytest.mark.parametrize("name, dtype, kind", [("f16", torch.float16, 1), ("bf16", torch.bfloat16, 32)])
def test_matrices_in_16_bits(monkeypatch, tmp_path, name, dtype, kind):
    import gguf

    model, path = export(monkeypatch, tmp_path, "--dtype", name, **SHAPES["experts"][1])
    keys, tensors = read(path)
    found, router = restored(tensors, model.config, "glm4moe"), re.compile(r"mlp\.gate\.|norm")
    for part, weight in model.state_dict().items():
        rounded = weight if router.search(part) or weight.dim() == 1 else weight.to(dtype).float()
        assert torch.equal(found[part], rounded), part
    assert keys["general.file_type"] == kind
    types = {one.name: one.tensor_type.name for one in gguf.GGUFReader(path).tensors}
    assert types["blk.1.ffn_up_exps.weight"] == types["token_embd.weight"] == name.upper()
    for part in ("blk.1.ffn_gate_inp.weight", "blk.1.exp_probs_b.bias", "output_norm.weight"):
        assert types[part] == "F32"


def test_the_tokenizer_and_the_chat_template(monkeypatch, tmp_path):
    """The tokens and merges of the file, cut by our pattern, give our ids; the template gives our text."""
    _, path = export(monkeypatch, tmp_path)
    keys, _ = read(path)
    ours = {name.removeprefix("tokenizer.ggml."): value for name, value in keys.items()}
    assert (ours["model"], ours["pre"], ours["add_bos_token"]) == ("gpt2", "superbpe", False)
    assert [ours[f"{name}_token_id"] for name in ("bos", "eos", "padding", "eot")] == [0, 0, 6, 2]
    size = TOKENIZER.vocab_size
    tokens, kinds = ours["tokens"], ours["token_type"]
    assert {one for one, kind in enumerate(kinds) if kind == 3} == set(TOKENIZER.special_ids.values())
    assert {tokens[one]: one for one in TOKENIZER.special_ids.values()} == TOKENIZER.special_ids
    assert kinds[size:] == [5] * 3 and len(set(tokens)) == size + 3 and set(kinds) == {1, 3, 5}
    merges = [tuple(pair.split(" ")) for pair in ours["merges"]]
    vocabulary = {token: one for one, token in enumerate(tokens) if kinds[one] == 1}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = split_and_spell(TOKENIZER.contents["pattern"])
    for text in ("the thing?\n  the", "  the\n\n  é 你好 42", "<|im_end|>"):
        assert backend.encode(text).ids == TOKENIZER.encode(text)

    jinja2 = pytest.importorskip("jinja2")
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the thing?"}]
    text = environment.from_string(keys["tokenizer.chat_template"]).render(
        messages=messages, add_generation_prompt=True
    )
    assert text == TOKENIZER.decode(ChatTemplate(TOKENIZER).prompt(messages), skip_special=False)


def test_an_imported_tokenizer(monkeypatch, tmp_path):
    """Its added tokens, its BOS, and no chat template where it has none."""
    backend = backend_of("GPT-2", False, {"a": 0, "b": 1, "ab": 2}, [("a", "b")])
    backend.add_special_tokens(["<s>", "</s>"])
    backend.add_tokens(["<think>"])
    settings = '{"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": true}'
    tokenizer = HfTokenizer({"tokenizer.json": backend.to_str(), "tokenizer_config.json": settings})
    _, path = export(monkeypatch, tmp_path, tokenizer=tokenizer, vocab_size=8)
    keys, _ = read(path)
    assert keys["tokenizer.ggml.tokens"] == ["a", "b", "ab", "<s>", "</s>", "<think>", "[PAD6]", "[PAD7]"]
    assert keys["tokenizer.ggml.token_type"] == [1, 1, 1, 3, 3, 4, 5, 5]
    assert "tokenizer.chat_template" not in keys
    assert [keys[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "padding")] == [3, 4, 4]
    assert keys["tokenizer.ggml.add_bos_token"] and keys["tokenizer.ggml.pre"] == "gpt-2"


def test_patterns_of_imported_tokenizers():
    for (pattern, whole), name in PATTERNS.items():
        backend = backend_of(pattern, whole)
        backend.normalizer = tokenizers.normalizers.NFC()
        assert pattern_of(json.loads(backend.to_str())) == name
        backend.normalizer = tokenizers.normalizers.Lowercase()
        refused(backend)
        backend.normalizer = None
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
        refused(backend)
    backend.pre_tokenizer = split_and_spell(r"\w+|\s")
    refused(backend)
    refused(tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0})))


def refused(backend):
    """Assert that llama.cpp has no such tokenizer."""
    with pytest.raises(Exception, match="not one of those that llama.cpp cuts"):
        pattern_of(json.loads(backend.to_str()))


REFUSED = {  # a part of the error -> settings
    "model.final_logit_softcapping=30.0": {"final_logit_softcapping": 30.0},
    "model.sliding_window=9": {"sliding_window": 9},
    "model.dual_chunk_attention_config=": {"dual_chunk_attention_config": {"chunk_size": 9, "local_size": 3}},
    "model.partial_rotary_factor=0.5: llama.cpp's architecture qwen3": {"partial_rotary_factor": 0.5},
    "model.scoring_func=sigmoid: llama.cpp's architecture qwen3moe": MOE | {"n_shared_experts": 0},
    "model.norm_topk_prob=False": SOFTMAX | {"norm_topk_prob": False},
    "model.routed_scaling_factor=2.0": SOFTMAX | {"routed_scaling_factor": 2.0},
    "model.first_k_dense_replace=1": SOFTMAX | {"first_k_dense_replace": 1},
    "model.mlp_only_layers=[1]": MOE | {"mlp_only_layers": [1]},
    "model.mlp_only_layers=[0]": SHAPES["Mixtral"][1] | {"mlp_only_layers": [0]},
    "model.topk_method=group_limited_greedy": MOE | {
        "n_group": 2, "topk_group": 1, "topk_method": "group_limited_greedy"},
    "model.shared_expert_intermediate_size=9": MOE | {"shared_expert_intermediate_size": 9},
    "model.n_shared_experts=0": MLA | MOE | {"n_shared_experts": 0},
    "model.shared_expert_gate=True": MLA | MOE | {"shared_expert_gate": True},
    "model.head_dim=8": SHAPES["Qwen2-MoE"][1] | {"head_dim": 8},
    "model.q_lora_rank=4": MLA | {"q_lora_rank": 4, "num_hidden_layers": 26},
    "model.rms_norm_eps=1e-05": MLA | {"rms_norm_eps": 1e-5},
    "model.rope_scaling={'type': 'ntk'": {"rope_scaling": {"type": "ntk", "factor": 2.0}},
    "model.rope_scaling={'rope_type': 'yarn'": {"rope_scaling": YARN | {"beta_fast": 30.0}},
    "model.rope_scaling={'rope_type': 'llama3'": {"rope_scaling": SHAPES["Llama"][1]["rope_scaling"]},
    "'factor': 4.0, 'original": MLA | {"rope_scaling": YARN},  # the temperature on cos and sin
    "'factor': None, 'original": MLA | {"rope_scaling": YARN | {"factor": None}},
    "model.rope_scaling={'type': 'linear'": MLA | {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "model.layers.0.self_attn.o_proj.bias: llama.cpp's architecture qwen3": {"attention_bias": True},
    "model.layers.0.mlp.gate_proj.bias: llama.cpp's architecture glm4moe": MOE | {
        "mlp_bias": True, "first_k_dense_replace": 1},
    "q_a_proj.bias": MLA | {"attention_bias": True, "q_lora_rank": 4},
}  # fmt: skip


@pytest.mark.parametrize("words", REFUSED)
def test_what_llama_cpp_cannot_express_is_refused(monkeypatch, capsys, tmp_path, words):
    check_refusal(monkeypatch, capsys, tmp_path, random_model(**REFUSED[words]), words)


def check_refusal(monkeypatch, capsys, tmp_path, model, words, tokenizer=TOKENIZER):
    """Assert that the command ends with one line that has `words`, and leaves nothing behind."""
    source = tmp_path / "model.pkl"
    text = tokenizer.to_json()
    write_checkpoint(source, weights=model.state_dict(), config=run_config(model), tokenizer=text)
    assert command(monkeypatch, source, "--out", tmp_path / "new" / "model.gguf") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ") and words in error
    assert list(tmp_path.iterdir()) == [source]


def test_steering_that_an_architecture_does_not_read(monkeypatch, capsys, tmp_path):
    model = random_model(**SOFTMAX)
    model.model.layers[1].mlp.gate.e_score_correction_bias[2] = 0.1
    check_refusal(monkeypatch, capsys, tmp_path, model, "layers.1.mlp.gate.e_score_correction_bias")


def test_tokenizers_that_llama_cpp_does_not_have(monkeypatch, capsys, tmp_path):
    check_refusal(monkeypatch, capsys, tmp_path, random_model(), "tokenizer.kind=char", CharTokenizer("abc"))
    check_refusal(monkeypatch, capsys, tmp_path, random_model(), "no merges", byte_tokenizer())


def test_an_mtp_head_is_left_out_and_named(monkeypatch, capsys, tmp_path):
    model, path = export(monkeypatch, tmp_path, mtp="sequential", **MOE)
    assert capsys.readouterr().err.endswith("no MTP head\n")
    keys, tensors = read(path)
    kept = {name: weight for name, weight in model.state_dict().items() if not name.startswith("mtp.")}
    assert restored(tensors, model.config, "glm4moe").keys() == kept.keys()
    assert keys["glm4moe.block_count"] == 2


def test_files_are_replaced_only_on_request_and_whole(monkeypatch, capsys, tmp_path):
    model, path = export(monkeypatch, tmp_path)
    first, source = path.read_bytes(), tmp_path / "model.pkl"
    assert command(monkeypatch, source, "--out", path) == 2
    assert "--overwrite replaces it" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        assert command(patch, source, "--out", path, "--overwrite", "--dtype", "f16") == 2
    assert "could not write" in capsys.readouterr().err
    assert path.read_bytes() == first and {*tmp_path.iterdir()} == {path, source}
    assert command(monkeypatch, source, "--out", path, "--overwrite", "--dtype", "f16") == 0
    assert len(path.read_bytes()) < len(first)
    assert load_full(source).model.config == model.config


def full(descriptor):
    """A disk without space."""
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("words, arguments", {
    "must end in .gguf": ["model.pkl", "--out", "model.pkl", "--overwrite"],
    "no such checkpoint": ["nowhere.pkl", "--out", "model.gguf"],
    "--help lists the flags": ["model.pkl"],
}.items())  # fmt: skip
def test_wrong_flags(monkeypatch, capsys, tmp_path, words, arguments):
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, *arguments) == 2
    assert words in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_without_the_package(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert command(monkeypatch, tmp_path / "model.pkl", "--out", tmp_path / "model.gguf") == 2
    assert "pip install gguf" in capsys.readouterr().err
