"""The decoder with experts and with latent attention against Hugging Face's models with the same weights."""

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Dots1Config,
    Dots1ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from inference.generation.speculative import draft
from model.caches import make_cache
from model.tinyseek import TinySeek
from tests.modules.tools import shake, small_config
from utils.cost import cost_card

MOE = {"n_routed_experts": 6, "num_experts_per_tok": 3, "n_shared_experts": 2, "moe_intermediate_size": 20}
SOFTMAX = MOE | {"n_shared_experts": 0, "scoring_func": "softmax"}
MLA = {"attention_kind": "mla", "kv_lora_rank": 12, "qk_nope_head_dim": 10, "qk_rope_head_dim": 6,
       "v_head_dim": 7}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "mscale": 1.0,
        "mscale_all_dim": 0.7}  # fmt: skip
GROUPS = {"n_routed_experts": 8, "n_group": 4, "topk_group": 2}
SHAPES = {
    "Dots1": MOE,
    "Dots1, first layer dense": MOE | {"first_k_dense_replace": 1, "num_hidden_layers": 3},
    "Dots1, no shared expert": MOE | {"n_shared_experts": 0, "routed_scaling_factor": 2.5},
    "Dots1, groups of experts": MOE | GROUPS,
    "Dots1, weights not normalised": MOE | {"norm_topk_prob": False, "tie_word_embeddings": False},
    "Dots1, one expert": MOE | {"num_experts_per_tok": 1, "norm_topk_prob": False},
    "Dots1, all experts": MOE | {"num_experts_per_tok": 6},
    "Qwen3Moe": SOFTMAX,
    "Qwen3Moe, not normalised": SOFTMAX | {"norm_topk_prob": False, "num_experts_per_tok": 1},
    "Qwen3Moe, first layer dense": SOFTMAX | {"first_k_dense_replace": 1},
    "DeepseekV3": MOE | MLA,
    "DeepseekV3, queries compressed": MOE | MLA | {"q_lora_rank": 9, "tie_word_embeddings": False},
    "DeepseekV3, yarn, groups, bias": MOE | MLA | GROUPS | {"rope_scaling": YARN, "attention_bias": True,
                                                            "q_lora_rank": 9},
    "DeepseekV3, dense": MLA,
}  # fmt: skip
NAMES = (
    "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size "
    "rms_norm_eps max_position_embeddings attention_bias tie_word_embeddings"
)
EXPERTS = "num_experts_per_tok moe_intermediate_size norm_topk_prob"
DEEPSEEK = "n_routed_experts n_shared_experts n_group topk_group routed_scaling_factor first_k_dense_replace"
LATENT = "q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim"


def twins(name, dtype=torch.float32, seed=1, **changes):
    """Our model and Hugging Face's, with the same random weights, gains and biases, loaded strictly."""
    config = small_config(**SHAPES[name], **changes)
    kind = name.partition(",")[0]
    names, extra = NAMES.split() + EXPERTS.split(), {}
    if kind == "Qwen3Moe":
        extra = {"num_experts": config.n_routed_experts,
                 "mlp_only_layers": list(range(config.first_k_dense_replace))}  # fmt: skip
    else:
        names += DEEPSEEK.split()
    if kind == "DeepseekV3":
        names += LATENT.split()
        extra["rope_interleave"] = config.rope_interleaved
    else:
        names += ["head_dim"]
        extra["sliding_window"] = None
    values = {one: getattr(config, one) for one in names}
    if kind == "DeepseekV3" and not config.n_routed_experts:  # all layers dense
        values |= {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 99}
    if kind == "DeepseekV3":
        values["num_key_value_heads"] = config.num_attention_heads
    rope = {"rope_type": "default", "rope_theta": config.rope_theta, **(config.rope_scaling or {})}
    shape, cls = {
        "Dots1": (Dots1Config, Dots1ForCausalLM),
        "Qwen3Moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
        "DeepseekV3": (DeepseekV3Config, DeepseekV3ForCausalLM),
    }[kind]
    theirs = cls(shape(**values, **extra, rope_parameters=rope, attn_implementation="eager"))
    theirs.set_experts_implementation("eager")
    ours = shake(TinySeek(config), seed)
    generator = torch.Generator().manual_seed(seed)
    for module in ours.modules():
        if hasattr(module, "e_score_correction_bias"):
            bias = module.e_score_correction_bias
            bias.copy_(torch.randn(bias.shape, generator=generator) * (0 if kind == "Qwen3Moe" else 0.2))
    weights = ours.state_dict()
    if kind == "Qwen3Moe":  # it has no such buffer
        weights = {key: value for key, value in weights.items() if "correction" not in key}
    empty = {key: value for key, value in theirs.state_dict().items() if not value.numel()}  # none shared
    theirs.load_state_dict(weights | empty, strict=True)
    return ours.to(dtype).eval(), theirs.to(dtype).eval()


def text(B, T, seed=0):
    return torch.randint(0, 61, (B, T), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", SHAPES)
def test_logits_are_hugging_faces(name):
    """One token, an odd length, two rows; the logits are of order 1 and more, so 1e-5 is strict."""
    ours, theirs = twins(name)
    for shape in ((1, 1), (2, 13)):
        ids = text(*shape)
        with torch.no_grad():
            expected = theirs(input_ids=ids).logits
            ours_logits = ours(ids).logits
        assert expected.std() > 0.3
        torch.testing.assert_close(ours_logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("interleaved", [False, True])
def test_both_pairings_of_rotary_channels(interleaved):
    ours, theirs = twins("DeepseekV3", rope_interleaved=interleaved)
    ids = text(2, 13)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(input_ids=ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("implementation", ["loop", "grouped"])
def test_loss_and_every_gradient_are_hugging_faces(name, implementation):
    """In fp64, the router's included: it learns from the language-model loss. Their routers and some of
    their norms compute in fp32 even so, which is where the last digits go."""
    ours, theirs = twins(name, moe_implementation=implementation)
    ids = text(2, 11)
    labels = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], dim=1)
    ours_loss = ours(ids, labels=labels).loss_sum / 20
    logits = theirs(input_ids=ids).logits[:, :-1].flatten(0, 1)
    their_loss = F.cross_entropy(logits, ids[:, 1:].flatten())
    torch.testing.assert_close(ours_loss, their_loss, rtol=0, atol=2e-6)
    ours_loss.backward()
    their_loss.backward()
    expected = dict(theirs.named_parameters())
    for key, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[key].grad, rtol=1e-4, atol=2e-6)
        if key.endswith("mlp.gate.weight"):
            assert parameter.grad.abs().max() > 1e-4, key


def test_padding_on_the_left_changes_nothing_for_the_real_tokens():
    ours, _ = twins("Dots1", torch.float64)
    ids = text(1, 7)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], dim=1)
    mask = torch.tensor([[0] * 3 + [1] * 7])
    with torch.no_grad():
        alone = ours(ids).logits
        positions = torch.arange(-3, 7).clamp_min(0)[None]
        beside = ours(padded, padding_mask=mask, position_ids=positions).logits[:, 3:]
    torch.testing.assert_close(beside, alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("changes", "bytes_per_token"),
    [
        ({"num_key_value_heads": 8}, 4 * 2 * 8 * 32 * 2),  # MHA: layers, keys and values, heads, head dim
        ({"num_key_value_heads": 4}, 4 * 2 * 4 * 32 * 2),  # GQA
        ({"attention_kind": "mla"}, 4 * (64 + 16) * 2),  # MLA: one latent and one rotated key for all heads
    ],
)
def test_the_cache_takes_what_the_cost_card_says(changes, bytes_per_token):
    """Of the default shape in bf16: measured in memory, computed by the card, and by hand."""
    shape = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8, "head_dim": 32}
    config = small_config(**shape, **MOE, **changes)
    model = TinySeek(config).bfloat16()
    assert make_cache(model, 3, 100).bytes == 3 * 100 * bytes_per_token
    assert cost_card(model, 64).kv_cache_bytes() == bytes_per_token


@pytest.mark.parametrize("kind", ["parallel", "sequential"])
def test_the_second_loss_is_that_of_the_token_after_the_next(kind):
    """Column by column: what the head says at t, after it was told token t+1, is scored on token t+2."""
    config = small_config(**MOE, mtp=kind)
    model = shake(TinySeek(config), 3).double()
    text_ids = text(2, 12)
    ids, labels = text_ids[:, :-1], text_ids[:, 1:].clone()
    labels[0, 4] = -100  # token 5 of the first row is not to be learned
    output = model(ids, labels=labels, mtp=True)
    expected = torch.zeros((), dtype=torch.float64)
    for row in range(2):
        for t in range(10):  # the last column has no token after the next within its row
            if labels[row, t + 1] == -100:
                continue
            hidden = model(ids[row : row + 1, : t + 1]).hidden
            logits, _ = draft(model, hidden, text_ids[row : row + 1, 1 : t + 2])
            expected = expected + F.cross_entropy(logits[:, -1], text_ids[row, t + 2 : t + 3])
    torch.testing.assert_close(output.mtp_loss_sum, expected, rtol=1e-10, atol=1e-10)
    first = torch.autograd.grad(output.mtp_loss_sum, model.model.embed_tokens.weight, retain_graph=True)[0]
    second = torch.autograd.grad(expected, model.model.embed_tokens.weight)[0]
    torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-10)
    assert len(output.routings) == (3 if kind == "sequential" else 2)
    assert model(ids, labels=labels).mtp_loss_sum is None
