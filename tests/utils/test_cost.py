"""The cost card against transformers' parameter counts, published totals and PyTorch's own FLOP counter."""

from dataclasses import replace

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode
from transformers.modeling_layers import MtpLayer

from config.checks import validate_section
from config.model import ModelConfig
from config.schema import OptimConfig
from model.caches import make_cache
from model.tinyseek import TinySeek
from modules.mtp import ParallelMTP
from train.engine.optimizers import build_optimizers
from utils.cost import CostCard, cost_card


def model_config(**settings) -> ModelConfig:
    config = ModelConfig(**settings)
    validate_section("model", config)
    return config


def card_of(config: ModelConfig, *arguments, **settings) -> CostCard:
    """The card of a model without memory."""
    with torch.device("meta"):
        return cost_card(TinySeek(config), *arguments, **settings)


TINY = {
    "vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 48, "max_position_embeddings": 64,
}  # fmt: skip
DENSE = [
    {},
    {"tie_word_embeddings": False},
    {"attention_bias": True},
    {"num_key_value_heads": 1, "head_dim": None, "num_hidden_layers": 3},
]
EXPERTS = {
    "num_hidden_layers": 3, "first_k_dense_replace": 1, "n_routed_experts": 6, "num_experts_per_tok": 2,
    "n_shared_experts": 3, "moe_intermediate_size": 20,
}  # fmt: skip
LATENT = {
    "attention_kind": "mla", "qk_norm": False, "num_key_value_heads": 4, "kv_lora_rank": 10,
    "qk_nope_head_dim": 9, "qk_rope_head_dim": 6, "v_head_dim": 11,
}  # fmt: skip
SOFTMAX = EXPERTS | {"n_shared_experts": 0, "first_k_dense_replace": 0, "scoring_func": "softmax"}
VARIANTS = {  # by the class in transformers that has such layers
    "Qwen3": DENSE,
    "Llama": [{"qk_norm": False, "attention_bias": True, "mlp_bias": True}],
    "Qwen2": [{"qk_norm": False, "attention_bias": True, "attention_out_bias": False}],
    "Qwen3Moe": [SOFTMAX, SOFTMAX | {"mlp_only_layers": [1]}],
    "Qwen2Moe": [
        SOFTMAX | {
            "qk_norm": False, "attention_bias": True, "attention_out_bias": False, "mlp_only_layers": [0],
            "n_shared_experts": 1, "shared_expert_intermediate_size": 27, "shared_expert_gate": True,
        },
    ],
    "Dots1": [
        EXPERTS,
        EXPERTS | {"first_k_dense_replace": 0, "n_shared_experts": 1, "tie_word_embeddings": False},
        EXPERTS | {"first_k_dense_replace": 2, "num_experts_per_tok": 6},
    ],
    "DeepseekV3": [
        EXPERTS | LATENT,
        EXPERTS | LATENT | {"q_lora_rank": 14, "attention_bias": True, "tie_word_embeddings": False},
    ],
}
CASES = [(name, changes) for name, variants in VARIANTS.items() for changes in variants]
SAME_NAMES = [*TINY, *EXPERTS, *LATENT, "q_lora_rank", "attention_bias", "tie_word_embeddings", "mlp_bias",
              "mlp_only_layers", "shared_expert_intermediate_size"]  # fmt: skip


def twin(name: str, config: ModelConfig, **settings):
    """The same model in transformers, eager in attention and experts, as the FLOP counter needs it."""
    settings = {key: getattr(config, key) for key in SAME_NAMES if hasattr(config, key)} | settings
    if name in ("Qwen3Moe", "Qwen2Moe"):
        settings["num_experts"] = settings.pop("n_routed_experts")
    if name in ("Qwen3", "Dots1", "Qwen3Moe"):
        settings["sliding_window"] = None
    if name == "DeepseekV3":
        settings |= {"n_group": 1, "topk_group": 1}
        del settings["head_dim"]
    settings["attn_implementation"] = settings.get("attn_implementation", "eager")
    hf_config = getattr(transformers, f"{name}Config")(**settings)
    model = getattr(transformers, f"{name}ForCausalLM")(hf_config)
    if config.n_routed_experts:
        model.set_experts_implementation("eager")
    return model


def part_of(name: str) -> str:
    """Which group a parameter of the twin belongs to."""
    parts = {
        "norm": "norms", "embed": "embedding", "shared_expert": "shared experts",
        "experts": "routed experts", "mlp.gate.": "router", "self_attn": "attention",
        "mlp": "feed-forward", "lm_head": "head",
    }  # fmt: skip
    return next(group for word, group in parts.items() if word in name)


@pytest.mark.parametrize("name, changes", CASES)
def test_parameters_as_in_transformers(name, changes):
    config = model_config(**TINY | changes)
    model = twin(name, config)
    card = card_of(config, batch_tokens=64)
    counted = dict.fromkeys(card.groups, 0)
    for key, parameter in model.named_parameters():
        counted[part_of(key)] += parameter.numel()
    assert {group: numbers.total for group, numbers in card.groups.items()} == counted
    assert card.parameters == sum(p.numel() for p in model.parameters())
    idle = 0  # weights of the experts that one token did not choose
    for layer in model.model.layers:
        if hasattr(layer.mlp, "experts"):
            sizes = [stack[0].numel() for stack in layer.mlp.experts.parameters()]
            idle += (config.n_routed_experts - config.num_experts_per_tok) * sum(sizes)
    assert card.active_parameters == card.parameters - idle


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
    assert card_of(published(name), batch_tokens=1).parameters == PUBLISHED[name][1]


def test_published_cache_sizes():
    assert card_of(published("Llama-3-8B"), 1).kv_cache_bytes(2) == 131_072
    assert card_of(published("Llama-2-7B"), 1).kv_cache_bytes(2) == 524_288
    embedding = card_of(published("Qwen3-0.6B"), 1).groups["embedding"].total
    assert 596_049_920 - embedding == 440_467_456


BIG = {
    "Qwen3-30B-A3B": {
        "vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32,
        "num_key_value_heads": 4, "head_dim": 128, "n_routed_experts": 128, "num_experts_per_tok": 8,
        "n_shared_experts": 0, "moe_intermediate_size": 768, "tie_word_embeddings": False,
    },
    "DeepSeek-V3": {
        "vocab_size": 129280, "hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 128,
        "intermediate_size": 18432, "attention_kind": "mla", "q_lora_rank": 1536, "kv_lora_rank": 512,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 256,
        "num_experts_per_tok": 8, "n_shared_experts": 1, "moe_intermediate_size": 2048,
        "first_k_dense_replace": 3, "tie_word_embeddings": False, "num_key_value_heads": 128,
    },
}  # fmt: skip


def test_published_mixtures_of_experts():
    qwen = card_of(model_config(**BIG["Qwen3-30B-A3B"]), 1)
    assert (qwen.parameters, qwen.active_parameters) == (30_532_122_624, 3_353_032_704)
    deepseek = card_of(model_config(**BIG["DeepSeek-V3"]), 1)
    assert deepseek.parameters == 671_026_419_200 - 58 * 256  # the published files hold the routers' biases
    assert deepseek.active_parameters / 1e9 == pytest.approx(37.55, abs=0.01)
    assert deepseek.kv_cache_bytes(2) == 70_272
    # README_WEIGHTS.md of the release: 36.7B active with one of the two tables; the MTP module has 11.5B of
    # its own and 2.4B active with both tables: the numbers of its decoder layer, without eh_proj
    table, eh_proj = deepseek.groups["embedding"].total, 2 * 7168 * 7168
    assert (deepseek.active_parameters - table) / 1e9 == pytest.approx(36.7, abs=0.1)
    extra = card_of(model_config(**BIG["DeepSeek-V3"], mtp="sequential"), 1)
    assert (extra.groups["mtp"].total - eh_proj) / 1e9 == pytest.approx(11.5, abs=0.01)
    assert (extra.groups["mtp"].multiplied - eh_proj + table) / 1e9 == pytest.approx(2.4, abs=0.05)
    assert extra.active_parameters == deepseek.active_parameters


def all_seen(card: CostCard, tokens: int) -> CostCard:
    """The card if every query of every layer had `tokens` keys."""
    return replace(card, keys_seen=[tokens for _ in card.keys_seen])


def counted_flops(run) -> tuple[int, int]:
    """FLOPs of a forward pass, and of it together with its backward pass, as PyTorch counts them."""
    with FlopCounterMode(display=False) as forward:
        out = run()
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    return forward.get_total_flops(), forward.get_total_flops() + backward.get_total_flops()


@pytest.mark.parametrize("name, changes", CASES)
def test_flops_as_pytorch_counts_them(name, changes):
    config = model_config(**TINY | changes)
    model, tokens = twin(name, config), 16
    ids = torch.arange(tokens)[None] % config.vocab_size
    card = card_of(config, batch_tokens=tokens, sequence_length=tokens)
    forward, both = counted_flops(lambda: model(ids).logits)
    full = all_seen(card, tokens)  # masked keys cost as much there
    assert (forward, both) == (tokens * full.forward_flops(), tokens * full.train_flops())
    scores, values = (15, 11) if config.attention_kind == "mla" else (config.head_dim, config.head_dim)
    half = 3 * config.num_hidden_layers * config.num_attention_heads * (scores + values) * tokens
    assert card.train_flops() == 6 * card.matmul_parameters + half


def mtp_block(longer) -> MtpLayer:
    """The block of transformers, whose decoder layer is the last of a model that is one layer longer."""
    layer_class, norm_class = type(longer.model.layers[0]), type(longer.model.norm)
    return MtpLayer(longer.config, layer_class, norm_class, longer.config.num_hidden_layers - 1)


@pytest.mark.parametrize("name, changes", CASES)
def test_sequential_mtp_costs_what_the_layer_in_transformers_does(name, changes):
    plain, config = model_config(**TINY | changes), model_config(**TINY | changes | {"mtp": "sequential"})
    tokens = 16
    card = card_of(config, batch_tokens=tokens, sequence_length=tokens)
    longer = twin(name, config, num_hidden_layers=config.num_hidden_layers + 1)
    mtp = mtp_block(longer)
    assert card.groups["mtp"].total == sum(p.numel() for p in mtp.parameters())
    without = card_of(plain, tokens, tokens)
    assert card.parameters - without.parameters == card.groups["mtp"].total
    assert card.active_parameters == without.active_parameters
    assert card.forward_flops() == without.forward_flops()
    assert card.train_flops() - without.train_flops() == 3 * card.mtp_flops()

    hidden, embeddings = torch.randn(2, 1, tokens, config.hidden_size, requires_grad=True)
    rotary = longer.model.rotary_emb(hidden, torch.arange(tokens)[None])

    def run():
        return longer.lm_head(mtp(embeddings, hidden, rotary, None, None, None))

    forward, both = counted_flops(run)
    assert forward == tokens * all_seen(card, tokens).mtp_flops()
    assert both == 3 * forward


def test_parallel_mtp_costs_its_block_and_a_second_head():
    config, tokens = model_config(**TINY, mtp="parallel"), 16
    card = card_of(config, batch_tokens=tokens, sequence_length=tokens)
    block = ParallelMTP(config)
    head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
    assert card.groups["mtp"].total == sum(p.numel() for p in block.parameters())
    hidden = torch.randn(1, tokens, config.hidden_size, requires_grad=True)
    block.norm = torch.nn.Identity()  # its backward sums rows by a product with ones, which would be counted
    forward, both = counted_flops(lambda: head(block(hidden)[0]))
    assert forward == tokens * card.mtp_flops() == tokens * all_seen(card, tokens).mtp_flops()
    assert both == 3 * forward
    without = card_of(model_config(**TINY), tokens, tokens)
    assert card.forward_flops() == without.forward_flops()
    assert card.train_flops() == without.train_flops() + 3 * card.mtp_flops()
    assert card.active_parameters == without.active_parameters


@pytest.mark.parametrize("window", [None, 8, 40, 128, 500, 792])
@pytest.mark.parametrize("sinks", [0, 4, 20])
def test_keys_seen_is_the_average_of_a_mask(window, sinks):
    tokens, settings = 512, {"sliding_window": window, "attention_sinks": sinks if window else 0}
    card = card_of(model_config(**TINY, **settings), 1, sequence_length=tokens)
    positions = torch.arange(tokens)
    distance = positions[:, None] - positions[None]
    mask = (distance >= 0) & ((distance < (window or tokens)) | (positions < sinks))
    mean = mask.sum(1).double().mean().item()
    assert card.keys_seen == pytest.approx([mean, mean], abs=0.51)


LAYERS = [{"sliding_window_pattern": 2},
          {"layer_types": ["full_attention", *["sliding_attention"] * 3, "full_attention"]}]  # fmt: skip


@pytest.mark.parametrize("mtp", ["none", "sequential"])
@pytest.mark.parametrize("kinds", LAYERS)
def test_every_layer_of_a_pattern_costs_what_its_mask_shows(kinds, mtp):
    """Scores and weighted sums of the allowed pairs, counted from the masks that a model of 3 local and 2
    global layers gives to its layers; MTP sees all."""
    shape = TINY | {"num_hidden_layers": 5, "sliding_window": 24, "mtp": mtp} | kinds
    config, tokens = model_config(**shape, attention_sinks=4), 64
    model, pairs = TinySeek(config), []

    def count(layer, arguments):
        bias = arguments[1].bias(torch.float32)  # of the context
        pairs.append(int((bias == 0).sum()))

    layers = [*model.model.layers, *([model.mtp.layer] if mtp == "sequential" else [])]
    for layer in layers:
        layer.register_forward_pre_hook(count)
    ids = torch.arange(tokens)[None]
    model(ids, labels=ids, mtp=mtp != "none")
    card, per_pair = cost_card(model, tokens), 2 * 4 * (16 + 16)  # 2 products of 4 heads of 16
    assert len(set(pairs)) == 2 and len(pairs) == len(card.keys_seen)
    most = tokens / 2 + 0.5  # keys of a causal query, on average; the convention leaves out the half
    for layer, count in enumerate(pairs):
        assert card.keys_seen[layer] == pytest.approx(count / tokens, abs=0.51), layer
        assert (card.keys_seen[layer] == tokens / 2) == (count / tokens == most)
    assert card.forward_flops() == 2 * card.matmul_parameters + per_pair * sum(card.keys_seen[:5])
    extra = 2 * card.groups["mtp"].multiplied + per_pair * sum(card.keys_seen[5:])
    assert card.mtp_flops() == extra


@pytest.mark.parametrize("every", [None, 2])
@pytest.mark.parametrize("window", [None, 8])
def test_the_cache_on_the_card_is_that_of_the_tensors(window, every):
    """Apart from the slots of a ring that are spare: 16 of margin, less the newest token's."""
    shape = {"num_hidden_layers": 5, "sliding_window": window}
    shape |= {"sliding_window_pattern": every, "attention_sinks": 2} if window else {}
    model = TinySeek(model_config(**TINY | shape))
    card, locals_ = cost_card(model, 64), 0 if window is None else 5 if every is None else 3
    for tokens in (1, 10, 11, 64, 1000):
        spare = 15 * locals_ if tokens > 10 else 0
        assert make_cache(model, 1, tokens).bytes == card.kv_cache_bytes(4, tokens) + spare * 2 * 2 * 16 * 4
    text = 2 * 2 * 16 * 2 * ((5 - locals_) * 64 + locals_ * 10)
    line = next(line for line in card.lines() if line.startswith("kv cache"))
    assert (f", {text / 1024:.4g} KiB for 64 tokens in bf16" in line) == bool(locals_), line


@pytest.mark.parametrize("name, changes", CASES)
def test_memory_of_the_optimizer_is_what_the_optimizer_holds(name, changes):
    config = model_config(**TINY | changes)
    model = twin(name, config)
    model(torch.arange(60)[None]).logits.sum().backward()
    for parameter in model.parameters():  # an expert that no token chose has no gradient yet
        parameter.grad = torch.ones_like(parameter) if parameter.grad is None else parameter.grad
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step()
    card = card_of(config, batch_tokens=8)
    assert card.state_bytes["optimizer"] == held_by(optimizer)
    weights = sum(p.nbytes for p in model.parameters())
    assert card.state_bytes["weights"] == card.state_bytes["gradients"] == weights

    # the names say it, not the card: projections, and experts, each of a stack a matrix
    is_matrix = lambda key, p: p.dim() > 1 and ("proj" in key or "experts" in key)  # noqa: E731
    named = list(model.named_parameters())
    matrices = [one for key, p in named if is_matrix(key, p) for one in (p if p.dim() == 3 else [p])]
    others = [p for key, p in named if not is_matrix(key, p)]
    matrices = [torch.nn.Parameter(one.detach().clone()) for one in matrices]
    for parameter in matrices:
        parameter.grad = torch.ones_like(parameter)
    muon, adam = torch.optim.Muon(matrices), torch.optim.AdamW(others)
    muon.step()
    adam.step()
    held = held_by(muon) + held_by(adam)
    assert card_of(config, batch_tokens=8, optimizer="muon").state_bytes["optimizer"] == held


def held_by(optimizer) -> int:
    """Bytes of the optimizer's state, step counters aside."""
    return sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t.dim())


@pytest.mark.parametrize("mtp", ["none", "parallel", "sequential"])
@pytest.mark.parametrize("name, changes", CASES)
def test_the_card_is_that_of_the_model_and_the_optimizers_that_are_trained(name, changes, mtp):
    config = model_config(**TINY | changes | {"mtp": mtp})
    model = TinySeek(config)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for optimizer in ("adamw", "muon"):
        held = 0
        for part in build_optimizers(model, OptimConfig(optimizer=optimizer)):
            part.step()
            held += held_by(part)
        card = cost_card(model, batch_tokens=8, optimizer=optimizer)
        assert card.parameters == sum(p.numel() for p in model.parameters())
        assert card.state_bytes["optimizer"] == held


def test_the_card_reads_well():
    lines = card_of(published("Qwen3-0.6B"), batch_tokens=8192, sequence_length=1024).lines()
    assert [line.split()[0] for line in lines] == ["parameters", "compute", "kv", "memory"]
    assert "596,049,920" in lines[0]
    assert "active" not in lines[0]
    assert "112 KiB per token in bf16, 224 KiB in fp32" in lines[2]


@pytest.mark.parametrize("kind, parameters", [("parallel", "1,056"), ("sequential", "12,992")])
def test_mtp_has_a_line_of_its_own(kind, parameters):
    lines = card_of(model_config(**TINY, mtp=kind), batch_tokens=64).lines()
    assert [line.split()[0] for line in lines] == ["parameters", "compute", "mtp", "kv", "memory"]
    assert "active" in lines[0]
    assert lines[2].split()[1] == parameters
    assert "in training only" in lines[2]
