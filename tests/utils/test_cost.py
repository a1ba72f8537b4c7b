"""The cost card against transformers' parameter counts, published totals and PyTorch's own FLOP counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from config.schema import ModelConfig, validate_section
from utils.cost import activation_numbers, cost_card


def model_config(**settings) -> ModelConfig:
    config = ModelConfig(**settings)
    validate_section("model", config)
    return config


TINY = {
    "vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 48, "max_position_embeddings": 64,
}  # fmt: skip
VARIANTS = [
    {},
    {"tie_word_embeddings": False},
    {"attention_bias": True},
    {"num_key_value_heads": 1, "head_dim": None, "num_hidden_layers": 3},
]


def qwen3(config: ModelConfig):
    """The same model in transformers, with eager attention: that is what the FLOP counter can see."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    shared = [*TINY, "attention_bias", "tie_word_embeddings"]
    settings = {name: getattr(config, name) for name in shared}
    return Qwen3ForCausalLM(Qwen3Config(**settings, attn_implementation="eager"))


@pytest.mark.parametrize("changes", VARIANTS)
def test_parameters_as_in_transformers(changes):
    config = model_config(**TINY | changes)
    model = qwen3(config)
    card = cost_card(config, batch_tokens=64)
    assert card.parameters == card.active_parameters == sum(p.numel() for p in model.parameters())

    counted = dict.fromkeys(card.groups, 0)
    for name, parameter in model.named_parameters():
        kinds = {
            "norm": "norms",
            "embed": "embedding",
            "self_attn": "attention",
            "mlp": "feed-forward",
            "lm_head": "head",
        }
        counted[next(group for word, group in kinds.items() if word in name)] += parameter.numel()
    assert {name: group.total for name, group in card.groups.items()} == counted


PUBLISHED = {  # model: settings, parameters
    "Qwen3-0.6B": ((151936, 1024, 28, 16, 8, 128, 3072, True, True), 596_049_920),
    "Llama-2-7B": ((32000, 4096, 32, 32, 32, 128, 11008, False, False), 6_738_415_616),
    "Llama-3-8B": ((128256, 4096, 32, 32, 8, 128, 14336, False, False), 8_030_261_248),
    "Mistral-7B": ((32000, 4096, 32, 32, 8, 128, 14336, False, False), 7_241_732_096),
}
FIELDS = [*list(TINY)[:7], "tie_word_embeddings", "qk_norm"]


def published(name: str) -> ModelConfig:
    return model_config(**dict(zip(FIELDS, PUBLISHED[name][0])))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_totals(name):
    assert cost_card(published(name), batch_tokens=1).parameters == PUBLISHED[name][1]


def test_published_cache_sizes():
    assert cost_card(published("Llama-3-8B"), 1).kv_cache_bytes(2) == 131_072
    assert cost_card(published("Llama-2-7B"), 1).kv_cache_bytes(2) == 524_288
    embedding = cost_card(published("Qwen3-0.6B"), 1).groups["embedding"].total
    assert 596_049_920 - embedding == 440_467_456


@pytest.mark.parametrize("changes", VARIANTS)
def test_flops_as_pytorch_counts_them(changes):
    config = model_config(**TINY | changes)
    model, tokens = qwen3(config), 16
    ids = torch.arange(tokens)[None] % config.vocab_size
    card = cost_card(config, batch_tokens=tokens, sequence_length=tokens)
    with FlopCounterMode(display=False) as forward:
        loss = model(ids).logits.sum()
    assert forward.get_total_flops() == pytest.approx(tokens * card.forward_flops(full_attention=True))
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    counted = forward.get_total_flops() + backward.get_total_flops()
    assert counted == pytest.approx(tokens * card.train_flops(full_attention=True))
    assert card.train_flops() == 6 * card.matmul_parameters + 6 * config.num_hidden_layers * (
        config.num_attention_heads * config.head_dim * tokens
    )


@pytest.mark.parametrize("window", [None, 1, 5, 16, 99])
def test_keys_seen_is_the_average_of_a_mask(window):
    tokens = 4096
    card = cost_card(model_config(**TINY, sliding_window=window and window * 64), 1, sequence_length=tokens)
    positions = torch.arange(tokens)
    distance = positions[:, None] - positions[None]
    mask = (distance >= 0) & (distance < (window * 64 if window else tokens))
    assert card.keys_seen == pytest.approx(mask.sum(1).double().mean().item(), abs=0.51)


def test_memory_of_the_optimizer_is_what_the_optimizer_holds():
    config = model_config(**TINY)
    model = qwen3(config)
    model(torch.arange(8)[None]).logits.sum().backward()
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step()
    held = sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t.dim())
    card = cost_card(config, batch_tokens=8)
    assert card.state_bytes["optimizer"] == held
    assert (
        card.state_bytes["weights"]
        == card.state_bytes["gradients"]
        == sum(p.nbytes for p in model.parameters())
    )

    matrices = [p for name, p in model.named_parameters() if "proj" in name]
    others = [p for name, p in model.named_parameters() if "proj" not in name]
    muon, adam = torch.optim.Muon(matrices), torch.optim.AdamW(others)
    muon.step()
    adam.step()
    held = sum(
        t.nbytes for o in (muon, adam) for state in o.state.values() for t in state.values() if t.dim()
    )
    assert cost_card(config, batch_tokens=8, optimizer="muon").state_bytes["optimizer"] == held


@pytest.mark.parametrize("vocabulary", [100, 3000])
def test_activations_are_of_the_size_that_autograd_keeps(vocabulary):
    config = model_config(**TINY | {"vocab_size": vocabulary, "hidden_size": 64, "intermediate_size": 192})
    model = qwen3(config)
    model.set_attn_implementation("sdpa")
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    tokens = 64
    ids = torch.arange(tokens)[None] % 100
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = torch.nn.functional.cross_entropy(model(ids).logits[0], ids[0])
    assert loss.requires_grad
    assert tokens * activation_numbers(config) * 4 == pytest.approx(sum(kept.values()), rel=0.4)


def test_the_card_reads_well():
    lines = cost_card(published("Qwen3-0.6B"), batch_tokens=8192, sequence_length=1024).lines()
    assert [line.split()[0] for line in lines] == ["parameters", "compute", "kv", "memory"]
    assert "596,049,920" in lines[0]
    assert "active" not in lines[0]
    assert "112 KiB per token in bf16, 224 KiB in fp32" in lines[2]
