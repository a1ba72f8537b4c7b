"""config.json of Hugging Face to `ModelConfig` and back.

Old and new spellings are read: `rope_theta` and `rope_scaling` or `rope_parameters`, `num_experts` or
`num_local_experts`. The old ones are written, which all versions of transformers read.

A family can hold a model if what it writes is read back as a model that computes the same: `behaviour`
returns all that the logits depend on, and nothing else.
"""

from config.checks import validate_section
from config.model import ModelConfig
from inference.hf.families import FAMILIES, REQUIRED, Family
from inference.hf.other_families import OTHER_FAMILIES, TableFamily
from modules.attention.latent import softmax_scale
from modules.rope_scaling import read_scaling, rope_frequencies
from utils.errors import UserError

NULLS = ("q_lora_rank", "num_key_value_heads")  # settings whose null is a value, and not their default
LENGTHS = (None, 1000, 10**6)  # of rows, to compare rules that depend on it
# settings that the logits depend on in layers of one kind, for `behaviour`; GQA_SETTINGS have no
# rope_interleaved, because export gives such weights the other pairing
GQA_SETTINGS = ("num_key_value_heads", "head_dim", "qk_norm", "attention_bias", "partial_rotary_factor")
MLA_SETTINGS = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
                "attention_bias", "rope_interleaved")  # fmt: skip
EXPERT_SETTINGS = ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "scoring_func",
                   "norm_topk_prob", "routed_scaling_factor", "shared_width", "shared_expert_gate",
                   "n_group")  # fmt: skip

# entries of config.json that are used as they are; all others are checked as settings of ours
TYPES = {"rope_parameters": dict, "rope_scaling": dict, "layer_types": list, "mlp_only_layers": list,
         "max_window_layers": int, "decoder_sparse_step": int, "first_k_dense_replace": int,
         "num_hidden_layers": int}  # fmt: skip


def family_of(config: dict, where: str, families: dict = FAMILIES) -> Family | TableFamily:
    """Return the family of a config.json, or raise a `UserError` that lists the known ones."""
    name = config.get("model_type")
    if not isinstance(name, str) or name not in families:
        known = ", ".join((*FAMILIES, *OTHER_FAMILIES))
        raise UserError(f"{where}: model_type {repr(name)[:60]} is not supported; known: {known}")
    if "quantization_config" in config:
        raise UserError(
            f"{where}: the weights are quantized (quantization_config); take an fp32 or bf16 model"
        )
    return families[name]


def read_settings(config: dict, where: str) -> ModelConfig:
    """Return the settings of a TinySeek model that computes what the model of this config.json does."""
    family, model = family_of(config, where), {}
    given = {name: value for name, value in config.items() if value is not None}
    for name in TYPES.keys() & given:
        if type(given[name]) is not TYPES[name]:
            raise UserError(f"{where}: {name} must be {TYPES[name].__name__}, not {given[name]!r}")
    for name, only in ({"hidden_act": "silu"} | family.needs).items():
        if given.get(name, only) != only:
            raise UserError(f"{where}: {name}={given[name]!r} is not supported, only {only!r}")
    for name, default in family.settings.items():
        spellings = family.renamed.get(name, (name,))
        model[name] = next((given[one] for one in spellings if one in given), default)
        if name in NULLS and name in config:
            model[name] = config[name]
        if model[name] is REQUIRED:
            raise UserError(f"{where}: {' or '.join(spellings)} is missing")
    model["num_key_value_heads"] = model["num_key_value_heads"] or model["num_attention_heads"]
    if model.get("topk_method") == "greedy":  # DeepSeek-V2's name for one group
        model |= {"topk_method": "group_limited_greedy", "n_group": 1, "topk_group": 1}
    rope = dict(given.get("rope_parameters") or given.get("rope_scaling") or {})
    model["rope_theta"] = rope.pop("rope_theta", given.get("rope_theta", family.rope_theta))
    rule = rope.get("rope_type", rope.get("type", "default"))
    model["rope_scaling"] = None if rule == "default" else rope
    layers = model["num_hidden_layers"]
    if not 0 < layers < 10**5:
        raise UserError(f"{where}: num_hidden_layers={layers!r} is not a number of layers")
    model |= windows(family, config, layers, where) | dense_layers(family, given, layers, where)
    if model.get("first_k_dense_replace", 0) >= layers or model.get("mlp_only_layers") == [*range(layers)]:
        model |= {"n_routed_experts": 0, "first_k_dense_replace": 0, "mlp_only_layers": None}
    found = ModelConfig(**model | family.fixed)
    try:
        validate_section("model", found)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return found


def windows(family: Family, config: dict, layers: int, where: str) -> dict:
    """Return our settings of windows. A sliding_window of null means none; an absent one, the default."""
    given = {name: value for name, value in config.items() if value is not None}
    window = config.get("sliding_window", family.window)
    on = given.get("use_sliding_window", False) if family.window_switch else True
    if family.windows == "none" or not on or not window:
        return {}
    types = ["sliding_attention"] * layers
    if family.windows == "listed":
        types = given.get("layer_types")
        full = given.get("max_window_layers", family.max_window_layers)
        if types is None and family.max_window_layers is None:  # its rule changed between versions
            raise UserError(f"{where}: layer_types is missing: it says which layers have the sliding_window")
        types = types or ["full_attention" if n < full else "sliding_attention" for n in range(layers)]
    if all(one == "full_attention" for one in types):
        return {}
    every = types == ["sliding_attention"] * layers
    return {"sliding_window": window, "layer_types": None if every else types}


def dense_layers(family: Family, given: dict, layers: int, where: str) -> dict:
    """Return our settings of layers without experts."""
    if not family.dense_layers:
        return {}
    only, step = given.get("mlp_only_layers", ()), given.get("decoder_sparse_step", 1)
    if step < 1:
        raise UserError(f"{where}: decoder_sparse_step={step} must be at least 1")
    dense = [n for n in range(layers) if n in only or (n + 1) % step]
    if dense == [*range(len(dense))]:
        return {"first_k_dense_replace": len(dense)}
    return {"mlp_only_layers": dense}


def write_settings(model: ModelConfig) -> dict:
    """Return the config.json of the first family that can hold the model; without any, raise a `UserError`
    that names what the nearest one lacks."""
    wanted, nearest = behaviour(model), None
    for name in FAMILIES:
        try:
            config = in_family(name, model)
            found = behaviour(read_settings(config, name))
        except UserError as error:  # the family's own rules refuse it
            lacks = [str(error)]
        else:
            lacks = [key for key in wanted | found if wanted.get(key) != found.get(key)]
            if not lacks:
                return config
        if nearest is None or len(lacks) < len(nearest[1]):
            nearest = name, lacks
    raise UserError(
        f"no architecture of Hugging Face that TinySeek knows has this model: {nearest[0]} comes nearest, "
        f"but not in {', '.join(nearest[1])}"
    )


def in_family(name: str, model: ModelConfig) -> dict:
    """Return the config.json of `model` in a family, whether or not that can hold it."""
    family, layers = FAMILIES[name], range(model.num_hidden_layers)
    config = {"model_type": name, "architectures": [family.architecture], "hidden_act": "silu"} | family.needs
    for setting in family.settings:
        config[family.renamed.get(setting, (setting,))[0]] = getattr(model, setting)
    if model.attention_kind == "mla":  # which has no groups
        config["num_key_value_heads"] = model.num_attention_heads
    if family.divisible and model.hidden_size % model.num_attention_heads:
        raise UserError(f"model.hidden_size={model.hidden_size} is not divisible by "
                        f"model.num_attention_heads={model.num_attention_heads}")  # fmt: skip
    config |= written_rope(model)
    sparse = [model.is_moe_layer(n) for n in layers]
    if "first_k_dense_replace" in family.settings:
        config["first_k_dense_replace"] = (sparse + [True]).index(True)
    if not any(sparse) and "n_routed_experts" in config:  # no layer reads them, but they must be valid
        config |= {"n_routed_experts": 1, "num_experts_per_tok": 1, "norm_topk_prob": False}
    if family.dense_layers:
        config |= {"mlp_only_layers": [n for n in layers if not sparse[n]], "decoder_sparse_step": 1}
    if "shared_expert_intermediate_size" in family.settings:
        config["shared_expert_intermediate_size"] = model.shared_width
    if family.windows != "none":
        seen = [model.layer_window(n) for n in layers]
        config["sliding_window"] = next((window for window in seen if window), None)
        if family.window_switch:
            config["use_sliding_window"] = any(seen)
        if family.windows == "listed":
            config["layer_types"] = ["sliding_attention" if window else "full_attention" for window in seen]
            config["max_window_layers"] = model.num_hidden_layers  # read if layer_types is not
    return config


def written_rope(model: ModelConfig) -> dict:
    """Return rope_theta and rope_scaling in Hugging Face's terms."""
    rule, theta, values = read_scaling(model.rope_scaling, model.rope_theta)
    if rule == "ntk":  # Hugging Face has no such rule; it is a larger base
        D = model.rotary_dim
        return {"rope_theta": theta * values["factor"] ** (D / (D - 2)), "rope_scaling": None}
    if rule == "dynamic" and values["original_max_position_embeddings"]:
        raise UserError("rope_scaling: dynamic with original_max_position_embeddings")
    # 0: not given; False is a value, of truncate
    scaling = {key: value for key, value in values.items() if value is False or value != 0}
    return {"rope_theta": theta, "rope_scaling": {"rope_type": rule} | scaling if rule != "default" else None}


def behaviour(model: ModelConfig) -> dict:
    """Return all settings that the logits depend on, those without effect in this model left out."""
    every = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps",
             "max_position_embeddings", "tie_word_embeddings", "final_logit_softcapping",
             "dual_chunk_attention_config", "attention_kind")  # fmt: skip
    found = {name: getattr(model, name) for name in every}
    layers = range(model.num_hidden_layers)
    sparse = [model.is_moe_layer(n) for n in layers]
    found["windows"] = [model.layer_window(n) for n in layers]
    found["attention_sinks"] = model.attention_sinks if any(found["windows"]) else 0
    found["layers with experts"] = sparse
    mla = model.attention_kind == "mla"
    found |= {name: getattr(model, name) if mla else None for name in MLA_SETTINGS}
    found |= {name: getattr(model, name) for name in GQA_SETTINGS if not mla}
    found["bias of o_proj"] = model.out_bias
    if not all(sparse):
        found |= {"intermediate_size": model.intermediate_size, "mlp_bias": model.mlp_bias}
    if any(sparse):
        found |= {name: getattr(model, name) for name in EXPERT_SETTINGS}
        grouped = model.n_group > 1
        found |= {name: getattr(model, name) if grouped else None for name in ("topk_group", "topk_method")}
    angles = model.rotary_dim, model.rope_theta, model.rope_scaling, model.max_position_embeddings
    tables = [rope_frequencies(*angles, length=length) for length in LENGTHS]
    found["rope_scaling"] = [(frequencies.tolist(), factor) for frequencies, factor in tables]
    found["scale of scores"] = softmax_scale(model) if mla else None  # DeepSeek's YaRN changes it too
    return found
