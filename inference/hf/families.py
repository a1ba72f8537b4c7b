"""The differences between families of Hugging Face decoders: names of settings and weights, as data. Encoders
and encoder-decoders are in other_families.py.

All of them are one decoder, and TinySeek's names are Hugging Face's, so a family is a few exceptions. The
same table serves import_hf.py, which reads `config.json` and weights, and export_hf.py, which writes them.
"""

from dataclasses import dataclass, field

REQUIRED = object()  # a setting that config.json must have

# name -> its value where config.json has none; None: derived, as in `ModelConfig`
DECODER = {
    "vocab_size": REQUIRED, "hidden_size": REQUIRED, "num_hidden_layers": REQUIRED,
    "num_attention_heads": REQUIRED, "num_key_value_heads": REQUIRED, "intermediate_size": REQUIRED,
    "max_position_embeddings": REQUIRED, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "initializer_range": 0.02,
}  # fmt: skip
EXPERTS = {"num_experts_per_tok": REQUIRED, "moe_intermediate_size": REQUIRED, "norm_topk_prob": False}
DEEPSEEK_EXPERTS = EXPERTS | {
    "n_routed_experts": REQUIRED, "n_shared_experts": REQUIRED, "routed_scaling_factor": 1.0,
    "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1,
}  # fmt: skip
LATENT = {
    "q_lora_rank": 1536, "kv_lora_rank": REQUIRED, "qk_nope_head_dim": REQUIRED,
    "qk_rope_head_dim": REQUIRED, "v_head_dim": REQUIRED, "attention_bias": False,
}  # fmt: skip
QWEN_BIAS = {"qk_norm": False, "attention_bias": True, "attention_out_bias": False}
SOFTMAX = {"scoring_func": "softmax", "n_shared_experts": 0}


@dataclass(frozen=True)
class Family:
    """One `model_type` of Hugging Face."""

    architecture: str
    settings: dict  # settings in config.json: name -> default
    fixed: dict = field(default_factory=dict)  # settings of ours that are the same in all its models
    renamed: dict = field(default_factory=dict)  # our setting -> its names in config.json, the first to write
    needs: dict = field(default_factory=dict)  # further entries of config.json with the only value supported
    rope_theta: float = 10000.0  # where config.json has none
    # layers with a window: `none`; `all`; `listed` in layer_types, or those from max_window_layers on
    windows: str = "none"
    window: int | None = None  # where config.json has no sliding_window
    max_window_layers: int | None = None  # where it has none; None: layer_types must say
    window_switch: bool = False  # windows count only with use_sliding_window
    dense_layers: bool = False  # mlp_only_layers and decoder_sparse_step say which layers have no experts
    divisible: bool = False  # transformers refuses a hidden_size that num_attention_heads does not divide
    weights: dict = field(default_factory=dict)  # part of our weight's name -> of theirs
    expert: tuple = ("gate_proj", "up_proj", "down_proj")  # the matrices of one expert


# The order counts: export takes the first family that can hold a model.
FAMILIES = {
    "qwen3": Family(
        "Qwen3ForCausalLM", DECODER | {"head_dim": 128, "attention_bias": False}, {"qk_norm": True},
        windows="listed", window_switch=True, window=4096, max_window_layers=28,
    ),
    "llama": Family(
        "LlamaForCausalLM",
        DECODER | {"num_key_value_heads": None, "head_dim": None, "attention_bias": False, "mlp_bias": False},
        {"qk_norm": False}, divisible=True,
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM", DECODER, QWEN_BIAS,
        windows="listed", window_switch=True, window=4096, max_window_layers=28,
    ),
    "mistral": Family(
        "MistralForCausalLM", DECODER | {"head_dim": None}, {"qk_norm": False}, windows="all", window=4096,
    ),
    "dots1": Family(
        "Dots1ForCausalLM", DECODER | DEEPSEEK_EXPERTS | {"head_dim": None, "attention_bias": False},
        {"qk_norm": True, "scoring_func": "sigmoid"}, windows="listed", window=4096, max_window_layers=62,
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        DECODER | EXPERTS | {"head_dim": None, "attention_bias": False, "n_routed_experts": REQUIRED},
        SOFTMAX | {"qk_norm": True}, {"n_routed_experts": ("num_experts", "num_local_experts")},
        windows="all", window_switch=True, window=4096, dense_layers=True,
    ),
    "qwen2_moe": Family(
        "Qwen2MoeForCausalLM",
        DECODER | EXPERTS | {"n_routed_experts": REQUIRED, "shared_expert_intermediate_size": REQUIRED,
                             "attention_bias": True},
        SOFTMAX | {"qk_norm": False, "attention_out_bias": False, "n_shared_experts": 1,
                   "shared_expert_gate": True},
        {"n_routed_experts": ("num_experts", "num_local_experts"), "attention_bias": ("qkv_bias",)},
        windows="listed", window_switch=True, window=4096, dense_layers=True,
        weights={".mlp.shared_experts.": ".mlp.shared_expert."},
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        DECODER | {"head_dim": None, "n_routed_experts": REQUIRED, "num_experts_per_tok": REQUIRED,
                   "rms_norm_eps": 1e-5, "moe_intermediate_size": REQUIRED},
        SOFTMAX | {"qk_norm": False, "norm_topk_prob": True},
        {"n_routed_experts": ("num_local_experts", "num_experts"),
         "moe_intermediate_size": ("intermediate_size",)},
        rope_theta=1e6, windows="all", weights={".mlp.": ".block_sparse_moe."}, expert=("w1", "w3", "w2"),
    ),
    "deepseek_v3": Family(
        "DeepseekV3ForCausalLM",
        DECODER | DEEPSEEK_EXPERTS | LATENT | {
            "norm_topk_prob": True, "routed_scaling_factor": 2.5, "rope_interleaved": True,
            "first_k_dense_replace": 3, "n_group": 8, "topk_group": 4,
        },
        {"attention_kind": "mla", "scoring_func": "sigmoid", "qk_norm": False},
        {"rope_interleaved": ("rope_interleave",)},
        {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1},
    ),
    "deepseek_v2": Family(
        "DeepseekV2ForCausalLM",
        DECODER | DEEPSEEK_EXPERTS | LATENT | {"topk_method": "greedy", "num_key_value_heads": None},
        # transformers neither reads norm_topk_prob here nor the pairing, which is interleaved
        {"attention_kind": "mla", "scoring_func": "softmax", "norm_topk_prob": False,
         "rope_interleaved": True, "qk_norm": False},
        needs={"scoring_func": "softmax", "moe_layer_freq": 1, "mlp_bias": False}, divisible=True,
    ),
}  # fmt: skip
