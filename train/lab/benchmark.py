"""How fast does a model train and write, and how fast is its Hugging Face twin on the same machine?

    python train/lab/benchmark.py                                     the shape that the README quotes
    python train/lab/benchmark.py --config benchmark_moe              the same with experts, against dense,
    too python train/lab/benchmark.py --config gpu_base --set train.compile=true
    python train/lab/benchmark.py --set model.hidden_size=512 --set train.batch_size=4
    python train/lab/benchmark.py --drafts out/mtp/TinySeek_Pre_final.pkl   plain against speculative decoding

Machines are shared and noisy, so the contenders take turns, step by step, and what counts are medians, of the
speeds and of the ratios of each turn. Training: forward, backward and an AdamW step on random tokens, the
twin in a process of its own. Decoding: greedy, 128 new tokens after a prompt of 16, one row. The twin is
measured where `transformers` is installed. Drafts: how a trained model continues 200 places of its own
held-out text, with and without its MTP head.
"""

import sys, pathlib; sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # repository root

import contextlib
import dataclasses
import functools
import multiprocessing
import os
import random
import signal
import statistics
import time

import utils  # noqa: F401  first: it says how threads wait, before PyTorch loads
import torch

from config.load import from_dict, load_config
from inference.generation.generator import Generator
from inference.generation.load import load_model
from inference.generation.sampling import SamplingParams
from inference.generation.speculative import SpeculativeGenerator
from load_data.packing import prepare_pretraining
from model.tinyseek import TinySeek
from train.engine.machine import start_machine, start_process
from utils.cost import cost_card
from utils.device import peak_flops, set_threads, synchronize
from utils.errors import Parser, UserError, run_main

PROMPT, NEW_TOKENS = 16, 128
DENSE = "TinySeek, dense, as wide"


def main():
    """Both measurements, one table each."""
    parser = Parser(__doc__)
    parser.add_argument("--config", default="benchmark", metavar="NAME|FILE.json")
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value", dest="settings")
    parser.add_argument("--steps", type=int, default=20, help="measured turns of each contender (default 20)")
    parser.add_argument("--only", choices=("train", "decode"))
    parser.add_argument("--drafts", metavar="CHECKPOINT", help="measure this model's speculative decoding")
    parser.add_argument("--prompts", type=int, default=200, help="with --drafts (default 200)")
    args = parser.parse_args()
    if args.drafts:
        return compare_drafts(args.drafts, args.prompts)
    config = load_config(args.config, args.settings)
    config.model.vocab_size = config.model.vocab_size or config.tokenizer.vocab_size
    machine = start_machine(config)
    if args.only != "decode":
        compare_training(config, machine, args.steps)
    if args.only != "train":
        for dtype in dict.fromkeys([torch.float32, machine.dtype]):
            compare_decoding(config, machine, dtype, max(5, args.steps // 2))


def twin_kind(model) -> str | None:
    """The Hugging Face architecture of the same shape; None without one, or without transformers."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import transformers  # noqa: F401
    except ImportError:
        return None
    if model.attention_kind == "mla" or model.mtp != "none":
        return None
    if not model.n_routed_experts:
        return "Qwen3"
    return "Qwen3Moe" if model.scoring_func == "softmax" and not model.n_shared_experts else "Dots1"


def hugging_face_twin(config, attention: str):
    """The Hugging Face model of the same shape, or None."""
    model, kind = config.model, twin_kind(config.model)
    if kind is None:
        return None
    import transformers

    names = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
             "head_dim", "intermediate_size", "max_position_embeddings", "tie_word_embeddings"]  # fmt: skip
    settings = {}
    if model.n_routed_experts:
        names += ["num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"]
    if kind == "Qwen3Moe":
        settings["num_experts"] = model.n_routed_experts
        settings["mlp_only_layers"] = list(range(model.first_k_dense_replace))
    if kind == "Dots1":
        settings["sliding_window"] = None
        names += ["n_routed_experts", "n_shared_experts", "first_k_dense_replace", "n_group", "topk_group",
                  "routed_scaling_factor"]  # fmt: skip
    settings |= {name: getattr(model, name) for name in names}
    shape = getattr(transformers, f"{kind}Config")(**settings, attn_implementation=attention)
    return getattr(transformers, f"{kind}ForCausalLM")(shape)


def dense_of_same_width(config):
    """The dense configuration whose feed-forward is as wide as what one token uses of the experts'."""
    model = config.model
    width = (model.num_experts_per_tok + model.n_shared_experts) * model.moe_intermediate_size
    return dataclasses.replace(model, n_routed_experts=0, intermediate_size=width)


def take_turns(contenders: dict, steps: int, machine) -> dict[str, list[float]]:
    """Seconds of each call of each contender, after three calls to warm up.

    In another order in every turn: a contender that always came after the same one would always find the
    caches as that one leaves them.
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
    """How many times as fast as the reference: the median over turns, since a shared machine may be slower in
    some turns, for both."""
    return statistics.median(theirs / ours for ours, theirs in zip(seconds, reference, strict=True))


def report(seconds: dict[str, list[float]], tokens: int, unit: str, extra=None) -> None:
    """Medians, the spread of the middle half, and ratios to the last contender."""
    *_, last = seconds.values()
    for name, times in seconds.items():
        low, middle, high = statistics.quantiles(times, n=4)
        line = f"  {name:30s} {tokens / middle:10,.0f} {unit}  ({tokens / high:,.0f} to {tokens / low:,.0f})"
        print(f"{line}  ratio {ratio(times, last):.2f}" + (extra(tokens / middle) if extra else ""))


# --- training -------------------------------------------------------------------------------------


def training_step(model, config, machine, loss):
    """One call = forward + backward + fused AdamW step on random tokens."""
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
    """Name -> training step, for each attention and for a dense model of the same active width."""
    shapes = {}
    for implementation in dict.fromkeys([config.model.attn_implementation, "sdpa"]):
        shape = dataclasses.replace(config.model, attn_implementation=implementation)
        shapes[f"TinySeek ({implementation})"] = shape
    if config.model.n_routed_experts:
        shapes[DENSE] = dense_of_same_width(config)

    def loss(model, inputs, labels):
        return model(inputs, labels=labels).loss_sum / labels.numel()

    return {name: training_step(TinySeek(shape), config, machine, loss) for name, shape in shapes.items()}


def serve_twins(connection, config, machine) -> None:
    """In a process of the twins: their names, then a training step of each whose name is received."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process hears it too, and ends this one
    start_process(machine.device, config.train.seed)
    steps = {}
    for attention in ("eager", "sdpa"):
        twin = hugging_face_twin(config, attention)
        steps[f"{type(twin).__name__} ({attention})"] = training_step(
            twin, config, machine, lambda model, inputs, labels: model(input_ids=inputs, labels=inputs).loss
        )
    connection.send(list(steps))
    while True:
        name = connection.recv()
        steps[name]()
        synchronize(machine.device)
        connection.send(name)


@contextlib.contextmanager
def twins_steps(config, machine):
    """Name -> training step of each twin, in a process that lives as long as this context.

    In a process of their own because memory is shared within one: ours keeps what it freed (utils/device.py),
    which would speed up the twins by an eighth, and what they free would speed us up. Each is measured as
    whoever uses it alone would see it.
    """
    if twin_kind(config.model) is None:
        yield {}
        return
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve_twins, args=(there, config, machine), daemon=True)
    process.start()
    there.close()  # so that `recv` fails, and does not wait, if the process ends

    def ask(name=None):
        try:
            if name:
                here.send(name)
            return here.recv()
        except (EOFError, OSError) as error:
            raise UserError("the process of the Hugging Face twins ended; it says why above") from error

    try:
        yield {name: functools.partial(ask, name) for name in ask()}
    finally:
        process.terminate()
        process.join()


def compare_training(config, machine, steps: int) -> None:
    """Training tokens per second, with the attention that each would choose and with SDPA in both."""
    rows, length = config.train.batch_size, config.data.sequence_length
    card = cost_card(config.model, rows * length, length)
    cost = card.train_flops() / 1e6
    print(f"training, {rows} x {length} tokens, {machine.dtype}, {cost:.1f} MFLOP per token")
    name = torch.cuda.get_device_name() if machine.device.type == "cuda" else ""
    peak = peak_flops(name, machine.dtype)

    def utilisation(tokens_per_second):
        reached = card.train_flops() * tokens_per_second
        return f"  {reached / 1e9:,.0f} GFLOP/s" + (f"  MFU {reached / peak:.1%}" if peak else "")

    with twins_steps(config, machine) as twins:
        seconds = take_turns(our_steps(config, machine) | twins, steps, machine)
    report(seconds, rows * length, "tokens/s", utilisation)
    if DENSE in seconds:
        ours, *_ = seconds.values()
        print(f"  with experts, against dense of the same active width: {ratio(ours, seconds[DENSE]):.2f}")


# --- decoding -------------------------------------------------------------------------------------


def compare_decoding(config, machine, dtype, turns: int) -> None:
    """Greedy decoding, one row; both models hold their weights in `dtype`."""
    if config.model.max_position_embeddings < PROMPT + NEW_TOKENS:
        print(f"decoding: left out, it needs max_position_embeddings of at least {PROMPT + NEW_TOKENS}")
        return
    model = TinySeek(config.model).to(machine.device, dtype).eval()
    prompt = torch.randint(0, config.model.vocab_size, (1, PROMPT)).tolist()
    params = SamplingParams(temperature=0.0, max_new_tokens=NEW_TOKENS)
    generator = Generator(model)
    contenders = {"TinySeek": lambda: generator.generate(prompt, params, stop_ids=set())}
    plain = Generator(model, fast=False)
    contenders["TinySeek, plain path"] = lambda: plain.generate(prompt, params, stop_ids=set())
    twin = hugging_face_twin(config, "sdpa")
    if twin is not None:
        twin.to(machine.device, dtype).eval()
        ids = torch.tensor(prompt, device=machine.device)

        def generate():
            with torch.inference_mode():
                twin.generate(
                    ids, attention_mask=torch.ones_like(ids), do_sample=False, eos_token_id=None,
                    pad_token_id=0, min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS,
                )  # fmt: skip

        contenders[f"{type(twin).__name__}.generate"] = generate
    print(f"decoding, greedy, 1 row, {PROMPT} + {NEW_TOKENS} tokens, {dtype}")
    report(take_turns(contenders, turns, machine), NEW_TOKENS, "tokens/s")


# --- drafts ---------------------------------------------------------------------------------------


def compare_drafts(checkpoint: str, count: int) -> None:
    """Greedy decoding of 64 tokens after `count` prompts, by turns plain and with drafts: the same tokens?"""
    set_threads()
    model, tokenizer, saved = load_model(checkpoint)
    config = from_dict(saved["config"], checkpoint)
    held_out = prepare_pretraining(config, tokenizer).val
    places = [len(held_out) * number // count for number in range(count)]
    prompts = [held_out[place : place + PROMPT].tolist() for place in places]
    params = SamplingParams(temperature=0.0, max_new_tokens=64)
    for fast in (True, False):
        lengths = (1, 2, 3) if config.model.mtp == "sequential" else (1,)
        engines = {"plain": Generator(model, fast=fast)}
        engines |= {f"{n} drafted": SpeculativeGenerator(model, 0, n, fast) for n in lengths}
        seconds, answers = {name: 0.0 for name in engines}, {name: [] for name in engines}
        for prompt in prompts:
            for name, engine in engines.items():
                start = time.perf_counter()
                answers[name].append(engine.generate([prompt], params)[0])
                seconds[name] += time.perf_counter() - start
        print(f"{count} prompts of {PROMPT} tokens, greedy, {'fast' if fast else 'plain'} path")
        tokens = sum(map(len, answers["plain"]))
        for name, engine in engines.items():
            same = sum(one == other for one, other in zip(answers[name], answers["plain"], strict=True))
            line = f"  {name:12s} {tokens / seconds[name]:8,.0f} tokens/s  ratio "
            line += f"{seconds['plain'] / seconds[name]:.2f}"
            if name != "plain":
                line += f"  accepted {engine.accepted / engine.drafted:.1%}  same output {same} of {count}"
            print(line)


if __name__ == "__main__":
    run_main(main)
