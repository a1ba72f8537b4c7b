"""Tiny Hugging Face models that are no decoders, with random weights, saved in folders with tokenizers."""

import json

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from tests.inference.hf.models import randomized

WORDS = ["the", "quick", "brown", "fox", "jump", "##s", "##ed", "over", "lazy", "dog", "你", "好", "é", "a",
         "b", "c", "d", "##e", "##f", "!", "?", "1", "2"]  # fmt: skip
SIZES = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "intermediate_size": 20, "max_position_embeddings": 48}  # fmt: skip
MODERN = SIZES | {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2,
                  "sep_token_id": 3, "local_attention": 6}  # fmt: skip
T5 = {"vocab_size": 60, "d_model": 32, "num_layers": 2, "num_heads": 4, "d_kv": 6, "d_ff": 20,
      "feed_forward_proj": "gated-gelu"}  # fmt: skip
OTHERS = {
    "BertForMaskedLM": SIZES,
    "BertForMaskedLM, one head, one type": SIZES | {
        "num_attention_heads": 1, "type_vocab_size": 1, "layer_norm_eps": 1e-3, "hidden_act": "silu"},
    "BertForPreTraining": SIZES,
    "ModernBertForMaskedLM": MODERN | {"num_hidden_layers": 4},
    "ModernBertForMaskedLM, biases, types of layers": MODERN | {
        "num_hidden_layers": 3, "attention_bias": True, "mlp_bias": True, "norm_bias": True,
        "classifier_bias": True, "norm_eps": 1e-3,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 500.0},
                            "sliding_attention": {"rope_type": "default", "rope_theta": 70.0}}},
    "T5ForConditionalGeneration": T5 | {"decoder_start_token_id": 3},
    "T5ForConditionalGeneration, two matrices, longer decoder": T5 | {
        "tie_word_embeddings": False, "num_decoder_layers": 3, "layer_norm_epsilon": 1e-3,
        "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20},
}  # fmt: skip


def make_other(case: str, seed=0):
    """Hugging Face's model of a case, with random weights, gains and biases."""
    kind = getattr(transformers, case.partition(",")[0])
    model = kind(kind.config_class(**OTHERS[case])).eval()
    if "two matrices" in case:
        model.lm_head.weight = torch.nn.Parameter(torch.empty(60, 32))
    buffers = {name: tensor.clone() for name, tensor in model.named_buffers()}  # numbers of positions
    randomized(model, seed)
    for name, tensor in buffers.items():
        model.get_buffer(name).copy_(tensor)
    return model


def word_pieces() -> str:
    """A tokenizer.json as BERT's: lower case, no accents, [CLS] before and [SEP] after a text."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: one for one, word in enumerate(special + WORDS)}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    backend.add_special_tokens(special)
    return backend.to_str()


def pieces() -> str:
    """A tokenizer.json as T5's: Unigram, `</s>` after a text, sentinels with the last ids."""
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -2.0)]
    words += [(word.replace("##", "") if "##" in word else "▁" + word, -3.0 - n / 9)
              for n, word in enumerate(WORDS)]  # fmt: skip
    backend = Tokenizer(models.Unigram([*words, ("▁the▁quick", -3.5)], 2))
    backend.normalizer = normalizers.NFKC()
    steps = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.Metaspace()
    backend.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    backend.add_special_tokens(["<pad>", "</s>", "<unk>", "<extra_id_1>", "<extra_id_0>"])
    return backend.to_str()


def write_other_tokenizer(folder, kind="bert") -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    names = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "</s>"} if kind == "t5" else {
        f"{role}_token": f"[{role.upper()}]" for role in ("unk", "pad", "cls", "sep", "mask")}  # fmt: skip
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"} | names
    if kind == "t5":
        settings["additional_special_tokens"] = ["<extra_id_1>", "<extra_id_0>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(pieces() if kind == "t5" else word_pieces(), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def save_other(case: str, folder, **options):
    """Save the model of a case and a tokenizer; return the model."""
    model = make_other(case)
    model.save_pretrained(folder, **options)
    write_other_tokenizer(folder, model.config.model_type)
    return model
