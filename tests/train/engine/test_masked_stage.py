"""Masked language modelling against obvious loops over one token at a time; and what must never happen."""

import math

import numpy as np
import pytest
import torch

from config.encoder import EncoderConfig
from config.objectives import MLMConfig
from load_data.masking import HELD_OUT, MaskedLoader, Masking
from load_data.tokenization.tokenizer import MASK, CharTokenizer
from model.encoder import MaskedLM
from tests.modules.tools import shake
from tests.train.tools import machine, make_trainer, small_config, weights_of
from train.engine.masked_stage import MaskedEvaluation, freeze_key_biases
from train.engine.token_loss import TokenLoss
from train.engine.optimizers import build_optimizers
from train.engine.stage import LoaderSource

TOKENIZER = CharTokenizer("abcdefghijklmnopqrstuvwxyz").with_special([MASK])
TOKENS = (np.random.default_rng(0).integers(26, size=330) + TOKENIZER.encode("a")[0]).astype(np.uint16)
BERT = {"norm_order": "post", "norm": "layer_norm", "norm_bias": True, "position_embedding_type": "absolute",
        "type_vocab_size": 2, "hidden_act": "gelu", "gated": False, "attention_bias": True,
        "mlp_bias": True, "head_bias": True}  # fmt: skip
LENGTH = 12


def tiny(**changes) -> MaskedLM:
    """An encoder with random weights, in fp64."""
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
             "max_position_embeddings": LENGTH, "vocab_size": TOKENIZER.vocab_size + 3}  # fmt: skip
    torch.manual_seed(0)
    with torch.no_grad():
        return shake(MaskedLM(EncoderConfig(**shape | changes)).double()).eval()


def loader(ratio=0.4, rows=4, accumulation=1):
    """Rows of `LENGTH` from the tokens."""
    return MaskedLoader(TOKENS, Masking(TOKENIZER, MLMConfig(ratio)), LENGTH, rows, accumulation)


def obvious(model, ids, labels, real):
    """(nll, right?) of each label, one row and one token at a time, without padding."""
    found = []
    for row, wanted, keep in zip(ids, labels, real):
        logits = model(row[keep][None]).logits[0]
        for place, label in enumerate(wanted[keep].tolist()):
            if label >= 0:
                share = logits[place].softmax(-1)[label].item()
                found.append((-math.log(share), int(logits[place].argmax()) == label))
    return found


@pytest.mark.parametrize("recipe", [{}, BERT], ids=["modern", "bert"])
def test_the_loss_is_that_of_the_masked_tokens_alone(recipe):
    """However a step is divided; a part of a row is padding."""
    model, (batch,) = tiny(**recipe), loader().next_step()
    batch["padding_mask"] = torch.ones(4, LENGTH, dtype=torch.bool)
    batch["padding_mask"][2, 7:] = False
    batch["labels"][2, 7:] = -100
    found = obvious(model, *batch.values())
    count = len(found)
    assert 5 < count < 4 * LENGTH / 2  # not all tokens have a label
    parts = [{key: value[some] for key, value in batch.items()} for some in ([0, 2], [1], [3])]
    for batches in ([batch], parts):
        results = [TokenLoss()(model, one, count) for one in batches]
        loss, sure = (sum(sum(part.values()).item() for part in side) for side in zip(*results))
        assert loss == pytest.approx(sum(nll for nll, _ in found) / count, rel=1e-9)
        assert sure == pytest.approx(sum(math.exp(-nll) for nll, _ in found) / count, rel=1e-9)


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_the_evaluation_against_a_loop(batch_size):
    """The last of 30 windows has one token less than the others, so that there is padding."""
    model, masking = tiny(**BERT), Masking(TOKENIZER, HELD_OUT)
    tokens = TOKENS[:-1]
    rows = [masking.row(tokens[start : start + 11], (n,)) for n, start in enumerate(range(0, 329, 11))]
    pairs = [[torch.from_numpy(part) for part in row] for row in rows]
    everything = [torch.ones(len(ids), dtype=torch.bool) for ids, _ in pairs]
    found = obvious(model, *zip(*pairs), everything)
    loss = sum(nll for nll, _ in found) / len(found)
    expected = {"val_loss": loss, "val_ppl": math.exp(loss), "val_acc": np.mean([hit for _, hit in found])}
    evaluation = MaskedEvaluation(tokens, TOKENIZER, LENGTH, batch_size, machine())
    with torch.no_grad():
        assert evaluation(model, None) == pytest.approx(expected, rel=1e-5)
        assert evaluation(model, None) == evaluation(model, None)
    assert evaluation.batches == -(-30 // batch_size)


def test_a_masked_position_never_sees_its_own_token():
    """Other tokens in the masked places change the labels, and nothing that the model reads."""
    masking = Masking(TOKENIZER, HELD_OUT)
    ids, labels = masking.row(TOKENS[:200], (0,))
    other = TOKENS[:200].copy()
    places = np.flatnonzero(labels[1:] >= 0)
    other[places] = TOKENIZER.encode("z")[0]
    again, changed = masking.row(other, (0,))
    assert np.array_equal(ids, again) and (changed[1:][places] == other[places]).all()
    assert len(places) > 10 and (labels[1:][places] == TOKENS[places]).all()


def test_a_step_without_any_mask_is_skipped(tmp_path):
    """With a mask ratio of 1 in 40 about every second step of one row of 11 letters has none."""
    config = small_config("optim.warmup_steps=0", steps=12)
    model = tiny().float().train()
    source = loader(0.025, rows=1)
    trainer = make_trainer(tmp_path, config, model=model, loader=source, loss=TokenLoss())
    trainer.run()
    assert 0 < trainer.skipped < 12 and all(part.isfinite().all() for part in weights_of(model).values())


def test_biases_of_keys_are_frozen_where_nothing_rotates_them(tmp_path):
    """They change no score but by the same number: the proof of training would find rounding noise."""
    model, (batch,) = tiny(**BERT), loader().next_step()
    TokenLoss()(model, batch, 1.0)[0]["ce"].backward()
    norms = {name: part.grad.norm().item() for name, part in model.named_parameters()}
    idle = [name for name in norms if name.endswith("k_proj.bias")]
    assert len(idle) == 2 and max(norms[name] for name in idle) < 1e-12 < 1e-6 < min(
        norm for name, norm in norms.items() if name not in idle
    )
    trains = freeze_key_biases(model)
    assert [name for name, part in model.named_parameters() if not part.requires_grad] == idle
    assert [name for name in norms if not trains(name)] == idle
    rotated = tiny(**BERT | {"position_embedding_type": "rope"})
    freeze_key_biases(rotated)
    assert all(part.requires_grad for part in rotated.parameters())


def test_tables_of_vectors_are_not_for_muon():
    config = small_config("optim.optimizer=muon").optim
    model = tiny(**BERT)
    (muon, adam) = build_optimizers(model, config)
    named = {id(part): name for name, part in model.named_parameters()}
    tables = {f"model.embed_{name}.weight" for name in ("tokens", "positions", "token_types")}
    assert tables <= {named[id(part)] for group in adam.param_groups for part in group["params"]}
    assert "head.dense.weight" in {named[id(part)] for group in muon.param_groups for part in group["params"]}


def test_the_weight_of_a_step_counts_masked_tokens():
    source = loader(accumulation=3)
    step = LoaderSource(source).next_step()
    assert step.tokens == 3 * 4 * LENGTH
    assert step.weight == sum(int((one["labels"] >= 0).sum()) for one in step.micro_batches)
