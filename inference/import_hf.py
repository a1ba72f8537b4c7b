"""Turn a Hugging Face folder into a TinySeek checkpoint, which every later stage accepts.

    python inference/import_hf.py FOLDER --out out/qwen3
    python inference/chat.py --out out/qwen3
    python train/lora_train.py --init out/qwen3/TinySeek_SFT_final.pkl --out out/qwen3_lora
    python inference/import_hf.py ADAPTER --base out/qwen3/TinySeek_SFT_final.pkl --out out/adapter

FOLDER is one that transformers wrote or that was downloaded: config.json, weights in safetensors files,
tokenizer.json; ADAPTER is one that peft wrote. Families: Llama, Qwen2, Qwen3, Qwen2-MoE, Qwen3-MoE, Mistral,
Mixtral, Dots1, DeepSeek-V2 and DeepSeek-V3. A model with a chat template answers, as after fine-tuning (SFT);
another continues texts. Weights are stored in fp32, which holds bf16 and fp16 exactly.
"""

import sys, pathlib; sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # repository root

import os
import time
from pathlib import Path

from config.load import to_dict
from config.model import ModelConfig
from config.schema import RunConfig
from inference.generation.load import load_full
from inference.generation.terminal import tell
from inference.hf.adapter_files import SETTINGS, import_adapter
from inference.hf.folder import read_json_file, stored_tensors
from inference.hf.settings import family_of, read_settings
from inference.hf.weights import read_weights
from load_data.tokenization.hf_tokenizer import HfTokenizer, read_hf_tokenizer
from utils.checkpoint import final_name, save_checkpoint
from utils.errors import Parser, UserError, end_cleanly, run_main

LONGEST_ROW = 512  # of later training, unless it is set: the model's own maximum is for much larger machines


def parse_command():
    """Return the flags."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("folder", metavar="FOLDER", type=Path, help="config.json, *.safetensors, tokenizer.json")
    add("--out", metavar="DIR", type=Path, required=True, help="the folder for the checkpoint")
    add("--base", metavar="FILE", help="the checkpoint that an adapter of peft belongs to")
    add("--overwrite", action="store_true", help="replace an earlier import in --out")
    return parser.parse_args()


def main():
    """Import a model, or an adapter if the folder holds one."""
    args = parse_command()
    end_cleanly()
    if os.path.isfile(args.out):
        raise UserError(f"--out {args.out} is a file: name a folder")
    if os.path.isfile(args.folder / SETTINGS):
        if args.base is None:
            raise UserError(f"{args.folder} holds an adapter: name the model it belongs to with --base FILE")
        path = import_adapter(args.folder, load_full(args.base), args.out, args.overwrite)
        tell(f"wrote {path}\nnext: python inference/chat.py --adapter {path}")
        return
    if args.base is not None:
        raise UserError(f"{args.folder} has no {SETTINGS}, and --base is for adapters: leave it out")
    path = import_model(args.folder, args.out, args.overwrite)
    tell(f"wrote {path}\nnext: python inference/chat.py --checkpoint {path}")


def import_model(folder: Path, out: Path, overwrite: bool) -> Path:
    """Write the model in `folder` as a checkpoint in `out`, and return its path."""
    start, where = time.perf_counter(), str(folder / "config.json")
    settings = read_json_file(folder, "config.json")
    model = read_settings(settings, where)
    tokenizer = read_hf_tokenizer(folder, model.vocab_size, settings.get("eos_token_id"))
    short = "SFT" if tokenizer.turns else "Pre"
    path = out / final_name(short)
    if os.path.exists(path) and not overwrite:
        raise UserError(f"{path} exists: name another --out, or replace it with --overwrite")
    weights = read_weights(model, family_of(settings, where), stored_tensors(folder), str(folder))
    entries = {"stage": "import_hf", "short": short, "step": 0, "tokenizer": tokenizer.to_json()}
    config = to_dict(run_config(folder, model, tokenizer))
    save_checkpoint(path, entries | {"config": config, "weights": weights})
    numbers = sum({id(tensor): tensor.numel() for tensor in weights.values()}.values())  # tied ones once
    does = "answers" if tokenizer.turns else f"continues texts ({tokenizer.refused})"
    tell(f"{settings['model_type']}: {numbers:,} numbers, {tokenizer.vocab_size:,} tokens, "
         f"{time.perf_counter() - start:.1f} s; it {does}")  # fmt: skip
    return path


def run_config(folder: Path, model: ModelConfig, tokenizer: HfTokenizer) -> RunConfig:
    """Return the settings that later stages inherit."""
    config = RunConfig(model=model)
    config.train.max_steps = 1  # a run needs a bound; this one has no steps
    config.tokenizer.kind, config.tokenizer.path = "hf", str(folder)
    ours = "tinyseek" if "User：" in tokenizer.special_ids else "chatml"  # of a base, for fine-tuning
    config.data.template = "own" if tokenizer.turns else ours
    config.data.sequence_length = min(LONGEST_ROW, model.max_position_embeddings)
    return config


if __name__ == "__main__":
    run_main(main)
