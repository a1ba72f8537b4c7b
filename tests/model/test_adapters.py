"""Adapters on a model over the tensors of its base: each equals a model made by hand, and the base, bit by
bit, stays what it was."""

import copy

import pytest
import torch

from inference.fast.decoder import refusal
from model.adapters import ADAPTERS, adapted, attach, soft_tokens, twin
from model.selecting import SelectingModel
from model.tinyseek import TinySeek
from modules.adapters.lora_model import fold
from modules.adapters.prefix import PrefixEncoder
from tests.inference.adapters import ADAPTED, MOE, run_settings, shake_added
from tests.modules.tools import shake, small_config
from utils.checkpoint import weights_digest
from utils.errors import UserError

IDS = torch.tensor([[5, 60, 7, 0, 33, 33, 12]])
SHAPES = {"dense": {}, "moe": MOE}


def base_of(shape="dense", **changes):
    """A random model in fp64."""
    return shake(TinySeek(small_config(**SHAPES[shape], **changes)), 3).double().eval()


def trained(base, like, seed=1):
    """(stage, settings, weights) of an adapter with random weights, made on a copy of the base."""
    short, sections = ADAPTED[like]
    config, model = run_settings(base.config, sections), copy.deepcopy(base)
    added = attach(model, short, config)
    shake_added(model, added, seed)
    return short, config, {name: part for name, part in model.state_dict().items() if name in added}


def by_hand(base, like, config, weights):
    """A model of its own that computes what the base with the adapter should."""
    if like == "prompt":  # a longer table: soft tokens are tokens
        more = small_config(**{**vars(base.config), "vocab_size": base.config.vocab_size + 6})
        model, state = TinySeek(more).double(), base.state_dict()
        rows = weights["model.embed_tokens.prompt"]
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            state[name] = torch.cat([state[name], rows])
        model.load_state_dict(state)
        return model.eval()
    model = copy.deepcopy(base)
    if like == "prefix":
        model.prefix = PrefixEncoder(weights["prefix.keys"], weights["prefix.values"])
    elif like == "mixlora":
        attach(model, "MixLora", config)
        model.load_state_dict({**model.state_dict(), **weights})
    else:
        scale = config.lora.lora_alpha / config.lora.r
        for name, A in weights.items():
            if ".lora_A." in name:
                weight = model.get_parameter(name.replace(".lora_A.default", ".weight"))
                whole = weight + scale * weights[name.replace("lora_A", "lora_B")].to(weight) @ A.to(weight)
                lengths = weights.get(name.replace("lora_A", "lora_magnitude_vector"))
                if lengths is not None:
                    whole = whole * (lengths / whole.norm(dim=1))[:, None]
                weight.data = whole.detach()
    return model.eval()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("like", ADAPTED)
def test_the_adapted_model_is_the_one_made_by_hand(like, shape):
    """Several adapters beside each other, over shared tensors; the base keeps its bits, keys and logits."""
    base = base_of(shape)
    before, logits = weights_digest(base.state_dict()), base(IDS).logits
    short, config, weights = trained(base, like)
    model = adapted(base, short, config, weights, "here")
    other = adapted(base, *trained(base, "lora", seed=8), "there")
    ids = torch.tensor([[5, 62, 7, 66, 33]]) if like == "prompt" else IDS
    V = base.config.vocab_size
    expected = by_hand(base, like, config, weights)(ids).logits[..., :V]
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-9, atol=1e-9)
    if like != "prompt":
        assert not torch.allclose(model(IDS).logits, logits) and not model.training
    assert not torch.allclose(other(IDS).logits, logits)
    if short == "Lora":
        fold(model, "default")
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-9, atol=1e-9)
        assert model.state_dict().keys() == base.state_dict().keys()
    assert (not refusal(model)) == (short == "Lora")
    assert weights_digest(base.state_dict()) == before and torch.equal(base(IDS).logits, logits)
    theirs = {part.data_ptr() for part in base.state_dict().values()}
    own = [part for part in model.state_dict().values() if part.data_ptr() not in theirs]
    assert theirs & {part.data_ptr() for part in model.state_dict().values()}
    assert len(own) < len(theirs) or like == "mixlora"
    assert model.model.embed_tokens.weight.data_ptr() == base.model.embed_tokens.weight.data_ptr()
    assert all(parameter.requires_grad for parameter in base.parameters())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("like", ADAPTED)
def test_what_is_attached_learns_and_nothing_else(like, shape):
    base = base_of(shape)
    names, (short, sections) = set(base.state_dict()), ADAPTED[like]
    added = attach(base, short, run_settings(base.config, sections))
    assert added and added == set(base.state_dict()) - names
    learns = {name for name, parameter in base.named_parameters() if parameter.requires_grad}
    assert learns <= added and added - learns <= set(dict(base.named_buffers()))
    words = {"Lora": ".lora_", "MixLora": "lora_", "Prefix": "pr"}
    assert all(words[short] in name or ".gate." in name for name in learns)


def test_mixlora_has_lora_on_attention_where_it_is_wanted():
    for wanted in (True, False):
        base = base_of()
        settings = run_settings(base.config, {"mixlora": {"attention": wanted}, "lora": {"r": 2}})
        added = attach(base, "MixLora", settings)
        plain = [name for name in added if ".default" in name]
        assert bool(plain) == wanted and all("self_attn" in name for name in plain)
        assert settings.lora.target_modules == ["attention", "dense", "shared"]  # the run's own, untouched


def test_experts_are_folded_too():
    """LoRA on routed experts: logits with adapters beside the weights are those of the folded weights."""
    base = base_of("moe")
    settings = {"lora": {"r": 2, "target_modules": ["experts", "shared"], "use_dora": True}}
    config, model = run_settings(base.config, settings), copy.deepcopy(base)
    added = attach(model, "Lora", config)
    shake_added(model, added, 1)
    weights = {name: part for name, part in model.state_dict().items() if name in added}
    other = adapted(base, "Lora", config, weights, "here")
    torch.testing.assert_close(other(IDS).logits, model(IDS).logits, rtol=0, atol=0)
    before = base(IDS).logits
    fold(other, "default")
    torch.testing.assert_close(other(IDS).logits, model(IDS).logits, rtol=1e-9, atol=1e-9)
    assert not refusal(other) and torch.equal(base(IDS).logits, before)
    assert (other(IDS).logits - before).abs().max() > 0.1


def test_weights_that_do_not_fit_are_refused():
    base = base_of()
    short, config, weights = trained(base, "lora")
    name = next(iter(weights))
    without = {key: part for key, part in weights.items() if key != name}
    for wrong, words in (
        (without, "1 missing"),
        ({**weights, "lm_head.weight": base.lm_head.weight}, "1 unexpected .*lm_head"),
        ({**weights, name: weights[name][:1]}, "1 of another shape"),
    ):
        with pytest.raises(UserError, match=f"a.pkl does not fit this model: weights {words}"):
            adapted(base, short, config, wrong, "a.pkl")


def test_a_twin_shares_all_tensors_and_no_module():
    base = base_of("moe")
    other = twin(base)
    for one, two in zip(base.parameters(), other.parameters(), strict=True):
        assert one is not two and one.data_ptr() == two.data_ptr()
    for one, two in zip(base.buffers(), other.buffers(), strict=True):
        assert one is two
    assert not {id(part) for part in base.modules()} & {id(part) for part in other.modules()}
    assert other.lm_head.weight is other.model.embed_tokens.weight


def test_only_a_prompt_has_soft_tokens():
    counts = {like: soft_tokens(short, run_settings(base_of().config, sections))
              for like, (short, sections) in ADAPTED.items()}  # fmt: skip
    assert counts == {"lora": 0, "dora": 0, "mixlora": 0, "prefix": 0, "prompt": 2}
    assert {short for short, _ in ADAPTED.values()} == set(ADAPTERS.values())
    assert soft_tokens("Lora", run_settings(base_of().config, ADAPTED["prompt"][1])) == 0


def test_the_base_of_a_gate_reads_without_dropout_while_the_gate_learns():
    """As it will in use: with other hidden states at each reading the gate would learn from noise."""
    base = shake(TinySeek(small_config(dropout=0.5)))
    gated = SelectingModel(base, candidates=3, width=4).train()
    ids = torch.arange(10)[None]
    assert gated.training and gated.selector.training and torch.equal(gated(ids), gated(ids))
    assert not torch.equal(base.train()(ids).logits, base(ids).logits)  # it has dropout to leave out
