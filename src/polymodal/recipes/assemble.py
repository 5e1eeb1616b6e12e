"""The one place that wires parts together: recipe -> tokenizer, processor, network."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import torch

from polymodal.core.errors import ConfigError
from polymodal.modalities.processor import Processor, StreamLayout
from polymodal.modalities.table import build_reader
from polymodal.modalities.text import Tokenizer
from polymodal.models.backbones.decoder import CausalConfig
from polymodal.models.compose import MultimodalModel
from polymodal.models.compose.model import Within
from polymodal.models.weights.assign import main_dtype, no_weights
from polymodal.models.weights.formats import convert
from polymodal.recipes.extending import base_tokenizers, fill_base
from polymodal.recipes.published import Published, fill_sources
from polymodal.recipes.schema import PartSource, Recipe
from polymodal.recipes.tokenizers import make_text_tokenizers, make_tokenizer, recipe_chat, vocabulary_rows


@dataclass(slots=True)
class Assembly:
    """A recipe's parts, wired."""

    recipe: Recipe
    tokenizer: Tokenizer
    processor: Processor
    network: MultimodalModel
    text_tokenizers: Mapping[str, Tokenizer] = field(default_factory=dict)
    """Of text streams with a tokenizer of their own."""


def assemble(
    recipe: Recipe,
    tokenizer: Tokenizer | None = None,
    text_tokenizers: Mapping[str, Tokenizer] | None = None,
    *,
    with_sources: bool = True,
) -> Assembly:
    """Build everything that a recipe describes, with random weights drawn from its seed, or from ``recipe.sources``.

    Args:
        recipe: the recipe.
        tokenizer: the tokenizer of an existing run; None makes the recipe's own.
        text_tokenizers: those of its text streams; None or an empty mapping makes the recipe's own.
        with_sources: whether parts with a source get its weights; not needed where all weights are read next.
    """
    if tokenizer is None and (base := base_tokenizers(recipe)) is not None:
        tokenizer, text_tokenizers = base
    tokenizer = tokenizer or make_tokenizer(recipe)
    text_tokenizers = text_tokenizers or make_text_tokenizers(recipe)
    torch.manual_seed(recipe.seed)
    network = _network(recipe, tokenizer, text_tokenizers, _replaced(recipe) if with_sources else None)
    if with_sources and recipe.sources:
        fill_sources(network, recipe.sources)
    if with_sources and recipe.extend is not None:
        fill_base(network, recipe)
    # Checkpoints are stored in any precision; weights that train are float32.
    network.float()
    return Assembly(recipe, tokenizer, make_processor(recipe, tokenizer, text_tokenizers), network, text_tokenizers)


def _replaced(recipe: Recipe) -> dict[str, Within]:
    """Paths of the parts all of whose weights come from their sources, so that none need be drawn.

    The reference library's modules are replaced as a whole; ours keep their buffers.
    """
    # A language model that learns to look at streams has new blocks among its own.
    is_partly_new = recipe.model.look is not None and recipe.model.backbone.use != "transformers"
    model = recipe.model
    uses = {f"streams.{name}.encoder": stream.encoder.use for name, stream in model.streams.items()}
    uses["backbone"] = model.backbone.use
    return {
        path: partial(torch.device, "meta") if uses.get(path) == "transformers" else no_weights
        for path in recipe.sources
        if path != "backbone" or not is_partly_new
    }


def _network(
    recipe: Recipe,
    tokenizer: Tokenizer,
    text_tokenizers: Mapping[str, Tokenizer],
    later: Mapping[str, Within] | None = None,
) -> MultimodalModel:
    controls = {
        name: text_tokenizers.get(name, tokenizer).controls
        for name, stream in recipe.model.streams.items()
        if stream.modality == "text"
    }
    return MultimodalModel(recipe.model, vocabulary_rows(recipe.model.tokenizer, tokenizer), controls, later)


def load_published(source: str | os.PathLike[str], *, as_stored: bool = False) -> Assembly:
    """The model of a published checkpoint, its weights mapped from the file and copied only where they are converted.

    Args:
        source: a checkpoint folder or a hub id.
        as_stored: whether the network computes in the number format that most of the weights are stored in; else all of
            it becomes float32, in which models train.

    Raises:
        CheckpointError: if files are missing or damaged, or tensors are missing or unknown.
        ConfigError: if the architecture has no native form.
    """
    published = Published(source)
    whole = PartSource(folder=str(published.folder.path), part="", architecture=published.architecture.name)
    recipe = Recipe(name=published.folder.path.name, model=published.model, sources={"": whole})
    tokenizer, text_tokenizers = make_tokenizer(recipe), make_text_tokenizers(recipe)
    with no_weights():
        network = _network(recipe, tokenizer, text_tokenizers)
    published.fill(network)
    # One format for all, but what the architecture must not round.
    dtype = main_dtype(network) if as_stored else torch.float32
    convert(network, dtype, published.exact_names(network) if dtype == torch.float16 else ())
    processor = make_processor(recipe, tokenizer, text_tokenizers)
    return Assembly(recipe, tokenizer, processor, network, text_tokenizers)


def make_processor(
    recipe: Recipe, tokenizer: Tokenizer, text_tokenizers: Mapping[str, Tokenizer] | None = None
) -> Processor:
    """The processor of a recipe: its readers, and the token counts that its config derives."""
    own = text_tokenizers or {}
    model = recipe.model
    streams = {}
    for name, stream in model.streams.items():
        assert stream.reader is not None
        streams[name] = StreamLayout(
            reader=build_reader(stream.reader, recipe.limits, own.get(name, tokenizer)),
            enters_sequence=model.has_placeholders(name),
            count_tokens=partial(model.count_placeholders, name),
            around=getattr(stream.enters, "around", None),
            view=stream.view,
            tokens=stream.tokens,
            is_instruction=name == model.instruction_stream,
        )
    backbone = model.backbone
    max_tokens = backbone.max_tokens if isinstance(backbone, CausalConfig) else 1
    if not streams and recipe_chat(recipe) is None:
        raise ConfigError("the model has neither streams nor a decoder")
    return Processor(
        tokenizer,
        recipe_chat(recipe),
        streams,
        max_tokens=max_tokens,
        overflow=recipe.overflow,
        tokens=recipe.tokens,
        has_source=isinstance(backbone, CausalConfig) and backbone.has_source,
    )
