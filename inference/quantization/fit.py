"""Quantise a model in place: find the codes of each layer by a method, and report what that changed."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import nn

from config.quant import CALIBRATED, QuantConfig
from inference.quantization.calibrate import Inputs, calibrated, stack_of
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
    plain, found = quantized_paths(model, quant), {}
    if quant.method in CALIBRATED:
        for inputs in calibrated(model, plain, batches, quant.method == "gptq", tick):
            for path, seen in inputs.items():
                new = fitted(path, plain[path], seen, quant)
                model.set_submodule(path, new)
                unseen = sum(read.count == 0 for read in seen[0])
                found[path] = relative(output_errors(plain[path], new, seen)), unseen
    quantize_weights(model, quant)  # the others
    if model.config.tie_word_embeddings:
        plain.pop(HEAD, None)  # the embedding's row counts it
    return [row_of(path, layer, model.get_submodule(path), *found.get(path, (None, 0)))
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
            continue
        if scale is not None:  # W x = (W s)(x / s)
            if quant.method == "awq":
                round = lambda matrix, store=store: store.round(matrix).dequantize()  # noqa: E731
                s = awq_scales(weight, [read.sample for read in inputs], round)
            else:
                s = smooth_scales(inputs[0].largest, weight)
            scale.copy_(1 / s)
            weight = weight * s
        store.round(weight)
    return new


def put_gptq(store: nn.Module, weight: torch.Tensor, inputs: list[Inputs], quant: QuantConfig) -> None:
    """Fill a store with the codes that GPTQ finds for each matrix (out, in) of weight (.., out, in)."""
    form = (quant.bits, quant.group_size, quant.symmetric, quant.act_order, store.scale_dtype)
    found = [gptq(one, read.hessian, *form) for one, read in zip(stack_of(weight), inputs, strict=True)]
    parts = [torch.stack(one) if one[0] is not None else None for one in zip(*found, strict=True)]
    store.put(*(part if part is None else part.view(*weight.shape[:-1], -1) for part in parts))


def relative(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Return |error| / |true| over all `pairs` (error, true) together; 0 if all that is true is 0."""
    wrong = size = 0.0
    for error, true in pairs:
        wrong += error.square().sum().item()
        size += true.square().sum().item()
    return (wrong / size) ** 0.5 if size else 0.0


def output_errors(layer: nn.Module, new: nn.Module, seen: list[list[Inputs]]):
    """Yield for each matrix of a layer, for the inputs that were kept, the error of its outputs (n, out) and
    the outputs."""
    for old, now, inputs in zip(matrices(layer), matrices(new), seen, strict=True):
        for one, other, read in zip(stack_of(old), stack_of(now), inputs, strict=True):
            yield read.sample @ (other - one).T, read.sample @ one.T


def row_of(path: str, layer: nn.Module, new: nn.Module, output_error: float | None, unseen: int) -> Row:
    """Return the row of a layer, its memory measured."""
    old, now = matrices(layer), matrices(new)
    error = relative((other - one, one) for one, other in zip(old, now, strict=True))
    numbers = sum(one.numel() for one in old)
    return Row(path, numbers, held_bytes(layer), held_bytes(new), error, output_error, unseen)
