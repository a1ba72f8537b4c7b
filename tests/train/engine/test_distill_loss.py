"""The loss of a student beside its teacher: each term against its formula, whatever the batches; and what a
wrong teacher, term or stage looks like."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from modules.distillation.divergence import top_outcomes
from modules.distillation.relations import relation_loss
from tests.train.students import ALL, MOE, V, make_run, make_stage, make_student, make_teacher, steps_of
from tests.train.students import student_config
from tests.train.tools import ListLoader, largest_difference, same_bits, weights_of
from train.engine.recorder import Recorder
from utils.errors import UserError


def summed(stage, batches):
    """The terms and measures of a step, each summed over its micro-batches; and its labels."""
    weight = float(sum((batch["labels"] != -100).sum() for batch in batches))
    stage.loss.before_step(stage.model, batches)
    terms, measures = {}, {}
    for batch in batches:
        for total, found in zip((terms, measures), stage.loss(stage.model, batch, weight), strict=True):
            for name, value in found.items():
                total[name] = total.get(name, 0) + value
    return terms, measures


def joined(batches):
    """One batch of all rows."""
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("teacher", [{}, {"n_routed_experts": 0}])
def test_every_term_is_its_formula(temperature, teacher):
    """Full logits, both models run by hand: padding and unlabelled tokens count where they should only."""
    weights = {"logits": 0.7, "hidden": 0.1, "attention": 2, "ce": 0.5}
    weights = [f"distill.{name}_weight={weight}" for name, weight in weights.items()]
    config = student_config(*ALL, f"distill.temperature={temperature}", *weights)
    stage, batches = make_stage(config, make_teacher(**teacher)), steps_of()[0]
    terms, measures = summed(stage, batches)
    batch, student = joined(batches), stage.model["student"]
    about = {key: batch[key] for key in ("document_ids", "padding_mask")}
    with Recorder(student, [0, 1], 1) as ours, Recorder(stage.frozen["teacher"], [0, 2], 2) as theirs:
        s = student(batch["input_ids"], **about).logits
        t = stage.frozen["teacher"](batch["input_ids"], **about).logits
    labels, real = batch["labels"], batch["padding_mask"]
    keep = labels != -100
    ce = F.cross_entropy(s.flatten(0, 1), labels.flatten(), ignore_index=-100)
    kd = F.kl_div(*((part[keep][:, :V] / temperature).log_softmax(-1) for part in (s, t)), log_target=True,
                  reduction="sum") * temperature**2 / keep.sum()  # fmt: skip
    projected = stage.model["projection"](ours.hidden)
    hidden = sum(F.mse_loss(a[real], b[real]) for a, b in zip(projected, theirs.hidden, strict=True)) / 2
    attention = relation_loss(ours.heads, theirs.heads, 1, ours.bias(), real) / real.sum()
    expected = {"ce": 0.5 * ce, "logits": 0.7 * kd, "hidden": 0.1 * hidden, "attention": 2 * attention}
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(measures["ce"], ce)
    torch.testing.assert_close(measures["logits"], kd)


@pytest.mark.parametrize("settings", [ALL, ("distill.logits=jsd", "distill.top_k=5", *MOE),
                                      ("distill.logits=none", "distill.hidden=cosine")], ids=str)  # fmt: skip
def test_four_micro_batches_equal_two_and_one(settings):
    """Though their rows have from none to all of their labels, and padding."""
    config = student_config(*settings, "balance.statistics=exact")
    teacher, gradients = make_teacher(), []
    for rows in (1, 2, 4):
        torch.manual_seed(0)  # of the projection
        stage = make_stage(config, teacher)
        terms, _ = summed(stage, steps_of(4 // rows, rows)[0])
        sum(terms.values()).backward()
        gradients.append({name: p.grad for name, p in stage.model.named_parameters() if p.grad is not None})
    assert largest_difference(gradients[0], gradients[1]) < 1e-5
    assert largest_difference(gradients[0], gradients[2]) < 1e-5


def test_attention_maps_of_models_with_as_many_heads():
    """Of a student that is the teacher: none to learn, in maps, in states through the identity, in logits."""
    teacher = make_teacher(n_routed_experts=0, dropout=0.0, attention_dropout=0.0)
    config = student_config("distill.attention=maps", "distill.hidden=mse")
    config.model = teacher.model.config
    stage = make_stage(config, teacher, make_student(config, 0))
    for layer in stage.model["projection"].layers:
        nn.init.eye_(layer.weight)
    terms, _ = summed(stage, steps_of()[0])
    assert max(terms[name].abs() for name in ("logits", "hidden", "attention")) < 1e-6
    stage.model["student"].model.layers[2].self_attn.q_norm.weight.data[0] += 1
    terms, _ = summed(stage, steps_of()[0])
    assert terms["attention"] > 1e-3


def test_a_second_head_learns_too():
    config = student_config("model.mtp=parallel", "distill.hidden=mse")
    stage = make_stage(config, make_teacher())
    terms, _ = summed(stage, steps_of()[0])
    one, _ = summed(make_stage(student_config("distill.hidden=mse"), make_teacher()), steps_of()[0])
    assert terms.keys() == {"ce", "logits", "hidden", "mtp"} and one.keys() == {"ce", "logits", "hidden"}


@pytest.mark.parametrize("kind", ["forward", "jsd"])
def test_stored_probabilities_take_the_place_of_the_teacher(kind, monkeypatch):
    """The same terms, and the teacher is not run."""
    config = student_config("distill.top_k=6", "distill.temperature=2", f"distill.logits={kind}")
    teacher, batches = make_teacher(), steps_of()[0]
    live = make_stage(config, teacher)
    wanted, _ = summed(live, batches)
    with torch.no_grad():
        for batch in batches:
            about = {key: batch[key] for key in ("document_ids", "padding_mask")}
            logits = teacher.model(batch["input_ids"], **about).logits.flatten(0, 1)[:, :V]
            stored = [part.view(1, 9, 6) for part in top_outcomes(logits, 6, 2.0)]
            batch |= dict(zip(("teacher_ids", "teacher_logprobs"), stored, strict=True))
    monkeypatch.setattr(teacher.model, "forward", None)
    found, _ = summed(make_stage(config, teacher), batches)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value)


def test_given_layers_meet_instead_of_those_of_a_map():
    stage, (batch, *_) = make_stage(student_config("distill.hidden=mse", "distill.layers=[2,0]"),
                                    make_teacher()), steps_of(1, 4)[0]  # fmt: skip
    about = {key: batch[key] for key in ("document_ids", "padding_mask")}
    student, teacher = stage.model["student"], stage.frozen["teacher"]
    with Recorder(student, [0, 1]) as ours, Recorder(teacher, [2, 0]) as theirs:
        student(batch["input_ids"], **about)
        teacher(batch["input_ids"], **about)
    real, projected = batch["padding_mask"], stage.model["projection"](ours.hidden)
    expected = sum(F.mse_loss(a[real], b[real]) for a, b in zip(projected, theirs.hidden, strict=True)) / 2
    torch.testing.assert_close(summed(stage, [batch])[0]["hidden"], expected, rtol=1e-5, atol=1e-6)


def test_spare_ids_are_no_outcomes_of_the_best_tokens_either():
    """With every token among the best, the loss is that of full logits: no tail holds the spare ids."""
    terms = [summed(make_stage(student_config(*more), make_teacher()), steps_of()[0])[0]["logits"]
             for more in ((), (f"distill.top_k={V}",))]  # fmt: skip
    torch.testing.assert_close(*terms)


# --- saboteurs ---------------------------------------------------------------------------------------------


def test_a_teacher_in_training_mode():
    stage = make_stage(student_config(), make_teacher())
    stage.frozen["teacher"].train()
    with pytest.raises(UserError, match="the teacher is in training mode: its dropout"):
        summed(stage, steps_of()[0])


def test_training_leaves_the_teacher_as_it_is(tmp_path):
    """Bit for bit, in evaluation mode and without gradient, although the student trains with dropout."""
    teacher = make_teacher()
    before = weights_of(teacher.model)
    run = make_run(tmp_path, student_config(*ALL, "model.dropout=0.1"), teacher)
    start = weights_of(run.model)
    run.run()
    assert same_bits(before, weights_of(teacher.model)) and not teacher.model.training
    assert all(p.grad is None and not p.requires_grad for p in teacher.model.parameters())
    assert largest_difference(start, weights_of(run.model)) > 1e-3


def test_a_teacher_that_trains(tmp_path):
    """Among what is trained it gets no gradient; written to by hand, its digest tells."""
    teacher = make_teacher()

    def beside(stage):
        parts = {**stage.model, "teacher": teacher.model.requires_grad_()}
        return replace(stage, model=nn.ModuleDict(parts), frozen={})

    with pytest.raises(UserError, match="cut off from the loss, so never trained: teacher.model.embed"):
        make_run(tmp_path / "a", student_config(), teacher, change=beside).run()
    run = make_run(tmp_path / "b", student_config(), make_teacher())
    update = run.update

    def moved(witness):
        run.stage.frozen["teacher"].model.norm.weight.data.mul_(1.0001)
        return update(witness)

    run.update = moved
    with pytest.raises(UserError, match="the frozen model teacher was changed by training"):
        run.run()


@pytest.mark.parametrize(("name", "words"), [
    ("hidden", "hidden does not reach what it should train: student.model.embed_tokens.weight"),
    ("heads", "attention does not reach what it should train: student.*v_proj.weight"),
])  # fmt: skip
def test_a_term_that_trains_less_than_it_should(tmp_path, monkeypatch, name, words):
    """Detached states train the projection alone; detached values leave queries and keys."""
    read = getattr(Recorder, name).fget
    cut = {"hidden": lambda seen: [state.detach() for state in read(seen)],
           "heads": lambda seen: [*read(seen)[:2], read(seen)[2].detach()]}[name]  # fmt: skip
    monkeypatch.setattr(Recorder, name, property(cut))
    with pytest.raises(UserError, match=words):
        make_run(tmp_path, student_config(*ALL), make_teacher()).run()


def test_every_term_names_what_it_trains(tmp_path, capsys):
    """A student with experts of a dense teacher."""
    teacher = make_teacher(n_routed_experts=0)
    config = student_config(*ALL, *MOE, "balance.weight=0.01", "distill.layer_map=last", steps=2)
    make_run(tmp_path, config, teacher, loader=ListLoader(steps_of(2, 8))).run()
    said = capsys.readouterr().out
    for term in ("ce", "logits", "hidden", "attention", "balance"):
        assert f"{term} trains " in said


@pytest.mark.parametrize(("ours", "theirs", "heads"), [
    ((4, 4), (6, 6), 2), ((4, 2), (4, 4), 2), ((3, 1), (4, 2), 1), ((4, 4), (4, 4), 4),
])  # fmt: skip
def test_relations_have_the_most_heads_that_divide_those_of_both_models(ours, theirs, heads):
    """Query heads and key/value heads of both, so that every width can be cut again."""
    names = ("num_attention_heads", "num_key_value_heads")
    student = [f"model.{name}={count}" for name, count in zip(names, ours, strict=True)]
    config = student_config("model.hidden_size=48", *student, *ALL)
    teacher = make_teacher(hidden_size=48, **dict(zip(names, theirs, strict=True)))
    assert make_stage(config, teacher).loss.relation_heads == heads
