"""Tokenizers of Hugging Face's format: the ids of `transformers`, and no text reaches a special token."""

import itertools
import json
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import tokenizers

from config.load import load_config
from inference.generation.text_stream import TextStream
from load_data.packing import prepare_pretraining
from load_data.tokenization.hf_tokenizer import LARGEST, HfTokenizer, read_hf_tokenizer
from load_data.tokenization.tokenizer import END_OF_TEXT, PAD, PART_TOKENS, SPECIAL_TOKENS, Tokenizer
from load_data.tokenization.train_tokenizer import train_tokenizer
from tests.load_data.hf_folders import MODELS, NOT_SPECIAL, save
from utils.errors import UserError

TEXTS = [
    "", " ", "  two  spaces ", "The quick brown fox", "\n\n\tdef f(x):\n    return x", "é 你好，世界。 😀",
    "<", "a < b > s/", "<0x0A>", "▁", "##s", "it is the", "0123456789", "\u200b\x00", "s></s", "old\r\n",
    "ﬁ Å",
]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Every kind of model in a folder, with what `transformers` reads from it."""
    made = {}
    for name in MODELS:
        folder = tmp_path_factory.mktemp(name)
        made[name] = folder, save(folder, name, "chatml" if name == "byte_level" else "llama2")
    return made


@pytest.mark.parametrize("name", MODELS)
def test_ids_are_those_of_transformers(folders, name):
    folder, theirs = folders[name]
    ours = read_hf_tokenizer(folder, 1000)
    pairs = ("".join(pair) for pair in itertools.permutations(TEXTS, 2))
    for text in [*TEXTS, *(text for text in pairs if "<s>" not in text)]:
        expected = theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert ours.encode(text) == expected, text
    assert ours.encode_batch(TEXTS) == [ours.encode(text) for text in TEXTS]
    assert ours.begin == theirs("a", split_special_tokens=True)["input_ids"][: len(ours.begin)]
    assert bool(ours.begin) == (name in ("llama", "mistral"))


@pytest.mark.parametrize("name", MODELS)
def test_no_text_reaches_a_special_token(folders, name):
    """Alone, within words, with spaces, and in each of the three ways to encode."""
    ours = read_hf_tokenizer(folders[name][0])
    assert {*NOT_SPECIAL, *SPECIAL_TOKENS, *PART_TOKENS} <= ours.special_ids.keys()
    unknown = {ours.special_ids.get("<unk>")}
    forbidden = set(ours.special_ids.values()) - unknown
    for text in ours.special_ids:
        for shape in ("{}", " {}", "{} ", "a{}b", "a {} b", "{0}{0}", "<{}>", "\n{}\n", "the{}", "▁{}"):
            for encode in (ours.encode, ours.encode_section, ours.encode_inside):
                ids = encode(shape.format(text))
                assert forbidden.isdisjoint(ids), (text, shape)
    for text in ("<s>", "</s>", "<unk>"):
        assert name not in ("byte_level", "llama", "mistral") or unknown.isdisjoint(ours.encode(text))


@pytest.mark.parametrize("name", MODELS)
def test_bytes_decode_and_stream_alike(folders, name):
    """The bytes of each id, joined, are the text: that of `transformers` but for the first word's space."""
    folder, theirs = folders[name]
    ours = read_hf_tokenizer(folder, 1000)
    for text in TEXTS:
        ids = ours.encode(text)
        stream = TextStream(ours)
        shown = "".join(stream.push(one) for one in [*ids, ours.vocab_size, ours.eos_id]) + stream.finish()
        assert shown == ours.decode([*ids, ours.eos_id, 10**6])
        if name in ("byte_level", "llama", "mistral") and text not in ("▁", "<0x0A>"):
            assert shown in (text, f" {text}")
        if "  " not in text and not text.startswith((" ", "▁", "##")):
            assert shown.removeprefix(" ") == theirs.decode(ids, skip_special_tokens=True)
    eos = ours.eos_id
    assert ours.decode([eos], skip_special=False) == theirs.convert_ids_to_tokens(eos)
    assert len(ours.token_bytes) == ours.vocab_size
    assert not ours.token_bytes[list(ours.special_ids.values())].any()


@pytest.mark.parametrize("name", MODELS)
def test_json_gives_the_same_tokenizer(folders, name):
    one = read_hf_tokenizer(folders[name][0])
    two = Tokenizer.from_json(one.to_json())
    assert two.to_json() == one.to_json() and two.digest == one.digest and isinstance(two, HfTokenizer)
    for field in ("special_ids", "id_to_bytes", "begin", "eos_ids", "separator", "strips", "turns", "pad_id"):
        assert getattr(two, field) == getattr(one, field), field
    text = "".join(TEXTS) + "\ud800<s>"
    with ThreadPoolExecutor(4) as threads:
        assert {tuple(ids) for ids in threads.map(two.encode, [text] * 8)} == {tuple(one.encode(text))}
    assert one.encode("a\ud800b") == one.encode("a\ufffdb")


def test_added_tokens_that_are_text_stay_text(tmp_path):
    """White space (GPT-NeoX), and single letters (DeepSeek-V2 has "ü" as an added token)."""
    more = [tokenizers.AddedToken(text, normalized=text == "ü") for text in ("ü", "    ", "\n\n")]
    theirs = save(tmp_path, "byte_level", "deepseek", more=more)
    ours = read_hf_tokenizer(tmp_path, len(theirs))
    for text in ("Grüße", "ü", "a    b", "     x\n\n\n", "\n\n    ü<think>".replace("<think>", "")):
        expected = theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert ours.encode(text) == expected and ours.decode(expected) == text
    assert "ü" not in ours.special_ids and "<think>" in ours.special_ids


def test_settings_of_batches_are_left_out(folders, tmp_path):
    """A tokenizer.json may ask for padding and truncation; settings may name tokens that it lacks."""
    theirs = save(tmp_path, "mistral")
    backend = theirs.backend_tokenizer
    backend.enable_padding(direction="left", length=9)
    backend.enable_truncation(4)
    backend.save(str(tmp_path / "tokenizer.json"))
    file = tmp_path / "tokenizer_config.json"
    flags = {"lstrip": True, "special": True, "__type": "AddedToken"}
    more = {
        "added_tokens_decoder": {"999": flags | {"content": "<|new|>"}},
        "extra_special_tokens": ["<|x|>"],
    }
    file.write_text(json.dumps(json.loads(file.read_text()) | more), encoding="utf-8")
    ours = read_hf_tokenizer(tmp_path, 1000)
    plain = read_hf_tokenizer(folders["mistral"][0], 1000)
    for text in TEXTS:
        assert ours.encode(text) == plain.encode(text)
    assert ours.begin == plain.begin == [1] and ours.strips["<|new|>"] == (True, False)
    size = len(save(tmp_path / "again", "mistral"))
    assert {ours.special_ids["<|new|>"], ours.special_ids["<|x|>"]} == {size, size + 1}


def test_special_tokens_of_ours(folders):
    """A new model gets all that are missing; one with weights those of ChatML, if there are rows for them."""
    folder, theirs = folders["llama"]
    size = len(theirs)
    new = read_hf_tokenizer(folder)
    missing = [name for name in (*SPECIAL_TOKENS, *PART_TOKENS) if name not in theirs.get_vocab()]
    assert new.contents["added"] == missing and END_OF_TEXT in missing and "<think>" not in missing
    assert [new.special_ids[name] for name in missing] == [*range(size, size + len(missing))]
    assert new.vocab_size == size + len(missing) and new.eos_ids == [new.special_ids[END_OF_TEXT], 2]
    for rows, added in ((size, []), (size + 1, []), (size + 2, ["<|im_start|>", "<|im_end|>"])):
        old = read_hf_tokenizer(folder, rows)
        assert old.contents["added"] == added and old.vocab_size == size + len(added)
        assert old.special_ids[END_OF_TEXT] == old.special_ids[PAD] == old.eos_id == 2
        assert old.decode([2], skip_special=False) == "</s>"
    with pytest.raises(UserError, match=f"go up to {size - 1}, and the model has only {size - 1} rows"):
        read_hf_tokenizer(folder, size - 1)
    holes = read_hf_tokenizer(folders["word_level"][0])
    assert len(set(holes.special_ids.values())) == len(holes.special_ids)
    assert holes.decode([holes.special_ids["<think>"] + 9, *holes.encode("is")]) == " is"


def test_ends_of_a_text(folders, tmp_path):
    """generation_config.json may name several; ids that do not exist are left out."""
    save(tmp_path, "byte_level", "chatml")
    ends = {"eos_token_id": [5, 6, 10**9, -1, "7", None]}
    (tmp_path / "generation_config.json").write_text(json.dumps(ends), encoding="utf-8")
    ours = read_hf_tokenizer(tmp_path, 1000)
    end, text_end = (ours.special_ids[name] for name in ("<|im_end|>", "<|endoftext|>"))
    assert ours.eos_ids == [text_end, 5, 6, end] and ours.pad_id == text_end


def test_bpe_of_bytes_knows_everything(tmp_path):
    """GPT-2 names its end of text as the token for unknown text, too."""
    save(tmp_path, "byte_level", "chatml")
    file = tmp_path / "tokenizer.json"
    data = json.loads(file.read_bytes())
    before = read_hf_tokenizer(tmp_path)
    data["model"]["unk_token"] = "<|im_end|>"
    data["model"]["vocab"]["never"] = data["model"]["vocab"].pop("z")
    data["model"]["merges"] = []
    file.write_text(json.dumps(data), encoding="utf-8")
    ours = read_hf_tokenizer(tmp_path)
    assert ours.encode("z<b") == before.encode("<b") and ours.encode("z") == []


def test_by_flags(folders, tmp_path):
    """`tokenizer.kind=hf` reads the folder; a changed file is another tokenizer."""
    save(tmp_path, "llama")
    settings = [f"tokenizer.path={tmp_path / 'tokenizer.json'}", "tokenizer.kind=hf"]
    config = load_config(None, settings).tokenizer
    one = train_tokenizer(config, [], tmp_path / "cache", "", 0)
    assert one.digest == read_hf_tokenizer(tmp_path).digest and not (tmp_path / "cache").exists()
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text(encoding="utf-8").replace("true", "false"), encoding="utf-8")
    assert train_tokenizer(config, [], tmp_path, "", 0).digest != one.digest
    with pytest.raises(UserError, match="tokenizer.kind=hf needs tokenizer.path"):
        load_config(None, settings[1:])
    with pytest.raises(UserError, match="tokenizer.path is for tokenizer.kind=hf only, and the kind is bpe"):
        load_config(None, settings[:1])


def test_documents_begin_as_texts_do(tmp_path):
    """Between two documents stand the end of one and the beginning of the next."""
    save(tmp_path, "mistral")
    text = tmp_path / "text.jsonl"
    text.write_text("".join(f'{{"text": "The number {number}</s>"}}\n' for number in range(40)))
    config = load_config(None, ["tokenizer.kind=hf", f"tokenizer.path={tmp_path}"])
    config.data.paths, config.data.cache_dir = [str(text)], str(tmp_path / "cache")
    data = prepare_pretraining(config)
    eos, bos = (data.tokenizer.special_ids[name] for name in (END_OF_TEXT, "<s>"))
    documents = " ".join(map(str, data.train)).split(f" {eos} {bos} ")
    known = {" ".join(map(str, data.tokenizer.encode(f"The number {number}</s>"))) for number in range(40)}
    assert len(documents) > 20 and set(documents) <= known


def cut(folder):
    (folder / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes()[:1000])


def edit(folder, change):
    """Change tokenizer.json by `change(data)`."""
    data = json.loads((folder / "tokenizer.json").read_bytes())
    change(data)
    (folder / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")


def other_model(folder):
    edit(folder, lambda data: data["model"].update(type="Hieroglyphs"))


def huge_id(folder):
    edit(folder, lambda data: data["model"]["vocab"].update(giant=2**32 - 2))


def same_id(folder):
    """A word with the id of a special token would reach it."""
    edit(folder, lambda data: data["model"]["vocab"].update(word=data["added_tokens"][-1]["id"]))


def unknown_is_the_end(folder):
    """Any unknown word would end the text."""
    edit(folder, lambda data: data["model"].update(unk_token="</s>"))


def nothing_for_unknown_text(folder):
    edit(folder, lambda data: data["model"].update(unk_token=""))


def post_processor_without_its_token(folder):
    processor = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {},
    }
    edit(folder, lambda data: data.update(post_processor=processor))


def only_sentencepiece(folder):
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")


def too_large(folder):
    with open(folder / "tokenizer_config.json", "ab") as file:
        file.truncate(LARGEST + 1)


def no_end(folder):
    (folder / "tokenizer_config.json").unlink()


BROKEN = {
    cut: "not of the format of the library tokenizers",
    other_model: "not of the format of the library tokenizers",
    huge_id: "an id of 4,294,967,294",
    same_id: "'word' has the id of a special token",
    unknown_is_the_end: "text that it does not know would become its eos_token, </s>",
    post_processor_without_its_token: "not of the format of the library tokenizers",
    nothing_for_unknown_text: "not of the format of the library tokenizers",
    only_sentencepiece: r"a tokenizer.json is needed, and there is only tokenizer.model; .* writes it",
    too_large: "larger than 64 MiB",
    no_end: "{folder}: the tokenizer has no end of text: name an eos_token",
    lambda folder: (folder / "tokenizer_config.json").write_text("[1]"): "AttributeError",
    lambda folder: (folder / "tokenizer_config.json").write_bytes(b"\xff"): "cannot be read as text in UTF-8",
}


@pytest.mark.parametrize("harm", BROKEN)
def test_broken_folders(tmp_path, harm):
    save(tmp_path, "word_level")
    harm(tmp_path)
    with pytest.raises(UserError, match=BROKEN[harm].replace("{folder}", re.escape(str(tmp_path)))):
        read_hf_tokenizer(tmp_path, 1000)


def test_a_folder_that_is_missing(tmp_path):
    with pytest.raises(UserError, match="a tokenizer.json is needed, and there is no such folder"):
        read_hf_tokenizer(tmp_path / "nowhere")
