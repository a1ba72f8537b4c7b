"""The cache of latent attention: one short vector per token and layer, from which all keys and values follow.

    row of the store:  [ c_kv | k_r ]      kv_lora_rank + qk_rope_head_dim numbers

c_kv is the compressed latent that all heads expand into their keys and values; k_r is the one rotated key
that all heads share. No head has a key or a value of its own here, so the number of heads costs no memory.

    latents: (B, 1, T, R + Dr) of the new tokens  ->  (B, 1, S, R + Dr) of all, R = rank, Dr = rotary channels

c_kv is stored *after* its norm and k_r *after* its rotation, so that each token is normalised and rotated
once, not at every later step. The rotation is why k_r is separate: a key that was expanded from c_kv and then
rotated could not be absorbed into the query (`modules/attention/latent.py`).

Paper: DeepSeek-V2, arXiv 2405.04434, section 2.1. The methods are those of `modules/attention/cache.py`.
"""

import torch

from modules.attention.cache import KVCache


class LatentCache(KVCache):
    """Latents of every past token: slot s holds token s.

    Args:
        num_layers, batch_size, kv_lora_rank, qk_rope_head_dim: sizes of the store.
        capacity: the largest number of tokens in a row.
    """

    parts = 1

    def __init__(self, num_layers, batch_size, capacity, kv_lora_rank, qk_rope_head_dim, dtype, device):
        width = kv_lora_rank + qk_rope_head_dim
        super().__init__(num_layers, batch_size, capacity, 1, width, dtype, device)  # (L, 1, B, 1, S, R + Dr)

    def append(self, layer: int, latents):
        """latents (B, 1, T, R + Dr) of the new tokens -> all (B, 1, S, R + Dr). Padding is not kept."""
        return self._put(self.store[layer, 0], latents)


def lesson():
    """Print what 128 heads of DeepSeek-V3 (61 layers, bf16) store per token, and what fits in 16 GB."""
    layers, place = 61, (torch.bfloat16, "cpu")
    kinds = {
        "128 heads with keys and values of their own": KVCache(layers, 1, 1, 128, 128, *place),
        "8 key/value heads for all (GQA)": KVCache(layers, 1, 1, 8, 128, *place),
        "one latent and one rotated key (MLA)": LatentCache(layers, 1, 1, 512, 64, *place),
    }
    print("A cache for DeepSeek-V3: bytes per token, and how many tokens fit in 16 GB")
    for name, cache in kinds.items():
        print(f"  {name:45s} {cache.bytes:9,} {16e9 / cache.bytes:10,.0f}")
    cache = LatentCache(1, 2, 8, 2, 2, torch.float32, "cpu")
    cache.begin(3, new_tokens=[3, 1])  # two prompts in one batch, of 3 tokens and of 1
    seen = cache.append(0, torch.ones(2, 1, 3, 4))
    cache.advance()
    print(f"  two rows of lengths {cache.lengths}: queries see {tuple(seen.shape)}; # marks a filled slot")
    for row in seen[:, 0, :, 0].bool():
        print("   ", "".join("#" if held else "." for held in row.tolist()))


if __name__ == "__main__":
    lesson()
