"""A batch with an adapter per row against each row by itself."""

import pytest
import torch
from torch import nn

from config.adapters import LoraConfig
from model.caches import make_cache
from modules.adapters.adapter_switch import AdapterSwitch
from modules.adapters.lora_model import add_lora, switch_of
from tests.model import test_moe_model
from tests.model.test_tinyseek import text
from tests.modules.adapters.test_lora import our_model, shake_adapters
from utils.errors import UserError

MODELS = {
    "dense": {},
    "mixture, loop": test_moe_model.MOE | {"moe_implementation": "loop"},
    "mixture, sorted": test_moe_model.MOE | {"moe_implementation": "grouped", "first_k_dense_replace": 1},
    "latent, mixture": test_moe_model.MOE | test_moe_model.MLA,
}
EVERYTHING = ["attention", "dense", "shared", "experts"]
ADAPTERS = {
    "small": {"r": 1, "target_modules": EVERYTHING},
    "large": {"r": 7, "target_modules": EVERYTHING, "use_rslora": True},
    "lengths": {"r": 2, "target_modules": EVERYTHING, "use_dora": True},
    "attention": {"r": 3, "target_modules": ["o_proj"]},  # other layers do not have it
}


def adapted(changes, dtype=torch.float64):
    model = our_model(**changes).to(dtype).eval()
    for name, settings in ADAPTERS.items():
        add_lora(model, LoraConfig(**settings), name)
    shake_adapters(model)
    return model, switch_of(model)


ROWS = [
    ["small", None, "large", "small", "lengths", "attention"],
    ["large", "large", None],
    ["attention", "small"],
    ["lengths"],
    [None, None],
]


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_every_row_is_as_if_alone(kind):
    model, switch = adapted(MODELS[kind])
    for rows in ROWS:
        for tokens in (1, 5):
            ids = text(len(rows), tokens, seed=len(rows))
            switch.use(rows)
            together = model(ids).logits
            outputs = {}
            for row, name in enumerate(rows):
                switch.use(name)
                alone = model(ids[row : row + 1]).logits[0]
                torch.testing.assert_close(together[row], alone, rtol=1e-10, atol=1e-10)
                outputs[name] = model(ids[:1]).logits
            values = list(outputs.values())  # adapters that all do the same would prove nothing
            assert all((a - b).abs().max() > 1e-3 for n, a in enumerate(values) for b in values[:n])


def test_gradients_are_the_sum_of_those_of_the_rows():
    model, switch = adapted(MODELS["mixture, sorted"])
    rows, ids = ROWS[0], text(6, 4)
    learned = {name: p for name, p in model.named_parameters() if "lora_" in name}

    def gradients(choice, ids):
        switch.use(choice)
        model.zero_grad()
        model(ids[:, :-1], ids[:, 1:]).loss_sum.backward()
        return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in learned.items()}

    together = gradients(rows, ids)
    alone = [gradients(name, ids[row : row + 1]) for row, name in enumerate(rows)]
    for name, grad in together.items():
        torch.testing.assert_close(grad, sum(g[name] for g in alone), rtol=1e-9, atol=1e-11)
    assert all(g.any() for g in together.values())


@torch.no_grad()
def test_decoding_with_a_cache_and_under_bf16():
    model, switch = adapted(MODELS["latent, mixture"])
    rows, ids = ROWS[0], text(6, 6)
    switch.use(rows)
    expected, cache = model(ids).logits, make_cache(model, 6, 6)
    steps = [model(ids[:, t : t + 1], cache=cache).logits for t in range(6)]
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, rtol=1e-9, atol=1e-9)
    model, switch = adapted({}, torch.float32)
    switch.use(rows)
    expected = model(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        assert (model(ids).logits - expected).norm() < 0.05 * expected.norm()


def test_flattened_tokens_are_those_of_their_row():
    model = nn.Sequential(nn.Linear(3, 4)).double()
    for name in ("a", "b"):
        add_lora(model, LoraConfig(r=2, target_modules=["0"]), name)
    shake_adapters(model)
    x, switch = torch.randn(3, 5, 3, dtype=torch.float64), switch_of(model)
    switch.use(["b", "a", "b"])
    torch.testing.assert_close(model(x.flatten(0, 1)), model(x).flatten(0, 1), rtol=1e-12, atol=1e-12)
    assert model(x[:, :0]).shape == (3, 0, 4)
    for batch in (x[:2], x[:1], torch.cat([x, x]), x.flatten(0, 1)[:14]):  # a multiple fits tokens only
        with pytest.raises(UserError, match="3 adapters for a batch of"):
            model(batch)


def test_what_cannot_be_used():
    model, switch = adapted({})
    switch.use("small")
    for choice, words in (("smal", "'smal'.*small"), (["small", "x"], "'x'"), ([], "no adapter for any row")):
        with pytest.raises(UserError, match=words):
            switch.use(choice)
    assert switch.choice == "small"
    with pytest.raises(UserError, match="none"):
        AdapterSwitch().use("a")
    rows = ["small", None]
    switch.use(rows)
    rows[0] = "large"
    assert switch.choice == ["small", None]
