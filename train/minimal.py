"""Train a small language model in one visible loop: text in, a curve and new text out. Start reading here.

    python train/minimal.py                     the standard library of your Python, 75 seconds of training
    python train/minimal.py --data book.txt     your own text
    python train/minimal.py --steps 300         a fixed number of steps: the same losses on every run

The model is the one that everything else here trains (model/tinyseek.py); the optimizer is plain AdamW in
fp32. What a real run needs on top is in train/engine/, whose losses equal these, given the same batches.

Shapes: B windows in a batch, T tokens in a window, C hidden size, V vocabulary.
"""

import sys, pathlib; sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # repository root

import utils  # noqa: F401  decides how threads wait; must precede torch
import math
import sysconfig
import time

import torch
from tokenizers import ByteLevelBPETokenizer

from config.model import ModelConfig
from model.tinyseek import TinySeek
from utils.errors import Parser, UserError, run_main

B, T, V = 8, 128, 1024
LEARNING_RATE, WARMUP_STEPS, WEIGHT_DECAY, LARGEST_NORM = 1.5e-3, 20, 0.1, 1.0

def read_text(path: str | None) -> str:
    """Return the text of a file, or that of all modules at the top of the standard library."""
    library = pathlib.Path(sysconfig.get_path("stdlib"))
    files = [pathlib.Path(path)] if path else sorted(library.glob("*.py"))
    try:
        return "".join(file.read_text(encoding="utf-8") for file in files)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", "not UTF-8")
        raise UserError(f"--data {path or library}: {reason}; give a text file in UTF-8") from None


def windows(ids: torch.Tensor, starts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut the windows of `ids` (N,) that begin at `starts` (B,): inputs (B, T) and labels (B, T).

    labels[b, t] is the token that follows inputs[b, t]. The shift happens here and nowhere else. Trap: a loss
    that shifts once more teaches the token after the next; nothing fails, the numbers just disappoint.
    """
    rows = ids[starts[:, None] + torch.arange(T + 1)]  # (B, T + 1)
    return rows[:, :-1], rows[:, 1:]


@torch.no_grad()
def evaluate(model: TinySeek, ids: torch.Tensor, count: int) -> float:
    """Return the mean loss, in nats per token, on `count` evenly spaced windows, the same ones every time."""
    model.eval()  # dropout off, in models that have it
    total = 0.0
    for starts in (torch.arange(count) * (len(ids) - T - 1) // count).split(B):
        inputs, labels = windows(ids, starts)
        total += model(inputs, labels=labels).loss_sum.item()
    model.train()
    return total / (count * T)  # sum over count: a mean of means would give a short batch too much weight


@torch.no_grad()
def sample(model: TinySeek, ids: list[int], length: int, temperature: float = 0.7) -> list[int]:
    """Continue `ids` by `length` tokens. Each one runs the whole window; inference/ has a cache instead."""
    model.eval()
    for _ in range(length):
        logits = model(torch.tensor([ids[-T:]])).logits[0, -1]  # (1, T, V) -> (V,), after the last token
        # A temperature below 1 sharpens the distribution: fewer slips, more repetition.
        ids = ids + torch.multinomial((logits / temperature).softmax(dim=-1), 1).tolist()
    return ids


def train(model: TinySeek, ids, held_out, bits: float, steps: int, seconds: float, seed: int) -> list[float]:
    """Train for `steps`, or for `seconds` if that is 0, and return the loss of every step.

    ids, held_out: (N,) tokens. `bits` turns nats per token into the bits per byte that are printed.
    """
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    gains = [p for p in model.parameters() if p.dim() < 2]  # norm gains: decay would pull 1 to 0
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))  # 0.999 averages over more steps than there are
    generator = torch.Generator().manual_seed(seed)
    losses, shown, started = [], 0, time.monotonic()
    while True:
        # A run bounded by time completes its schedule on a slow machine too, in fewer steps.
        step, elapsed = len(losses), time.monotonic() - started
        done = step / steps if steps else min(1.0, elapsed / seconds)
        if losses and done >= (shown + 1) / 20:
            shown, recent = int(done * 20), losses[-50:]  # the loss of one batch is mostly noise
            trained, unseen = bits * sum(recent) / len(recent), bits * evaluate(model, held_out, 64)
            star = " " * round(24 * (unseen - 1)) + "*"  # line by line, the stars draw the held-out curve
            left = elapsed / done - elapsed
            print(f"{step:6d} {trained:10.3f} {unseen:10.3f} {left:8.0f} s   {star}", flush=True)
        if done == 1:
            return losses

        inputs, labels = windows(ids, torch.randint(len(ids) - T, (B,), generator=generator))  # (B, T) each
        loss = model(inputs, labels=labels).loss_sum / labels.numel()  # forward: the mean over B * T tokens
        optimizer.zero_grad()  # gradients add up unless they are cleared
        loss.backward()
        # One odd batch must not throw the weights far off: a longer gradient is cut to this length.
        torch.nn.utils.clip_grad_norm_(model.parameters(), LARGEST_NORM)
        # Warmup: AdamW's first steps have full size, although its averages have hardly seen a gradient.
        # Then a cosine down to zero: large steps to get there, small ones to settle.
        warmup = min(1.0, (step + 1) / (WARMUP_STEPS + 1))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * warmup * (1 + math.cos(math.pi * done)) / 2
        optimizer.step()
        losses.append(loss.item())


def main(arguments: list[str] | None = None) -> None:
    """Turn text into ids, train a model on them, measure it on held-out text, and let it write."""
    parser = Parser(__doc__)
    parser.add_argument("--data", metavar="FILE", help="text to train on (default: the standard library)")
    parser.add_argument("--steps", type=int, metavar="N", default=0, help="train for N steps, however long")
    parser.add_argument("--seconds", type=float, metavar="S", default=75.0, help="default: 75")
    parser.add_argument("--seed", type=int, metavar="N", default=0, help="of weights, batches and sample")
    args = parser.parse_args(arguments)
    if args.steps < 0 or not 0 < args.seconds < math.inf or not 0 <= args.seed < 2**63:
        raise UserError("--seconds must be above 0, --steps and --seed at least 0, --seed below 2**63")
    text = read_text(args.data)
    cut = len(text) * 19 // 20  # the end is held out in one piece: neighbouring lines give each other away

    # Byte-pair encoding joins frequent neighbours until there are V tokens; load_data/byte_pair.py shows how.
    # Bytes need no tokenizer, but three times the steps for a text: in equal time 0.3 bits per byte worse.
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([text[:cut]], vocab_size=V, show_progress=False)  # never sees held-out text
    ids, held_out = (torch.tensor(tokenizer.encode(part).ids) for part in (text[:cut], text[cut:]))
    if min(len(ids), len(held_out)) <= T:
        raise UserError(f"--data {args.data}: {len(text)} characters are too few; give at least {80 * T}")
    bits = len(held_out) / len(text[cut:].encode()) / math.log(2)  # per byte, to compare any tokenizers

    torch.manual_seed(args.seed)
    model = TinySeek(ModelConfig(
        vocab_size=V, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, zero_init_residual=True, attn_implementation="eager",
    ))  # fmt: skip
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(ids):,} tokens to train on, "
          f"{len(held_out):,} held out; losses in bits per byte\n")  # fmt: skip
    print("  step   training   held out  time left  " + "".join(f"{number:<24}" for number in (1, 2, 3, 4)))
    train(model, ids, held_out, bits, args.steps, args.seconds, args.seed)
    print(f"\nheld-out text: {bits * evaluate(model, held_out, 256):.3f} bits per byte\n\n--- sample ---")
    prompt = tokenizer.encode("def " if args.data is None else text[cut : cut + 20]).ids
    print(tokenizer.decode(sample(model, prompt, 150)))


if __name__ == "__main__":
    run_main(main)
