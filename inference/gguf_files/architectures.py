"""The architectures of llama.cpp: the one that computes the same as a model, its settings and weights there.

    deepseek2   latent attention, dense or with experts
    glm4moe     grouped-query attention with experts and shared experts
    qwen2moe    the same with Qwen2-MoE's gate on the shared experts
    qwen3moe    experts alone, with QK-norm;   llama   without it, as in Mixtral
    qwen3       dense, with QK-norm;           llama   without it, with biases or not

Dots1 is the Hugging Face twin of our experts, but llama.cpp's `dots1` reads neither shared key/value heads
nor tied embeddings. GLM-4.5 has the same layers, and `glm4moe` reads both.

The package gguf translates names of weights from Hugging Face's. Some weights change their form: an
architecture rotates either neighbouring channels or half-split ones (modules/rope_pairing.py), and kv_b_proj
becomes two tensors, because llama.cpp always absorbs it (modules/attention/latent.py).
Source: src/models/ in https://github.com/ggml-org/llama.cpp
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from config.model import ModelConfig
from modules.rope_pairing import other_pairing
from utils.errors import UserError

STEERING = "mlp.gate.e_score_correction_bias"


@dataclass(frozen=True)
class Architecture:
    """One architecture, and which models it can express."""

    name: str
    only: dict = field(default_factory=dict)  # settings that must have this value, besides `ALWAYS`
    biases: str = r"attn_[qkv]|exp_probs_b"  # that it reads
    interleaved: bool = False  # neighbouring channels rotate
    ties: bool = True  # without an output head it takes the embedding


ALWAYS = {"final_logit_softcapping": None, "sliding_window": None, "dual_chunk_attention_config": None}
WHOLE = {"partial_rotary_factor": 1.0}
SOFTMAX = WHOLE | {"scoring_func": "softmax", "norm_topk_prob": True, "routed_scaling_factor": 1.0}
SOFTMAX |= {"first_k_dense_replace": 0, "mlp_only_layers": None}
SHARED = {"shared_expert_intermediate_size": None, "shared_expert_gate": False}
QWEN3, QWEN3MOE = Architecture("qwen3", WHOLE), Architecture("qwen3moe", SOFTMAX)
QWEN2MOE = Architecture("qwen2moe", SOFTMAX | {"norm_topk_prob": False, "qk_norm": False}, ties=False)
GLM4MOE = Architecture("glm4moe", SHARED)
LLAMA = Architecture("llama", WHOLE, biases=".*", interleaved=True)
MIXTRAL = Architecture("llama", SOFTMAX, biases=".*", interleaved=True)
# It norms the latents with the same epsilon as everything else; we do with 1e-6.
DEEPSEEK2 = Architecture("deepseek2", SHARED | {"rms_norm_eps": 1e-6}, biases="exp_probs_b", interleaved=True)


def architecture_of(config: ModelConfig) -> Architecture:
    """Return the architecture that computes the same. Raise `UserError` if llama.cpp has none."""
    E, H, shared = config.n_routed_experts, config.num_attention_heads, config.n_shared_experts
    if config.attention_kind == "mla":
        found = DEEPSEEK2
    elif not E:
        found = QWEN3 if config.qk_norm else LLAMA
    elif shared:
        found = QWEN2MOE if config.shared_expert_gate else GLM4MOE
    else:
        found = QWEN3MOE if config.qk_norm else MIXTRAL
    dense = dense_layers(config)
    only, latent = (ALWAYS | found.only).items(), found is DEEPSEEK2
    broken = [name for name, value in only if (getattr(config, name) or None) != (value or None)]
    rules = {
        "mlp_only_layers": dense != sorted(dense, reverse=True),  # only the first ones
        "n_shared_experts": latent and E and not shared,
        "topk_method": config.n_group > 1 and config.topk_method != "noaux_tc",
        "head_dim": found is QWEN2MOE and H * config.head_dim != config.hidden_size,
        # llama.cpp takes 26 or 27 layers for DeepSeek-V2-Lite, which does not compress queries.
        "q_lora_rank": latent and config.q_lora_rank and len(dense) in (26, 27),
    }
    for name in [*broken, *(name for name in rules if rules[name])]:
        given = f"model.{name}={getattr(config, name)}"
        raise UserError(f"{given}: llama.cpp's architecture {found.name}, the nearest, cannot express it")
    return found


def dense_layers(config: ModelConfig) -> list[bool]:
    """Return which layers have a dense feed-forward."""
    return [not config.is_moe_layer(layer) for layer in range(config.num_hidden_layers)]


def settings_of(config: ModelConfig, found: Architecture) -> dict:
    """Return the metadata of the shape: keys without the name of the architecture, and values."""
    E, R, rope, D = config.n_routed_experts, config.kv_lora_rank, config.qk_rope_head_dim, config.head_dim
    latent = found is DEEPSEEK2
    keys = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.moe_intermediate_size if found is MIXTRAL else config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": 1 if latent else config.num_key_value_heads,  # absorbed: the latent
        "attention.key_length": R + rope if latent else D,
        "attention.value_length": R if latent else D,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
    }
    if latent:
        keys |= {
            "attention.key_length_mla": config.qk_nope_head_dim + rope,
            "attention.value_length_mla": config.v_head_dim,
            "attention.kv_lora_rank": R,
            "attention.q_lora_rank": config.q_lora_rank or 0,
        }
    if latent or E:
        keys |= {
            "leading_dense_block_count": sum(dense_layers(config)),
            "expert_feed_forward_length": config.moe_intermediate_size,
            "expert_shared_count": config.n_shared_experts if E else 0,
        }
    if E:
        keys |= {
            "expert_count": E,
            "expert_used_count": config.num_experts_per_tok,
            "expert_shared_feed_forward_length": config.shared_width,
            "expert_gating_func": {"softmax": 1, "sigmoid": 2}[config.scoring_func],
            "expert_weights_norm": config.norm_topk_prob,
            "expert_weights_scale": float(config.routed_scaling_factor),
        }
    if E and config.topk_group < config.n_group:
        keys |= {"expert_group_count": config.n_group, "expert_group_used_count": config.topk_group}
    return keys


def tensors_of(state: dict, config: ModelConfig, found: Architecture) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield llama.cpp's names and tensors for all weights of a `TinySeek`, its MTP head left out.

    Raise `UserError` for a weight that the architecture does not read.
    """
    import gguf

    kind = {name: one for one, name in gguf.MODEL_ARCH_NAMES.items()}[found.name]
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    if config.rope_interleaved != found.interleaved:
        state = other_pairing(state, config)
    for name, weight in state.items():
        if name.startswith("mtp.") or name == "lm_head.weight" and config.tie_word_embeddings and found.ties:
            continue
        for part, piece in pieces(name, weight, config):
            place = names.get_name(part, (".weight", ".bias"))
            known = place and (place.endswith("weight") or re.search(rf"\.({found.biases})\.bias$", place))
            if known:
                yield place, piece
            elif not name.endswith(STEERING) or weight.any():  # without an equal it must be zero
                raise UserError(f"{name}: llama.cpp's architecture {found.name} has no such weight")


def pieces(name: str, weight: torch.Tensor, config: ModelConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a weight in llama.cpp's form, with a name that ends in .weight or .bias."""
    if name.endswith("experts.gate_up_proj"):  # (E, 2F, C)
        gate, up = weight.chunk(2, dim=1)
        yield name.replace("gate_up", "gate") + ".weight", gate
        yield name.replace("gate_up", "up") + ".weight", up
    elif name.endswith("kv_b_proj.weight"):  # (H * (nope + Dv), R): of each head the keys', then the values'
        sizes = config.qk_nope_head_dim, config.v_head_dim
        keys, values = weight.unflatten(0, (config.num_attention_heads, -1)).split(sizes, dim=1)
        yield name.replace("kv_b", "k_b"), keys.transpose(1, 2)  # (H, R, nope)
        yield name.replace("kv_b", "v_b"), values  # (H, Dv, R)
    elif name.endswith("experts.down_proj"):
        yield name + ".weight", weight
    elif name.endswith(STEERING):
        yield name.replace("correction_bias", "correction.bias"), weight
    else:
        yield name, weight
