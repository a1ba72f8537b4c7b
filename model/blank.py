"""Models whose weights have no initial numbers, to be filled from a file, or no memory at all."""

from collections.abc import Callable

import torch
from torch.nn import init
from torch.overrides import TorchFunctionMode

DRAWS = {torch.Tensor.normal_, torch.Tensor.uniform_, init.normal_, init.uniform_, init.kaiming_uniform_}


class Blank(TorchFunctionMode):
    """Within this context `torch.empty` is on `device`, and nothing is filled with random numbers."""

    def __init__(self, device: str):
        super().__init__()
        self.device = device

    def __torch_function__(self, function, types, args=(), kwargs=None):
        """Call `function`, or return the tensor that it would have filled."""
        kwargs = kwargs or {}
        if function in DRAWS:
            return args[0] if args else kwargs["tensor"]  # PyTorch's initializers pass it by name
        if function is torch.empty:
            kwargs["device"] = self.device
        return function(*args, **kwargs)


def blank(kind: Callable, config, device: str = "cpu") -> torch.nn.Module:
    """Return `kind(config)` with arbitrary weights, which on the device `meta` are shapes alone.

    Gains of norms, biases of routers and RoPE's tables do not come from `torch.empty`: they are computed on
    the CPU as usual.

    Trap: `with torch.device("meta")` computes everything there, and the first such computation imports a
    thousand modules, which take a second and 150 MB.
    """
    with Blank(device):
        return kind(config)
