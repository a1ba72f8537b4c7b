"""What makes a stage itself: everything that the engine (train/engine/trainer.py) does not share."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from load_data.tokenization.tokenizer import Tokenizer


@dataclass
class Stage:
    """What makes a stage itself.

    Attributes:
        name, short: `pre_train`, `Pre`: the names of its log folder and of its checkpoints.
        model: trainable are the parameters that require gradients.
        loader: `next_step()` gives the micro-batches of one optimizer step; `epoch`, `epoch_progress`,
            `state_dict()`, `load_state_dict()`.
        loss: (model, micro-batch, tokens of the whole step) -> (terms, measures): the loss is the sum of the
            terms, each already divided by the tokens; measures are numbers for the log, divided likewise
            (one named as a term stands for it in the log). It may have `before_step(model, micro-batches)`,
            `after_step(factor of the learning rate)` -> numbers for the log, and `claims()`, what each term
            must reach.
        evaluate: (model, batches or None for all) -> numbers for the log, `val_loss` among them; its
            attribute `batches` is how many there are in all.
        tokenizer: goes into every checkpoint.
        data_digest: identifies the training data; a resumed run must find the same.
        trains: which parameters are meant to learn, by name. The engine does not freeze; it checks.
        base: what an adapter needs of the frozen model it was made for (plain data: `digest`, `path`). Its
            checkpoints hold the parameters and buffers that are named in `own` and none of the base.
        own: names of the weights that checkpoints hold; None for all.
        keep_best: a number of the evaluation; the result are not the last weights, but those with the highest
            of it after an epoch, on all held-out data.
    """

    name: str
    short: str
    model: torch.nn.Module
    loader: object
    loss: Callable
    evaluate: Callable
    tokenizer: Tokenizer
    data_digest: str
    trains: Callable[[str], bool] = lambda name: True
    base: dict | None = None
    own: frozenset[str] | None = None
    keep_best: str | None = None
