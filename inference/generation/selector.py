"""Load a trained selector (`--gate`) with the models that it chooses between."""

from dataclasses import replace
from pathlib import Path

import torch

from config.load import from_dict
from inference.generation.conversation import Message, prompt_within
from inference.generation.load import Loaded, check_base, find_file, load_adapter, load_full, open_as
from model.selecting import SelectingModel
from utils.checkpoint import load_checkpoint, load_weights
from utils.errors import UserError

BASE = "base"  # the candidate without an adapter


def open_candidates(paths: list[str | Path], base: Loaded) -> list[Loaded]:
    """Return the candidates of a selector: adapters on `base`, whole models, or the word `base`.

    Whole models must have the tokenizer of the base, so that losses per token can be compared.
    """
    models = []
    for path in paths:
        if path == BASE:
            models.append(base)
        elif load_checkpoint(path).get("base"):
            models.append(load_adapter(path, base))
        else:
            models.append(load_full(path, base.device))
            if models[-1].tokenizer.digest != base.tokenizer.digest:
                raise UserError(
                    f"gate.candidates: {path} has another tokenizer than the base {base.path}, so losses per "
                    "token cannot be compared: choose a model with the tokenizer of the base"
                )
    return models


def candidate_records(models: list[Loaded], base: Loaded) -> list[dict]:
    """Return what a gate's checkpoint records of its candidates: paths, and hashes of the weights."""
    paths = [BASE if model is base else str(model.path) for model in models]
    return [{"path": path, "digest": model.digest} for path, model in zip(paths, models, strict=True)]


class LoadedSelector:
    """The result of gate_train in `path`: `choose(messages)` returns the number of the model that answers.

    `base` reads the questions. `models` are the candidates, `names` their paths in training. All candidates
    answer, as in training, including a pre-trained one.
    """

    def __init__(self, path: str | Path, base: Loaded):
        checkpoint = open_as("--gate", path)
        check_base(checkpoint, path, base)
        records = checkpoint["base"]["candidates"]
        self.names = [record["path"] for record in records]
        files = [BASE if was == BASE else find_file(was, record["digest"], path)
                 for was, record in zip(self.names, records, strict=True)]  # fmt: skip
        if None in files:
            was = self.names[files.index(None)]
            raise UserError(f"{path}: its candidate {was} was not found; put it beside the gate")
        models = open_candidates(files, base)
        for record, model in zip(records, models, strict=True):
            if record["digest"] != model.digest:
                raise UserError(
                    f"{path} was trained to choose {record['path']}, but {model.path} has other weights now: "
                    "train the gate again"
                )
        self.base, self.models = base, [replace(model, answers=True) for model in models]
        width = from_dict(checkpoint["config"], str(path)).gate.width
        self.selecting = SelectingModel(base.model, len(records), width)
        own = {name for name in self.selecting.state_dict() if name.startswith("selector.")}
        load_weights(self.selecting, checkpoint["weights"], str(path), own)
        self.selecting.to(base.device).eval()

    @torch.inference_mode()
    def choose(self, messages: list[Message]) -> int:
        """Return the number of the candidate for the last message, the only one that is read."""
        room = self.base.model.config.max_position_embeddings
        ids = prompt_within(self.base.template, messages[-1:], room)
        return int(self.selecting(torch.tensor([ids], device=self.base.device))[0, -1].argmax())
