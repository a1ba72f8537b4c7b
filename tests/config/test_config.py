"""Configurations: every preset is right, and every mistake is one line that names it."""

import json

import pytest

from config.load import DEFAULT_PRESET, from_dict, load_config, preset_names, to_dict
from config.checks import validate_section
from config.model import ModelConfig
from config.schema import RunConfig
from utils.errors import UserError, run_main


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_right(name):
    config = load_config(name)
    assert config.model.head_dim
    assert config.data.sequence_length <= config.model.max_position_embeddings
    again = from_dict(json.loads(json.dumps(to_dict(config))), where="checkpoint")
    assert again == config


def test_the_default_preset_exists_and_ends_in_time():
    config = load_config()
    assert config == load_config(DEFAULT_PRESET)
    assert config.train.max_seconds <= 600


def test_a_stage_has_presets_of_its_own():
    """`--config` of a stage takes the names of its own folder, and says which there are."""
    assert "default" in preset_names("sft_train") and "default" not in preset_names()
    assert load_config(stage="sft_train") == load_config("default", stage="sft_train")
    assert load_config(stage="lora_train").data.paths == ["skills:shopping"]
    with pytest.raises(UserError, match="--config laptop: no such preset; presets: .*default"):
        load_config("laptop", stage="sft_train")
    with pytest.raises(UserError, match="--config default: no such preset; presets: .*laptop"):
        load_config("default")
    with pytest.raises(UserError, match="no such file$"):
        load_config("gone.json", stage="sft_train")


def line_of(*settings, file=None) -> str:
    """The one line that a configuration is refused with."""
    with pytest.raises(UserError) as caught:
        load_config(file and str(file), list(settings))
    assert "\n" not in str(caught.value)
    return str(caught.value)


MISTAKES = {
    "nothing": ["section.key=value"],
    "train.max_steps": ["section.key=value"],
    "max_steps=3": ["section.key=value", "max_steps=3"],
    "a.b.c=3": ["section.key=value"],
    "trian.max_steps=3": ["trian", "did you mean train?"],
    "zzzz.max_steps=3": ["zzzz", "known: model, tokenizer"],
    "train.max_step=3": ["max_step", "section train", "did you mean max_steps?"],
    "train.max_steps=0": ["train.max_steps=0", "at least 1"],
    "train.max_steps=3.5": ["train.max_steps", "int", "3.5"],
    "train.max_steps=true": ["train.max_steps", "int", "True"],
    "train.max_steps=many": ["train.max_steps", "int", "'many'"],
    "train.batch_size=null": ["train.batch_size", "int", "None"],
    "train.compile=1": ["train.compile", "bool", "1"],
    "train.device=tpu": ["train.device", "auto, cpu, cuda, mps"],
    "optim.lr=0": ["optim.lr", "above 0"],
    "optim.lr=NaN": ["optim.lr", "finite"],
    "optim.lr=Infinity": ["optim.lr", "finite"],
    "optim.lr=true": ["optim.lr", "float"],
    "optim.lr=fast": ["optim.lr", "float", "'fast'"],
    "optim.beta1=1": ["optim.beta1", "below 1"],
    "model.dropout=-0.1": ["model.dropout", "at least 0"],
    "model.dropout=NaN": ["model.dropout"],
    "model.hidden_size=100": ["model.hidden_size=100", "model.num_attention_heads=6"],
    "model.num_key_value_heads=4": ["model.num_key_value_heads=4", "model.num_attention_heads=6"],
    "model.sliding_window_pattern=2": ["model.sliding_window_pattern=2", "set model.sliding_window"],
    "model.attention_sinks=4": ["model.attention_sinks=4", "set model.sliding_window"],
    "model.layer_types=[1, 2]": ["model.layer_types", "list of strings"],
    "model.mlp_only_layers=[true]": ["model.mlp_only_layers", "list of whole numbers", "[True]"],
    "model.mlp_only_layers=1": ["model.mlp_only_layers", "list or null", "1"],
    "model.topk_method=greedy": ["model.topk_method", "noaux_tc, group_limited_greedy"],
    "model.head_dim=33": ["model.head_dim=33", "odd"],
    "model.rope_scaling=4": ["model.rope_scaling", "dict or null", "4"],
    "data.paths=python": ["data.paths", "list"],
    'data.paths=["a", 3]': ["data.paths", "list of strings"],
}  # fmt: skip


@pytest.mark.parametrize(("setting", "words"), MISTAKES.items(), ids=MISTAKES)
def test_mistakes_on_the_command_line(setting, words):
    line = line_of(setting)
    assert all(word in line for word in words), line


def test_no_stage_scores_what_its_base_trained_on():
    """A fraction is inherited; a larger one is refused, a smaller one holds out a part of the same (D1)."""
    base = {"data": {"val_fraction": 0.1}}
    assert load_config("tiny", inherited=base).data.val_fraction == 0.1
    assert load_config("shakespeare", inherited={"data": {"val_fraction": 0.02}}).data.val_fraction == 0.02
    assert load_config("tiny", ["data.val_fraction=0.05"], base).data.val_fraction == 0.05
    with pytest.raises(UserError, match=r"^data.val_fraction=0.2 is more than the 0.1 .*omit the setting"):
        load_config("tiny", ["data.val_fraction=0.2"], base)
    for broken in ("a lot", 2.0, None):
        with pytest.raises(UserError, match="^data.val_fraction"):
            load_config("tiny", ["data.val_fraction=0.2"], {"data": {"val_fraction": broken}})
    assert load_config("tiny", ["data.val_fraction=0.2"]).data.val_fraction == 0.2


def test_settings_are_read_as_what_their_field_is():
    settings = ["optim.lr=1", "train.max_seconds=null", "data.paths=[\"a.txt\"]", "train.compile=true",
                "data.cache_dir=123", "model.rope_scaling={\"type\": \"linear\", \"factor\": 2}"]  # fmt: skip
    config = load_config("tiny", settings)
    assert config.optim.lr == 1.0
    assert type(config.optim.lr) is float
    assert config.train.max_seconds is None
    assert config.data.paths == ["a.txt"]
    assert config.train.compile is True
    assert config.data.cache_dir == "123"
    assert config.model.rope_scaling["factor"] == 2
    assert load_config("tiny", ["train.max_steps=3", "train.max_steps=4"]).train.max_steps == 4


def test_the_command_line_overrides_the_file_and_the_file_the_defaults(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text('{"train": {"max_steps": 5, "seed": 7}}', encoding="utf-8")
    config = load_config(str(path), ["train.max_steps=6"])
    assert (config.train.max_steps, config.train.seed) == (6, 7)
    assert config.optim == RunConfig().optim


def test_mistakes_in_a_file(tmp_path):
    path = tmp_path / "mine.json"
    assert "no such file" in line_of(file=path)
    contents = {
        '{"train":\n {"max_steps": 5,}}': ["line 2", "JSON"],
        "": ["line 1", "JSON"],
        "[1, 2]": ["JSON object", "list"],
        '{"train": 5}': ["section train", "5"],
        '{"train": {"max_steps": "5"}}': ["train.max_steps", "'5'"],
        '{"train": {"max_steps": true}}': ["train.max_steps", "True"],
        '{"trains": {}}': ["'trains'", "did you mean train?"],
        '{"train": {"max_steps": 5}, "optim": {"lr": NaN}}': ["optim.lr"],
        '{"train": {"max_steps": 5, "max_steps": 6}}': ["max_steps", "twice"],
        '{"train": {"seed": 5}}': ["train.max_steps", "train.max_seconds"],
    }
    for content, words in contents.items():
        path.write_text(content, encoding="utf-8")
        line = line_of(file=path)
        assert all(word in line for word in words), (content, line)
    path.write_bytes(b'{"train": "\xff"}')
    assert "UTF-8" in line_of(file=path)


def test_a_file_with_a_byte_order_mark_is_read(tmp_path):  # as Windows editors write it
    path = tmp_path / "mine.json"
    path.write_text('{"train": {"max_steps": 5}}', encoding="utf-8-sig")
    assert load_config(str(path)).train.max_steps == 5


def test_an_unknown_preset_names_the_known_ones():
    with pytest.raises(UserError, match=r"--config huge: no such preset; presets: .*laptop.*tiny"):
        load_config("huge")


def test_two_configurations_share_nothing():
    one, two = load_config("tiny"), load_config("tiny")
    one.data.paths.append("more")
    assert two.data.paths == ["python"]
    assert RunConfig().data.paths == ["python"]


def test_head_dim_follows_the_heads():
    config = ModelConfig(hidden_size=96, num_attention_heads=6, num_key_value_heads=2)
    validate_section("model", config)
    assert config.head_dim == 16
    explicit = ModelConfig(hidden_size=100, num_attention_heads=6, num_key_value_heads=2, head_dim=16)
    validate_section("model", explicit)
    assert explicit.head_dim == 16


@pytest.mark.parametrize("every", [2, 3, 6, 9])
def test_the_pattern_is_that_of_gemma_3(every):
    from transformers import Gemma3TextConfig

    theirs = Gemma3TextConfig(num_hidden_layers=7, sliding_window_pattern=every).layer_types
    config = ModelConfig(num_hidden_layers=7, sliding_window=5, sliding_window_pattern=every)
    validate_section("model", config)
    windows = {"sliding_attention": 5, "full_attention": None}
    assert [config.layer_window(layer) for layer in range(7)] == [windows[kind] for kind in theirs]
    assert config.layer_window(7) is None  # sequential MTP
    config.sliding_window_pattern = None
    assert [config.layer_window(layer) for layer in range(8)] == [5] * 8
    assert [ModelConfig().layer_window(layer) for layer in range(5)] == [None] * 5
    with pytest.raises(UserError, match="sliding_window_pattern=1 must be at least 2"):
        validate_section("model", ModelConfig(sliding_window=5, sliding_window_pattern=1))


def test_latent_attention_does_not_read_the_heads_of_the_other_kind():
    config = ModelConfig(hidden_size=100, num_attention_heads=6, num_key_value_heads=4, attention_kind="mla")
    validate_section("model", config)
    assert config.head_dim == 16 and config.rotary_dim == config.qk_rope_head_dim
    validate_section("model", ModelConfig(attention_kind="mla", head_dim=33))
    assert "odd" in line_of("model.attention_kind=mla", "model.qk_rope_head_dim=3")


def test_experts_in_no_layer_at_all_are_refused():
    """It would silently be a dense model. With sequential MTP the layer of the second head may have them."""
    settings = ["model.num_hidden_layers=2", "model.n_routed_experts=8", "model.first_k_dense_replace=2"]
    line = line_of(*settings)
    assert "model.first_k_dense_replace=2" in line and "model.n_routed_experts=0" in line
    load_config("tiny", [*settings, "model.mtp=sequential"])
    assert "3 layers" in line_of(*settings[:2], "model.mtp=sequential", "model.first_k_dense_replace=3")


LOCAL, FULL = "sliding_attention", "full_attention"
EXPERTS = {"n_routed_experts": 8}
CONTRADICTIONS = [  # settings of a model with three layers, words of the line
    ({"layer_types": [FULL, FULL]}, "layer_types has 2 entries for model.num_hidden_layers=3"),
    ({"layer_types": [FULL, FULL, "chunked_attention"]}, "does not take chunked_attention; it takes full_"),
    ({"layer_types": [FULL, LOCAL, FULL]}, "sliding_attention, which needs a window"),
    ({"layer_types": [FULL] * 3, "sliding_window": 4}, "sliding_window=4 is that of no layer"),
    ({"layer_types": [LOCAL] * 3, "sliding_window": 4, "sliding_window_pattern": 2}, "pattern=2 and .* both"),
    ({"mlp_only_layers": [0, 3]} | EXPERTS, r"mlp_only_layers=\[0, 3\] names a layer .* 0 to 2"),
    ({"mlp_only_layers": [-1]} | EXPERTS, r"mlp_only_layers=\[-1\] names a layer"),
    ({"mlp_only_layers": [1, 2], "first_k_dense_replace": 1} | EXPERTS, "leaves no layer with experts"),
    ({"shared_expert_gate": True, "n_shared_experts": 0} | EXPERTS, "shared_expert_gate=True needs a shared"),
    ({"shared_expert_intermediate_size": 9, "n_shared_experts": 0} | EXPERTS, "size=9 needs a shared expert"),
    ({"attention_out_bias": False, "attention_kind": "mla"}, "out_bias needs model.attention_kind=gqa"),
    ({"n_group": 8, "topk_group": 8} | EXPERTS, "n_group=8 leaves one expert per group"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "words"), CONTRADICTIONS, ids=lambda value: str(value)[:40])
def test_contradictions_within_a_model(settings, words):
    with pytest.raises(UserError, match=f"^model.*{words}") as caught:
        validate_section("model", ModelConfig(num_hidden_layers=3, **settings))
    assert "\n" not in str(caught.value)


def test_what_the_settings_of_layers_mean():
    config = ModelConfig(num_hidden_layers=3, sliding_window=4, layer_types=[FULL, LOCAL, LOCAL],
                         mlp_only_layers=[1], **EXPERTS | {"n_group": 8, "num_experts_per_tok": 1},
                         norm_topk_prob=False, topk_method="group_limited_greedy")  # fmt: skip
    validate_section("model", config)
    assert [config.layer_window(layer) for layer in range(4)] == [None, 4, 4, None]  # the last is that of MTP
    assert [config.is_moe_layer(layer) for layer in range(4)] == [True, False, True, True]
    assert config.shared_width == 2 * 128 and not config.out_bias
    config.shared_expert_intermediate_size, config.attention_bias = 100, True
    assert config.shared_width == 100 and config.out_bias
    config.attention_out_bias = False
    assert not config.out_bias


def test_an_error_is_one_line_and_exit_code_two(capsys):
    def fail():
        raise UserError("first\n  second")

    with pytest.raises(SystemExit) as caught:
        run_main(fail)
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: first second\n"
    with pytest.raises(ZeroDivisionError):  # a bug keeps its traceback
        run_main(lambda: 1 / 0)
    for returned, code in ((None, 0), (0, 0), (3, 3)):
        with pytest.raises(SystemExit) as caught:
            run_main(lambda returned=returned: returned)
        assert (caught.value.code or 0) == code
