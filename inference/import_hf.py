"""Turn a Hugging Face folder into a TinySeek checkpoint, which every later stage accepts.

    python inference/import_hf.py FOLDER --out out/qwen3                  a whole model
    python inference/chat.py --out out/qwen3
    python train/lora_train.py --init out/qwen3/TinySeek_SFT_final.pkl --out out/qwen3_lora

The folder is one that transformers wrote or that was downloaded: config.json, weights in safetensors files,
tokenizer.json. Families: Llama, Qwen2, Qwen3, Qwen2-MoE, Qwen3-MoE, Mistral, Mixtral, Dots1, DeepSeek-V2 and
DeepSeek-V3. A model with a chat template becomes a result of fine-tuning (SFT) and answers; another becomes a
result of pre-training. Weights are stored in fp32, into which bf16 and fp16 go exactly.
"""

import sys, pathlib; sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # repository root

import time
from pathlib import Path

from config.load import to_dict
from config.model import ModelConfig
from config.schema import RunConfig
from inference.generation.terminal import tell
from inference.hf.folder import read_json_file, stored_tensors
from inference.hf.settings import family_of, read_settings
from inference.hf.weights import read_weights
from load_data.tokenization.hf_tokenizer import HfTokenizer, read_hf_tokenizer
from utils.checkpoint import final_name, save_checkpoint
from utils.errors import Parser, UserError, run_main

LONGEST_ROW = 512  # of later training, unless it is set: the model's own maximum is for much larger machines


def parse_command():
    """Return the flags."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("folder", metavar="FOLDER", type=Path, help="config.json, *.safetensors, tokenizer.json")
    add("--out", metavar="DIR", type=Path, required=True, help="the folder for the checkpoint")
    add("--overwrite", action="store_true", help="replace an earlier import in --out")
    return parser.parse_args()


def main():
    """Read the settings, the tokenizer and the weights, and write one checkpoint."""
    args = parse_command()
    start = time.perf_counter()
    where = str(args.folder / "config.json")
    settings = read_json_file(args.folder, "config.json")
    model = read_settings(settings, where)
    tokenizer = read_hf_tokenizer(args.folder, model.vocab_size)
    short = "SFT" if tokenizer.turns else "Pre"
    path = args.out / final_name(short)
    if path.exists() and not args.overwrite:
        raise UserError(f"{path} exists: name another --out, or replace it with --overwrite")
    weights = read_weights(model, family_of(settings, where), stored_tensors(args.folder), str(args.folder))
    save_checkpoint(path, {
        "stage": "import_hf", "short": short, "step": 0, "config": to_dict(run_config(args.folder, model, tokenizer)),
        "tokenizer": tokenizer.to_json(), "weights": weights,
    })  # fmt: skip
    numbers = len({id(tensor): 0 for tensor in weights.values()})
    parameters = sum({id(tensor): tensor.numel() for tensor in weights.values()}.values())
    does = "it answers, with its own chat template" if tokenizer.turns else "it continues texts"
    tell(f"{settings['model_type']}: {parameters:,} numbers in {numbers} tensors, {tokenizer.vocab_size:,} "
         f"tokens, {time.perf_counter() - start:.1f} s; {does}")  # fmt: skip
    tell(f"wrote {path}\nnext: python inference/chat.py --checkpoint {path}")


def run_config(folder: Path, model: ModelConfig, tokenizer: HfTokenizer) -> RunConfig:
    """Return the settings that later stages inherit."""
    config = RunConfig(model=model)
    config.train.max_steps = 1  # a run needs a bound; this one has no steps
    config.tokenizer.kind, config.tokenizer.path = "hf", str(folder)
    config.data.template = "own" if tokenizer.turns else "chatml"
    config.data.sequence_length = min(LONGEST_ROW, model.max_position_embeddings)
    return config


if __name__ == "__main__":
    run_main(main)
