"""The one place that wires parts together: recipe -> tokenizer, processor, network."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from polymodal.core.errors import ConfigError, DataError
from polymodal.core.parts import Text
from polymodal.core.samples import Sample
from polymodal.data.planner import BAD_SAMPLE
from polymodal.data.sources import open_source
from polymodal.modalities.processor import Processor, StreamLayout
from polymodal.modalities.table import build_reader
from polymodal.modalities.text import ChatFormat, Tokenizer, chat_format, train_bpe
from polymodal.models.backbones.decoder import DecoderConfig
from polymodal.models.compose import MultimodalModel
from polymodal.models.entries.table import SequenceEntry
from polymodal.models.weights.assign import no_weights
from polymodal.recipes.published import Published, fill_sources
from polymodal.recipes.schema import Recipe

_TOKENIZER_SAMPLES = 20_000
"""Samples per source that a tokenizer is trained on; more changes little and takes time."""


@dataclass(slots=True)
class Assembly:
    """A recipe's parts, wired."""

    recipe: Recipe
    tokenizer: Tokenizer
    processor: Processor
    network: MultimodalModel


def assemble(recipe: Recipe, tokenizer: Tokenizer | None = None, *, with_sources: bool = True) -> Assembly:
    """Build everything that a recipe describes, with random weights drawn from its seed, or from ``recipe.sources``.

    Args:
        recipe: the recipe.
        tokenizer: the tokenizer of an existing run; None makes the recipe's own.
        with_sources: whether parts with a source get its weights; not needed where all weights are read next.
    """
    tokenizer = tokenizer or make_tokenizer(recipe)
    torch.manual_seed(recipe.seed)
    network = MultimodalModel(recipe.model, tokenizer.size)
    if with_sources and recipe.sources:
        fill_sources(network, recipe.sources)
    return Assembly(recipe, tokenizer, make_processor(recipe, tokenizer), network)


def load_published(source: str | os.PathLike[str]) -> Assembly:
    """The model of a published checkpoint, its weights mapped from the file and not copied where they are float32.

    Args:
        source: a checkpoint folder or a hub id.

    Raises:
        CheckpointError: if files are missing or damaged, or tensors are missing or unknown.
        ConfigError: if the architecture has no native form.
    """
    published = Published(source)
    recipe = Recipe(name=published.folder.path.name, model=published.model)
    tokenizer = make_tokenizer(recipe)
    with no_weights():
        network = MultimodalModel(recipe.model, tokenizer.size)
    published.fill(network)
    return Assembly(recipe, tokenizer, make_processor(recipe, tokenizer), network.float())


def recipe_chat(recipe: Recipe) -> ChatFormat | None:
    """The chat format of the recipe's decoder; None without one."""
    backbone = recipe.model.backbone
    return chat_format(backbone.chat) if isinstance(backbone, DecoderConfig) else None


def make_tokenizer(recipe: Recipe) -> Tokenizer:
    """The recipe's tokenizer: read from its file, or trained on the text of its data.

    Raises:
        DataError: if it must be trained and there is no text.
    """
    config = recipe.model.tokenizer
    chat = recipe_chat(recipe)
    controls = chat.controls if chat else ()
    if config.path is not None:
        return Tokenizer.load(config.path, controls)
    if not reads_text(recipe):
        # Bytes alone: nothing will be encoded, and a run folder holds a tokenizer whatever its model reads.
        return train_bpe([], config.vocab_size, controls)
    texts = list(training_texts(recipe))
    if not texts:
        raise DataError("the tokenizer is to be trained on the recipe's data, and the data holds no text")
    return train_bpe(texts, config.vocab_size, controls)


def reads_text(recipe: Recipe) -> bool:
    """Whether any part of the model takes token ids."""
    model = recipe.model
    return isinstance(model.backbone, DecoderConfig) or any(s.modality == "text" for s in model.streams.values())


def training_texts(recipe: Recipe) -> Iterator[str]:
    """The texts of every source of every stage, each source once, at most ``20,000`` samples of each."""
    paths = dict.fromkeys(entry.path for stage in recipe.stages for entry in stage.data)
    for path in paths:
        source = open_source(Path(recipe.data_root) / path)
        step = max(1, len(source) // _TOKENIZER_SAMPLES)
        for index in range(0, len(source), step):
            # A malformed sample is the loader's to name and count.
            with contextlib.suppress(*BAD_SAMPLE):
                yield from sample_texts(source[index])


def sample_texts(sample: Sample) -> Iterable[str]:
    """Every text of a sample."""
    parts = [part for message in sample.messages for part in message.parts]
    return (part.text for part in (*parts, *sample.views.values()) if isinstance(part, Text))


def make_processor(recipe: Recipe, tokenizer: Tokenizer) -> Processor:
    """The processor of a recipe: its readers, and the token counts that its config derives."""
    model = recipe.model
    streams = {}
    for name, stream in model.streams.items():
        assert stream.reader is not None
        streams[name] = StreamLayout(
            reader=build_reader(stream.reader, recipe.limits, tokenizer),
            enters_sequence=isinstance(stream.enters, SequenceEntry),
            count_tokens=partial(model.count_tokens, name),
        )
    backbone = model.backbone
    max_tokens = backbone.max_tokens if isinstance(backbone, DecoderConfig) else 1
    if not streams and recipe_chat(recipe) is None:
        raise ConfigError("the model has neither streams nor a decoder")
    return Processor(tokenizer, recipe_chat(recipe), streams, max_tokens=max_tokens, overflow=recipe.overflow)
