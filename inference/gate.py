"""Loading a gate: from its checkpoint to the models that it chooses between, and the choice itself."""

from pathlib import Path

import torch

from inference.load import Loaded, check_base, load_adapter, load_full
from load_data.chat_template import fit_turns
from model.gated import GatedModel
from utils.checkpoint import load_checkpoint, load_weights, weights_digest
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
            models.append(load_full(path, base.model.embed_tokens.weight.device))
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
        records.append({"path": path, "digest": weights_digest(model.model.state_dict())})
    return records


class Gate:
    """A trained gate: `choose(messages)` gives the number of the model that answers.

    Args:
        path: its checkpoint.
        base: the model that it reads questions with.
    """

    def __init__(self, path: str | Path, base: Loaded):
        checkpoint = load_checkpoint(path)
        if checkpoint.get("short") != "Gate":
            raise UserError(
                f"{path}: not a gate ({checkpoint.get('stage')}); train one with train/gate_train.py"
            )
        check_base(checkpoint, path, base)
        records = checkpoint["base"]["candidates"]
        paths = [self.find(record["path"], Path(path).parent) for record in records]
        self.base, self.models = base, open_candidates(paths, base)
        for record, model in zip(records, self.models, strict=True):
            if record["digest"] != weights_digest(model.model.state_dict()):
                raise UserError(
                    f"{path} was trained to choose {record['path']} as it was before: train it anew"
                )
        self.names = [record["path"] for record in records]
        self.gated = GatedModel(base.model, len(records), checkpoint["config"]["gate"]["width"])
        own = {name for name in self.gated.state_dict() if name.startswith("gate.")}
        load_weights(self.gated, checkpoint["weights"], str(path), own)
        self.gated.to(base.model.embed_tokens.weight.device).eval()

    @staticmethod
    def find(path: str, folder: Path) -> str:
        """Where a candidate is: where it was in training, or beside the gate."""
        beside = folder / Path(path).name
        return path if path == BASE or Path(path).is_file() or not beside.is_file() else str(beside)

    @torch.inference_mode()
    def choose(self, messages: list[dict[str, str]]) -> int:
        """The candidate for the last message, which alone is read."""
        template = self.base.template
        room = self.base.config.model.max_position_embeddings
        ids = template.prompt(fit_turns(template, messages[-1:], room))[-room:]
        device = self.base.model.embed_tokens.weight.device
        return int(self.gated(torch.tensor([ids], device=device))[0, -1].argmax())
