"""A TinySeek that computes with rounded matrices during training (QAT) and is stored as codes at its end.

The layers are those that a quantised model has on codes (model/quantized.py).
"""

from collections.abc import Callable
from dataclasses import replace

from torch import nn

from config.load import to_dict
from config.quant import QATConfig, QuantConfig
from config.schema import RunConfig
from model.quantized import quantized_paths
from model.tinyseek import TinySeek
from modules.experts.moe import Experts
from modules.quantized.fake import FakeExperts, FakeLayer, FakeLinear
from utils.errors import UserError


def format_of(qat: QATConfig) -> QuantConfig:
    """Return the format of the model that a training with `qat` ends in."""
    return QuantConfig("rtn", qat.bits, qat.group_size)


def round_in_training(model: TinySeek, qat: QATConfig) -> Callable[[nn.Module, RunConfig], dict]:
    """Make `model` compute with rounded weights, whose names stay. Return `coded_result`, for its end.

    Raises `UserError` for a matrix that the groups do not fit, naming it.
    """
    for path, layer in quantized_paths(model, format_of(qat)).items():
        kind = FakeExperts if isinstance(layer, Experts) else FakeLinear
        try:
            model.set_submodule(path, kind(layer, qat.bits, qat.group_size, qat.kind))
        except ValueError as error:
            raise UserError(f"qat: {path}: {error}; choose another qat.group_size") from None
    return coded_result


def coded_result(model: nn.Module, config: RunConfig) -> dict:
    """Return the entries `weights` and `config` of the final checkpoint. Its model is on codes, and computes
    what the trained one computed."""
    weights = model.state_dict()
    for path, layer in model.named_modules():
        if isinstance(layer, FakeLayer):
            for name in layer.state_dict():
                del weights[f"{path}.{name}"]
            codes = layer.quantized().state_dict()
            weights |= {f"{path}.{name}": part for name, part in codes.items()}
    return {"weights": weights, "config": to_dict(replace(config, quant=format_of(config.qat)))}
