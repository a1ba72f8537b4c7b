"""Prefix tuning and prompt tuning: steer a frozen model by a few trained vectors in place of text.

    prefix   n keys and values per layer, before all text:   attention(q, [P_k ; k], [P_v ; v])
    prompt   embeddings of 3n new tokens, written into the text: n each after the markers of the roles

    keys, values: (L, G, n, D) of L layers      with k, v (B, G, T, D)  ->  (B, G, n + T, D)
    prompt: (3n, C), row i for the id V + i     ids (B, T)  ->  embeddings (B, T, C)

A prefix reaches every layer directly, with 2 L G D numbers per position. A prompt enters at the first layer,
as text does, with C numbers per position; it need not be the embedding of any token. The embeddings of a role
that never appears in the data do not change.

Both start as text, as both papers advise: the prefix as keys and values that the model computes from n
random tokens, the prompt as embeddings of random tokens. The model then starts as if it had read them.
A prefix needs large steps, about 0.1 to 0.3 with Adam where a weight takes 0.001, since keys and values have
to move by about 1. Loss with n = 16 on text of another kind (4 layers, 120 steps; 5.27 without a prefix):

    starts as                 at first     Adam's step size: 0.01   0.03    0.1     0.3
    N(0, 0.02)                  5.28                       5.19   5.12    4.79    4.47
    N(0, 1)                     5.33                       5.17   5.01    4.66    4.39
    random tokens               5.29                       5.16   5.01    4.65    4.41

Trap: keys are used as they are stored. Those computed from text are already rotated to positions 0..n-1, so
real tokens have positions n, n+1, ..; each of several packed documents starts at n and attends to the prefix.

Li and Liang, arXiv 2101.00190 (prefix; keys and values are trained directly here, without the paper's extra
network, as in P-Tuning v2, arXiv 2110.07602); Lester et al., arXiv 2104.08691 (prompt). Tested against
`peft`.
"""

import torch
import torch.nn.functional as F
from torch import nn

from modules.attention.cache import KVCache
from utils.errors import UserError

ROLES = 3  # System, User, Assistant


class PrefixEncoder(nn.Module):
    """Trained keys and values (L, G, n, D); in a forward without a cache it takes the place of one."""

    def __init__(self, keys, values):
        super().__init__()
        self.keys, self.values = nn.Parameter(keys), nn.Parameter(values)

    @property
    def length(self) -> int:
        """The number of positions, n."""
        return self.keys.shape[2]

    def append(self, layer: int, keys, values):
        """Prepend the prefix to keys and values (B, G, T, D) of the tokens -> (B, G, n + T, D) each."""
        pairs = ((self.keys[layer], keys), (self.values[layer], values))
        return [torch.cat([front.to(new).expand(len(new), -1, -1, -1), new], dim=2) for front, new in pairs]

    def start(self, cache) -> None:
        """Put the prefix into an empty `KVCache`."""
        for layer, parts in enumerate(zip(self.keys.detach(), self.values.detach(), strict=True)):
            cache.start_with(layer, *(part[None] for part in parts))  # (1, G, n, D) for all rows


class PromptEmbedding(nn.Module):
    """An embedding table with more rows. It replaces `embed_tokens` and keeps its `weight` (V, C), which the
    output head may share. Row i of `prompt` (3n, C) is the id V + i."""

    def __init__(self, weight: nn.Parameter, prompt):
        super().__init__()
        self.weight, self.prompt = weight, nn.Parameter(prompt)

    def forward(self, ids):
        """ids (B, T), each below V + 3n -> (B, T, C)."""
        new = ids >= len(self.weight)
        text = F.embedding(ids.masked_fill(new, 0), self.weight)
        prompt = F.embedding((ids - len(self.weight)).clamp(min=0), self.prompt)
        return torch.where(new[..., None], prompt, text)


def add_prefix(model, config) -> None:
    """Add a prefix or a prompt (`config.kind`) of length n = `config.length` to a `TinySeek`. It starts as
    random tokens."""
    shape, table = model.config, model.model.embed_tokens
    count = config.length * (ROLES if config.kind == "prompt" else 1)
    ids = torch.randint(shape.vocab_size, (count,)).to(table.weight.device)
    if config.kind == "prompt":
        model.model.embed_tokens = PromptEmbedding(table.weight, table.weight.detach()[ids])
        return
    if shape.attention_kind == "mla" or shape.sliding_window is not None:
        raise UserError(
            "prefix.kind=prefix needs keys and values that stay, which a model with model.attention_kind=mla "
            "or model.sliding_window does not keep: use prefix.kind=prompt"
        )
    if shape.dual_chunk_attention_config is not None:
        raise UserError(
            "prefix.kind=prefix does not work with model.dual_chunk_attention_config: use prefix.kind=prompt"
        )
    if config.length >= shape.max_position_embeddings:
        raise UserError(
            f"prefix.length={config.length} leaves no room for text in model.max_position_embeddings="
            f"{shape.max_position_embeddings}: lower it"
        )
    model.prefix = PrefixEncoder(*keys_and_values(model, ids))


@torch.no_grad()
def keys_and_values(model, ids):
    """Return each layer's keys and values of the n tokens `ids`, (L, G, n, D) each."""
    training, shape, weight = model.training, model.config, model.model.embed_tokens.weight
    sizes = (shape.num_hidden_layers, 1, len(ids), shape.num_key_value_heads, shape.head_dim)
    cache = KVCache(*sizes, weight.dtype, weight.device)
    model.eval()
    model(ids[None], cache=cache, last_only=True)
    model.train(training)
    return cache.store[:, 0, 0].clone(), cache.store[:, 1, 0].clone()


def lesson():
    """Train a prefix so that a frozen attention head adds one vector to its output; embed a prompt."""
    from modules.attention.context import build_context
    from modules.attention.grouped_query import eager_attention

    torch.manual_seed(0)
    B, G, T, D, wish = 8, 2, 10, 16, torch.randn(16)
    q, k, v = torch.randn(3, B, G, T, D)
    target = eager_attention(q, k, v, build_context(T, "cpu"), D**-0.5) + wish
    print("A prefix of n keys and values; queries and keys of real tokens stay as they are")
    for n in (1, 4, 16):
        prefix, context = PrefixEncoder(*torch.randn(2, 1, G, n, D)), build_context(T, "cpu", prefix=n)
        optimizer, errors = torch.optim.Adam(prefix.parameters(), lr=0.1), []
        for _ in range(101):
            out = eager_attention(q, *prefix.append(0, k, v), context, D**-0.5)
            errors.append((out - target).square().mean())
            optimizer.zero_grad(), errors[-1].backward(), optimizer.step()
        print(f"  n = {n:2d}   error {errors[0]:.2f}, after 100 steps {errors[-1]:.2f}")
    table = PromptEmbedding(nn.Parameter(torch.arange(5.0)[:, None]), torch.tensor([[0.5], [0.25], [0.125]]))
    ids = torch.tensor([[4, 5, 6, 7, 2]])
    print(f"3 rows beside a vocabulary of 5: ids {ids[0].tolist()} ->", table(ids)[0, :, 0].tolist())


if __name__ == "__main__":
    lesson()
