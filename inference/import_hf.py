"""Turn a Hugging Face folder into a TinySeek checkpoint, which every later stage accepts.

    python inference/import_hf.py FOLDER --out out/qwen3
    python inference/chat.py --out out/qwen3
    python train/lora_train.py --init out/qwen3/TinySeek_SFT_final.pkl --out out/qwen3_lora
    python inference/import_hf.py ADAPTER --base out/qwen3/TinySeek_SFT_final.pkl --out out/adapter

FOLDER is one that transformers wrote or that was downloaded: config.json, weights in safetensors files,
tokenizer.json; ADAPTER is one that peft wrote. Decoders: Llama, Qwen2, Qwen3, Qwen2-MoE, Qwen3-MoE, Mistral,
Mixtral, Dots1, DeepSeek-V2 and DeepSeek-V3. One with a chat template answers, as after fine-tuning (SFT);
another continues texts. Also BERT and ModernBERT (for inference/fill_mask.py), T5 v1.1 and flan-T5 (for
inference/seq2seq.py), and embedding models on the first two that sentence-transformers wrote (for
inference/search.py). Weights are stored in fp32, which holds bf16 and fp16 exactly.
"""

import sys, pathlib; sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # repository root

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from shlex import quote
from typing import NamedTuple

from config.load import to_dict
from config.schema import RunConfig
from inference.generation.load import SPECIAL, load_full
from inference.generation.terminal import tell
from inference.hf import by_table
from inference.hf.adapter_files import SETTINGS, import_adapter
from inference.hf.by_table import WHOLE
from inference.hf.folder import read_json_file, stored_tensors
from inference.hf.other_families import OTHER_FAMILIES
from inference.hf.sentence_folder import MODULES, read_sentence_folder
from inference.hf.settings import family_of
from inference.hf.settings import read_settings as settings_of_decoder
from inference.hf.weights import read_weights
from load_data.tokenization.hf_tokenizer import GENERATION, HfTokenizer, read_hf_tokenizer
from model.encoder import Encoder
from utils.checkpoint import final_name, save_checkpoint
from utils.errors import Parser, UserError, end_cleanly, run_main

CHAT = "python inference/chat.py --checkpoint"
INPUTS = {  # for a model of each kind; a chat needs none
    "MLM": ' "Paris is the [MASK] of France."',
    "Span": ' --prompt "Thank you <extra_id_0> me to your party."',
    "Embed": ' "how are checkpoints written" train/engine',
}
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
    import_model(args.folder, args.out, args.overwrite)


class Source(NamedTuple):
    """A model that is about to be imported."""

    short: str  # of the stage that trains such models
    config: RunConfig  # the settings that later stages inherit
    tokenizer: HfTokenizer
    weights: Callable[[], dict]  # reads them
    what: str
    following: str  # the command that uses it


def import_model(folder: Path, out: Path, overwrite: bool) -> Path:
    """Write the model in `folder` as a checkpoint in `out`, and return its path."""
    start = time.perf_counter()
    if os.path.exists(folder / MODULES):
        source = embedding_model(folder)
    else:
        settings = read_json_file(folder, "config.json")
        other = settings.get("model_type") in [*OTHER_FAMILIES]
        source = other_model(folder, settings) if other else decoder(folder, settings)
    source.config.validate()
    path = out / final_name(source.short)
    if os.path.exists(path) and not overwrite:
        raise UserError(f"{path} exists: name another --out, or replace it with --overwrite")
    weights = source.weights()
    save_checkpoint(path, {
        "stage": "import_hf", "short": source.short, "step": 0, "tokenizer": source.tokenizer.to_json(),
        "config": to_dict(source.config), "weights": weights,
    })  # fmt: skip
    numbers = sum({id(tensor): tensor.numel() for tensor in weights.values()}.values())  # tied ones once
    tell(f"{source.what}: {numbers:,} numbers, {source.tokenizer.vocab_size:,} tokens, "
         f"{time.perf_counter() - start:.1f} s\nwrote {path}\n"
         f"next: {source.following} {quote(str(path))}{INPUTS.get(source.short, '')}")  # fmt: skip
    return path


def decoder(folder: Path, settings: dict) -> Source:
    """Return a decoder, which answers if its tokenizer has a chat template."""
    where = str(folder / "config.json")
    model, family = settings_of_decoder(settings, where), family_of(settings, where)
    tokenizer = read_hf_tokenizer(folder, model.vocab_size, settings.get("eos_token_id"))
    config = run_config(folder, "model", model)
    ours = "tinyseek" if "User：" in tokenizer.special_ids else "chatml"  # of a base, for fine-tuning
    config.data.template = "own" if tokenizer.turns else ours
    does = "answers" if tokenizer.turns else f"continues texts ({tokenizer.refused})"
    return Source("SFT" if tokenizer.turns else "Pre", config, tokenizer,
                  lambda: read_weights(model, family, stored_tensors(folder), str(folder)),
                  f"{settings['model_type']}, which {does}", CHAT)  # fmt: skip


def other_model(folder: Path, settings: dict) -> Source:
    """Return an encoder or an encoder-decoder."""
    if os.path.exists(folder / GENERATION):  # newer versions move the first token to write there
        given = {name: value for name, value in settings.items() if value is not None}
        settings = read_json_file(folder, GENERATION) | given
    stored, family = stored_tensors(folder), OTHER_FAMILIES[settings["model_type"]]
    model = by_table.read_settings(
        settings, by_table.table_names(family, stored), str(folder / "config.json")
    )
    tokenizer = read_hf_tokenizer(folder, model.vocab_size, settings.get("eos_token_id"), chat=False)
    read = partial(by_table.read_weights, WHOLE[family.short], model, family, stored, str(folder))
    return Source(family.short, run_config(folder, family.section, model), tokenizer, read,
                  settings["model_type"], SPECIAL[family.short])  # fmt: skip


def embedding_model(folder: Path) -> Source:
    """Return an embedding model: an encoder and its pooling."""
    sentence = read_sentence_folder(folder)
    body, where = sentence.body, str(sentence.body / "config.json")
    settings, stored = read_json_file(body, "config.json"), stored_tensors(body)
    family = family_of(settings, where, OTHER_FAMILIES)
    if family.section != "encoder":
        raise UserError(f"{where}: model_type {settings['model_type']!r} is no encoder")
    model = by_table.read_settings(settings, by_table.table_names(family, stored), where)
    tokenizer = read_hf_tokenizer(body, model.vocab_size, settings.get("eos_token_id"), chat=False)
    config = run_config(body, "encoder", model)
    config.embed.base, config.embed.pooling = "encoder", sentence.pooling
    length = min(sentence.length or model.max_position_embeddings, model.max_position_embeddings)
    config.embed.query_length = config.embed.document_length = length

    def read() -> dict:
        weights = by_table.read_weights(Encoder, model, family, stored, str(body), body=True)
        return {f"body.{name}": part for name, part in weights.items()}

    what = f"{settings['model_type']} with {sentence.pooling} pooling, at most {length} tokens"
    return Source("Embed", config, tokenizer, read, what, SPECIAL["Embed"])


def run_config(folder: Path, section: str, model) -> RunConfig:
    """Return the settings that later stages inherit, those of the model in `section`."""
    config = RunConfig(**{section: model})
    config.train.max_steps = 1  # a run needs a bound; this one has no steps
    config.tokenizer.kind, config.tokenizer.path = "hf", str(folder)
    config.data.sequence_length = min(LONGEST_ROW, model.max_position_embeddings)
    return config


if __name__ == "__main__":
    run_main(main)
