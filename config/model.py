"""The shape of a TinySeek model. Field names follow Hugging Face, which readers know."""

from dataclasses import dataclass

from config.checks import checked, option
from utils.errors import UserError

LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass
class ModelConfig:
    """The shape of a TinySeek decoder. Names as in Hugging Face's `Dots1Config` and `DeepseekV3Config`."""

    vocab_size: int = option(0, at_least=0)  # 0: the size of the tokenizer's vocabulary
    hidden_size: int = option(256, at_least=1)
    num_hidden_layers: int = option(4, at_least=1)
    num_attention_heads: int = option(8, at_least=1)
    num_key_value_heads: int = option(4, at_least=1)
    head_dim: int | None = option(None, at_least=2)  # None: hidden_size / num_attention_heads
    intermediate_size: int = option(768, at_least=1)
    max_position_embeddings: int = option(512, at_least=1)
    rms_norm_eps: float = option(1e-6, above=0)
    qk_norm: bool = True
    attention_bias: bool = False  # on q, k, v and o
    attention_out_bias: bool | None = None  # on o alone; None: as attention_bias. Qwen2 has true and false
    mlp_bias: bool = False  # on gate, up and down of dense layers
    sliding_window: int | None = option(None, at_least=1)  # tokens, the query's own included
    sliding_window_pattern: int | None = option(None, at_least=2)  # every n-th layer sees all; None: no layer
    layer_types: list[str] | None = None  # instead of a pattern: of each layer, one of `LAYER_TYPES`
    attention_sinks: int = option(0, at_least=0)  # the first n tokens of a text, which no window hides
    rope_theta: float = option(10000.0, above=1)  # raising it is ABF, arXiv 2309.16039
    rope_scaling: dict | None = None  # old or new Hugging Face spelling, see modules/rope_scaling.py
    rope_interleaved: bool = False  # pairs (0,1),(2,3).. instead of (0,D/2),(1,D/2+1)..
    partial_rotary_factor: float = option(1.0, above=0, at_most=1)  # the share of a head's channels to rotate
    dual_chunk_attention_config: dict | None = None  # Qwen's, see modules/attention/dual_chunk.py
    tie_word_embeddings: bool = True
    dropout: float = option(0.0, at_least=0, below=1)  # on embeddings and on each block's two outputs
    attention_dropout: float = option(0.0, at_least=0, below=1)
    final_logit_softcapping: float | None = option(None, above=0)  # None keeps the Hugging Face twin exact
    initializer_range: float = option(0.02, above=0)
    zero_init_residual: bool = False  # o_proj and down_proj start at zero: each block starts as the identity
    attn_implementation: str = option("auto", choices=("auto", "sdpa", "eager", "blocked", "flash"))

    # mixture of experts (modules/experts/moe.py); n_routed_experts = 0 is a dense model
    n_routed_experts: int = option(0, at_least=0)
    num_experts_per_tok: int = option(4, at_least=1)
    n_shared_experts: int = option(2, at_least=0)  # one MLP of that many times the width
    shared_expert_intermediate_size: int | None = option(None, at_least=1)  # another width of that MLP
    shared_expert_gate: bool = False  # each token scales the output of the shared experts, as in Qwen2-MoE
    moe_intermediate_size: int = option(128, at_least=1)  # width of one expert
    first_k_dense_replace: int = option(0, at_least=0)  # the first layers keep a dense feed-forward
    mlp_only_layers: list[int] | None = None  # and so do these, counted from 0
    scoring_func: str = option("sigmoid", choices=("sigmoid", "softmax"))
    norm_topk_prob: bool = True  # the weights of the chosen experts sum to 1
    routed_scaling_factor: float = option(1.0, above=0)
    n_group: int = option(1, at_least=1)  # experts are divided into groups, and a
    topk_group: int = option(1, at_least=1)  # token chooses from its best groups only, ranked by the sum of
    topk_method: str = option("noaux_tc", choices=("noaux_tc", "group_limited_greedy"))  # two experts, or one
    router_jitter_noise: float = option(0.0, at_least=0, below=1)  # in training: router input times 1 +- this
    moe_implementation: str = option("auto", choices=("auto", "grouped", "loop"))

    # multi-head latent attention (modules/attention/latent.py) in place of grouped-query attention
    attention_kind: str = option("gqa", choices=("gqa", "mla"))
    q_lora_rank: int | None = option(None, at_least=1)  # None: queries are not compressed
    kv_lora_rank: int = option(64, at_least=1)  # size of the cached latent
    qk_nope_head_dim: int = option(32, at_least=1)
    qk_rope_head_dim: int = option(16, at_least=2)
    v_head_dim: int = option(32, at_least=1)

    # multi-token prediction (modules/mtp.py)
    mtp: str = option("none", choices=("none", "parallel", "sequential"))

    @property
    def rotary_dim(self) -> int:
        """The number of channels of a head that the rotary embedding rotates."""
        if self.attention_kind == "mla":
            return self.qk_rope_head_dim
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def out_bias(self) -> bool:
        """True if the output projection of grouped-query attention has a bias."""
        return self.attention_bias if self.attention_out_bias is None else self.attention_out_bias

    @property
    def shared_width(self) -> int:
        """The width of the MLP that is the shared experts; 0 without any."""
        return self.shared_expert_intermediate_size or self.n_shared_experts * self.moe_intermediate_size

    def is_moe_layer(self, layer: int) -> bool:
        """Return whether layer `layer` has experts; the one after the last is that of sequential MTP."""
        dense = layer < self.first_k_dense_replace or layer in (self.mlp_only_layers or ())
        return self.n_routed_experts > 0 and not dense

    def layer_window(self, layer: int) -> int | None:
        """Return the window of layer `layer`, or None if it sees all.

        With a pattern of n, layers n-1, 2n-1, .. see all (Gemma 3). With a pattern, or types of layers, that
        of sequential MTP sees all.
        """
        every, kinds = self.sliding_window_pattern, self.layer_types
        local = every is None or (layer % every != every - 1 and layer < self.num_hidden_layers)
        if kinds is not None:
            local = kinds[layer : layer + 1] == ["sliding_attention"]
        return self.sliding_window if local else None

    def layer_reach(self, layer: int, length):
        """Return how many tokens a query of the layer sees, at most, in a row of `length` tokens."""
        window = self.layer_window(layer)
        return length if window is None else min(window + self.attention_sinks, length)

    def check(self):
        """Fill in `head_dim` and `partial_rotary_factor`; raise `UserError` for the first broken rule."""
        self.read_partial_rotary_factor()
        attention = self.latent_rules if self.attention_kind == "mla" else self.head_rules
        for rules in (attention, self.chunk_rules, self.window_rules, self.expert_rules):
            for broken, message in rules():
                if broken:
                    raise UserError(message)
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads

    def read_partial_rotary_factor(self):
        """Move `partial_rotary_factor` out of `rope_scaling`, where Hugging Face's files have it."""
        scaling = dict(self.rope_scaling or {})
        share = scaling.pop("partial_rotary_factor", None)
        if share is None:
            return
        key = "model.rope_scaling: partial_rotary_factor"
        share = checked(key, share, float, {"above": 0, "at_most": 1})
        if self.partial_rotary_factor not in (1.0, share):
            raise UserError(f"{key}={share} contradicts model.partial_rotary_factor="
                            f"{self.partial_rotary_factor}: omit one")  # fmt: skip
        self.partial_rotary_factor, self.rope_scaling = share, scaling or None

    def head_rules(self):
        """Yield for each rule of grouped-query attention whether it is broken, and the error."""
        C, H, G, D = self.hidden_size, self.num_attention_heads, self.num_key_value_heads, self.head_dim
        yield D is None and C % H, (
            f"model.hidden_size={C} is not divisible by model.num_attention_heads={H}: set model.head_dim"
        )
        D = D or C // H
        yield D % 2, f"model.head_dim={D} is odd: rotary embeddings rotate pairs of channels"
        turned = int(D * self.partial_rotary_factor)
        yield turned < 2 or turned % 2, (
            f"model.partial_rotary_factor={self.partial_rotary_factor} rotates {turned} channels of {D}: "
            "rotary embeddings need an even number, at least 2"
        )
        yield H % G, (
            f"model.num_attention_heads={H} is not divisible by model.num_key_value_heads={G}: change one"
        )

    def latent_rules(self):
        """Yield the same for latent attention, which reads neither head_dim nor num_key_value_heads."""
        D, window = self.qk_rope_head_dim, self.sliding_window
        yield D % 2, f"model.qk_rope_head_dim={D} is odd: rotary embeddings rotate pairs of channels"
        yield self.partial_rotary_factor != 1, (
            f"model.partial_rotary_factor={self.partial_rotary_factor} needs model.attention_kind=gqa: "
            "in latent attention set model.qk_rope_head_dim"
        )
        yield window is not None, f"model.sliding_window={window} needs model.attention_kind=gqa: change one"
        yield self.attention_out_bias is not None, (
            "model.attention_out_bias needs model.attention_kind=gqa: in latent attention set "
            "model.attention_bias alone"
        )

    def chunk_rules(self):
        """Yield the same for dual chunk attention, if it is asked for."""
        chunks, name = self.dual_chunk_attention_config, "model.dual_chunk_attention_config"
        if chunks is None:
            return
        keys = ("chunk_size", "local_size", "original_max_position_embeddings")
        unknown = ", ".join(sorted(set(chunks) - set(keys)))
        yield unknown, f"{name} does not take {unknown}; it takes {', '.join(keys)}"
        for key in keys:
            value = chunks.get(key)
            wrong = type(value) is not int or value < 1
            optional = key == keys[2] and value is None
            yield wrong and not optional, f"{name}: {key} must be a whole number above 0, not {value!r}"
        c, w = chunks["chunk_size"], chunks["local_size"]
        yield w >= c, f"{name}: local_size={w} must be below chunk_size={c}: their difference is the stride"
        yield self.attention_kind == "mla", f"{name} needs model.attention_kind=gqa: change one"
        yield self.sliding_window is not None, (
            f"model.sliding_window={self.sliding_window} leaves nothing for {name} to reach: set one to null"
        )
        yield self.attn_implementation not in ("auto", "eager"), (
            f"{name} has its own kernels: set model.attn_implementation=auto (or eager, the slow formula), "
            f"not {self.attn_implementation}"
        )

    def window_rules(self):
        """Yield the same for settings that mean nothing without a window, and for the types of layers."""
        for name in ("sliding_window_pattern", "attention_sinks"):
            value = getattr(self, name)
            yield value and self.sliding_window is None, (
                f"model.{name}={value} needs a window: set model.sliding_window, or leave it out"
            )
        window, every, kinds = self.sliding_window, self.sliding_window_pattern, self.layer_types
        if kinds is None:
            return
        unknown = ", ".join(sorted(set(kinds) - set(LAYER_TYPES)))
        yield unknown, f"model.layer_types does not take {unknown}; it takes {', '.join(LAYER_TYPES)}"
        yield len(kinds) != self.num_hidden_layers, (
            f"model.layer_types has {len(kinds)} entries for model.num_hidden_layers="
            f"{self.num_hidden_layers}: give each layer one"
        )
        yield every is not None, (
            f"model.sliding_window_pattern={every} and model.layer_types both say which layers see all: "
            "leave one out"
        )
        local = "sliding_attention" in kinds
        yield local and window is None, (
            "model.layer_types has sliding_attention, which needs a window: set model.sliding_window"
        )
        yield window is not None and not local, (
            f"model.sliding_window={window} is that of no layer, since model.layer_types has no "
            "sliding_attention: leave one out"
        )

    def expert_rules(self):
        """Yield the same for a mixture of experts; a dense model has no such rules."""
        E, K, groups, best = self.n_routed_experts, self.num_experts_per_tok, self.n_group, self.topk_group
        if E == 0:
            return
        layers, dense = self.num_hidden_layers + (self.mtp == "sequential"), self.mlp_only_layers
        yield self.first_k_dense_replace >= layers, (
            f"model.first_k_dense_replace={self.first_k_dense_replace} leaves none of {layers} layers with "
            "experts: lower it, or set model.n_routed_experts=0"
        )
        yield not all(0 <= layer < self.num_hidden_layers for layer in dense or ()), (
            f"model.mlp_only_layers={dense} names a layer that is not there: layers are 0 to "
            f"{self.num_hidden_layers - 1}"
        )
        yield not any(map(self.is_moe_layer, range(layers))), (
            f"model.mlp_only_layers={dense} leaves no layer with experts: shorten it, or set "
            "model.n_routed_experts=0"
        )
        for name in ("shared_expert_intermediate_size", "shared_expert_gate"):
            yield getattr(self, name) and not self.n_shared_experts, (
                f"model.{name}={getattr(self, name)} needs a shared expert: set model.n_shared_experts=1"
            )
        yield K > E, f"model.num_experts_per_tok={K} is more than model.n_routed_experts={E}: lower it"
        yield K == 1 and self.norm_topk_prob, (
            "model.num_experts_per_tok=1 with model.norm_topk_prob=true makes every weight 1, so the router "
            "gets no gradient from the loss: set model.norm_topk_prob=false, or use at least two experts"
        )
        yield E % groups, f"model.n_routed_experts={E} is not divisible by model.n_group={groups}: change one"
        yield best > groups, f"model.topk_group={best} is more than model.n_group={groups}: lower it"
        yield best * E // groups < K, (
            f"model.topk_group={best} groups have fewer than model.num_experts_per_tok={K} experts: raise it"
        )
        yield groups > 1 and E // groups < 2 and self.topk_method == "noaux_tc", (
            f"model.n_group={groups} leaves one expert per group, and groups are ranked by two: lower it"
        )
