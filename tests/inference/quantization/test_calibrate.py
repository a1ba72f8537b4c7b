"""What calibration sees: real tokens of the training side, through layers that are quantised already."""

import pytest
import torch
import torch.nn.functional as F

from inference.generation.load import load_full
from inference.quantization import calibrate, fit
from inference.quantization.calibrate import KEPT, Inputs, training_rows
from inference.quantization.fit import quantize_model
from load_data.chat.chat_data import prepare_chat
from load_data.corpora.sources import VAL
from tests.inference.quantization.tools import FORMATS, HELD_OUT, write_source


def texts(loaded, batches):
    """All rows as texts."""
    rows = [row.tolist() for batch in batches for row in batch["input_ids"]]
    return [loaded.tokenizer.decode(row, skip_special=False) for row in rows]


def test_windows_are_training_text(tmp_path, monkeypatch):
    """The held-out part of the text has letters of its own. A calibration that reads it shows them."""
    loaded = load_full(write_source(tmp_path))
    rows = texts(loaded, training_rows(loaded, None, 1000))
    assert len(rows) == (3500 - 1) // 48  # an epoch, no window twice
    assert not any(HELD_OUT in row for row in rows)
    right = calibrate.prepare_pretraining
    swapped = lambda *given: type("Swapped", (), {"train": right(*given).val})  # noqa: E731
    monkeypatch.setattr(calibrate, "prepare_pretraining", swapped)
    assert all(HELD_OUT in row for row in texts(loaded, training_rows(loaded, None, 9)))


def test_dialogues_are_of_the_training_side(tmp_path):
    loaded = load_full(write_source(tmp_path, "SFT"))
    rows = "\n".join(texts(loaded, training_rows(loaded, None, 1000)))
    data = prepare_chat(loaded.config, loaded.tokenizer)
    asked = {side: [one[0]["content"] for one in data.dialogues(side)] for side in ("train", VAL)}
    assert len(asked[VAL]) > 5
    assert all(f"：{question}" in rows for question in asked["train"])
    assert not any(f"：{question}" in rows for question in asked[VAL])


def test_data_of_the_user_are_split_too(tmp_path):
    loaded = load_full(write_source(tmp_path))
    other = tmp_path / "other.txt"
    other.write_text("q" * 1400 + "Q" * 600, encoding="utf-8")
    assert set("".join(texts(loaded, training_rows(loaded, [str(other)], 100)))) == {"q"}


@torch.no_grad()
def unpacked_inputs(loaded, number, name):
    """What a linear layer reads from each training dialogue alone: no packing, no padding."""
    data, seen = prepare_chat(loaded.config, loaded.tokenizer), []
    layer = loaded.model.model.layers[number].get_submodule(name)
    hook = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, -2)))
    for sample in data.train:
        loaded.model(torch.tensor(sample.ids[None, :-1].astype(int)))
    hook.remove()
    return torch.cat(seen).double()


def watched(monkeypatch, loaded, quant):
    """Quantise; {path: what its matrices have read}."""
    kept, right = {}, fit.fitted

    def spy(path, layer, seen, quant):
        kept[path] = seen
        return right(path, layer, seen, quant)

    monkeypatch.setattr(fit, "fitted", spy)
    quantize_model(loaded.model, quant, training_rows(loaded, None, 1000))
    return kept


def test_statistics_are_those_of_real_tokens_through_quantised_layers(tmp_path, monkeypatch):
    """The first layer reads what the plain model computes; the last one what the quantised layers before it
    give. Both against each dialogue run alone."""
    path = write_source(tmp_path, "SFT")
    plain, loaded = load_full(path), load_full(path)
    seen = watched(monkeypatch, loaded, FORMATS["gptq4"])
    for number, model in ((0, plain), (1, loaded)):
        x = unpacked_inputs(model, number, "self_attn.q_proj")
        found = seen[f"model.layers.{number}.self_attn.q_proj"][0][0]
        assert found.count == len(x)
        torch.testing.assert_close(found.hessian.double(), 2 * x.T @ x, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(found.largest.double(), x.abs().amax(0), rtol=1e-5, atol=1e-5)
    other = unpacked_inputs(plain, 1, "self_attn.q_proj")
    assert (found.hessian.double() - 2 * other.T @ other).norm() > 0.01 * found.hessian.norm()


@torch.no_grad()
def test_an_expert_sees_its_own_tokens(tmp_path, monkeypatch):
    """Against the router's choices for dialogues run alone, and a loop over the tokens."""
    path = write_source(tmp_path, "SFT")
    plain, loaded = load_full(path), load_full(path)
    layer, calls = plain.model.model.layers[1].mlp.experts, []
    layer.register_forward_pre_hook(lambda module, args: calls.append(args[:2]))
    seen = watched(monkeypatch, loaded, FORMATS["awq4"])["model.layers.1.mlp.experts"]
    unpacked_inputs(plain, 1, "self_attn.q_proj")
    for expert, (read, inner) in enumerate(zip(*seen, strict=True)):
        own = torch.cat([x[(chosen == expert).any(-1)] for x, chosen in calls])
        assert abs(read.count - len(own)) <= 0.1 * len(own)  # layer 0 is quantised in one of them
        assert inner.count == read.count and len(inner.sample) <= KEPT
        gate, up = F.linear(read.sample, layer.gate_up_proj[expert]).chunk(2, dim=-1)
        torch.testing.assert_close(inner.sample, F.silu(gate) * up)


@pytest.mark.parametrize("method", ["gptq4", "awq4", "smoothquant"])
def test_an_expert_without_tokens_is_rounded(tmp_path, method, monkeypatch):
    """A router that never chooses expert 3."""
    loaded = load_full(write_source(tmp_path))
    for layer in loaded.model.model.layers[1:]:
        layer.mlp.gate.e_score_correction_bias[3] = -100.0
    before = loaded.model.model.layers[1].mlp.experts.down_proj[3].clone()
    rows = quantize_model(loaded.model, FORMATS[method], training_rows(loaded, None, 8))
    assert [row.unseen for row in rows if row.path.endswith(".experts")] == [1]
    now = loaded.model.model.layers[1].mlp.experts.down_proj[3]
    bound = 0.2 if method == "awq4" else 0.12  # 4 bits in groups of 8; AWQ's scales are those of the others
    assert (now - before).norm() < bound * before.norm()


def test_kept_inputs_are_bounded_and_spread():
    inputs = Inputs(2, batches=10, hessian=False)
    for batch in range(10):
        inputs.add(torch.full((1000, 2), float(batch)))
    assert len(inputs.sample) <= KEPT and set(inputs.sample[:, 0].tolist()) == set(map(float, range(10)))
    assert len(Inputs(2, 1, False).sample) == 0
