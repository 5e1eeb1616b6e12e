"""Tokenizers of recipes: published ones are taken as they are, and a run folder holds all it needs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toys
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import polymodal as pm
from polymodal.core.errors import ConfigError
from polymodal.core.parts import Text
from polymodal.core.samples import Message
from polymodal.modalities.text import CHAT_FORMATS, chat_format, template_of, tokenize
from polymodal.modalities.text import Tokenizer as Ours
from polymodal.recipes.assemble import assemble
from polymodal.recipes.loading import dump_recipe, load_recipe
from polymodal.recipes.tokenizers import make_tokenizer, write_text_tokenizers, write_tokenizer
from polymodal.training.weights import save_weights

TINY = {"transformer": {"width": 16, "depth": 1, "heads": 2, "norm": "rms", "bias": False}, "max_tokens": 64}


def published(folder: Path) -> Path:
    """A checkpoint's tokenizer files."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: place for place, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in ("</s>", "<pad>")])
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    names = {"eos_token": "</s>", "pad_token": {"content": "<pad>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


def recipe(**model: Any) -> Any:
    return load_recipe({"name": "t", "model": {"heads": {"text": {"use": "next_token"}}, **model}})


def test_a_published_tokenizer_is_taken_as_it_is(tmp_path: Path) -> None:
    folder = str(published(tmp_path / "hub"))
    mine = recipe(
        backbone={"use": "decoder", "chat": "none", **TINY}, tokenizer={"use": "file", "path": folder, "rows": 300}
    )
    parts = assemble(mine)
    assert parts.tokenizer.size == 258 and parts.tokenizer.names.pad == "<pad>"
    assert parts.network.decoder.embed_tokens.weight.shape == (300, 16)
    asked = recipe(
        backbone={"use": "decoder", "chat": "chatml", **TINY},
        tokenizer={"use": "file", "path": folder, "add": ["<|im_start|>", "<|im_end|>"]},
    )
    assert make_tokenizer(asked).size == 260


def test_what_a_published_tokenizer_lacks_is_said(tmp_path: Path) -> None:
    folder = str(published(tmp_path / "hub"))
    source = {"use": "file", "path": folder}
    with pytest.raises(ConfigError, match=r"has no control token '<\|im_start\|>', which .* add: \['<\|"):
        make_tokenizer(recipe(backbone={"use": "decoder", "chat": "chatml", **TINY}, tokenizer=source))
    with pytest.raises(ConfigError, match="found 258 ids, expected at most 100, the rows of the embedding"):
        assemble(recipe(backbone={"use": "decoder", "chat": "none", **TINY}, tokenizer={**source, "rows": 100}))
    with pytest.raises(ConfigError, match="'pad' belongs to use: file; a tokenizer that is trained here names its own"):
        recipe(backbone={"use": "decoder", **TINY}, tokenizer={"use": "bpe", "pad": "<pad>"})


def towers(folder: str) -> Any:
    """Two text streams: one with a tokenizer of its own, one without."""
    encoder = {"use": "text_transformer", "width": 16, "depth": 1, "heads": 2, "vocab_size": 258}
    own = {"use": "text", "max_tokens": 12, "tokenizer": folder}
    return load_recipe(
        {
            "name": "towers",
            "model": {
                "streams": {"text": {"modality": "text", "encoder": encoder, "reader": own}},
                "backbone": "none",
                "heads": {"space": {"use": "projection", "dim": 8}},
            },
        }
    )


def test_a_run_folder_needs_no_other_folder(tmp_path: Path) -> None:
    hub, run = published(tmp_path / "hub"), tmp_path / "run"
    mine = towers(str(hub))
    parts = assemble(mine)
    run.mkdir()
    (run / "recipe.yaml").write_text(dump_recipe(mine))
    write_text_tokenizers(parts.text_tokenizers, run)
    write_tokenizer(parts.tokenizer, run)
    save_weights(parts.network, run / "model.safetensors")
    before = pm.load(run).embed(["a red cube", "b"])
    shutil.rmtree(hub)
    np.testing.assert_array_equal(pm.load(run).embed(["a red cube", "b"]), before)
    assert Ours.load(run / "tokenizers" / "text").names.pad == "<pad>"


def test_a_text_stream_must_have_a_row_for_each_id(tmp_path: Path) -> None:
    mine = towers(str(published(tmp_path / "hub")))
    data = mine.to_data()
    data["model"]["streams"]["text"]["encoder"]["vocab_size"] = 50
    with pytest.raises(ConfigError, match=r"streams.text: its tokenizer has 258 ids, its encoder 50 rows"):
        assemble(load_recipe(data))


def test_names_of_control_tokens_survive_the_run_folder(tmp_path: Path) -> None:
    tokenizer = Ours.load(published(tmp_path / "hub"))
    write_tokenizer(tokenizer, tmp_path / "run")
    again = Ours.load(tmp_path / "run" / "tokenizer.json")
    assert again.names == tokenizer.names and again.size == tokenizer.size
    own = toys.tokenizer() if hasattr(toys, "tokenizer") else None
    if own is not None:
        write_tokenizer(own, tmp_path / "own")
        assert Ours.load(tmp_path / "own" / "tokenizer.json").names == own.names


@pytest.mark.parametrize("name", CHAT_FORMATS)
def test_an_exported_format_renders_there_what_it_renders_here(name: str, tmp_path: Path) -> None:
    reference = pytest.importorskip("transformers")
    chat = chat_format(name)
    controls = [control for control in (*chat.controls, "<s>") if not control.startswith("{")]
    tokenizer = Ours.load(published(tmp_path / "hub"), controls)
    write_tokenizer(tokenizer, tmp_path / "out", chat)
    theirs = reference.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.chat_template == template_of(chat, tokenizer)
    turns = [("user", 'What\'s "this"?'), ("assistant", "A {{ cat }}."), ("user", "Sure?\n")]
    for given in (turns, turns[:1], [("system", "Be brief."), *turns]):
        messages = [Message(role, (Text(text),)) for role, text in given]  # type: ignore[arg-type]
        ours = [id for run in tokenize(chat.render(messages, id="s", prompt=True), tokenizer) for id in run.ids]
        data = [{"role": role, "content": text} for role, text in given]
        assert theirs.apply_chat_template(data, add_generation_prompt=True, return_dict=False) == ours


@pytest.mark.parametrize("asks", [True, False])
def test_a_stream_that_asks_for_a_start_and_an_end_gets_them(asks: bool, tmp_path: Path) -> None:
    (tmp_path / "views.jsonl").write_text(json.dumps({"id": "a", "views": {"text": "a red star"}}) + "\n")
    stream = {
        "modality": "text",
        "encoder": {"use": "embedding", "width": 16},
        "reader": {"use": "text", "add_special": asks},
    }
    mine = load_recipe(
        {
            "name": "t",
            "data_root": str(tmp_path),
            "model": {
                "streams": {"text": stream}, "backbone": {"use": "none"}, "heads": {"space": {"use": "projection"}}
            },
            "stages": [
                {
                    "name": "s", "train": ["heads"], "data": ["views.jsonl"], "objectives": {"infonce": 1.0},
                    "batch": {"samples": 2}, "steps": 1,
                }
            ],
        }
    )  # fmt: skip
    parts = assemble(mine)
    ids = parts.processor.batch([pm.Sample("a", views={"text": Text("red")})]).streams["text"].values[0].tolist()
    frame = [parts.tokenizer.prefix, parts.tokenizer.suffix]
    assert frame == ([[parts.tokenizer.bos_id], [parts.tokenizer.eos_id]] if asks else [[], []])
    assert ids == [*frame[0], *parts.tokenizer.encode("red"), *frame[1]]
