"""`train.gradient_checkpointing=true`: the same run bit by bit, with every layer computed twice."""

import pytest
import torch

from model.adapters import attach
from model.tinyseek import DecoderLayer, TinySeek
from modules.attention.cache import KVCache
from modules.checkpointing import checkpoint_layers
from tests.inference.adapters import ADAPTED, run_settings, shake_added
from tests.modules import tools
from tests.train.tools import (
    PLAIN,
    machine,
    make_trainer,
    same_bits,
    small_config,
    small_model,
    weights_of,
    without_timing,
)
from train.engine.language_model_loss import LanguageModelLoss
from utils.log import read_log
from utils.products import ONEDNN, PRECISION

STEPS, PARTS, LAYERS = 2, 2, 2
RANDOM = ("model.dropout=0.2", "model.attention_dropout=0.1")
EXPERTS = (
    "model.n_routed_experts=4", "model.num_experts_per_tok=2", "model.n_shared_experts=1",
    "model.moe_intermediate_size=12", "model.router_jitter_noise=0.2", "balance.bias_rate=0.05",
    "balance.z_loss=0.01", "balance.weight=0.1",
)  # fmt: skip
LATENT = (
    "model.attention_kind=mla", "model.qk_norm=false", "model.num_key_value_heads=2", "model.kv_lora_rank=6",
    "model.qk_nope_head_dim=4", "model.qk_rope_head_dim=4", "model.v_head_dim=8",
)  # fmt: skip
RUNS = {  # settings, dtype, forward passes of each layer without checkpointing
    "dense, without a random number": ((), torch.float32, LAYERS),
    "dense, window": ((*RANDOM, "model.sliding_window=4"), torch.float32, LAYERS),
    "experts": ((*RANDOM, *EXPERTS, "model.mtp=sequential"), torch.float32, LAYERS + 1),
    "latent, counted first": (
        (*RANDOM, *EXPERTS, *LATENT, "model.mtp=parallel", "balance.statistics=exact"),
        torch.bfloat16,
        2 * LAYERS,
    ),
}  # fmt: skip


@pytest.fixture
def calls(monkeypatch):
    """The products and the autocast of every call to a layer's forward, and if it computes gradients."""
    seen, forward = [], DecoderLayer.forward

    def noting(layer, *inputs):
        products, autocast = torch.backends.mkldnn.matmul.fp32_precision, torch.is_autocast_enabled("cpu")
        seen.append((products, autocast, torch.is_grad_enabled()))
        return forward(layer, *inputs)

    monkeypatch.setattr(DecoderLayer, "forward", noting)
    return seen


@pytest.mark.parametrize("name", RUNS)
def test_a_run_gives_the_same_bits(tmp_path, calls, name):
    """Through the whole engine, its proof included, with accumulation: weights, biases of routers and the
    log, in which loads are counted. Layers run again under the same products and the same autocast."""
    settings, dtype, forwards = RUNS[name]
    ends, logs = [], []
    for wanted in (False, True):
        config = small_config(
            *PLAIN, *settings, f"train.gradient_checkpointing={wanted}", f"train.accumulation_steps={PARTS}",
            steps=STEPS,
        )  # fmt: skip
        model = small_model(config)
        place = {"dtype": dtype, "products": ONEDNN}
        loss = LanguageModelLoss(model, config, machine(**place))
        trainer = make_trainer(tmp_path / str(wanted), config, model=model, loss=loss, **place)
        prove = trainer.prove_before
        trainer.prove_before = lambda prove=prove: (prove(), calls.clear())
        trainer.run()
        layers = LAYERS + (config.model.mtp == "sequential")
        assert len(calls) == STEPS * PARTS * (forwards + layers * wanted)
        with_gradient = {call[:2] for call in calls if call[2]}
        assert with_gradient == {(PRECISION[ONEDNN], dtype == torch.bfloat16)}
        ends.append(weights_of(model))
        rows = read_log(tmp_path / str(wanted) / "toy" / "log.txt")
        logs.append(without_timing(rows))
    assert same_bits(*ends) and logs[0] == logs[1]


@pytest.mark.parametrize("like", ADAPTED)
def test_adapters_get_the_same_gradients(calls, like):
    """On a frozen base, whose first layers need no gradient of their own."""
    short, sections = ADAPTED[like]
    config = run_settings(tools.small_config(dropout=0.2), sections)
    config.lora.lora_dropout = 0.3
    model = tools.shake(TinySeek(config.model))
    shake_added(model, attach(model, short, config), 1)
    calls.clear()  # a prefix starts as a text that the model has read
    ids, gradients = torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(0)), []
    for wanted in (False, True):
        checkpoint_layers(model, wanted)
        torch.manual_seed(3)
        model(ids, labels=ids).loss_sum.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
        model.zero_grad()
    assert same_bits(*gradients) and len(calls) == LAYERS + 2 * LAYERS


def test_a_run_may_be_resumed_with_it(tmp_path):
    """As after an end for lack of memory: the result is that of the run that did not stop."""
    settings = (*RANDOM, "train.save_every=1")
    whole = make_trainer(tmp_path / "whole", small_config(*settings, steps=4))
    whole.run()
    first = make_trainer(tmp_path / "parts", small_config(*settings, steps=4))
    after = first.after_step

    def out_of_memory(*arguments, **more):
        after(*arguments, **more)
        if first.step == 2:
            raise MemoryError

    first.after_step = out_of_memory
    with pytest.raises(MemoryError):
        first.run()
    config = small_config(*settings, "train.gradient_checkpointing=true", steps=4)
    second = make_trainer(tmp_path / "parts", config, resume=True)
    assert second.step == 2
    second.run()
    assert same_bits(weights_of(whole.model), weights_of(second.model))


def test_layers_without_a_way_back_are_run_as_they_are(calls, monkeypatch):
    """Without gradients there is none, nor through a cache, whose memory was written since: PyTorch says so
    as before."""
    monkeypatch.setattr("modules.checkpointing.checkpoint", None)
    config, ids = tools.small_config(), torch.arange(9)[None]
    for wanted in (False, True):
        model = checkpoint_layers(tools.shake(TinySeek(config)), wanted)
        cache = KVCache(2, 1, 9, config.num_key_value_heads, config.head_dim, torch.float32, "cpu")
        with torch.no_grad():
            model(ids[:, :5], cache=cache)
        loss = model(ids[:, 5:], cache=cache).logits.sum()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    assert len(calls) == 2 * 2 * LAYERS
