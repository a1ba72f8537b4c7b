"""Compare a Hugging Face model in TinySeek and in transformers: the numbers it gives, and what they cost.

    python train/lab/compare_hf.py FOLDER                 config.json and weights
    python train/lab/compare_hf.py FOLDER --tokens 128    config.json alone: random weights, not imported

Our side is the cost card (utils/cost.py) and the imported model; the other is transformers, and PyTorch's
FLOP counter on its forward pass, which counts all T keys of each query, as ours does here. Both run in fp32
with the cache, on the same prompt, and take turns; times are medians. Needs `transformers` and `safetensors`.
"""

import sys, pathlib; sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # repository root

import statistics
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import utils  # noqa: F401  first: it sets how threads wait, before PyTorch loads
import torch
from torch.utils.flop_counter import FlopCounterMode

from inference.fast.decoder import refusal
from inference.generation.generator import Generator
from inference.generation.sampling import SamplingParams
from inference.hf.folder import read_json_file, stored_tensors
from inference.hf.settings import family_of, read_settings
from inference.hf.weights import read_weights, shapes_of
from model.blank import blank
from model.tinyseek import TinySeek
from utils.cost import FP32, cost_card, flops, size
from utils.device import set_threads
from utils.errors import Parser, UserError, run_main

NEW_TOKENS, TURNS = 16, 5


@torch.inference_mode()
def main():
    """Print one table."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("folder", metavar="FOLDER", type=Path, help="a Hugging Face folder; config.json is enough")
    add("--tokens", type=int, default=512, help="length of the prompt (default: %(default)s)")
    args = parser.parse_args()
    if not find_spec("transformers"):
        raise UserError("the comparison needs the package transformers: pip install transformers")
    import transformers

    set_threads()
    torch.manual_seed(0)
    settings = read_json_file(args.folder, "config.json")
    config = read_settings(settings, str(args.folder / "config.json"))
    if not 0 < args.tokens <= config.max_position_embeddings - NEW_TOKENS:
        most = config.max_position_embeddings - NEW_TOKENS
        raise UserError(f"--tokens {args.tokens}: this model takes prompts of 1 to {most}")
    with tempfile.TemporaryDirectory() as folder:
        if any(args.folder.glob("*.safetensors")):
            source = args.folder
            theirs = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        else:
            source, kind = Path(folder), transformers.AutoConfig.from_pretrained(args.folder)
            theirs = transformers.AutoModelForCausalLM.from_config(kind, dtype=torch.float32)
            theirs.save_pretrained(source)
        ours = blank(TinySeek, config).eval()
        start = time.perf_counter()
        weights = read_weights(config, family_of(settings, ""), stored_tensors(source), str(source))
        seconds = time.perf_counter() - start
        ours.load_state_dict(weights)
    del weights
    theirs.eval()
    ids = torch.randint(0, config.vocab_size, (1, args.tokens))
    rows = [*shapes(config, theirs, args.tokens), *runs(ours, theirs, ids)]
    print(f"{settings['model_type']}, prompt of {args.tokens}; reading the weights took {seconds:.1f} s")
    if reason := refusal(ours):
        print(f"the fast decoder does not take this model: {reason}")
    width = max(len(name) for name, *_ in rows)
    for name, our, their in [("", "TinySeek", "transformers"), *rows]:
        print(f"{name:{width}}  {our:>14}  {their:>14}")


def shapes(config, theirs, tokens: int):
    """Yield (name, ours, theirs) of what follows from the shapes: our cost card, and what they have."""
    card = cost_card(blank(TinySeek, config, "meta"), tokens, tokens)
    yield "parameters", f"{card.parameters:,}", f"{sum(part.numel() for part in theirs.parameters()):,}"
    buffers = sum(part.numel() for name, part in theirs.named_buffers() if name.endswith("correction_bias"))
    held = sum(part.numel() for part in {id(p): p for p in theirs.parameters()}.values()) + buffers
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    numbers = sum(part.numel() for name, part in shapes_of(config).items() if name not in tied)
    yield "weights in fp32", size(FP32 * numbers), size(FP32 * held)
    card.keys_seen = [config.layer_reach(layer, tokens) for layer in range(config.num_hidden_layers)]
    usual = theirs.config._attn_implementation
    theirs.set_attn_implementation("eager")  # products that the counter knows
    if config.n_routed_experts:
        theirs.set_experts_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        past = theirs(torch.zeros(1, tokens, dtype=torch.long)).past_key_values
    theirs.set_attn_implementation(usual)
    yield "forward pass, per token", flops(card.forward_flops()), flops(counter.get_total_flops() / tokens)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in past.layers)
    yield "cache of the prompt", size(card.kv_cache_bytes(FP32, tokens)), size(held)


def runs(ours, theirs, ids):
    """Yield (name, ours, theirs) of what they compute, and how long it takes."""
    prompt, params = ids[0].tolist(), SamplingParams(0.0, max_new_tokens=NEW_TOKENS)
    generate = Generator(ours).generate
    gap = (ours(ids, last_only=True).logits - theirs(ids, logits_to_keep=1).logits).abs().max().item()
    yield "largest difference of logits", f"{gap:.1e}", ""
    options = {"do_sample": False, "min_new_tokens": NEW_TOKENS, "eos_token_id": None, "pad_token_id": 0}
    options["attention_mask"] = torch.ones_like(ids)
    calls = {
        ("ours", 1): lambda: generate([prompt], SamplingParams(0.0, max_new_tokens=1))[0],
        ("theirs", 1): lambda: theirs.generate(ids, **options | {"min_new_tokens": 1}, max_new_tokens=1),
        ("ours", NEW_TOKENS): lambda: generate([prompt], params)[0],
        ("theirs", NEW_TOKENS): lambda: theirs.generate(ids, **options, max_new_tokens=NEW_TOKENS),
    }
    times, texts = {key: [] for key in calls}, {}
    for turn in range(TURNS + 1):
        for key, call in calls.items():
            start = time.perf_counter()
            texts[key] = call()
            times[key] += [time.perf_counter() - start] * (turn > 0)  # the first warms up
    same = [*texts["ours", NEW_TOKENS]] == texts["theirs", NEW_TOKENS][0, len(prompt) :].tolist()
    yield f"the same {NEW_TOKENS} greedy tokens", "yes" if same else "no", ""
    middle = {key: statistics.median(seconds) for key, seconds in times.items()}
    yield "prompt", *(f"{1000 * middle[side, 1]:,.0f} ms" for side in ("ours", "theirs"))
    rest = {
        side: (middle[side, NEW_TOKENS] - middle[side, 1]) / (NEW_TOKENS - 1) for side in ("ours", "theirs")
    }
    yield "each further token", *(f"{1000 * rest[side]:,.1f} ms" for side in ("ours", "theirs"))


if __name__ == "__main__":
    run_main(main)
