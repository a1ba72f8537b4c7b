"""Hugging Face families other than decoders: BERT, ModernBERT and T5, each as one table.

    settings   ours -> (its value where config.json has none, its names there, the first of which is written)
    weights    our layer -> theirs. Several of ours with the same one of theirs are its rows, in this order.

`N` is the number of a layer. A layer's parameters have the same names on both sides: weight, bias.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from inference.hf.families import REQUIRED
from utils.errors import UserError

SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
ENCODER = {name: (REQUIRED, name) for name in SIZES} | {"initializer_range": (0.02, "initializer_range")}
THETAS = {"global_rope_theta": ("full_attention", 160_000.0), "local_rope_theta": ("sliding_attention", 1e4)}


def bert_settings(config: dict, names: Collection[str]) -> dict:
    """Refuse a BERT without token types, which transformers cannot run."""
    if config.get("type_vocab_size") == 0:
        raise UserError("type_vocab_size=0 is not supported: every token of a BERT has a type")
    return {}


def modern_settings(config: dict, names: Collection[str]) -> dict:
    """Return the bases of the rotation, which old files have as settings and new ones by kind of layer."""
    rules, found = config.get("rope_parameters", {}), {}
    if "rope_scaling" in config:
        raise UserError("rope_scaling is not supported: no rule stretches the positions of an encoder here")
    if not isinstance(rules, dict) or rules.keys() - {kind for kind, _ in THETAS.values()}:
        raise UserError(f"rope_parameters={rules!r} must have entries full_attention and sliding_attention")
    for ours, (kind, default) in THETAS.items():
        rule = rules.get(kind) or {}
        if not isinstance(rule, dict) or rule.get("rope_type", "default") != "default":
            raise UserError(f"rope_parameters: {kind}={rule!r} is not supported, only rope_type 'default'")
        found[ours] = rule.get("rope_theta", config.get(ours, default))
    return found


def modern_config(model) -> dict:
    """Return what config.json says about local and global layers."""
    local = [model.layer_window(n) is not None for n in range(model.num_hidden_layers)]
    rules = {kind: {"rope_type": "default", "rope_theta": getattr(model, ours)}
             for ours, (kind, _) in THETAS.items()}  # fmt: skip
    types = ["sliding_attention" if one else "full_attention" for one in local]
    return {"rope_parameters": rules, "layer_types": types, "local_attention": model.local_attention or 128}


def t5_settings(config: dict, names: Collection[str]) -> dict:
    """Return what depends on the age of the file.

    A matrix of its own for the output layer is in the files or it is not: newer versions of transformers
    write tie_word_embeddings=true in either case. Before there was scale_decoder_outputs, it said both.
    """
    tied = config.get("tie_word_embeddings", True)
    start = config.get("decoder_start_token_id", config.get("pad_token_id", 0))
    layers = config.get("num_decoder_layers", config.get("num_layers"))
    return {"tie_word_embeddings": "lm_head.weight" not in names, "num_decoder_layers": layers,
            "scale_decoder_outputs": config.get("scale_decoder_outputs", tied),
            "decoder_start_token_id": start}  # fmt: skip


def t5_config(model) -> dict:
    """Return the entries that `t5_settings` reads."""
    scaled = model.scale_decoder_outputs
    return {"num_decoder_layers": model.num_decoder_layers, "scale_decoder_outputs": scaled,
            "decoder_start_token_id": model.decoder_start_token_id, "is_encoder_decoder": True,
            "tie_word_embeddings": scaled}  # fmt: skip


def t5_layers(stack: str, cross: bool) -> dict:
    """Return the table of the weights of one half."""
    ours, theirs = f"{stack}.layers.N", f"{stack}.block.N.layer"
    blocks = [("self_attn", "attention_norm", "SelfAttention")]
    blocks += [("cross_attn", "cross_norm", "EncDecAttention")] * cross
    table = {}
    for place, (block, norm, name) in enumerate(blocks):
        table |= {f"{ours}.{block}.{one}_proj": f"{theirs}.{place}.{name}.{one}" for one in "qkvo"}
        table[f"{ours}.{norm}"] = f"{theirs}.{place}.layer_norm"
    last = f"{theirs}.{len(blocks)}"
    matrices = {"gate_proj": "wi_0", "up_proj": "wi_1", "down_proj": "wo"}
    table |= {f"{ours}.mlp.{one}": f"{last}.DenseReluDense.{name}" for one, name in matrices.items()}
    return table | {
        f"{ours}.mlp_norm": f"{last}.layer_norm", f"{stack}.norm": f"{stack}.final_layer_norm",
        f"{stack}.relative_bias": f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias",
    }  # fmt: skip


@dataclass(frozen=True)
class TableFamily:
    """One `model_type` of Hugging Face."""

    architecture: str
    short: str  # of the stage that trains such models
    section: str  # of our configuration
    settings: dict[str, tuple]
    fixed: dict  # settings of ours that are the same in all its models
    needs: dict  # entries of config.json with the only value supported
    weights: dict[str, str]
    absent: dict = field(default_factory=dict)  # entry of `needs` -> what it means that there is none
    read: Callable[[dict, Collection[str]], dict] = lambda config, names: {}  # further settings of ours
    write: Callable[[object], dict] = lambda model: {}  # and back
    prefix: str = ""  # of the weights of the body, which files of a body alone leave out
    endings: dict = field(default_factory=dict)  # old names of parameters
    copies: dict = field(default_factory=dict)  # tied tensor -> that which it equals; files may have either
    ignored: tuple[str, ...] = ()  # beginnings of names that transformers does not load either
    roles: tuple[str, ...] = ("pad",)  # of the tokens that config.json names
    task: str = ""  # as the Hub calls it


OTHER_FAMILIES = {
    "bert": TableFamily(
        "BertForMaskedLM", "MLM", "encoder",
        ENCODER | {
            "max_position_embeddings": (512, "max_position_embeddings"),
            "type_vocab_size": (2, "type_vocab_size"), "hidden_act": ("gelu", "hidden_act"),
            "norm_eps": (1e-12, "layer_norm_eps"), "dropout": (0.1, "hidden_dropout_prob"),
            "attention_dropout": (0.1, "attention_probs_dropout_prob"),
        },
        {"norm_order": "post", "norm": "layer_norm", "norm_bias": True, "position_embedding_type": "absolute",
         "gated": False, "attention_bias": True, "mlp_bias": True, "head_bias": True},
        {"position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False,
         "tie_word_embeddings": True},
        {
            "model.embed_tokens": "bert.embeddings.word_embeddings",
            "model.embed_positions": "bert.embeddings.position_embeddings",
            "model.embed_token_types": "bert.embeddings.token_type_embeddings",
            "model.embed_norm": "bert.embeddings.LayerNorm",
            "model.layers.N.self_attn.q_proj": "bert.encoder.layer.N.attention.self.query",
            "model.layers.N.self_attn.k_proj": "bert.encoder.layer.N.attention.self.key",
            "model.layers.N.self_attn.v_proj": "bert.encoder.layer.N.attention.self.value",
            "model.layers.N.self_attn.o_proj": "bert.encoder.layer.N.attention.output.dense",
            "model.layers.N.attention_norm": "bert.encoder.layer.N.attention.output.LayerNorm",
            "model.layers.N.mlp.up_proj": "bert.encoder.layer.N.intermediate.dense",
            "model.layers.N.mlp.down_proj": "bert.encoder.layer.N.output.dense",
            "model.layers.N.mlp_norm": "bert.encoder.layer.N.output.LayerNorm",
            "head.dense": "cls.predictions.transform.dense",
            "head.norm": "cls.predictions.transform.LayerNorm",
            "lm_head": "cls.predictions",
        },
        read=bert_settings, prefix="bert.", endings={".gamma": ".weight", ".beta": ".bias"},
        copies={"cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
                "cls.predictions.decoder.bias": "cls.predictions.bias"},
        ignored=("bert.pooler.", "cls.seq_relationship."), task="fill-mask",
    ),
    "modernbert": TableFamily(
        "ModernBertForMaskedLM", "MLM", "encoder",
        ENCODER | {
            "max_position_embeddings": (8192, "max_position_embeddings"), "norm_eps": (1e-5, "norm_eps"),
            "norm_bias": (False, "norm_bias"), "attention_bias": (False, "attention_bias"),
            "mlp_bias": (False, "mlp_bias"), "head_bias": (False, "classifier_bias"),
            "layer_types": (None, "layer_types"),
            "global_attn_every_n_layers": (3, "global_attn_every_n_layers"),
            "local_attention": (128, "local_attention"), "dropout": (0.0, "mlp_dropout"),
            "attention_dropout": (0.0, "attention_dropout"),
        },
        {"norm_order": "pre", "norm": "layer_norm", "position_embedding_type": "rope", "gated": True,
         "hidden_act": "gelu", "type_vocab_size": 0},
        {"classifier_activation": "gelu", "hidden_activation": "gelu", "decoder_bias": True,
         "tie_word_embeddings": True},
        {
            "model.embed_tokens": "model.embeddings.tok_embeddings",
            "model.embed_norm": "model.embeddings.norm",
            "model.layers.N.attention_norm": "model.layers.N.attn_norm",
            "model.layers.N.self_attn.q_proj": "model.layers.N.attn.Wqkv",
            "model.layers.N.self_attn.k_proj": "model.layers.N.attn.Wqkv",
            "model.layers.N.self_attn.v_proj": "model.layers.N.attn.Wqkv",
            "model.layers.N.self_attn.o_proj": "model.layers.N.attn.Wo",
            "model.layers.N.mlp_norm": "model.layers.N.mlp_norm",
            "model.layers.N.mlp.gate_proj": "model.layers.N.mlp.Wi",
            "model.layers.N.mlp.up_proj": "model.layers.N.mlp.Wi",
            "model.layers.N.mlp.down_proj": "model.layers.N.mlp.Wo",
            "model.norm": "model.final_norm", "head.dense": "head.dense", "head.norm": "head.norm",
            "lm_head": "decoder",
        },
        read=modern_settings, write=modern_config, prefix="model.",
        copies={"decoder.weight": "model.embeddings.tok_embeddings.weight"},
        roles=("pad", "bos", "eos", "cls", "sep"), task="fill-mask",
    ),
    "t5": TableFamily(
        "T5ForConditionalGeneration", "Span", "seq2seq",
        {
            "vocab_size": (REQUIRED, "vocab_size"), "hidden_size": (REQUIRED, "d_model"),
            "num_hidden_layers": (REQUIRED, "num_layers"), "num_attention_heads": (REQUIRED, "num_heads"),
            "head_dim": (REQUIRED, "d_kv"), "intermediate_size": (REQUIRED, "d_ff"),
            "relative_attention_num_buckets": (32, "relative_attention_num_buckets"),
            "relative_attention_max_distance": (128, "relative_attention_max_distance"),
            "rms_norm_eps": (1e-6, "layer_norm_epsilon"), "dropout": (0.1, "dropout_rate"),
        },
        {},
        {"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu_new", "is_gated_act": True,
         "is_decoder": False},
        {"embed_tokens": "shared", **t5_layers("encoder", False), **t5_layers("decoder", True),
         "lm_head": "lm_head"},
        absent={"feed_forward_proj": "relu"}, read=t5_settings, write=t5_config,
        copies={"encoder.embed_tokens.weight": "shared.weight",
                "decoder.embed_tokens.weight": "shared.weight"},
        ignored=("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",),
        roles=("pad", "eos"), task="text2text-generation",
    ),
}  # fmt: skip
