"""The shape of an encoder-decoder, T5 v1.1: one model reads, the other writes and looks at what was read.

Names as in the other sections; Hugging Face's `T5Config` calls them d_model, d_kv, d_ff, num_heads,
num_layers.
"""

from dataclasses import dataclass

from config.checks import option
from utils.errors import UserError


@dataclass
class Seq2SeqConfig:
    """T5 v1.1 and flan-T5 (arXiv 1910.10683, 2002.05202, 2210.11416)."""

    vocab_size: int = option(0, at_least=0)  # 0: the size of the tokenizer's vocabulary
    hidden_size: int = option(192, at_least=1)
    num_hidden_layers: int = option(2, at_least=1)  # of the encoder
    num_decoder_layers: int = option(2, at_least=1)
    num_attention_heads: int = option(6, at_least=1)
    head_dim: int = option(32, at_least=1)  # times heads, it need not be hidden_size
    intermediate_size: int = option(512, at_least=1)
    relative_attention_num_buckets: int = option(32, at_least=4)
    relative_attention_max_distance: int = option(128, at_least=2)
    rms_norm_eps: float = option(1e-6, above=0)
    tie_word_embeddings: bool = True  # the output layer is the embedding; T5 v1.1 has two matrices
    # Scale the input of the output layer by hidden_size^-0.5. T5 does so if it is tied, and draws embeddings
    # from N(0, 1); with `initializer_range` the logits start too small, and learning takes twice as long.
    scale_decoder_outputs: bool = False
    max_position_embeddings: int = option(512, at_least=1)  # tokens to write; the buckets have no limit
    decoder_start_token_id: int = option(0, at_least=0)
    initializer_range: float = option(0.02, above=0)
    dropout: float = option(0.0, at_least=0, below=1)

    def check(self):
        """Raise `UserError` for the first broken rule."""
        buckets, far = self.relative_attention_num_buckets, self.relative_attention_max_distance
        if buckets % 4:
            raise UserError(
                f"seq2seq.relative_attention_num_buckets={buckets} must be divisible by 4: half of them look "
                "back, and half of those stand for one distance each"
            )
        if far <= buckets // 2:
            raise UserError(
                f"seq2seq.relative_attention_max_distance={far} must be above {buckets // 2}, the distances "
                "with a bucket of their own"
            )
        if self.vocab_size and self.decoder_start_token_id >= self.vocab_size:
            raise UserError(
                f"seq2seq.decoder_start_token_id={self.decoder_start_token_id} must be below "
                f"seq2seq.vocab_size={self.vocab_size}: change it"
            )
