"""The tokenizers of a recipe: made, read from a checkpoint, and kept in the run folder.

A run folder holds ``tokenizer.json``, what it calls its control tokens in ``tokenizer_config.json``, and below
``tokenizers/STREAM`` the same two files for every text stream with a tokenizer of its own: it needs no other folder.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from polymodal.core.errors import ConfigError, DataError
from polymodal.core.parts import Text
from polymodal.core.samples import Sample
from polymodal.data.planner import BAD_SAMPLE
from polymodal.data.sources import open_source
from polymodal.modalities.text import (
    Chat,
    ChatTemplate,
    TextReaderConfig,
    Tokenizer,
    TokenNames,
    chat_format,
    template_of,
    train_bpe,
)
from polymodal.modalities.text.tokenizer import END, START
from polymodal.models.backbones.decoder import CausalConfig
from polymodal.models.compose import TokenizerConfig
from polymodal.models.compose.masking import MASK_TOKENS
from polymodal.models.heads.table import MaskedTokenConfig
from polymodal.recipes.schema import Recipe

_SAMPLES = 20_000
"""Samples per source that a tokenizer is trained on; more changes little and takes time."""
TOKENIZER = "tokenizer.json"
_NAMES, _STREAMS = "tokenizer_config.json", "tokenizers"


def recipe_chat(recipe: Recipe) -> Chat | None:
    """The chat format of the recipe's decoder; None without one."""
    backbone = recipe.model.backbone
    return chat_format(backbone.chat) if isinstance(backbone, CausalConfig) else None


def make_tokenizer(recipe: Recipe) -> Tokenizer:
    """The recipe's tokenizer: read from its files, or trained on the text of its data.

    Raises:
        ConfigError: if a published tokenizer lacks a token that the recipe needs.
        CheckpointError: if there are no such files, or they are damaged.
        DataError: if it must be trained and there is no text.
    """
    config = recipe.model.tokenizer
    chat = recipe_chat(recipe)
    controls = chat.controls if chat else ()
    if _hides_text(recipe):
        controls = (*controls, MASK_TOKENS[0])
    if config.path is not None:
        return _published(config, controls)
    if not reads_text(recipe):
        # Bytes alone: nothing will be encoded, and a run folder holds a tokenizer whatever its model reads.
        return train_bpe([], config.vocab_size, controls)
    texts = list(training_texts(recipe))
    if not texts:
        raise DataError("the tokenizer is to be trained on the recipe's data, and the data holds no text")
    return train_bpe(texts, config.vocab_size, controls, framed=_frames_text(recipe))


def _published(config: TokenizerConfig, controls: Iterable[str]) -> Tokenizer:
    assert config.path is not None
    names = TokenNames(config.pad, config.media, config.bos, config.eos)
    tokenizer = Tokenizer.load(config.path, config.add, names)
    missing = [name for name in controls if name not in (START, END, *tokenizer.controls)]
    if missing:
        raise ConfigError(
            f"tokenizer {config.path}: has no control token {missing[0]!r}, which the backbone's chat format needs; "
            f"its own: {sorted(tokenizer.controls)[:12]}. Choose another chat format, or ask for it: "
            f"tokenizer: {{..., add: {missing}}}"
        )
    return tokenizer


def vocabulary_rows(config: TokenizerConfig, tokenizer: Tokenizer) -> int:
    """Rows of the token embedding: one for each id, or as many as the checkpoint has.

    Raises:
        ConfigError: if the tokenizer has more ids than ``rows``.
    """
    if config.rows is not None and tokenizer.size > config.rows:
        raise ConfigError(
            f"tokenizer: found {tokenizer.size} ids, expected at most {config.rows}, the rows of the embedding; "
            "leave out 'add', or raise 'rows' for an embedding that starts from random weights"
        )
    return config.rows or tokenizer.size


def make_text_tokenizers(recipe: Recipe) -> dict[str, Tokenizer]:
    """Per text stream with a tokenizer of its own, that tokenizer.

    Raises:
        ConfigError: if it has more ids than the stream's encoder has rows.
        CheckpointError: if its files are missing or damaged.
    """
    found = {}
    for name, stream in recipe.model.streams.items():
        reader = stream.reader
        if not isinstance(reader, TextReaderConfig) or reader.tokenizer is None:
            continue
        own = reader.tokenizer
        found[name] = Tokenizer.load(own.path, names=TokenNames(own.pad, None, own.bos, own.eos))
    check_text_tokenizers(recipe, found)
    return found


def check_text_tokenizers(recipe: Recipe, tokenizers: Mapping[str, Tokenizer]) -> None:
    """Prove that every text encoder has a row for every id of its tokenizer.

    Raises:
        ConfigError: if one has not.
    """
    for name, tokenizer in tokenizers.items():
        rows = getattr(recipe.model.streams[name].encoder, "vocab_size", None)
        if rows is not None and tokenizer.size > rows:
            raise ConfigError(
                f"streams.{name}: its tokenizer has {tokenizer.size} ids, its encoder {rows} rows (vocab_size); "
                "they belong to different checkpoints"
            )


def _hides_text(recipe: Recipe) -> bool:
    """Whether an objective replaces tokens of a tokenizer that is trained here by one that stands for hidden ones."""
    heads = recipe.model.heads.values()
    is_hidden = any(isinstance(head, MaskedTokenConfig) and head.predicts == "tokens" for head in heads)
    return is_hidden and recipe.model.tokenizer.path is None


def _frames_text(recipe: Recipe) -> bool:
    """Whether a text stream asks a tokenizer that is trained here for a start and an end."""
    readers = [stream.reader for stream in recipe.model.streams.values()]
    return any(
        isinstance(reader, TextReaderConfig) and reader.tokenizer is None and reader.add_special for reader in readers
    )


def reads_text(recipe: Recipe) -> bool:
    """Whether any part of the model takes ids of the model's own tokenizer."""
    model = recipe.model
    readers = [stream.reader for stream in model.streams.values() if stream.modality == "text"]
    return isinstance(model.backbone, CausalConfig) or any(
        not isinstance(reader, TextReaderConfig) or (reader.tokenizer is None and not reader.bytes)
        for reader in readers
    )


def training_texts(recipe: Recipe) -> Iterator[str]:
    """The texts of every source of every stage, each source once, at most ``20,000`` samples of each."""
    paths = dict.fromkeys(entry.path for stage in recipe.stages for entry in stage.data)
    for path in paths:
        source = open_source(Path(recipe.data_root) / path)
        step = max(1, len(source) // _SAMPLES)
        for index in range(0, len(source), step):
            # A malformed sample is the loader's to name and count.
            with contextlib.suppress(*BAD_SAMPLE):
                yield from sample_texts(source[index])


def sample_texts(sample: Sample) -> Iterable[str]:
    """Every text of a sample."""
    parts = [part for message in sample.messages for part in message.parts]
    return (part.text for part in (*parts, *sample.views.values()) if isinstance(part, Text))


def write_tokenizer(tokenizer: Tokenizer, folder: Path, chat: Chat | None = None) -> None:
    """Write a tokenizer and its names, whole or not at all; ``tokenizer.json`` comes last.

    Args:
        tokenizer: the tokenizer.
        folder: where to.
        chat: written beside it as a chat template, for other libraries.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = tokenizer.hub_files()
    if chat is not None and (template := template_of(chat, tokenizer)) is not None:
        files[_NAMES]["chat_template"] = template
        if isinstance(chat, ChatTemplate) and template != chat.template:
            # Processors of several modalities put the tokenizer's own start before what a template writes; a template
            # of text alone writes all of it.
            files[TOKENIZER]["post_processor"] = None
    for name in (_NAMES, TOKENIZER):
        partial = folder / f"{name}.part"
        partial.write_text(json.dumps(files[name], ensure_ascii=False) + "\n", encoding="utf-8")
        partial.replace(folder / name)


def export_tokenizers(
    recipe: Recipe, tokenizer: Tokenizer, text_tokenizers: Mapping[str, Tokenizer], folder: Path
) -> None:
    """Write a model's tokenizers as checkpoints of model hubs hold them.

    Args:
        recipe: of the model.
        tokenizer: the model's own; written where a part of the model reads it, with its chat template.
        text_tokenizers: those of text streams: the one that the instruction is read with goes into a folder of its own,
            and the only one of a model that reads no other into ``folder`` itself.
        folder: of the checkpoint.
    """
    if not reads_text(recipe):
        if len(text_tokenizers) == 1:
            write_tokenizer(next(iter(text_tokenizers.values())), folder)
        return
    chat = recipe_chat(recipe)
    write_tokenizer(tokenizer, folder, chat)
    if isinstance(chat, ChatTemplate):
        # Processors of several modalities look for it in a file of its own.
        (folder / "chat_template.jinja").write_text(template_of(chat, tokenizer) or "", encoding="utf-8")
    instruction = recipe.model.instruction_stream
    if instruction is not None and instruction in text_tokenizers:
        write_tokenizer(text_tokenizers[instruction], folder / "qformer_tokenizer")


def write_text_tokenizers(tokenizers: Mapping[str, Tokenizer], folder: Path) -> None:
    """Write the tokenizers of text streams into a run folder."""
    for name, tokenizer in tokenizers.items():
        write_tokenizer(tokenizer, folder / _STREAMS / name)


def remove_tokenizers(folder: Path) -> None:
    """Take all tokenizers out of a run folder, so that they are made anew."""
    for name in (TOKENIZER, _NAMES):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / _STREAMS, ignore_errors=True)


def read_text_tokenizers(folder: Path) -> dict[str, Tokenizer]:
    """The tokenizers of text streams that a run folder holds."""
    found = sorted((folder / _STREAMS).glob(f"*/{TOKENIZER}"))
    return {path.parent.name: Tokenizer.load(path.parent) for path in found}
