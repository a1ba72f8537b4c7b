"""Runs fine-tuning stages one after the other in one process, or under torchrun in several:

    python stages_in_turn.py STAGE ARGUMENTS.. [-- STAGE ARGUMENTS..]

One start of Python for all of them: starting takes longer than training a tiny model.
"""

import importlib
import sys

import utils  # noqa: F401  first
from train.engine import machine
from utils import distributed


def main():
    """All stages, on one group of processes."""
    world = None

    def start_once(device_type="cpu"):
        nonlocal world
        world = world or distributed_start(device_type)
        return world

    distributed_start, machine.distributed.start = distributed.start, start_once
    finish, distributed.finish = distributed.finish, lambda: None
    calls, call = [], []
    for word in sys.argv[1:]:
        if word == "--":
            calls.append(call)
            call = []
        else:
            call.append(word)
    for stage, *arguments in [*calls, call]:
        module = importlib.import_module(f"train.{stage}")
        sys.argv = [stage, *arguments]
        module.main()
    finish()


if __name__ == "__main__":
    main()
