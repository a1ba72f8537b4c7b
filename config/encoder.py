"""The shape of an encoder, which reads a text in both directions: BERT and its modern form are two recipes.

Names as in Hugging Face's `BertConfig` and `ModernBertConfig`.
"""

from dataclasses import dataclass

from config.checks import option
from config.model import LAYER_TYPES
from utils.errors import UserError


@dataclass
class EncoderConfig:
    """An encoder with a head for masked tokens. The defaults are the modern recipe; `bert.json` is BERT's.

    | | BERT (arXiv 1810.04805) | ModernBERT (arXiv 2412.13663) |
    | --- | --- | --- |
    | norm | after each block, LayerNorm | before each block, LayerNorm without bias |
    | positions | a learned vector each | rotary |
    | feed-forward | GELU, biases | gated GELU, no biases |
    | attention | every token sees all | in two of three layers, neighbours only |
    """

    vocab_size: int = option(0, at_least=0)  # 0: the size of the tokenizer's vocabulary
    hidden_size: int = option(192, at_least=1)
    num_hidden_layers: int = option(4, at_least=1)
    num_attention_heads: int = option(6, at_least=1)
    intermediate_size: int = option(384, at_least=1)
    max_position_embeddings: int = option(512, at_least=1)
    norm_order: str = option("pre", choices=("pre", "post"))
    norm: str = option("rms_norm", choices=("rms_norm", "layer_norm"))
    norm_bias: bool = False  # of layer_norm
    norm_eps: float = option(1e-6, above=0)
    position_embedding_type: str = option("rope", choices=("rope", "absolute"))
    global_rope_theta: float = option(10000.0, above=1)
    local_rope_theta: float = option(10000.0, above=1)
    type_vocab_size: int = option(0, at_least=0)  # kinds of segments; 0: tokens have none
    hidden_act: str = option("silu", choices=("silu", "gelu"))
    gated: bool = True  # the feed-forward has a gate
    attention_bias: bool = False
    mlp_bias: bool = False
    local_attention: int | None = option(None, at_least=2)  # tokens that a local layer sees
    global_attn_every_n_layers: int = option(3, at_least=1)  # layers 0, n, 2n, .. see all
    layer_types: list[str] | None = None  # instead of that: of each layer, one of `LAYER_TYPES`
    head_bias: bool = False  # of the transform; the output layer after it always has one
    initializer_range: float = option(0.02, above=0)
    dropout: float = option(0.0, at_least=0, below=1)
    attention_dropout: float = option(0.0, at_least=0, below=1)
    attn_implementation: str = option("auto", choices=("auto", "sdpa", "eager", "flash"))

    # `GroupedQueryAttention` also reads these: every head has keys and values of its own.
    rope_interleaved, qk_norm = False, False
    num_key_value_heads = property(lambda self: self.num_attention_heads)
    head_dim = property(lambda self: self.hidden_size // self.num_attention_heads)
    out_bias = property(lambda self: self.attention_bias)
    rms_norm_eps = property(lambda self: self.norm_eps)

    def layer_window(self, layer: int) -> int | None:
        """Return the window of layer `layer` as modules/attention/context.py counts it, or None if the layer
        sees all: `local_attention` // 2 tokens on either side, and the token itself."""
        if self.local_attention is None:
            return None
        local = layer % self.global_attn_every_n_layers != 0
        if self.layer_types is not None:
            local = self.layer_types[layer] == "sliding_attention"
        return self.local_attention // 2 + 1 if local else None

    def check(self):
        """Raise `UserError` for the first broken rule."""
        C, H, kinds = self.hidden_size, self.num_attention_heads, self.layer_types
        if C % H:
            raise UserError(
                f"encoder.hidden_size={C} is not divisible by encoder.num_attention_heads={H}: change one"
            )
        if self.position_embedding_type == "rope" and C // H % 2:
            raise UserError(
                f"encoder.hidden_size={C} gives encoder.num_attention_heads={H} heads of {C // H} channels, "
                "and rotary embeddings rotate pairs of channels: change one"
            )
        if self.norm_bias and self.norm == "rms_norm":
            raise UserError("encoder.norm_bias=true needs encoder.norm=layer_norm: RMSNorm has no bias")
        if kinds is not None and (len(kinds) != self.num_hidden_layers or set(kinds) - set(LAYER_TYPES)):
            raise UserError(
                f"encoder.layer_types={kinds} must name one of {', '.join(LAYER_TYPES)} for each of "
                f"encoder.num_hidden_layers={self.num_hidden_layers} layers"
            )
        if kinds is not None and "sliding_attention" in kinds and self.local_attention is None:
            raise UserError("encoder.layer_types has sliding_attention: set encoder.local_attention")
