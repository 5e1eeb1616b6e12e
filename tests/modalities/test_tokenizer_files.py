"""Tokenizer files of published checkpoints: every layout gives the ids that its own library gives."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from polymodal.core.errors import CheckpointError, ConfigError
from polymodal.core.parts import Text
from polymodal.core.samples import Message
from polymodal.modalities.text import Tokenizer, TokenNames, chat_format, tokenize

WORDS = "the quick brown fox jumps over a lazy dog while seven wizards box queens vault".split()  # noqa: SIM905
TEXTS = [
    "The quick  brown fox.",
    "a",
    " leading and trailing ",
    "na\u00efve caf\u00e9 \u4f60\u597d \U0001f600!",
    "line\nbreak\t tab 1234 it's DON'T",
    "<s> is text </s> here",
    "",
]
PLAIN = [text for text in TEXTS if "</s>" not in text]
"""Texts in which nothing is spelled like a control token: those the reference reads as tokens, and we never do."""


def corpus(count: int = 400) -> list[str]:
    rng = random.Random(0)
    lines = [" ".join(rng.choices(WORDS, k=rng.randint(3, 12))) for _ in range(count)]
    return [line.capitalize() + "." if rng.random() < 0.5 else line for line in lines]


def train_sentencepiece(folder: Path, kind: str, **options: Any) -> Path:
    library = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    library.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()), model_writer=model, model_type=kind, minloglevel=2, **options
    )
    path = folder / ("tokenizer.model" if kind == "bpe" else "spiece.model")
    path.write_bytes(model.getvalue())
    return path


LLAMA = {"vocab_size": 420, "byte_fallback": True, "normalization_rule_name": "identity"}


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A folder with a Llama-like SentencePiece model and nothing else but its config."""
    train_sentencepiece(tmp_path, "bpe", **LLAMA, remove_extra_whitespaces=False, split_digits=True)
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True}
    config |= {"bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def test_a_sentencepiece_bpe_gives_the_ids_of_its_library(llama: Path) -> None:
    library = pytest.importorskip("sentencepiece")
    theirs = library.SentencePieceProcessor(model_file=str(llama / "tokenizer.model"))
    ours = Tokenizer.load(llama)
    assert ours.size == theirs.vocab_size()
    for text in [*TEXTS, *corpus(30)]:
        # A space in front counts as the one that the model adds itself, here as in the reference library.
        ids = theirs.encode(text.lstrip(" "))
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids)
    assert ours.prefix == [theirs.bos_id()] and ours.suffix == []
    assert ours.names == TokenNames(None, None, "<s>", "</s>")
    assert ours.eos_id == ours.pad_id == theirs.eos_id()


def test_text_that_continues_a_sequence_begins_no_new_word(llama: Path) -> None:
    ours = Tokenizer.load(llama)
    first, later = ours.encode("dog"), ours.encode("dog", is_first=False)
    assert first != later
    assert ours.decode([*ours.encode("lazy"), *later]) == "lazydog"
    (llama / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "legacy": true}')
    old = Tokenizer.load(llama)
    assert old.encode("dog", is_first=False) == old.encode("dog") == first


def test_a_sentencepiece_unigram_gives_the_ids_of_its_library(tmp_path: Path) -> None:
    library = pytest.importorskip("sentencepiece")
    path = train_sentencepiece(tmp_path, "unigram", vocab_size=70, bos_id=-1, pad_id=0, eos_id=1, unk_id=2)
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    (tmp_path / "tokenizer_config.json").write_text('{"extra_ids": 3, "eos_token": "</s>", "pad_token": "<pad>"}')
    theirs = library.SentencePieceProcessor(model_file=str(path))
    ours = Tokenizer.load(tmp_path)
    for text in [*TEXTS[:-2], *corpus(30)]:
        assert ours.encode(text) == theirs.encode(text), text
    assert ours.suffix == [1] and ours.pad_id == 0
    assert ours.controls["<extra_id_2>"] == theirs.vocab_size()
    assert ours.controls["<extra_id_0>"] == ours.size - 1 == theirs.vocab_size() + 2


def byte_level(folder: Path, special: list[str], suffix: str = "") -> None:
    backend = tokenizers.Tokenizer(models.BPE(end_of_word_suffix=suffix))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix=suffix,
        show_progress=False,
    )
    backend.train_from_iterator(corpus(), trainer)
    backend.model.save(str(folder))


CASES = {
    "gpt2": ("GPT2Tokenizer", ["<|endoftext|>"], {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}, ""),
    "opt": (
        "GPT2Tokenizer",
        ["<s>", "<pad>", "</s>", "<unk>"],
        {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "</s>", "add_bos_token": True},
        "",
    ),
    "qwen2": ("Qwen2Tokenizer", ["<|endoftext|>", "<|im_end|>"], {"eos_token": "<|im_end|>", "bos_token": None}, ""),
    "clip": (
        "CLIPTokenizer",
        ["<|startoftext|>", "<|endoftext|>"],
        {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
        "</w>",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_vocab_and_merges_give_the_ids_of_the_reference(name: str, tmp_path: Path) -> None:
    reference = pytest.importorskip("transformers")
    kind, special, config, suffix = CASES[name]
    byte_level(tmp_path, special, suffix)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind, **config}))
    theirs = getattr(reference, kind).from_pretrained(tmp_path)
    ours = Tokenizer.load(tmp_path)
    assert ours.size == len(theirs)
    for text in [*PLAIN, *corpus(20)]:
        framed = [*ours.prefix, *ours.encode(text), *ours.suffix]
        assert framed == theirs(text).input_ids, text
    ids = ours.encode(corpus(1)[0])
    assert ours.decode(ids).strip() == theirs.decode(ids, clean_up_tokenization_spaces=False).strip() or name == "clip"
    assert ours.names.eos == config["eos_token"] and ours.names.bos == config["bos_token"]


def test_word_pieces_give_the_ids_of_the_reference(tmp_path: Path) -> None:
    reference = pytest.importorskip("transformers")
    pieces = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *WORDS,
        "##s",
        "##ing",
        ".",
        "'",
        "1",
        "##2",
        "cafe",
        "\u4f60",
    ]
    (tmp_path / "vocab.txt").write_text("\n".join(dict.fromkeys(pieces)) + "\n", encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": true}')
    theirs = reference.BertTokenizer.from_pretrained(tmp_path)
    ours = Tokenizer.load(tmp_path)
    assert ours.size == len(theirs)
    for text in [*TEXTS, *corpus(20), "The QUICK foxs, boxing caf\u00e9 12 \u4f60\u597d [SEP]"]:
        if "[SEP]" not in text:
            assert [*ours.prefix, *ours.encode(text), *ours.suffix] == theirs(text).input_ids, text
    # A control token's spelling is text, which the reference takes for the token.
    assert ours.control("[SEP]") not in ours.encode("a [SEP] b")
    assert ours.prefix == [ours.control("[CLS]")] and ours.suffix == [ours.control("[SEP]")]


def test_a_saved_reference_tokenizer_is_read_as_it_is(tmp_path: Path) -> None:
    reference = pytest.importorskip("transformers")
    byte_level(tmp_path, ["<|endoftext|>"])
    theirs = reference.GPT2Tokenizer.from_pretrained(tmp_path, pad_token="<|endoftext|>")
    theirs.add_special_tokens({"additional_special_tokens": ["<image>"]})
    theirs.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "vocab.json").exists()
    ours = Tokenizer.load(tmp_path / "saved", names=TokenNames(media="<image>"))
    assert ours.size == len(theirs)
    assert ours.media_id == theirs.convert_tokens_to_ids("<image>")
    for text in TEXTS:
        assert ours.encode(text) == theirs(text).input_ids
    for file, data in ours.hub_files().items():
        path = tmp_path / "back" / file
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(data))
    back = reference.AutoTokenizer.from_pretrained(tmp_path / "back")
    assert [back(text).input_ids for text in TEXTS] == [theirs(text).input_ids for text in TEXTS]
    assert back.pad_token == back.eos_token == "<|endoftext|>"


def test_nothing_is_added_in_silence(llama: Path) -> None:
    size = Tokenizer.load(llama).size
    assert Tokenizer.load(llama, ["<image>"]).control("<image>") == size
    with pytest.raises(ConfigError, match=r"its media token is said to be '<image>', which it does not hold"):
        Tokenizer.load(llama, names=TokenNames(media="<image>"))
    with pytest.raises(ConfigError, match=r"unknown control token '<\|user\|>'"):
        Tokenizer.load(llama).control("<|user|>")


def test_tokens_that_the_folder_lists_must_get_their_ids(llama: Path) -> None:
    size = Tokenizer.load(llama).size
    (llama / "added_tokens.json").write_text(json.dumps({"<image>": size, "<pad>": size + 1}))
    assert Tokenizer.load(llama).controls["<pad>"] == size + 1
    (llama / "added_tokens.json").write_text(json.dumps({"<image>": size + 7}))
    with pytest.raises(CheckpointError, match=rf"'<image>' got the id {size}, the folder says {size + 7}"):
        Tokenizer.load(llama)


def test_what_cannot_be_read_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no tokenizer; expected tokenizer.json, tokenizer.model"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    for damaged in (b"", b"\x0a\xff\xff\xff", b"\x0b\x01", b"\x0a\x02\x0a\x00", bytes(range(256))):
        (tmp_path / "tokenizer.model").write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"tokenizer.model: (is not a SentencePiece model|found 0 pieces)"):
            Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    byte_level(tmp_path, ["<unk>"])
    with pytest.raises(CheckpointError, match=r"unknown tokenizer_class 'Llama'.* Save the tokenizer"):
        Tokenizer.load(tmp_path)
    (tmp_path / "merges.txt").write_text("a b c d\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    with pytest.raises(CheckpointError, match=r"vocab.json and merges.txt are not a vocabulary"):
        Tokenizer.load(tmp_path)
    (tmp_path / "vocab.json").unlink()
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    with pytest.raises(CheckpointError, match=r"has no \[UNK\]; expected a WordPiece vocabulary"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="found list, expected a JSON object"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("name", ["vicuna", "llama-2", "mistral", "none"])
def test_prompts_in_named_formats_are_the_references_ids_of_the_rendered_text(name: str, llama: Path) -> None:
    reference = pytest.importorskip("transformers")
    theirs, ours = reference.AutoTokenizer.from_pretrained(llama), Tokenizer.load(llama)
    system = "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    rendered = {
        "vicuna": f"{system}detailed, and polite answers to the user's questions. USER: the fox? ASSISTANT:",
        "llama-2": "<s>[INST] the fox? [/INST]",
        "mistral": "<s>[INST] the fox? [/INST]",
        "none": "the fox?",
    }[name]
    segments = chat_format(name).render([Message("user", (Text("the fox?"),))], id="s", prompt=True)
    found = [id for run in tokenize(segments, ours) for id in run.ids]
    assert found == theirs(rendered, add_special_tokens=not rendered.startswith("<s>")).input_ids
