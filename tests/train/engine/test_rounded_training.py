"""QLoRA and quantisation-aware training as stages: what is saved computes what was trained, from the command
line and resumed, and what would train nothing is stopped."""

import copy

import pytest
import torch

from inference.fast.decoder import refusal
from inference.generation.load import load_adapter, load_full
from model.adapters import NF4, attach
from model.fake import coded_result, round_in_training
from model.quantized import quantize_weights
from modules.adapters.qlora import LoraQuantLinear
from modules.quantized.fake import FakeLayer, FakeQuantize
from tests.inference.tools import byte_tokenizer
from tests.train import policies
from tests.train.engine.test_fine_tuning import (  # noqa: F401
    arguments,
    base_in,
    call,
    call_until,
    dialogues,
    quick,
)
from tests.train.policies import rl_config
from tests.train.test_lora_policies import adapted as policy_of
from tests.train.tools import make_trainer, same_bits, small_config, small_model
from train import lora_train, mixlora_train, sft_train
from utils.checkpoint import load_checkpoint, load_weights, weights_digest
from utils.errors import UserError

GROUP = "qat.group_size=4"  # widths of tiny models are multiples of it


def trained(monkeypatch, module, flags):
    """The model of a run at its end."""
    stages, plain = [], module.train_and_score
    with monkeypatch.context() as patch:
        seen = lambda stage, *rest: stages.append(stage) or plain(stage, *rest)  # noqa: E731
        patch.setattr(module, "train_and_score", seen)
        script = sft_train if module is sft_train else lora_train
        call(patch, script, flags)
    return stages[0].model.eval()


def logits(model):
    with torch.no_grad():
        return model(torch.tensor([byte_tokenizer().encode("hello")])).logits


def test_an_adapter_beside_codes(dialogues, tmp_path, monkeypatch, capsys):  # noqa: F811
    """It is saved like any adapter of the same base, and used on the numbers that it was trained with."""
    from train.engine import fine_tuning

    base, out = base_in(tmp_path, "moe"), tmp_path / "run"
    model = trained(monkeypatch, fine_tuning, arguments(out, dialogues, base, "lora.base=nf4", steps=4))
    assert "weights proven" in capsys.readouterr().out
    assert sum(isinstance(layer, LoraQuantLinear) for layer in model.modules()) > 4
    file = out / "TinySeek_Lora_final.pkl"
    saved, before = load_checkpoint(file), load_checkpoint(base)["weights"]
    assert saved["base"]["digest"] == weights_digest(before)
    assert all("lora_" in name for name in saved["weights"])
    full = load_full(base)
    loaded = load_adapter(file, full)
    assert not refusal(loaded.model) and loaded.model.state_dict().keys() == before.keys()
    torch.testing.assert_close(logits(loaded.model), logits(model), rtol=1e-4, atol=1e-4)  # folded in fp32
    assert same_bits(before, full.model.state_dict())

    by_hand = quantize_weights(load_full(base).model, NF4)  # the same codes again
    config = loaded.config
    load_weights(by_hand, saved["weights"], "the adapter", attach(by_hand, "Lora", config))
    assert torch.equal(logits(by_hand), logits(model))
    config.lora.base = "full"
    other = load_full(base).model
    load_weights(other, saved["weights"], "the adapter", attach(other, "Lora", config))
    assert (logits(other) - logits(model)).abs().max() > 1e-2  # the base that training did not see


def test_a_mixture_of_adapters_needs_a_plain_base(dialogues, tmp_path, monkeypatch):  # noqa: F811
    flags = arguments(tmp_path / "run", dialogues, base_in(tmp_path), "lora.base=nf4")
    with pytest.raises(UserError, match="lora.base=nf4 is for plain LoRA"):
        call(monkeypatch, mixlora_train, flags)


def test_a_policy_beside_codes_starts_as_its_reference():
    policy, parts, _ = policy_of(rl_config(*policies.MOE, "lora.base=nf4"))
    reference, ids = parts["frozen"]["reference"], torch.tensor([[1, 2, 3, 4]])
    assert not any(isinstance(layer, LoraQuantLinear) for layer in reference.modules())
    assert any(isinstance(layer, LoraQuantLinear) for layer in policy.modules())
    assert torch.equal(policy(ids).logits, reference(ids).logits)
    shared = {name: part.data_ptr() for name, part in reference.state_dict().items()}
    assert shared.items() <= {name: part.data_ptr() for name, part in policy.state_dict().items()}.items()


@pytest.mark.parametrize(("kind", "optimizer"), [("ste", "adamw"), ("lsq", "muon")])
def test_rounded_training_ends_in_codes(
    kind, optimizer, dialogues, tmp_path, monkeypatch, capsys,  # noqa: F811
):
    """The file has the weights on codes; loaded, they give the same bits as the trained model."""
    base, out = base_in(tmp_path, "moe"), tmp_path / "run"
    settings = ("qat.bits=4", GROUP, f"qat.kind={kind}", f"optim.optimizer={optimizer}", "train.save_every=3")
    model = trained(monkeypatch, sft_train, arguments(out, dialogues, base, *settings, steps=4))
    assert "weights proven" in capsys.readouterr().out
    assert sum(isinstance(layer, FakeLayer) for layer in model.modules()) > 4
    file = out / "TinySeek_SFT_final.pkl"
    saved = load_checkpoint(file)
    assert saved["config"]["quant"]["method"] == "rtn" and saved["config"]["quant"]["bits"] == 4
    assert not any("log_scale" in name for name in saved["weights"])
    assert saved["weights"]["model.layers.0.self_attn.q_proj.store.codes"].dtype == torch.uint8
    loaded = load_full(file)
    assert torch.equal(logits(loaded.model), logits(model))
    assert (logits(loaded.model) - logits(load_full(base).model)).abs().max() > 1e-2
    with pytest.raises(UserError, match="codes of rtn, which cannot be trained"):
        call(monkeypatch, sft_train, arguments(tmp_path / "next", dialogues, file))


def test_groups_that_do_not_fit_are_refused(dialogues, tmp_path, monkeypatch):  # noqa: F811
    flags = arguments(tmp_path / "run", dialogues, base_in(tmp_path), "qat.bits=4", "qat.group_size=7")
    with pytest.raises(UserError, match="q_proj: groups of 7 do not divide.*choose another qat.group_size"):
        call(monkeypatch, sft_train, flags)
    with pytest.raises(UserError, match="qat.bits=5 must be one of 4, 8"):
        call(monkeypatch, sft_train, [*flags, "--set", "qat.bits=5"])


@pytest.mark.slow
def test_a_stopped_rounded_training_ends_as_if_it_were_not(dialogues, tmp_path, monkeypatch):  # noqa: F811
    """With learned scales; the files of both are equal bit for bit."""
    base, settings = base_in(tmp_path, "moe"), ("qat.bits=4", GROUP, "train.save_every=3")
    flags = {name: arguments(tmp_path / name, dialogues, base, *settings, steps=8) for name in "ab"}
    call(monkeypatch, sft_train, flags["a"])
    call_until(monkeypatch, sft_train, flags["b"], 6)
    call(monkeypatch, sft_train, [*flags["b"], "--resume"])
    one, two = (load_checkpoint(tmp_path / name / "TinySeek_SFT_final.pkl") for name in "ab")
    assert same_bits(one.pop("weights"), two.pop("weights")) and one == two


# --- saboteurs --------------------------------------------------------------------------------------------


def rounded_run(out, kind):
    """A trainer of a tiny decoder with rounded matrices."""
    config = small_config("qat.bits=4", GROUP, f"qat.kind={kind}", steps=3)
    model = small_model(config)
    round_in_training(model, config.qat)
    return make_trainer(out, config, model=model)


def test_a_healthy_rounded_run_passes(tmp_path, capsys):
    run = rounded_run(tmp_path, "lsq")
    before = coded_result(copy.deepcopy(run.model), run.config)["weights"]
    run.run()
    after = coded_result(run.model, run.config)["weights"]
    changed = [name for name, part in before.items() if not torch.equal(part, after[name])]
    assert any("codes" in name for name in changed) and any("scales" in name for name in changed)
    assert "weights proven" in capsys.readouterr().out


def without_straight_through(monkeypatch):
    """The true gradient of rounding: zero."""
    monkeypatch.setattr(FakeQuantize, "backward", lambda ctx, grad: (grad * 0, grad.sum(-1) * 0, None))


def through_torch_round(monkeypatch):
    """The same by autograd's own rules."""
    half = lambda groups, scales, _: (groups / scales[..., None]).round() * scales[..., None]  # noqa: E731
    monkeypatch.setattr(FakeQuantize, "apply", half)


def scales_that_are_not_trained(monkeypatch):
    """The gradient ends before the learned scales."""
    plain = FakeLayer.groups_and_scales

    def cut(layer, matrix):
        groups, scales = plain(layer, matrix)
        return groups, scales.detach()

    monkeypatch.setattr(FakeLayer, "groups_and_scales", cut)


@pytest.mark.parametrize(("plant", "kind", "words"), [
    (without_straight_through, "ste", "never trained: .*weight"),
    (through_torch_round, "ste", "never trained: .*weight"),
    (scales_that_are_not_trained, "lsq", "never trained: .*weight_log_scale"),
])  # fmt: skip
def test_a_saboteur_of_rounding_is_stopped(plant, kind, words, tmp_path, monkeypatch):
    run = rounded_run(tmp_path, kind)
    plant(monkeypatch)
    with pytest.raises(UserError, match=words):
        run.run()


def test_codes_that_training_changes_are_noticed(tmp_path, monkeypatch):
    """As an adapter that is merged in the middle of a run would change them."""
    config = small_config("lora.base=nf4", steps=3)
    model = quantize_weights(small_model(config), NF4)
    own = attach(model, "Lora", config)
    run = make_trainer(tmp_path, config, model=model)
    run.stage.own, run.stage.trains = own, own.__contains__
    store = model.model.layers[1].mlp.up_proj.store
    plain = run.stage.loss.function

    def meddle(model, batch, tokens):
        if run.step == 1 and model is run.runner:
            store.codes[0] ^= 16
        return plain(model, batch, tokens)

    run.stage.loss.function = meddle
    with pytest.raises(UserError, match="a buffer that nothing trains, yet changed.*up_proj.store.codes"):
        run.run()
