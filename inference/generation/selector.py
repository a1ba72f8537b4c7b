"""Loading a gate: from its checkpoint to the models that it chooses between, and the choice itself."""

from dataclasses import replace
from pathlib import Path

import torch

from inference.generation.conversation import Message, prompt_within
from inference.generation.load import Loaded, check_base, find_file, load_adapter, load_full, open_as
from model.selecting import SelectingModel
from utils.checkpoint import load_checkpoint, load_weights
from utils.errors import UserError

BASE = "base"  # the candidate without an adapter


def open_candidates(paths: list[str], base: Loaded) -> list[Loaded]:
    """The models that a gate chooses between: adapters on `base`, whole models, or the word `base`.

    Whole models must have the tokenizer of the base: losses per token can be compared then.
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
                    f"gate.candidates: {path} has another tokenizer than the base {base.path}, so that their "
                    "losses cannot be compared"
                )
    return models


def candidate_records(models: list[Loaded], base: Loaded) -> list[dict]:
    """What a gate's checkpoint says about its candidates: where they were, and a hash of their weights."""
    records = []
    for model in models:
        path = BASE if model is base else str(model.path)
        records.append({"path": path, "digest": model.digest})
    return records


class LoadedSelector:
    """A trained gate: `choose(messages)` gives the number of the model that answers.

    Args:
        path: its checkpoint.
        base: the model that it reads questions with.

    Attributes:
        models: the candidates. All answer, as they did in training, a pre-trained one included.
        names: where they were in training.
    """

    def __init__(self, path: str | Path, base: Loaded):
        checkpoint = open_as("--gate", path)
        check_base(checkpoint, path, base)
        records = checkpoint["base"]["candidates"]
        models = open_candidates([self.find(record, path) for record in records], base)
        for record, model in zip(records, models, strict=True):
            if record["digest"] != model.digest:
                raise UserError(
                    f"{path} was trained to choose {record['path']} as it was before, and {model.path} has "
                    "other weights: train the gate anew"
                )
        self.base, self.models = base, [replace(model, answers=True) for model in models]
        self.names = [record["path"] for record in records]
        self.selecting = SelectingModel(base.model, len(records), checkpoint["config"]["gate"]["width"])
        own = {name for name in self.selecting.state_dict() if name.startswith("selector.")}
        load_weights(self.selecting, checkpoint["weights"], str(path), own)
        self.selecting.to(base.device).eval()

    @staticmethod
    def find(record: dict, path: str | Path) -> str:
        """Where the candidate of `record` is, seen from the gate in `path`."""
        was = record["path"]
        found = was if was == BASE else find_file(was, record["digest"], path)
        if found is None:
            raise UserError(f"{path}: its candidate {was} is not there; put it beside the gate")
        return str(found)

    @torch.inference_mode()
    def choose(self, messages: list[Message]) -> int:
        """The candidate for the last message, which alone is read."""
        room = self.base.model.config.max_position_embeddings
        ids = prompt_within(self.base.template, messages[-1:], room)
        return int(self.selecting(torch.tensor([ids], device=self.base.device))[0, -1].argmax())
