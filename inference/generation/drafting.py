"""One draft of an MTP head: tokens that follow hidden states -> logits of the token after the next."""

from modules.attention.context import build_context


def draft(model, hidden, following, cache=None, last_only=False):
    """Return the MTP head's logits (B, T, V) of the token after the next, and its hidden states (B, T, C).

    Args:
        model: a `TinySeek`.
        hidden: (B, T, C) of the trunk, or of the head itself to look further ahead.
        following: (B, T), the token after each.
        cache: from `make_draft_cache`, for the sequential head.
        last_only: return the logits of the last column only, (B, 1, V).
    """
    tokens = following.shape[1]
    if cache is not None:
        cache.begin(tokens)
    context = build_context(tokens, hidden.device, window=model.config.sliding_window, cache=cache)
    rotary = model.model.rotary_emb(context.positions)
    second, _ = model.mtp(hidden, model.model.embed_tokens(following), context, rotary, cache)
    if cache is not None:
        cache.advance()
    return model.logits(second[:, -1:] if last_only else second), second
