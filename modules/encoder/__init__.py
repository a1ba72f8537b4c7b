"""Parts of an encoder: LayerNorm, a feed-forward with GELU, a head for masked tokens."""
