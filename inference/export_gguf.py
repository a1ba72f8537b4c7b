"""Write a model as a GGUF file, which llama.cpp and programs built on it run.

    python inference/export_gguf.py out/TinySeek_SFT_final.pkl --out model.gguf
    python inference/export_gguf.py out/TinySeek_Pre_final.pkl --out model.gguf --dtype bf16

The file holds the weights, the tokenizer and the chat template. With the same ids llama.cpp computes the same
logits: `inference/gguf_files/architectures.py` has the details, and the settings that llama.cpp cannot
express are refused. Text is not always cut into the same tokens (`inference/gguf_files/vocabulary.py`).
`--dtype` is that of matrices; gains, biases and routers stay in fp32. An MTP head is left out.
"""

import sys, pathlib; sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # repository root

import os
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

import utils  # noqa: F401  first: it sets how threads wait, before PyTorch loads
from inference.generation.load import Loaded, in_full, load_full
from inference.generation.terminal import closed_pipe_ends, open_streams, tell
from inference.gguf_files.architectures import architecture_of, settings_of, tensors_of
from inference.gguf_files.rotation import rotation
from inference.gguf_files.vocabulary import vocabulary_of
from utils.errors import Parser, UserError, end_cleanly, run_main

DTYPES = {"f32": (torch.float32, 0), "f16": (torch.float16, 1), "bf16": (torch.bfloat16, 32)}  # file_type
EXACT = ("ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight")  # routers


def contents(loaded: Loaded, dtype: str) -> tuple[str, dict, dict[str, torch.Tensor]]:
    """Return the architecture, the metadata and the tensors of the file.

    Raise `UserError` for a model or a tokenizer that llama.cpp cannot express.
    """
    config = loaded.model.config
    found = architecture_of(config)
    keys, extra = rotation(config, divisors=found.interleaved and config.attention_kind == "gqa")
    keys = {f"{found.name}.{key}": value for key, value in (settings_of(config, found) | keys).items()}
    keys |= vocabulary_of(loaded.tokenizer, loaded.config.data.template, config.vocab_size)
    keys |= {"general.name": loaded.path.stem, "general.file_type": DTYPES[dtype][1]}
    tensors = dict(tensors_of(loaded.model.state_dict(), config, found)) | extra
    for name, tensor in tensors.items():
        wide = tensor.dim() == 1 or name.endswith(EXACT)
        tensors[name] = tensor.to(torch.float32 if wide else DTYPES[dtype][0]).contiguous()
    return found.name, keys, tensors


def write(path: Path, name: str, keys: dict, tensors: dict[str, torch.Tensor]) -> None:
    """Write a GGUF file, all or nothing."""
    gguf = gguf_package()
    temporary = path.with_name(path.name + ".tmp")
    writer = gguf.GGUFWriter(temporary, name)
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
           list: writer.add_array}  # fmt: skip
    for key, value in keys.items():
        if value is not None:
            add[type(value)](key, value)
    for part, tensor in tensors.items():
        if tensor.dtype == torch.bfloat16:  # which numpy does not have
            raw = tensor.view(torch.int16).numpy().view(np.uint8)
            writer.add_tensor(part, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(part, tensor.numpy())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
            step()
        writer.flush()
        os.fsync(writer.fout[0].fileno())
        writer.close()
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"could not write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            writer.close()
        temporary.unlink(missing_ok=True)


def gguf_package():
    """Return the package that writes such files."""
    try:
        import gguf
    except ImportError:
        raise UserError("GGUF files need the package gguf: python -m pip install gguf") from None
    return gguf


def parse_command():
    """Return the flags."""
    parser = Parser(__doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="the model")
    parser.add_argument("--out", metavar="FILE.gguf", required=True, type=Path, help="the file to write")
    parser.add_argument("--dtype", choices=DTYPES, default="f32", help="of matrices (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace the file if there is one")
    args = parser.parse_args()
    if args.out.suffix != ".gguf":
        raise UserError(f"--out {args.out}: the name must end in .gguf")
    if args.out.exists() and not args.overwrite:
        raise UserError(f"--out {args.out} is there already; --overwrite replaces it")
    return args


@closed_pipe_ends()
def main():
    """Load the model, convert it, write the file."""
    open_streams()
    args = parse_command()
    end_cleanly()
    gguf_package()
    loaded = in_full(load_full(args.checkpoint), tell)
    name, keys, tensors = contents(loaded, args.dtype)
    write(args.out, name, keys, tensors)
    size, left = args.out.stat().st_size, loaded.model.mtp is not None
    tell(f"{args.out}: {name}, {len(tensors)} tensors, {size / 2**20:.1f} MiB{', no MTP head' * left}")


if __name__ == "__main__":
    run_main(main)
