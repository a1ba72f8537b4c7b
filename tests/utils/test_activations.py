"""The bytes of the cost card against what autograd keeps, and against the allocations of a training step."""

import gc

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from config.checks import validate_section
from config.model import ModelConfig
from config.schema import OptimConfig
from model.tinyseek import TinySeek
from modules.checkpointing import checkpoint_layers
from train.engine.optimizers import build_optimizers
from modules.attention import grouped_query
from utils import activations
from utils.activations import MicroBatch, kept_bytes, kept_chunks
from utils.cost import cost_card

SHAPE = {
    "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 160, "max_position_embeddings": 256,
}  # fmt: skip
EXPERTS = {
    "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 24,
}  # fmt: skip
LATER = {"first_k_dense_replace": 1, "scoring_func": "softmax", "norm_topk_prob": False}
LATENT = {
    "attention_kind": "mla", "qk_norm": False, "num_key_value_heads": 4, "kv_lora_rank": 24,
    "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 16,
}  # fmt: skip
CASES = {
    "dense": {},
    "plain": {"qk_norm": False, "tie_word_embeddings": False},
    "partial rotation": {"partial_rotary_factor": 0.25},
    "sdpa": {"attn_implementation": "sdpa"},
    "window": {"sliding_window": 32},
    "flash, window": {"attn_implementation": "flash", "sliding_window": 32},
    "flash, latent": LATENT | {"attn_implementation": "flash"},
    "two chunks, the first in two blocks": {
        "dual_chunk_attention_config": {"chunk_size": 150, "local_size": 10}
    },
    "three chunks": {"dual_chunk_attention_config": {"chunk_size": 100, "local_size": 20}},
    "pattern": {"sliding_window": 32, "sliding_window_pattern": 3, "num_hidden_layers": 4},
    "pattern, sinks, eager": {
        "sliding_window": 48, "sliding_window_pattern": 2, "attention_sinks": 16,
        "attn_implementation": "eager",
    },
    "a window as long as 64 with its sinks": {"sliding_window": 40, "attention_sinks": 24},
    "pattern, sequential": {
        "sliding_window": 40, "sliding_window_pattern": 2, "num_hidden_layers": 3, "mtp": "sequential",
        "attn_implementation": "sdpa",
    },
    "experts": EXPERTS,
    "experts, later": EXPERTS | LATER,
    "gated shared expert, first layer dense, biases": EXPERTS | {
        "shared_expert_intermediate_size": 40, "shared_expert_gate": True, "mlp_only_layers": [0],
        "mlp_bias": True, "attention_bias": True, "attention_out_bias": False,
    },
    "types of layers": {
        "sliding_window": 32, "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "num_hidden_layers": 3,
    },
    "latent": LATENT,
    "latent, experts": LATENT | EXPERTS | {"q_lora_rank": 40},
    "parallel": {"mtp": "parallel"},
    "sequential": EXPERTS | {"mtp": "sequential"},
}


def setting(rows: int, length: int, **changes):
    """A model and a batch of ids."""
    config = ModelConfig(**SHAPE | changes)
    validate_section("model", config)
    torch.manual_seed(0)
    return TinySeek(config), torch.randint(0, config.vocab_size, (rows, length))


def loss_of(model, ids, dtype):
    """The loss of training, with all its terms."""
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        output = model(ids, labels=ids, mtp=model.mtp is not None)
        balance = [routing.scores.square().sum() for routing in output.routings]  # keeps the scores
        return sum(part for part in (output.loss_sum, output.mtp_loss_sum, *balance) if part is not None)


def kept_by_autograd(model, run) -> int:
    """Bytes that autograd keeps for the backward pass of `run()`, each storage once, weights aside."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = run()
    assert loss.requires_grad
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    return sum(storage.nbytes() for place, storage in kept.items() if place not in weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [64, 192])
@pytest.mark.parametrize("name", CASES)
def test_activations_are_what_autograd_keeps(name, length, dtype):
    """192 is cut into blocks of queries. Equal but for the places of experts' rows, which a kernel holds
    without autograd's knowledge, their blank rows, and the mask of the last label."""
    model, ids = setting(3, length, **CASES[name])
    kept = kept_by_autograd(model, lambda: loss_of(model, ids, dtype))
    card = cost_card(model, ids.numel(), length, dtype=dtype)
    assert card.activation_bytes == pytest.approx(kept, rel=0.01 if model.config.n_routed_experts else 0.002)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_checkpointed_layers_keep_their_inputs(name, dtype):
    """Nothing of what the hand-written kernels save is left either. Autograd does not see the tables of
    cos and sin, which the call to run a layer again holds."""
    model, ids = setting(3, 192, **CASES[name])
    checkpoint_layers(model)
    kept = kept_by_autograd(model, lambda: loss_of(model, ids, dtype))
    batch = MicroBatch(3, 192, dtype.itemsize, checkpointed=True)
    pairs = kept_chunks(model.config, 192)[2]  # of tables: dual chunk attention has up to three
    tables = pairs * 2 * 4 * 192 * model.config.rotary_dim
    close = 0.002 if model.mtp is None else 0.02  # the places of labels for the second head
    assert kept_bytes(model.config, batch, matrices=0) - tables == pytest.approx(kept, rel=close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_rows_with_a_window_go_by_tiles(monkeypatch, dtype):
    """As if 64 tokens were long: neither probabilities nor a mask are kept."""
    for module in (activations, grouped_query):
        monkeypatch.setattr(module, "LONG", 64 * 64)
    test_activations_are_what_autograd_keeps("window", 64, dtype)


def peak_of(run) -> int:
    """The most bytes that `run` holds at a time, as PyTorch's profiler sees every allocation."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


PEAKS = {  # optimizer, micro-batches, rows, their length, dtype, shape
    "one pass": ("adamw", 1, 4, 256, torch.float32, {"num_hidden_layers": 6}),  # 2 layers: 16 % too low
    "accumulation": ("muon", 2, 16, 64, torch.bfloat16, {"num_hidden_layers": 4}),
    "the output head": ("adamw", 1, 8, 64, torch.bfloat16, {"vocab_size": 3000, "hidden_size": 32}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PEAKS)
def test_the_peak_is_that_of_all_allocations(monkeypatch, name):
    """A step, and a backward pass that keeps its graph on a copy of the model, as in the gradient proof. The
    card adds gradients and activations, which replace each other, and leaves out the gradients of a block."""
    optimizer, passes, rows, length, dtype, changes = PEAKS[name]
    monkeypatch.setattr("modules.muon.multiplies_bf16", lambda kind: dtype == torch.bfloat16)
    model, ids = setting(rows, length, **changes)
    optimizers = build_optimizers(model, OptimConfig(optimizer=optimizer))

    def proof():
        loss_of(model, ids, dtype).backward(retain_graph=True)
        model.zero_grad()

    def step():
        for _ in range(passes):
            loss_of(model, ids, dtype).backward()
        for part in optimizers:
            part.step()
        model.zero_grad()

    step()  # makes the moments
    card = cost_card(model, ids.numel(), length, optimizer, dtype)
    weights, moments = card.state_bytes["weights"], card.state_bytes["optimizer"]
    peak = max(2 * weights + peak_of(proof), weights + moments + peak_of(step))
    assert card.peak_bytes == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["dense", "experts", "latent", "sequential"])
def test_the_peak_with_checkpointing_is_that_of_all_allocations(name, dtype):
    """Forward and backward of a micro-batch, onto gradients that are there, as in all but the first of a
    step: what is kept, the layer that runs again, its own gradients, the head's logits."""
    model, ids = setting(3, 256, **CASES[name] | {"num_hidden_layers": 4})
    checkpoint_layers(model)
    loss_of(model, ids, dtype).backward()
    card = cost_card(model, ids.numel(), 256, dtype=dtype, checkpointed=True)
    peak = peak_of(lambda: loss_of(model, ids, dtype).backward())
    assert card.peak_bytes - sum(card.state_bytes.values()) == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("changes", [{"attn_implementation": "eager"}, {"vocab_size": 3000}])
def test_the_peak_is_elsewhere_with_many_scores_or_logits(changes):
    """Gradients of scores that are not computed by blocks outgrow those of the feed-forward; logits outgrow
    a layer."""
    model, ids = setting(2, 256, **changes)
    checkpoint_layers(model)
    loss_of(model, ids, torch.float32).backward()
    card = cost_card(model, ids.numel(), 256, checkpointed=True)
    peak = peak_of(lambda: loss_of(model, ids, torch.float32).backward())
    assert card.peak_bytes - sum(card.state_bytes.values()) == pytest.approx(peak, rel=0.1)
