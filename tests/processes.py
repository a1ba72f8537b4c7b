"""Real processes without the start of Python: a fork server imports PyTorch and this project once.

`python train/pre_train.py` takes three seconds to import what a test of eight tiny steps needs for 0.2. The
server imports it once and forks each process from there: a process of its own, with signals, exit codes and
gloo, for a tenth of the time. Where there is no fork server (Windows), each process imports everything.
"""

import ctypes
import importlib
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KIND = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
STAGES = ("pre_train", "sft_train", "lora_train", "mixlora_train", "prefix_train", "gate_train", "dpo_train",
          "mlm_train", "span_train", "distill_train")  # fmt: skip
context = multiprocessing.get_context(KIND)
folder = tempfile.TemporaryDirectory(prefix="processes")  # what they print
if KIND == "forkserver":
    # Trap: the server forks what it has. So it only imports: no thread, no OpenMP pool, no CUDA.
    stages = [f"train.{stage}" for stage in STAGES]
    context.set_forkserver_preload(
        ["tests.processes", "utils", *stages, "torch._dynamo", "matplotlib.backends.backend_agg"]
        + ["pytest", "tests.train.tools", "tests.inference.tools"]
    )


def start_server() -> None:
    """Start the fork server, unless it runs: with one thread, and so that it finds this repository."""
    fixed = {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "PYTHONPATH": str(ROOT)}
    before = {name: os.environ.get(name) for name in fixed}
    os.environ.update(fixed)
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def enter(function, arguments, environment, output) -> None:
    """Run `function` as the main function of a script; the first thing that the new process does."""
    import torch

    from utils.errors import run_main

    def end_with_the_tests():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_the_tests, daemon=True).start()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(environment)
    for descriptor, suffix in ((1, "out"), (2, "err")):
        file = os.open(f"{output}.{suffix}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, descriptor)
    torch.set_num_threads(1)
    try:
        run_main(lambda: function(*arguments))
    except SystemExit as ended:
        # Trap: a script ends with Python's clean-up, which PyTorch's threads may abort (utils/distributed.py,
        # leave). A process of `multiprocessing` has none. It takes a second: only where it may matter.
        if torch.distributed.is_initialized():
            ctypes.pythonapi.Py_Exit(ended.code)
        raise


def script(module: str, *words) -> None:
    """Do as `python MODULE WORDS` would."""
    sys.argv = [module, *map(str, words)]
    importlib.import_module(module).main()


def without_pictures(module: str, *words) -> None:
    """Do the same, and draw nothing: it takes longer than training."""
    trainer, pre_train = map(importlib.import_module, ("train.engine.trainer", "train.pre_train"))
    trainer.plot_curves = pre_train.plot_expert_load = pre_train.plot_expert_tokens = lambda *given: None
    script(module, *words)


class Forked:
    """Processes that run a function of a module, with what tests use of `subprocess.Popen`.

    More than one are joined as by torchrun: when one fails, the others get a SIGTERM after `grace` seconds.
    """

    number = 0

    def __init__(self, function, *arguments, processes=1, grace=0.1, **environment):
        Forked.number += 1
        self.output = Path(folder.name) / str(Forked.number)
        self.grace, self.failed_at = grace, None
        shared = {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"} | environment
        ranks = [{}]
        if processes > 1:
            from torch.distributed import TCPStore

            self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            shared |= {
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.store.port),
                "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
            }  # fmt: skip
            ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
        if KIND == "forkserver":
            start_server()
        self.processes = []
        for rank in ranks:
            given = (function, arguments, shared | rank, self.output)
            self.processes.append(context.Process(target=enter, args=given, daemon=True))
            self.processes[-1].start()

    def poll(self) -> int | None:
        """Return the exit code of the first process that failed, 0 if none did, None while one runs."""
        self.exit_codes = [process.exitcode for process in self.processes]
        failed = [code for code in self.exit_codes if code]
        if failed and self.failed_at is None:
            self.failed_at = time.monotonic()
        if None not in self.exit_codes:
            return failed[0] if failed else 0
        if failed and time.monotonic() > self.failed_at + self.grace:
            self.failed_at = float("inf")
            self.send_signal(signal.SIGTERM)
        return None

    @property
    def returncode(self) -> int | None:
        """The exit code as of `poll`."""
        return self.poll()

    def send_signal(self, number: int) -> None:
        """Send a signal to those that still run."""
        for process in self.processes:
            if process.exitcode is None:
                os.kill(process.pid, number)

    def kill(self) -> None:
        """Kill them all."""
        for process in self.processes:
            process.kill()

    def communicate(self, timeout: float = 120) -> tuple[str, str]:
        """Wait for the end; return standard output and standard error."""
        end = time.monotonic() + timeout
        while self.poll() is None:
            time.sleep(0.005)
            if time.monotonic() > end:
                self.kill()
                raise TimeoutError(f"after {timeout} seconds:\n{self.text('out')}\n{self.text('err')}")
        self.stdout, self.stderr = self.text("out"), self.text("err")
        return self.stdout, self.stderr

    def text(self, suffix: str) -> str:
        """What was printed so far."""
        path = self.output.with_suffix("." + suffix)
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def fork(function, *arguments, timeout: float = 120, **settings) -> Forked:
    """Run `function` in a process of its own to its end; settings as of `Forked`."""
    process = Forked(function, *arguments, **settings)
    process.communicate(timeout)
    return process


def both_ways(work, folder: Path) -> tuple:
    """What `work(out)` leaves in `seen.pt` in one process and in two; `folder` gets the outputs `a`, `b`."""
    import torch  # not before `utils`

    for name in "ab":
        (folder / name).mkdir()
    fork(work, folder / "b", processes=2)
    work(folder / "a")
    return tuple(torch.load(folder / name / "seen.pt") for name in "ab")
