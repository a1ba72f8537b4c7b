"""Compare quantised key/value caches with the full one: the same greedy texts, memory, and speed of decoding.

    python train/lab/compare_caches.py                     the latest model in out/
    python train/lab/compare_caches.py --checkpoint out/TinySeek_Pre_final.pkl --count 500

A pre-trained model continues pieces of held-out text, a fine-tuned one answers held-out questions of all its
skills. `equal` is the share of texts that are those of the full cache, token for token, and `gap` what the
others had between the two best logits where they first differ: the median, and the largest. Memory is that
of one row, against the full cache; speed that of one row in tokens/s, after a prompt of that length.
"""

import sys, pathlib; sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # repository root

import statistics
import time

import utils  # noqa: F401  first: it sets how threads wait, before PyTorch loads
import torch

from inference.generation.conversation import prompt_within
from inference.generation.generator import Generator
from inference.generation.load import DEFAULT_OUT, load_base
from inference.generation.sampling import SamplingParams
from load_data.packing import prepare_pretraining
from load_data.skills import SFT_SKILLS, scored_items
from model.caches import KV_KINDS, make_cache
from utils.device import pick_device, set_threads
from utils.errors import Parser, UserError, run_main

PROMPT, NEW, BATCH = 64, 64, 50  # tokens of a piece of text, and after it; rows of a batch
LENGTHS = (64, 256, 512)


def pick_prompts(loaded, count: int) -> list[list[int]]:
    """Return the ids of `count` prompts that no training has seen."""
    if loaded.answers:
        each, fraction = -(-count // len(SFT_SKILLS)), loaded.config.data.val_fraction
        items = [item for name in SFT_SKILLS for item in scored_items(name, each, 0, fraction)]
        room = loaded.model.config.max_position_embeddings - NEW
        return [prompt_within(loaded.template, item.messages, room) for item in items[:count]]
    text = prepare_pretraining(loaded.config, loaded.tokenizer).val
    starts = torch.randint(len(text) - PROMPT, (count,), generator=torch.Generator().manual_seed(0))
    return [text[start : start + PROMPT].tolist() for start in starts.tolist()]


@torch.inference_mode()
def gap(model, ids: list[int]) -> float:
    """Return what is between the two best logits after `ids`."""
    best = model(torch.tensor([ids], device=model.lm_head.weight.device), last_only=True).logits.topk(2).values
    return (best[..., 0] - best[..., 1]).item()


def speed(generator: Generator, length: int) -> float:
    """Return tokens per second of one row after a prompt of `length` tokens, the best of three runs."""
    times, params = [], SamplingParams(temperature=0, max_new_tokens=NEW)
    for _ in range(3):
        seen = []
        generator.generate([[1] * length], params, on_token=lambda *_: seen.append(time.perf_counter()))
        times.append((seen[-1] - seen[0]) / (len(seen) - 1))
    return 1 / min(times)


def main():
    """Print one line for each kind of cache."""
    parser = Parser(__doc__)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--checkpoint", metavar="FILE", help="the model (default: the latest stage in --out)")
    source.add_argument("--out", metavar="DIR", default=DEFAULT_OUT, help="the folder of the trained models")
    parser.add_argument("--count", type=int, default=200, metavar="N", help="texts (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    args = parser.parse_args()
    if args.count < 1:
        raise UserError(f"--count {args.count} must be at least 1")
    set_threads()
    loaded = load_base(args.checkpoint, pick_device(args.device), args.out)
    model, stop_ids = loaded.model.eval(), loaded.template.stop_ids if loaded.answers else ()
    prompts, texts = pick_prompts(loaded, args.count), {}
    lengths = [one for one in LENGTHS if one <= model.config.max_position_embeddings - NEW] or [1]
    memory = {kind: [make_cache(model, 1, n, kv_cache=kind).bytes for n in LENGTHS] for kind in KV_KINDS}
    print(f"{loaded.path}: {len(prompts)} texts of at most {NEW} new tokens, greedy")
    print(f"{'cache':5} {'equal':>7} {'gap':>15}  memory at {LENGTHS}  tokens/s after {lengths}")
    params = SamplingParams(temperature=0, max_new_tokens=NEW)
    for kind in KV_KINDS:
        generator, texts[kind] = Generator(model, loaded.tokenizer.eos_id, kv_cache=kind), []
        for first in range(0, len(prompts), BATCH):
            texts[kind] += generator.generate(prompts[first : first + BATCH], params, stop_ids)
        gaps = []
        for prompt, ours, full in zip(prompts, texts[kind], texts["full"], strict=True):
            if ours != full:
                same = next(n for n, (a, b) in enumerate(zip(ours, full)) if a != b)
                gaps.append(gap(model, prompt + full[:same]))
        between = f"{statistics.median(gaps):.3f} {max(gaps):.3f}" if gaps else "-"
        shares = "  ".join(f"{a / b:.3f}" for a, b in zip(memory[kind], memory["full"], strict=True))
        speeds = "  ".join(f"{speed(generator, length):,.0f}" for length in lengths)
        print(f"{kind:5} {1 - len(gaps) / len(prompts):7.1%} {between:>15}  {shares}    {speeds}", flush=True)


if __name__ == "__main__":
    run_main(main)
