"""Measure training and decoding speed against Hugging Face models of the same shape on this machine.

    python train/lab/benchmark.py                                     the shape that the README quotes
    python train/lab/benchmark.py --config benchmark_moe              with experts, and against a dense model
    python train/lab/benchmark.py --config gpu_base --set train.compile=true
    python train/lab/benchmark.py --drafts out/mtp/TinySeek_Pre_final.pkl   plain against speculative decoding

Machines are shared and noisy, so the contenders take turns, step by step, and the results are medians of the
speeds and of each turn's ratio. Training is forward, backward and an AdamW step on random tokens; the Hugging
Face twin has its own process and needs `transformers`. Decoding is greedy: 128 new tokens after a prompt of
16, one row. With --drafts, a model continues 200 passages of held-out text with and without its MTP head.
"""

import sys, pathlib; sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # repository root

import contextlib
import dataclasses
import functools
import itertools
import math
import multiprocessing
import random
import signal
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib.util import find_spec

import utils  # noqa: F401  sets OMP_WAIT_POLICY, so it must precede torch
import torch

from config.load import load_config
from inference.generation.generator import Generator
from inference.generation.load import load_full
from inference.hf.settings import write_settings
from inference.generation.sampling import SamplingParams
from inference.generation.speculative import SpeculativeGenerator
from load_data.packing import prepare_pretraining
from model.tinyseek import TinySeek
from modules.checkpointing import checkpoint_layers
from train.engine.machine import start_machine, start_process
from utils.cost import cost_card
from utils.device import peak_flops, set_threads, synchronize
from utils.errors import Parser, UserError, run_main
from utils.products import multiply_with

PROMPT, NEW_TOKENS, PASSAGES = 16, 128, 200
DENSE, PRODUCT = "TinySeek, dense, as wide", "a large product"
LARGE = (4096, 512, 1024)  # rows, inputs and outputs of the large product, whose operands fit into the caches


def main():
    """Measure training and decoding, one table each."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--config", default="benchmark", metavar="NAME|FILE.json")
    add("--set", action="append", default=[], metavar="section.key=value", dest="settings")
    add("--steps", type=int, default=20, help="measured turns of each contender (default 20)")
    add("--only", choices=("train", "decode"))
    add("--drafts", metavar="CHECKPOINT", help="measure this model's speculative decoding")
    args = parser.parse_args()
    if args.steps < 1:
        raise UserError("--steps must be at least 1")
    if args.drafts:
        return compare_drafts(args.drafts)
    config = load_config(args.config, args.settings)
    config.model.vocab_size = config.model.vocab_size or config.tokenizer.vocab_size
    machine = start_machine(config)
    if args.only != "decode":
        compare_training(config, machine, args.steps)
    for dtype in dict.fromkeys([torch.float32, machine.dtype] if args.only != "train" else []):
        compare_decoding(config, machine, dtype, max(5, args.steps // 2))


def twin_kind(model) -> str | None:
    """Return the matching Hugging Face architecture; None if there is none or transformers is missing."""
    if model.attention_kind == "mla" or model.mtp != "none" or not find_spec("transformers"):
        return None
    try:
        return write_settings(model)["architectures"][0].removesuffix("ForCausalLM")
    except UserError:
        return None


def hugging_face_twin(config, attention: str):
    """Return the Hugging Face model of the same shape."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = AutoConfig.for_model(**write_settings(config.model))
    return AutoModelForCausalLM.from_config(shape, attn_implementation=attention)


def take_turns(contenders: dict, steps: int, machine) -> dict[str, list[float]]:
    """Return the seconds of each contender's calls, after three calls to warm up.

    The order is random in every turn, so that no contender always inherits the caches of the same other one.
    """
    seconds, order = {name: [] for name in contenders}, random.Random(0)
    for turn in range(steps + 3):
        for name, call in order.sample(list(contenders.items()), len(contenders)):
            synchronize(machine.device)
            start = time.perf_counter()
            call()
            synchronize(machine.device)
            if turn >= 3:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: list[float], reference: list[float]) -> float:
    """Return the speed relative to the reference: the median over turns, since a slow turn slows both."""
    return statistics.median(theirs / ours for ours, theirs in zip(seconds, reference, strict=True))


def report(seconds: dict[str, list[float]], tokens: int, unit: str, extra=None) -> None:
    """Print medians, quartiles, and ratios to the last contender."""
    *_, last = seconds.values()
    for name, times in seconds.items():
        low, middle, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
        line = f"  {name:30s} {tokens / middle:10,.0f} {unit}  ({tokens / high:,.0f} to {tokens / low:,.0f})"
        print(f"{line}  ratio {ratio(times, last):.2f}" + (extra(tokens / middle) if extra else ""))


def training_step(model, config, machine, loss):
    """Return a function that runs forward, backward and a fused AdamW step on random tokens."""
    model.to(machine.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=machine.device.type in ("cpu", "cuda"))
    shape = config.train.batch_size, config.data.sequence_length + 1
    ids = torch.randint(0, config.model.vocab_size, shape, device=machine.device)
    inputs, labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    runner = torch.compile(model) if config.train.compile else model

    def step():
        with machine.autocast():
            value = loss(runner, inputs, labels)
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def our_steps(config, machine) -> dict:
    """Return name -> training step, for each attention and for a dense model of the same active width."""
    shapes = {}
    for kind in dict.fromkeys([config.model.attn_implementation, "sdpa"]):
        shapes[f"TinySeek ({kind})"] = dataclasses.replace(config.model, attn_implementation=kind)
    if (model := config.model).n_routed_experts:  # as wide as the experts that one token uses
        width = model.num_experts_per_tok * model.moe_intermediate_size + model.shared_width
        shapes[DENSE] = dataclasses.replace(model, n_routed_experts=0, intermediate_size=width)

    def loss(model, inputs, labels):
        return model(inputs, labels=labels).loss_sum / labels.numel()

    models = {name: TinySeek(shape) for name, shape in shapes.items()}
    if config.train.gradient_checkpointing:
        models["TinySeek, checkpointed"] = checkpoint_layers(TinySeek(config.model))
    return {name: training_step(model, config, machine, loss) for name, model in models.items()}


def large_product(dtype: torch.dtype):
    """Return a function that computes one large product, to measure the peak of this CPU in this run."""
    rows, inputs, outputs = LARGE
    shapes = (rows, inputs), (outputs, inputs), (rows, outputs)
    x, weight, out = (torch.randn(shape).to(dtype) for shape in shapes)
    return functools.partial(torch.mm, x, weight.T, out=out)


TWINS = {}  # attention -> training step, in the process of the twins


def start_twins(config, machine) -> None:
    """Build the twins in their process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process gets it too, and ends this one
    start_process(machine.device, config.train.seed)
    multiply_with(machine.products).__enter__()  # as long as this process lives
    for attention in ("eager", "sdpa"):
        twin = hugging_face_twin(config, attention)
        TWINS[attention] = training_step(
            twin, config, machine, lambda model, inputs, labels: model(input_ids=inputs, labels=inputs).loss
        )


def step_twin(attention: str, device: torch.device) -> None:
    """Take a training step of one twin, in their process."""
    TWINS[attention]()
    synchronize(device)


@contextlib.contextmanager
def twins_steps(config, machine):
    """Yield name -> training step of each twin, in a process that lives as long as this context.

    They need a process of their own, because ours keeps freed memory (utils/device.py): that would speed up
    the twins by an eighth, and the memory that they free would speed up our models.
    """
    kind = twin_kind(config.model)
    if kind is None:
        yield {}
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, start_twins, (config, machine)) as pool:

        def ask(*call):
            try:
                pool.submit(*call).result()
            except BrokenProcessPool as error:
                raise UserError("the process of the Hugging Face twins ended; see the error above") from error

        ask(int)  # returns when the twins are built
        yield {f"{kind}ForCausalLM ({name})": functools.partial(ask, step_twin, name, machine.device)
               for name in ("eager", "sdpa")}  # fmt: skip


def compare_training(config, machine, steps: int) -> None:
    """Print training tokens per second, with the default attention of each and with SDPA in both."""
    rows, length = config.train.batch_size, config.data.sequence_length
    with torch.device("meta"):
        cost = cost_card(TinySeek(config.model), rows * length, length).train_flops()
    print(f"training, {rows} x {length} tokens, {machine.dtype}, {cost / 1e6:.1f} MFLOP per token")
    with twins_steps(config, machine) as twins, multiply_with(machine.products):
        steps_of = our_steps(config, machine) | twins
        if machine.device.type == "cuda":
            seconds = take_turns(steps_of, steps, machine)
            peak = peak_flops(torch.cuda.get_device_name(), machine.dtype)
        else:
            seconds = take_turns(steps_of | {PRODUCT: large_product(machine.dtype)}, steps, machine)
            peak = 2 * math.prod(LARGE) / statistics.median(seconds.pop(PRODUCT))
            print(f"  large products reach {peak / 1e9:,.0f} GFLOP/s here; MFU is the share of that")

    def utilisation(speed):
        return f"  {cost * speed / 1e9:,.0f} GFLOP/s" + (f"  MFU {cost * speed / peak:.1%}" if peak else "")

    report(seconds, rows * length, "tokens/s", utilisation)
    if DENSE in seconds:
        ours, *_ = seconds.values()
        print(f"  with experts, against dense of the same active width: {ratio(ours, seconds[DENSE]):.2f}")


def compare_decoding(config, machine, dtype, turns: int) -> None:
    """Print the speed of greedy decoding, one row; both models hold their weights in `dtype`."""
    if config.model.max_position_embeddings < PROMPT + NEW_TOKENS:
        print(f"decoding: skipped, it needs max_position_embeddings of at least {PROMPT + NEW_TOKENS}")
        return
    model = TinySeek(config.model).to(machine.device, dtype).eval()
    prompt = torch.randint(0, config.model.vocab_size, (1, PROMPT)).tolist()
    params = SamplingParams(temperature=0.0, max_new_tokens=NEW_TOKENS)
    engines = {"TinySeek": Generator(model), "TinySeek, plain path": Generator(model, fast=False)}
    contenders = {name: functools.partial(engine.generate, prompt, params, stop_ids=set())
                  for name, engine in engines.items()}  # fmt: skip
    if twin_kind(config.model):
        twin = hugging_face_twin(config, "sdpa").to(machine.device, dtype).eval()
        ids = torch.tensor(prompt, device=machine.device)
        contenders[f"{type(twin).__name__}.generate"] = torch.inference_mode()(functools.partial(
            twin.generate, ids, attention_mask=torch.ones_like(ids), do_sample=False, eos_token_id=None,
            pad_token_id=0, min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS,
        ))  # fmt: skip
    print(f"decoding, greedy, 1 row, {PROMPT} + {NEW_TOKENS} tokens, {dtype}")
    report(take_turns(contenders, turns, machine), NEW_TOKENS, "tokens/s")


def compare_drafts(checkpoint: str) -> None:
    """Decode 64 tokens after each passage, plain and with drafts; print speeds and differences."""
    set_threads()
    loaded = load_full(checkpoint)
    model, held_out = loaded.model, prepare_pretraining(loaded.config, loaded.tokenizer).val
    places = [len(held_out) * number // PASSAGES for number in range(PASSAGES)]
    prompts = [held_out[place : place + PROMPT].tolist() for place in places]
    params = SamplingParams(temperature=0.0, max_new_tokens=64)
    lengths = (1, 2, 3) if model.config.mtp == "sequential" else (1,)
    engines = {"plain path": Generator(model, fast=False), "fast path": Generator(model)}
    engines |= {f"{n} drafted": SpeculativeGenerator(model, 0, n) for n in lengths}
    seconds, answers = dict.fromkeys(engines, 0.0), {name: [] for name in engines}
    for prompt, (name, engine) in itertools.product(prompts, engines.items()):
        start = time.perf_counter()
        answers[name].append(engine.generate([prompt], params)[0])
        seconds[name] += time.perf_counter() - start
    print(f"{PASSAGES} prompts of {PROMPT} tokens, greedy; drafts are made and verified on the plain path")
    plain, *_ = answers.values()
    for name, engine in engines.items():
        same = sum(one == other for one, other in zip(answers[name], plain, strict=True))
        speed, gain = sum(map(len, plain)) / seconds[name], seconds["plain path"] / seconds[name]
        line = f"  {name:12s} {speed:8,.0f} tokens/s  ratio {gain:.2f}"
        if isinstance(engine, SpeculativeGenerator):
            line += f"  accepted {engine.accepted / engine.drafted:.1%}  same output {same} of {PASSAGES}"
        print(line)


if __name__ == "__main__":
    run_main(main)
