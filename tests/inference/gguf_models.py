"""Models of every architecture that llama.cpp is given, tiny and with random weights, as GGUF files."""

import sys

import pytest
import tokenizers
import torch

from inference import export_gguf
from load_data.tokenization.tokenizer import BpeTokenizer, split_and_spell
from model.tinyseek import TinySeek
from tests.inference.tools import run_config, write_checkpoint
from tests.modules.tools import shake, small_config
from utils.errors import run_main

TOKENIZER = BpeTokenizer([("t", "h"), ("th", "e"), ("Ġ", "Ġ"), ("Ċ", "ĠĠ"), ("Ġ", "the"), ("?", "Ċ")])
MOE = {"n_routed_experts": 8, "num_experts_per_tok": 3, "n_shared_experts": 2, "moe_intermediate_size": 20}
SOFTMAX = MOE | {"n_shared_experts": 0, "scoring_func": "softmax"}
MLA = {"attention_kind": "mla", "kv_lora_rank": 16, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4}
MLA |= {"v_head_dim": 10}
QKV = {"attention_bias": True, "attention_out_bias": False}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 0.25, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 32}
SHAPES = {  # name -> llama.cpp's architecture, and the settings
    "dense": ("qwen3", {"rope_scaling": YARN | {"attention_factor": 1.3}}),
    "dense, biases, interleaved": ("qwen3", QKV | {
        "rope_interleaved": True, "tie_word_embeddings": False,
        "rope_scaling": {"type": "linear", "factor": 2},
    }),
    "Llama": ("llama", {"qk_norm": False, "attention_bias": True, "mlp_bias": True, "rope_scaling": LLAMA3}),
    "Qwen2": ("llama", QKV | {"qk_norm": False, "num_key_value_heads": 1, "tie_word_embeddings": False}),
    "experts": ("glm4moe", MOE | {
        "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.7,
        "partial_rotary_factor": 0.5,
    }),
    "experts, softmax": ("glm4moe", MOE | QKV | {
        "scoring_func": "softmax", "norm_topk_prob": False, "qk_norm": False, "rope_scaling": YARN,
        "num_experts_per_tok": 1, "tie_word_embeddings": False,
    }),
    "Qwen3-MoE": ("qwen3moe", SOFTMAX),
    "Mixtral": ("llama", SOFTMAX | {"qk_norm": False}),
    "Qwen2-MoE": ("qwen2moe", SOFTMAX | QKV | {
        "qk_norm": False, "norm_topk_prob": False, "n_shared_experts": 1, "shared_expert_gate": True,
        "shared_expert_intermediate_size": 12, "head_dim": 6,
    }),
    "latent": ("deepseek2", MLA | {"rope_interleaved": True, "num_hidden_layers": 3}),
    "latent, experts": ("deepseek2", MLA | MOE | {
        "q_lora_rank": 10, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "norm_topk_prob": False,
        "rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 0.7}, "tie_word_embeddings": False,
    }),
}  # fmt: skip


def random_model(**changes) -> TinySeek:
    """A model with random weights, gains, biases and, for sigmoid routers, steering."""
    sizes = {"vocab_size": TOKENIZER.vocab_size + 3, "max_position_embeddings": 128}
    config = small_config(**(sizes | changes))
    model = shake(TinySeek(config), seed=3).eval()
    generator = torch.Generator().manual_seed(4)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias") and config.scoring_func == "sigmoid":
            buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))
    return model


def backend_of(pattern: str, whole: bool, vocab=None, merges=None) -> tokenizers.Tokenizer:
    """A byte-level tokenizer that cuts text by a pattern, or as GPT-2 does."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges, ignore_merges=whole))
    plain = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = plain if pattern == "GPT-2" else split_and_spell(pattern)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return backend


def command(patch, *arguments) -> int:
    """Run the command within this process; return its exit code."""
    patch.setattr(sys, "argv", ["export_gguf.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        run_main(export_gguf.main)
    return caught.value.code


def export(patch, folder, *flags, model=None, tokenizer=TOKENIZER, **changes):
    """Write a model as a checkpoint and as a GGUF file; return the model and the path of the file."""
    model = model or random_model(**changes)
    source = folder / "model.pkl"
    write_checkpoint(
        source, "SFT", weights=model.state_dict(), config=run_config(model), tokenizer=tokenizer.to_json()
    )
    assert command(patch, source, "--out", folder / "model.gguf", *flags) == 0
    return model, folder / "model.gguf"
