"""Small models with random weights beside their data, and their quantised forms."""

import json
from dataclasses import replace

from config.quant import CALIBRATED, QuantConfig
from inference.generation.load import load_full
from inference.quantization.calibrate import training_rows
from inference.quantization.fit import quantize_model
from inference.quantize import contents
from tests.inference.tools import run_config, tiny_model, write_checkpoint
from utils.checkpoint import save_checkpoint

MOE = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 16,
       "first_k_dense_replace": 1}  # fmt: skip
MLA = {"attention_kind": "mla", "kv_lora_rank": 16, "q_lora_rank": 8, "qk_nope_head_dim": 10,
       "qk_rope_head_dim": 6, "v_head_dim": 8}  # fmt: skip
FORMATS = {
    "rtn8": QuantConfig("rtn", 8),
    "rtn4": QuantConfig("rtn", 4, 8),
    "rtn4-asym": QuantConfig("rtn", 4, 8, symmetric=False),
    "gptq4": QuantConfig("gptq", 4, 8),
    "gptq4-asym": QuantConfig("gptq", 4, 8, symmetric=False, act_order=False),
    "awq4": QuantConfig("awq", 4, 8),
    "smoothquant": QuantConfig("smoothquant", 8),
    "nf4": QuantConfig("nf4", 4),
    "nf4-double": QuantConfig("nf4", 4, double_quant=True),
    "head": QuantConfig("gptq", 8, head=True),
}
LETTERS = "abcdefghijklmnop"  # the held-out end of the text is written in others
HELD_OUT = "z"


def write_source(folder, short="Pre", seed=0, **shape):
    """A checkpoint whose data are a text, or 60 dialogues; returns its path."""
    model = tiny_model(seed, **({**MOE, **shape}))
    if short == "Pre":
        data = folder / "text.txt"
        text = "".join(LETTERS[(n * n + n // 7) % 16] for n in range(3500)) + HELD_OUT * 1500
        data.write_text(text, encoding="utf-8")  # the split is at 70 %
    else:
        data = folder / "dialogues.jsonl"
        turns = ({"messages": [{"role": "user", "content": f"{n} + {n % 7}?"},
                               {"role": "assistant", "content": f"{n + n % 7}" * (1 + n % 3)}]}
                 for n in range(60))  # fmt: skip
        data.write_text("".join(json.dumps(one) + "\n" for one in turns), encoding="utf-8")
    config = run_config(model)
    config["data"] |= {"paths": [str(data)], "sequence_length": 48, "cache_dir": str(folder / "cache")}
    path = folder / f"TinySeek_{short}_final.pkl"
    return write_checkpoint(path, short, weights=model.state_dict(), config=config)


def quantized(path, quant, rows=8):
    """The checkpoint `path` after `quantize_model`, and the rows of the table."""
    loaded = load_full(path)
    batches = training_rows(loaded, None, rows) if quant.method in CALIBRATED else []
    table = quantize_model(loaded.model, quant, batches)
    loaded.config = replace(loaded.config, quant=quant)
    return loaded, table


def write_quantized(path, source, quant):
    """Save the quantised form of a checkpoint; returns `path`."""
    save_checkpoint(path, contents(quantized(source, quant)[0]))
    return path
