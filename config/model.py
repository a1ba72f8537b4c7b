"""The shape of a TinySeek model. Field names follow Hugging Face, so that readers meet known words."""

from dataclasses import dataclass

from config.checks import option
from utils.errors import UserError


@dataclass
class ModelConfig:
    """The shape of a TinySeek decoder. Names as in Hugging Face's `Dots1Config` and `DeepseekV3Config`."""

    vocab_size: int = option(0, at_least=0)  # 0: as many as the tokenizer has
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
    sliding_window: int | None = option(None, at_least=1)  # tokens seen, the query's own included
    rope_theta: float = option(10000.0, above=1)  # raising it is ABF, arXiv 2309.16039
    rope_scaling: dict | None = None  # old or new Hugging Face spelling, see modules/rope_scaling.py
    rope_interleaved: bool = False  # pairs (0,1),(2,3).. instead of (0,D/2),(1,D/2+1)..
    tie_word_embeddings: bool = True
    dropout: float = option(0.0, at_least=0, below=1)  # on embeddings and on each block's two outputs
    attention_dropout: float = option(0.0, at_least=0, below=1)
    final_logit_softcapping: float | None = option(None, above=0)  # None keeps the Hugging Face twin exact
    initializer_range: float = option(0.02, above=0)
    zero_init_residual: bool = False  # o_proj and down_proj start at zero: each block starts as the identity
    attn_implementation: str = option("auto", choices=("auto", "sdpa", "eager", "blocked"))

    # mixture of experts (modules/experts/moe.py); n_routed_experts = 0 is a dense model
    n_routed_experts: int = option(0, at_least=0)
    num_experts_per_tok: int = option(4, at_least=1)
    n_shared_experts: int = option(2, at_least=0)  # one MLP of that many times the width
    moe_intermediate_size: int = option(128, at_least=1)  # width of one expert
    first_k_dense_replace: int = option(0, at_least=0)  # the first layers keep a dense feed-forward
    scoring_func: str = option("sigmoid", choices=("sigmoid", "softmax"))
    norm_topk_prob: bool = True  # the weights of the chosen experts add up to 1
    routed_scaling_factor: float = option(1.0, above=0)
    n_group: int = option(1, at_least=1)  # experts come in groups, and a token
    topk_group: int = option(1, at_least=1)  # chooses from its best groups only
    router_jitter_noise: float = option(0.0, at_least=0, below=1)  # in training: router input times 1 +- this
    moe_implementation: str = option("auto", choices=("auto", "grouped", "loop"))

    # multi-head latent attention (modules/attention/latent.py) in place of grouped-query attention
    attention_kind: str = option("gqa", choices=("gqa", "mla"))
    q_lora_rank: int | None = option(None, at_least=1)  # None: queries are not compressed
    kv_lora_rank: int = option(64, at_least=1)  # what the cache holds of keys and values
    qk_nope_head_dim: int = option(32, at_least=1)
    qk_rope_head_dim: int = option(16, at_least=2)
    v_head_dim: int = option(32, at_least=1)

    # multi-token prediction (modules/mtp.py)
    mtp: str = option("none", choices=("none", "parallel", "sequential"))

    def check(self):
        """Fill in `head_dim` and check that heads, groups and experts fit."""
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise UserError(
                    f"model.hidden_size={self.hidden_size} does not divide by model.num_attention_heads="
                    f"{self.num_attention_heads}: change one, or set model.head_dim"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.head_dim % 2:
            raise UserError(f"model.head_dim={self.head_dim} is odd: rotary embeddings turn pairs of numbers")
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"model.num_attention_heads={self.num_attention_heads} does not divide by "
                f"model.num_key_value_heads={self.num_key_value_heads}: each key/value head serves the same "
                "number of query heads"
            )
        if self.n_routed_experts:
            self.check_experts()
        if self.attention_kind == "mla":
            self.check_latent()

    @property
    def rotary_dim(self) -> int:
        """How many channels of a head the rotary embedding turns."""
        return self.qk_rope_head_dim if self.attention_kind == "mla" else self.head_dim

    def is_moe_layer(self, layer: int) -> bool:
        """Whether layer number `layer` has experts; one beyond the last is that of sequential MTP."""
        return self.n_routed_experts > 0 and layer >= self.first_k_dense_replace

    def check_experts(self):
        """What a router cannot do."""
        experts, chosen = self.n_routed_experts, self.num_experts_per_tok
        if chosen > experts:
            raise UserError(
                f"model.num_experts_per_tok={chosen} is more than model.n_routed_experts={experts}: "
                "lower the first or raise the second"
            )
        if chosen == 1 and self.norm_topk_prob:
            raise UserError(
                "model.num_experts_per_tok=1 with model.norm_topk_prob=true makes every weight 1, so "
                "that the router gets no gradient from the language-model loss: set "
                "model.norm_topk_prob=false, or use two experts or more"
            )
        if experts % self.n_group:
            raise UserError(
                f"model.n_routed_experts={experts} does not divide by model.n_group={self.n_group}"
            )
        if self.topk_group > self.n_group:
            raise UserError(
                f"model.topk_group={self.topk_group} is more than model.n_group={self.n_group}: lower it"
            )
        if chosen > self.topk_group * experts // self.n_group:
            raise UserError(
                f"model.num_experts_per_tok={chosen} experts are not in model.topk_group={self.topk_group} "
                f"groups of {experts // self.n_group}: raise model.topk_group"
            )
        if self.n_group > 1 and experts // self.n_group < 2:
            raise UserError(
                f"model.n_group={self.n_group} leaves one expert in a group, and groups are ranked by two"
            )

    def check_latent(self):
        """What latent attention cannot do."""
        if self.qk_rope_head_dim % 2:
            raise UserError(
                f"model.qk_rope_head_dim={self.qk_rope_head_dim} is odd: rotary embeddings turn pairs"
            )
        if self.sliding_window is not None:
            raise UserError(
                "model.sliding_window goes with model.attention_kind=gqa only: leave it out, or use gqa"
            )
