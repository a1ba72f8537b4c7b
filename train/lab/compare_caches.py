"""Compare quantised key/value caches with the full one: whether greedy texts are the same, memory and speed.

    python train/lab/compare_caches.py --count 200         the latest model in out/

A pre-trained model continues pieces of held-out text, a fine-tuned one answers held-out questions of all its
skills. `texts` is the share of identical texts. `tokens` is the share of identical choices, counted up to the
first difference in each text, and `gap` the median and the maximum distance of the two best logits there.
Memory is that of one row of 64, 256 and 512 tokens, relative to the full cache; tokens/s are of the whole
batch.
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
from utils.device import set_threads
from utils.errors import Parser, UserError, run_main

PROMPT, NEW, BATCH = 64, 64, 50  # tokens of a piece of text, and after it; rows of a batch


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
def main():
    """Print one line for each kind of cache."""
    parser = Parser(__doc__)
    parser.add_argument("--checkpoint", metavar="FILE", help="the model (default: the latest stage in out/)")
    parser.add_argument("--count", type=int, default=200, metavar="N", help="texts (default: %(default)s)")
    args = parser.parse_args()
    if args.count < 1:
        raise UserError(f"--count {args.count} must be at least 1")
    set_threads()
    loaded = load_base(args.checkpoint, torch.device("cpu"), DEFAULT_OUT)
    model, prompts, texts, sizes = loaded.model.eval(), pick_prompts(loaded, args.count), {}, {}
    params = SamplingParams(temperature=0, max_new_tokens=NEW)
    stop_ids = loaded.template.stop_ids if loaded.answers else ()
    print(f"{loaded.path}\ncache    texts   tokens          gap      memory          tokens/s")
    for kind in KV_KINDS:
        generator, start, gaps, choices = Generator(model, kv_cache=kind), time.perf_counter(), [], 0
        batches = [prompts[first : first + BATCH] for first in range(0, len(prompts), BATCH)]
        texts[kind] = [text for batch in batches for text in generator.generate(batch, params, stop_ids)]
        speed = sum(map(len, texts[kind])) / (time.perf_counter() - start)
        for prompt, ours, full in zip(prompts, texts[kind], texts["full"], strict=True):
            pairs = [*zip(ours, full)]
            same = next((place for place, (a, b) in enumerate(pairs) if a != b), None)
            choices += len(full) if same is None else same + 1
            if same is not None:
                best = model(torch.tensor([prompt + full[:same]]), last_only=True).logits.topk(2).values
                gaps.append((best[..., 0] - best[..., 1]).item())
        sizes[kind] = [make_cache(model, 1, n, kv_cache=kind).bytes for n in (64, 256, 512)]
        gap = f"{statistics.median(gaps):.3f}, {max(gaps):.3f}" if gaps else "-"
        memory = "  ".join(f"{own / full:.3f}" for own, full in zip(sizes[kind], sizes["full"], strict=True))
        shares = f"{1 - len(gaps) / len(prompts):8.1%} {1 - len(gaps) / choices:8.2%}"
        print(f"{kind:5}{shares} {gap:>14}   {memory} {speed:9,.0f}", flush=True)


if __name__ == "__main__":
    run_main(main)
