"""Settings that further families of Hugging Face need: biases, types of layers, a gate for shared experts,
groups of experts ranked by their best. Each model against Hugging Face's with the same random weights."""

import pytest
import torch
import torch.nn.functional as F
import transformers

from inference.fast.decoder import FastDecoder, refusal
from model.caches import make_cache
from model.tinyseek import TinySeek
from tests.modules.tools import shake, small_config

PLAIN = {"qk_norm": False}
QWEN2 = PLAIN | {"attention_bias": True, "attention_out_bias": False}
EXPERTS = {"scoring_func": "softmax", "n_routed_experts": 6, "num_experts_per_tok": 3, "n_shared_experts": 0,
           "moe_intermediate_size": 20}  # fmt: skip
SHARED = {"n_shared_experts": 1, "shared_expert_intermediate_size": 27, "shared_expert_gate": True}
LOCAL, FULL = "sliding_attention", "full_attention"
DEEPSEEK = EXPERTS | {
    "attention_kind": "mla", "kv_lora_rank": 12, "qk_nope_head_dim": 10, "qk_rope_head_dim": 6,
    "v_head_dim": 7, "rope_interleaved": True, "n_shared_experts": 2, "norm_topk_prob": False,
    "routed_scaling_factor": 1.7, "first_k_dense_replace": 1, "num_hidden_layers": 3, "n_routed_experts": 8,
}  # fmt: skip
BEST = {"topk_method": "group_limited_greedy"}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "mscale": 1.0,
        "mscale_all_dim": 0.7}  # fmt: skip
SHAPES = {  # the class in transformers, a comma, what is special
    "Llama, all biases": PLAIN | {"attention_bias": True, "mlp_bias": True},
    "Llama, biases in feed-forwards": PLAIN | {"mlp_bias": True, "num_key_value_heads": 1},
    "Qwen2": QWEN2,
    "Qwen2, later layers local": QWEN2 | {"sliding_window": 3, "num_hidden_layers": 3,
                                          "layer_types": [FULL, LOCAL, LOCAL]},
    "Qwen2, in no order": QWEN2 | {"sliding_window": 2, "num_hidden_layers": 5,
                                   "layer_types": [LOCAL, FULL, FULL, LOCAL, FULL]},
    "Qwen3Moe, one layer without": EXPERTS | {"mlp_only_layers": [1], "num_hidden_layers": 3},
    "Qwen3Moe, every second": EXPERTS | {"mlp_only_layers": [0, 2], "num_hidden_layers": 4},
    "Qwen2Moe": QWEN2 | EXPERTS | SHARED | {"norm_topk_prob": False},
    "Qwen2Moe, normed, windows": QWEN2 | EXPERTS | SHARED | {
        "mlp_only_layers": [0], "num_hidden_layers": 3, "sliding_window": 4,
        "layer_types": [LOCAL, FULL, LOCAL]},
    "DeepseekV2": DEEPSEEK,
    "DeepseekV2, two of four groups": DEEPSEEK | BEST | {"n_group": 4, "topk_group": 2, "q_lora_rank": 9},
    "DeepseekV2, yarn, biases, groups of one": DEEPSEEK | BEST | {
        "n_group": 8, "topk_group": 3, "rope_scaling": YARN, "attention_bias": True, "q_lora_rank": 9},
}  # fmt: skip
SAME = (
    "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size rms_norm_eps mlp_bias "
    "max_position_embeddings attention_bias tie_word_embeddings sliding_window num_experts_per_tok n_group "
    "moe_intermediate_size shared_expert_intermediate_size n_routed_experts n_shared_experts topk_group "
    "routed_scaling_factor first_k_dense_replace norm_topk_prob q_lora_rank kv_lora_rank qk_nope_head_dim "
    "qk_rope_head_dim v_head_dim mlp_only_layers"
)


def their_settings(name, config) -> dict:
    """The settings of a configuration in the words of the family."""
    kind, known = name.partition(",")[0], dir(getattr(transformers, f"{name.partition(',')[0]}Config")())
    settings = {key: getattr(config, key) for key in SAME.split() if key in known}
    settings["num_key_value_heads"] = config.num_key_value_heads
    if kind == "DeepseekV2":
        settings["num_key_value_heads"] = config.num_attention_heads
        settings["topk_method"] = config.topk_method if config.n_group > 1 else "greedy"
    else:
        settings |= {"head_dim": config.head_dim, "num_experts": config.n_routed_experts}
    if config.layer_types is not None:
        settings |= {"use_sliding_window": True, "layer_types": config.layer_types}
    if name == "Qwen3Moe, every second":
        settings |= {"decoder_sparse_step": 2, "mlp_only_layers": []}
    rope = {"rope_type": "default", "rope_theta": config.rope_theta, **(config.rope_scaling or {})}
    return settings | {"rope_parameters": rope, "attn_implementation": "eager"}


def twins(name, dtype=torch.float32, seed=1, **changes):
    """Our model and Hugging Face's, with the same random weights, gains and biases, loaded strictly."""
    config, kind = small_config(**SHAPES[name], **changes), name.partition(",")[0]
    shape = getattr(transformers, f"{kind}Config")(**their_settings(name, config))
    theirs = getattr(transformers, f"{kind}ForCausalLM")(shape)
    if config.n_routed_experts:
        theirs.set_experts_implementation("eager")
    ours = shake(TinySeek(config), seed)
    weights = {their_name(kind, key): value for key, value in ours.state_dict().items()}
    theirs.load_state_dict({key: value for key, value in weights.items() if key}, strict=True)
    return ours.to(dtype).eval(), theirs.to(dtype).eval()


def their_name(kind, key) -> str:
    """The name of a parameter there; empty for the router's bias, which is zero in these families."""
    if key.endswith("e_score_correction_bias"):
        return ""
    return key.replace("shared_experts.", "shared_expert.") if kind == "Qwen2Moe" else key


def text(B, T, seed=0):
    return torch.randint(0, 61, (B, T), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_logits_are_hugging_faces(name):
    """One token, and rows longer than any window; within 1e-5 of the logits' spread, which is 1.5 to 1.7:
    each of the two is about that far from the same model in fp64."""
    ours, theirs = twins(name)
    assert sum(p.numel() for p in ours.parameters()) == theirs.num_parameters()
    for shape in ((1, 1), (2, 13)):
        expected = theirs(text(*shape)).logits
        assert expected.std() > 0.3
        atol = 1e-5 * max(1.0, expected.std().item())
        torch.testing.assert_close(ours(text(*shape)).logits, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("name", SHAPES)
def test_loss_and_every_gradient_are_hugging_faces(name):
    """In fp64; their routers and some norms compute in fp32 even so, which is where the last digits go."""
    ours, theirs = twins(name, torch.float64)
    ids = text(2, 11)
    labels = F.pad(ids[:, 1:], (0, 1), value=-100)
    (ours(ids, labels=labels).loss_sum / 20).backward()
    logits = theirs(ids).logits[:, :-1].flatten(0, 1)
    F.cross_entropy(logits, ids[:, 1:].flatten()).backward()
    expected = dict(theirs.named_parameters())
    for key, parameter in ours.named_parameters():
        grad = expected[their_name(name.partition(",")[0], key)].grad
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=2e-6)
        assert grad.abs().max() > 1e-7, key


@pytest.mark.parametrize("name", SHAPES)
@torch.inference_mode()
def test_with_a_cache_and_on_the_fast_path(name):
    """Token after token gives the logits of the whole row, on the plain path, and on the fast one unless it
    refuses: windows and latent attention alone are left out."""
    model, _ = twins(name, torch.float64)
    ids = text(1, 14)
    whole, cache = model(ids).logits[0], make_cache(model, 1, 14)
    pieces = [model(piece, cache=cache).logits[0] for piece in ids.split([6, 1, 4, 1, 1, 1], dim=1)]
    torch.testing.assert_close(torch.cat(pieces), whole, rtol=0, atol=1e-12)
    assert bool(refusal(model)) == ("sliding_window" in SHAPES[name] or "Deepseek" in name)
    if not refusal(model):
        fast, cache = FastDecoder(model), make_cache(model, 1, 14)
        steps = [fast.step([token], cache)[0] for token in ids[0].tolist()]
        torch.testing.assert_close(torch.cat(steps), whole, rtol=0, atol=1e-12)
