"""Write a TinySeek model as a Hugging Face folder, which transformers loads with no code of ours.

    python inference/export_hf.py FOLDER                                  the latest model in out/
    python inference/export_hf.py FOLDER --checkpoint FILE --dtype bf16
    python inference/export_hf.py FOLDER --adapter out/TinySeek_Lora_final.pkl            for peft
    python inference/export_hf.py FOLDER --adapter out/TinySeek_Lora_final.pkl --merge    both in one model

A dense model becomes a Qwen3, one with experts a Dots1, one with latent attention a DeepSeek-V3; an imported
model becomes what it was, or a plainer family that computes the same. A setting that no architecture there
has is an error that names it. The head of multi-token prediction is left out: it only drafts. An encoder
becomes a BERT or a ModernBERT, an encoder-decoder a T5.
"""

import sys, pathlib; sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # repository root

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from inference.generation.load import (
    DEFAULT_OUT, SPECIAL, Loaded, build, in_full, load_adapter, load_base, open_as,
)  # fmt: skip
from inference.generation.terminal import tell
from inference.hf import by_table
from inference.hf.adapter_files import export_adapter
from inference.hf.by_table import WHOLE
from inference.hf.families import FAMILIES
from inference.hf.folder import INDEX, SINGLE, new_folder, safetensors_package
from inference.hf.other_families import OTHER_FAMILIES
from inference.hf.settings import write_settings
from inference.hf.tokenizer_files import tokenizer_files
from inference.hf.weights import BIAS, HEAD, shapes_of, written_weights
from load_data.tokenization.hf_tokenizer import GENERATION
from utils.checkpoint import load_checkpoint
from utils.errors import Parser, UserError, end_cleanly, run_main

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHARD = 4 * 10**9  # bytes in one file, at most; half of what small machines have as memory


def parse_command():
    """Return the flags."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("folder", metavar="FOLDER", type=Path, help="a new folder to write")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--checkpoint", metavar="FILE", help="the model (default: the latest stage in --out)")
    source.add_argument("--out", metavar="DIR", default=DEFAULT_OUT, help="the folder of the trained models")
    add("--adapter", metavar="FILE", help="the result of lora_train; its base is found by itself")
    add("--merge", action="store_true", help="with --adapter: write base and adapter as one model")
    add("--dtype", choices=DTYPES, default="fp32", help="of the weights (default: %(default)s, exact)")
    return parser.parse_args()


def main():
    """Open the model, and write it, or its adapter alone."""
    args = parse_command()
    end_cleanly()
    if args.merge and not args.adapter:
        raise UserError("--merge needs --adapter FILE, the adapter to merge")
    if args.checkpoint and (short := load_checkpoint(args.checkpoint).get("short")) in WHOLE:
        written = export_other(args.checkpoint, short, args.folder, DTYPES[args.dtype])
        tell(f"wrote {args.folder}: {written}, {args.dtype}; load it with "
             f"transformers.{written}.from_pretrained({str(args.folder)!r})")  # fmt: skip
        return
    model = load_base(args.checkpoint, "cpu", args.out, args.adapter, tell=tell)
    if args.adapter and not args.merge:
        export_adapter(args.adapter, model, args.folder)
        tell(f"wrote {args.folder}: an adapter for peft on {model.path}")
        return
    if args.adapter:
        model = load_adapter(args.adapter, model)
    family = export_model(in_full(model, tell), args.folder, DTYPES[args.dtype])
    tell(f"wrote {args.folder}: {family}, {args.dtype}; load it with "
         f"transformers.AutoModelForCausalLM.from_pretrained({str(args.folder)!r})")  # fmt: skip


def export_model(loaded: Loaded, folder: Path, dtype: torch.dtype = torch.float32) -> str:
    """Write a whole model to `folder`, all or nothing, and return the name of its architecture."""
    config = write_settings(loaded.model.config)
    tokenizer = loaded.tokenizer
    stop = sorted(loaded.template.stop_ids) if loaded.answers else tokenizer.eos_ids
    ends = {"eos_token_id": stop if stop[1:] else stop[0], "pad_token_id": tokenizer.pad_id}
    ends["bos_token_id"] = next(iter(tokenizer.begin), None)
    config |= ends | {"torch_dtype": str(dtype).removeprefix("torch."), "use_cache": True}
    texts = {"config.json": as_json(config), "README.md": model_card(loaded, config)}
    kind, longest = loaded.template.kind if loaded.answers else None, config["max_position_embeddings"]
    texts |= tokenizer_files(tokenizer, kind, longest)
    # An imported model keeps its sampling settings, but fine-tuning may have given its answers another end.
    kept = json.loads(texts.get(GENERATION, "{}"))
    texts[GENERATION] = as_json(ends | kept | {"eos_token_id": ends["eos_token_id"]})
    with new_folder(folder) as place:
        for name, text in texts.items():
            (place / name).write_text(text, encoding="utf-8")
        family, model = FAMILIES[config["model_type"]], loaded.model
        write_tensors(written_weights(model.state_dict(), model.config, family), place, dtype)
    return config["architectures"][0]


def export_other(path: str | Path, short: str, folder: Path, dtype: torch.dtype = torch.float32) -> str:
    """Write an encoder or an encoder-decoder to `folder`, and return the name of its architecture."""
    about = open_as(SPECIAL[short], path)
    model, tokenizer, _ = build(WHOLE[short], about, path)
    config = by_table.write_settings(model.config)
    family = OTHER_FAMILIES[config["model_type"]]
    first = next(iter(tokenizer.begin), None)
    last = [tokenizer.eos_id, *tokenizer.begin, *tokenizer.finish][-1]  # some tokenizers frame nothing
    ids = {"pad": tokenizer.pad_id, "bos": first, "cls": first, "eos": last, "sep": last}
    config |= {f"{role}_token_id": ids[role] for role in family.roles}
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    parts = [*by_table.written_weights(model.state_dict(), WHOLE[short], model.config, family)]
    texts = {"config.json": as_json(config)}
    texts |= tokenizer_files(tokenizer, None, model.config.max_position_embeddings)
    texts["README.md"] = (
        f"---\nlibrary_name: transformers\npipeline_tag: {family.task}\n---\n\n# {Path(path).stem}\n\n"
        f"A {family.architecture} with {sum(part.numel() for _, part in parts):,} parameters, written by "
        f"TinySeek after {about['step']:,} steps of {about['stage']}.\n"
    )
    with new_folder(folder) as place:
        for name, text in texts.items():
            (place / name).write_text(text, encoding="utf-8")
        write_tensors(parts, place, dtype)
    return family.architecture


def write_tensors(parts: Iterable[tuple[str, torch.Tensor]], folder: Path, dtype: torch.dtype) -> None:
    """Write all weights to `folder`, as one file, or as several with an index."""
    save_file = safetensors_package().torch.save_file
    files = [*in_files(parts, dtype)]
    places, total = {}, 0
    for number, names in enumerate(files, start=1):
        name = SINGLE if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
        # Copies: safetensors stores no views. Biases of routers change in steps that bf16 would round away.
        tensors = {
            key: part.to(torch.float32 if key.endswith(BIAS) else dtype).clone() for key, part in names
        }
        save_file(tensors, folder / name, metadata={"format": "pt"})
        (folder / name).chmod((folder / "config.json").stat().st_mode)  # the package lets nobody else read it
        total += sum(part.numel() * part.element_size() for part in tensors.values())
        places |= dict.fromkeys(tensors, name)
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / INDEX).write_text(as_json(index), encoding="utf-8")


def in_files(parts, dtype: torch.dtype) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Divide (name, tensor) into lists for one file each."""
    held, size = [], 0
    for name, part in parts:
        more = part.numel() * dtype.itemsize
        if held and size + more > SHARD:
            yield held
            held, size = [], 0
        held.append((name, part))
        size += more
    yield held


def as_json(data: dict) -> str:
    """Return the text of a JSON file."""
    return json.dumps(data, ensure_ascii=False, indent=2) + "\n"


def model_card(loaded: Loaded, config: dict) -> str:
    """Return README.md: what the model is, and the figures of its own training."""
    about, weights = loaded.about, shapes_of(loaded.model.config)
    weights = {
        name: part for name, part in weights.items() if name != HEAD or not config["tie_word_embeddings"]
    }
    count = sum(part.numel() for name, part in weights.items() if not name.endswith(BIAS))
    figures = {"parameters": f"{count:,}", "stage": about["stage"], "steps": f"{about['step']:,}"}
    if about.get("tokens"):
        figures["tokens"] = f"{about['tokens']:,}"
    if about.get("short") != "Pre" or about["step"]:
        figures["data"] = ", ".join(Path(path).name for path in loaded.config.data.paths)
    figures["context"] = f"{loaded.model.config.max_position_embeddings:,} tokens"
    figures |= {name: f"{value:.4g}" for name, value in (about.get("evaluation") or {}).items() if value}
    rows = "\n".join(f"| {name} | {value} |" for name, value in figures.items())
    names = {one: name for name, one in loaded.tokenizer.special_ids.items()}
    begin = "".join(names.get(one, str(one)) for one in loaded.tokenizer.begin)
    begins = f"A text begins with `{begin}`, which the tokenizer adds.\n" if begin else ""
    chat = (
        "`apply_chat_template` writes the dialogues that it was trained on. transformers turns the text of a "
        "special token into that token wherever it occurs, so remove such texts from what users write.\n"
    )
    return (
        f"---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n# {loaded.path.stem}\n\n"
        f"A {config['architectures'][0]} written by TinySeek, a mini language model to read and to run.\n\n"
        f"| | |\n| --- | --- |\n{rows}\n\n{chat if loaded.answers else begins}"
    )


if __name__ == "__main__":
    run_main(main)
