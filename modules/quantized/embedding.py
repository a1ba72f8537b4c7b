"""An embedding whose table is stored in 8 bits: only the rows that are asked for become numbers.

    e_t = s_t * q_t        table (V, C) as codes q, with a scale s for each row        ids (..) -> (.., C)

A row is a token, so that a scale for each row fits frequent and rare tokens alike. The output head may share
the store: it needs all rows at once (modules/quantized/layers.py).
"""

import torch
from torch import nn

from modules.quantized.integers import dequantize


class QuantEmbedding(nn.Module):
    """`nn.Embedding` on a store of 8 bits with a scale for each row."""

    def __init__(self, store: nn.Module):
        super().__init__()
        self.store = store

    @property
    def weight(self):
        """The whole table (V, C) in fp32, computed now."""
        return self.store.dequantize()

    def forward(self, ids):
        """ids (..) -> (.., C) in fp32."""
        return dequantize(self.store.codes[ids], self.store.scales[ids])


def lesson():
    """Compare one scale for each row with one for all, on a table with rows of different lengths."""
    from modules.quantized.integers import quantize
    from modules.quantized.stored import StoredIntegers

    torch.manual_seed(0)
    table = torch.randn(1000, 64) * torch.logspace(-1, 1, 1000)[:, None]
    embedding = QuantEmbedding(StoredIntegers(table.shape, 8).round(table))
    whole = dequantize(*quantize(table.view(1, -1), 8)).view_as(table)
    print("rows as long as       0.1       1      10")
    for name, found in (("one scale", whole), ("one for each row", embedding(torch.arange(1000)))):
        errors = (found - table).norm(dim=1) / table.norm(dim=1)
        print(f"  {name:18s}", *(f"{errors[row]:7.2%}" for row in (0, 500, 999)))
    size = sum(buffer.nbytes for buffer in embedding.buffers())
    print(f"memory {size:,} bytes instead of {table.nbytes:,}")


if __name__ == "__main__":
    lesson()
