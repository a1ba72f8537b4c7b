"""Quantise a model in place: find the codes of each layer by a method, and report what that changed."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from config.quant import CALIBRATED, QuantConfig
from inference.quantization.calibrate import Inputs, calibrated
from model.quantized import (
    HEAD, empty_layer, held_bytes, matrices, quantize_weights, quantized_paths, stores_of,
)  # fmt: skip
from model.tinyseek import TinySeek
from modules.quantized.awq import awq_scales
from modules.quantized.gptq import gptq
from modules.quantized.smoothquant import smooth_scales
from utils.errors import UserError


class Row(NamedTuple):
    """One quantised layer."""

    path: str
    numbers: int  # weights
    before: int  # bytes
    after: int
    weight_error: float  # |W' - W| / |W|
    output_error: float | None  # the same of its outputs, for the inputs that were kept
    unseen: int  # experts that no token reached: plain rounding


@torch.no_grad()
def quantize_model(
    model: TinySeek, quant: QuantConfig, batches: list[dict] = (), tick: Callable = lambda: None
) -> list[Row]:
    """Replace the matrices of `model` by codes, in place; return a row for each layer.

    `batches`: what the methods that calibrate read (inference/quantization/calibrate.py). `tick()` is called
    after each batch of each decoder layer, twice.
    """
    plain, seen = quantized_paths(model, quant), {}
    if quant.method in CALIBRATED:

        def wanted(number):
            inside = f"model.layers.{number}."
            return {path: layer for path, layer in plain.items() if path.startswith(inside)}

        for number, inputs in calibrated(model.model, batches, wanted, quant.method == "gptq", tick):
            for path, layer in wanted(number).items():
                model.set_submodule(path, fitted(path, layer, inputs[path], quant))
                seen[path] = errors(layer, model.get_submodule(path), inputs[path])
    rest = {path: layer for path, layer in plain.items() if path not in seen}
    quantize_weights(model, quant, rest)
    if model.config.tie_word_embeddings:
        plain.pop(HEAD, None)  # the embedding's row counts it
    return [row_of(path, layer, model.get_submodule(path), *seen.get(path, (None, 0)))
            for path, layer in plain.items()]  # fmt: skip


def fitted(path: str, layer: nn.Module, seen: list[list[Inputs]], quant: QuantConfig) -> nn.Module:
    """Return the quantised form of a layer; `seen` is what each of its matrices reads."""
    new = empty_layer(layer, quant)
    scales = [new.input_scale, getattr(new, "inner_scale", None)]
    for store, weight, inputs, scale in zip(stores_of(new), matrices(layer), seen, scales):
        weight = weight.float()
        if quant.method == "gptq":
            try:
                put_gptq(store, weight, inputs, quant)
            except ValueError as error:
                raise UserError(f"{path}: {error}; give other --data, or take --method awq") from None
        elif scale is not None:
            if quant.method == "awq":
                samples = [read.sample for read in inputs]
                round = lambda matrix, store=store: store.round(matrix).dequantize()  # noqa: E731
                grown = awq_scales(weight, samples if weight.dim() == 3 else samples[0], round)
            else:
                grown = smooth_scales(inputs[0].largest, weight)
            scale.copy_(1 / grown)
            store.round(weight * grown)
        else:
            store.round(weight)
    return new


def put_gptq(store: nn.Module, weight: torch.Tensor, inputs: list[Inputs], quant: QuantConfig) -> None:
    """Fill a store with the codes that GPTQ finds for each matrix (out, in) of weight (.., out, in)."""
    form = (quant.bits, quant.group_size, quant.symmetric, quant.act_order, store.scale_dtype)
    stack = weight.view(-1, *weight.shape[-2:])
    found = [gptq(one, read.hessian, *form) for one, read in zip(stack, inputs, strict=True)]
    parts = [torch.stack(one) if one[0] is not None else None for one in zip(*found, strict=True)]
    store.put(*(part if part is None else part.view(*weight.shape[:-1], -1) for part in parts))


def errors(layer: nn.Module, new: nn.Module, seen: list[list[Inputs]]) -> tuple[float, int]:
    """Return the error of a layer's outputs for the inputs that were kept, all its matrices together, and the
    number of experts that no token has reached."""
    wrong = size = 0.0
    for old, now, inputs in zip(matrices(layer), matrices(new), seen, strict=True):
        pairs = zip(old, now, inputs, strict=True) if old.dim() == 3 else [(old, now, inputs[0])]
        for one, other, read in pairs:
            x = read.sample
            wrong += (x @ (other - one).T).square().sum().item()
            size += (x @ one.T).square().sum().item()
    unseen = sum(read.count == 0 for read in seen[0])
    return (wrong / size) ** 0.5 if size else 0.0, unseen


def row_of(path: str, layer: nn.Module, new: nn.Module, output_error: float | None, unseen: int) -> Row:
    """Return the row of a layer, its memory measured."""
    old, now = matrices(layer), matrices(new)
    wrong = sum((one - other).square().sum().item() for one, other in zip(now, old, strict=True))
    size = sum(one.square().sum().item() for one in old)
    numbers = sum(one.numel() for one in old)
    error = (wrong / size) ** 0.5 if size else 0.0
    return Row(path, numbers, held_bytes(layer), held_bytes(new), error, output_error, unseen)
