"""Tiny Hugging Face models with random weights, of every family that TinySeek reads, saved in folders."""

import json

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TEXT = [
    "def f(x):\n    return x + 1\n",
    "The quick brown fox jumps over the lazy dog. 你好，世界！ ",
    "0123456789 ",
]
SMALL = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 128}  # fmt: skip
EXPERTS = {"moe_intermediate_size": 20, "num_experts_per_tok": 2}
QWEN = EXPERTS | {"num_experts": 5, "head_dim": 12}
DEEP = EXPERTS | {"n_routed_experts": 6, "n_shared_experts": 2}
MLA = DEEP | {"q_lora_rank": 9, "kv_lora_rank": 12, "qk_nope_head_dim": 10, "qk_rope_head_dim": 6,
              "v_head_dim": 7, "num_key_value_heads": 4, "n_group": 1, "topk_group": 1,
              "first_k_dense_replace": 0}  # fmt: skip
WINDOWS = {"use_sliding_window": True, "sliding_window": 5, "num_hidden_layers": 3}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 32}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64,
            "short_factor": [1.0, 1.1, 1.3, 1.7], "long_factor": [1.0, 1.5, 3.0, 4.0]}  # fmt: skip
CASES = {
    "Llama, its rule, head_dim": {"head_dim": 12, "rope_parameters": LLAMA3},
    "Llama, biases everywhere": {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4},
    "Llama, tied, one key/value head": {"tie_word_embeddings": True, "num_key_value_heads": 1},
    "Llama, longrope": {"rope_parameters": LONGROPE},
    "Qwen2, tied": {"tie_word_embeddings": True},
    "Qwen2, windows in the last layers": WINDOWS | {"max_window_layers": 1},
    "Qwen2, yarn, one key/value head": {"rope_parameters": YARN, "num_key_value_heads": 1},
    "Qwen3, head_dim": {"head_dim": 14, "rms_norm_eps": 1e-5},
    "Qwen3, tied, bias": {"head_dim": 8, "tie_word_embeddings": True, "attention_bias": True},
    "Qwen3, windows in listed layers": WINDOWS | {
        "head_dim": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "Mistral, window everywhere": {"sliding_window": 6},
    "Mistral, no window, head_dim": {"sliding_window": None, "head_dim": 10, "num_key_value_heads": 1},
    "Mistral, linear": {"sliding_window": None, "rope_parameters": {
        "rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    "Qwen3Moe, one expert": QWEN | {"num_experts_per_tok": 1},
    "Qwen3Moe, normalised, dense layer in between": QWEN | {
        "norm_topk_prob": True, "num_hidden_layers": 3, "mlp_only_layers": [1]},
    "Qwen3Moe, every second layer, window": QWEN | WINDOWS | {
        "decoder_sparse_step": 2, "num_hidden_layers": 4, "attention_bias": True},
    "Qwen2Moe": EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 28},
    "Qwen2Moe, one expert, no bias": EXPERTS | {
        "num_experts": 4, "num_experts_per_tok": 1, "shared_expert_intermediate_size": 20, "qkv_bias": False},
    "Qwen2Moe, dense first layer, normalised": EXPERTS | {
        "num_experts": 4, "mlp_only_layers": [0], "shared_expert_intermediate_size": 24,
        "norm_topk_prob": True},
    "Mixtral": {"num_local_experts": 4},
    "Mixtral, window, head_dim": {"num_local_experts": 3, "sliding_window": 7, "head_dim": 10},
    "Mixtral, tied, all experts": {
        "num_local_experts": 3, "num_experts_per_tok": 3, "tie_word_embeddings": True},
    "Dots1": DEEP | {"norm_topk_prob": True, "head_dim": 12},
    "Dots1, groups, dense first layer": DEEP | {
        "n_group": 3, "topk_group": 2, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5},
    "Dots1, one expert, windows": DEEP | {
        "num_experts_per_tok": 1, "n_shared_experts": 1, "sliding_window": 4, "max_window_layers": 1},
    "DeepseekV2, greedy": MLA | {"n_group": 3, "topk_group": 1, "first_k_dense_replace": 1},  # no groups
    "DeepseekV2, groups, whole queries": MLA | {
        "n_group": 3, "topk_group": 2, "topk_method": "group_limited_greedy", "q_lora_rank": None,
        "routed_scaling_factor": 3.0, "norm_topk_prob": True},  # which transformers does not read
    "DeepseekV2, yarn, bias": MLA | {
        "attention_bias": True, "rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}},
    "DeepseekV3, groups": MLA | {"n_group": 3, "topk_group": 2, "first_k_dense_replace": 1},
    "DeepseekV3, half-split, whole queries": MLA | {
        "q_lora_rank": None, "rope_interleave": False, "norm_topk_prob": False, "num_experts_per_tok": 1},
    "DeepseekV3, yarn, tied": MLA | {
        "tie_word_embeddings": True, "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.7}},
}  # fmt: skip


def make_model(case: str, seed=0, **changes):
    """Return Hugging Face's model of a case, with random weights, gains and biases."""
    family = getattr(transformers, case.partition(",")[0] + "ForCausalLM")
    settings = SMALL | CASES[case] | changes
    if family.__name__.startswith(("Qwen3", "Dots1")) and "head_dim" not in settings:
        settings["head_dim"] = 8
    if family.__name__.startswith("Dots1"):
        settings = {"sliding_window": None} | settings
    model = family(family.config_class(**settings)).eval()
    return randomized(model, seed)


@torch.no_grad()
def randomized(model, seed=0):
    """Fill a model with numbers that give logits of about 1 and a varied text; return it."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "inv_freq" in name:
            continue
        scale = 0.1 if name in ("model.embed_tokens.weight", "lm_head.weight") else 0.25
        noise = torch.randn(tensor.shape, generator=generator) * scale
        tensor.copy_(1 + noise if "norm" in name else noise)
    return model


def tokenizer_json(size: int) -> str:
    """Return a byte-level tokenizer.json with at most `size` ids, of which the last ends a text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size - 1, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(TEXT, trainer)
    backend.add_special_tokens(["<|endoftext|>"])
    return backend.to_str()


def write_tokenizer(folder, size=300, **settings) -> None:
    """Write tokenizer.json and tokenizer_config.json, with `settings` added to the latter."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer_json(size), encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"} | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def save(case: str, folder, **options):
    """Save the model of a case, by `save_pretrained` with `options`, and a tokenizer; return the model."""
    model = make_model(case)
    model.save_pretrained(folder, **options)
    write_tokenizer(folder)
    return model
