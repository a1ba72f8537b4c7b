"""Checks of a model before it runs: nothing hidden, nothing shared by accident, the right parts frozen.

A module owns the parameters and buffers that are registered in it. Only these follow `.to()`, reach the
optimizer and are saved. A layer in a plain dictionary still works in the forward and gets gradients, but is
never trained; nor is a layer that a name filter froze by mistake. Both are found without running the model.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from statistics import mode
from types import FunctionType, ModuleType

import torch
from torch import nn

from utils.errors import UserError

TIE = {"lm_head.weight", "embed_tokens.weight"}  # ends of the two names that one matrix may have
DEPTH = 6  # how deep lists in dictionaries in objects are searched for hidden tensors


def check_model(model: nn.Module, batches=(), trains: Callable[[str], bool] = lambda name: True) -> None:
    """Run all checks below. Raise `UserError` naming the tensor."""
    check_hidden(model)
    check_shared(model)
    check_trainable(model, trains)
    check_one_device(model, batches)
    check_one_dtype(model)


def check_trainable(model: nn.Module, trains: Callable[[str], bool]) -> None:
    """Raise `UserError` unless exactly the parameters that `trains` names require a gradient."""
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    if not any(trainable.values()):
        raise UserError("no trainable parameter: everything is frozen, so there is nothing to learn")
    extra = [name for name, trained in trainable.items() if trained and not trains(name)]
    frozen = [name for name, trained in trainable.items() if not trained and trains(name)]
    if extra or frozen:
        wrong = "trainable, though this stage does not train" if extra else "frozen, though this stage trains"
        raise UserError(f"{wrong} it: {describe(model, extra or frozen)}; check the stage's name filter")


def check_hidden(model: nn.Module) -> None:
    """Raise `UserError` for a parameter, a module with parameters, or a tensor with a gradient that is not
    registered."""
    for name, buffer in model.named_buffers():
        if buffer.requires_grad or isinstance(buffer, nn.Parameter):
            raise UserError(f"{name} wants a gradient, but is a buffer, which no optimizer sees: {REGISTER}")
    for where, value in hidden_parts(model):
        device = next(value.parameters()).device if isinstance(value, nn.Module) else value.device
        what = f"{where} ({type(value).__name__} on {device})"
        if isinstance(value, torch.Tensor) and not value.is_leaf:
            raise UserError(f"{what} was left by an earlier forward and holds its whole graph: detach it")
        if isinstance(value, (nn.Module, nn.Parameter)) or value.requires_grad:
            raise UserError(
                f"{what} is kept in a plain attribute, list or dictionary, so .to(), the optimizer and the "
                f"checkpoint never see it: {REGISTER}"
            )


REGISTER = "use nn.Parameter, nn.ParameterDict, nn.ModuleDict or nn.ModuleList"


def hidden_parts(model: nn.Module) -> Iterator[tuple[str, torch.Tensor | nn.Module]]:
    """Yield each tensor, and each module with parameters, that a module holds without registering it, and its
    place: `layers.0.experts['e0']`. Whatever is registered anywhere in the model does not count."""
    known = {id(part) for part in (*model.modules(), *model.parameters(), *model.buffers())}
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if attribute not in ("_parameters", "_buffers", "_modules"):
                yield from search(value, f"{name}.{attribute}" if name else attribute, known)


def search(value, where: str, seen: set[int], depth: int = 0):
    """Yield the `hidden_parts` of one value. `seen`, the ids of objects already visited, ends cycles."""
    if value is None or isinstance(value, (str, int, float)) or id(value) in seen or depth > DEPTH:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor) or (isinstance(value, nn.Module) and list(value.parameters())):
        yield where, value
        return
    parts = {}
    if isinstance(value, Mapping):
        parts = {f"{where}[{key!r}]": part for key, part in value.items()}
    elif isinstance(value, (list, tuple, set, frozenset, deque)):
        parts = {f"{where}[{index}]": part for index, part in enumerate(value)}
    elif not isinstance(value, (type, FunctionType, ModuleType)):
        parts = {f"{where}.{key}": part for key, part in getattr(value, "__dict__", {}).items()}
    for place, part in parts.items():
        yield from search(part, place, seen, depth + 1)


def check_shared(model: nn.Module) -> None:
    """Raise `UserError` if two names share memory, except for the tie of the output head."""
    names = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        key = (parameter.device, parameter.data_ptr()) if parameter.data_ptr() else id(parameter)
        names.setdefault(key, []).append(name)
    for group in names.values():
        tied = len(group) == 2 and all(any(name.endswith(end) for name in group) for end in TIE)
        if len(group) > 1 and not tied:
            raise UserError(
                f"the same numbers under {len(group)} names: {describe(model, group)}; make one layer for "
                "each place ([Layer()] * n is one layer n times), or share it on purpose under one name"
            )


def check_saved(model: nn.Module, saved_names) -> None:
    """Raise `UserError` naming what a checkpoint would lose: every trainable parameter, and the bias of each
    trainable router, must be among the names that the stage saves."""
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    trained += [name for name, _ in model.named_buffers() if balances(model, name)]
    if lost := [name for name in trained if name not in saved_names]:
        raise UserError(f"trained, but not saved: {describe(model, lost)}; the checkpoint would lose it")


def balances(model: nn.Module, name: str) -> bool:
    """Return True for the load-balancing bias of a trainable router: it moves without a gradient."""
    path, _, last = name.rpartition(".")
    weight = getattr(model.get_submodule(path), "weight", None)
    return last == "e_score_correction_bias" and weight is not None and weight.requires_grad


def check_one_device(model: nn.Module, batches) -> None:
    """Raise `UserError` naming a tensor that is not on the device of the others."""
    places = {f"parameter {name}": parameter.device for name, parameter in model.named_parameters()}
    places |= {f"buffer {name}": buffer.device for name, buffer in model.named_buffers()}
    places |= {where: tensor.device for where, tensor in search(batches, "batches", set())}
    usual = mode(places.values())
    if odd := [f"{name} is on {device}" for name, device in places.items() if device != usual]:
        raise UserError(f"everything must be on one device: {some(odd)}; the others are on {usual}")


def check_one_dtype(model: nn.Module) -> None:
    """Raise `UserError` unless all trainable parameters have one dtype; the frozen base may have another."""
    dtypes = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    usual = mode(dtypes.values())
    if odd := [name for name, dtype in dtypes.items() if dtype != usual]:
        what = f"{describe(model, odd)} is {dtypes[odd[0]]}, the others are {usual}"
        raise UserError(f"trainable parameters must have one dtype: {what}")


def describe(model: nn.Module, names: list[str]) -> str:
    """Return the first few parameters, each with the kind of module it belongs to, and their number."""
    kinds = [type(model.get_submodule(name.rpartition(".")[0])).__name__ for name in names]
    return some([f"{name} (in {kind})" for name, kind in zip(names, kinds)])


def some(names: list[str], count: int = 3) -> str:
    """Return the first names, and the number of those left out."""
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
