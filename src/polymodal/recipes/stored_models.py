"""Models from where they are stored: run folders, checkpoint folders and hub ids."""

from __future__ import annotations

import os
from pathlib import Path

from polymodal.core.config import unknown
from polymodal.core.errors import CheckpointError, ConfigError
from polymodal.inference.quantised import WEIGHTS as WEIGHTS_IN_FEWER_BITS
from polymodal.inference.quantised import quantise
from polymodal.modalities.text import Tokenizer
from polymodal.models.weights.folder import is_checkpoint
from polymodal.recipes.assemble import Assembly, assemble, load_published
from polymodal.recipes.loading import load_recipe
from polymodal.recipes.model import Model
from polymodal.recipes.run_folder import RECIPE, WEIGHTS, missing_files
from polymodal.recipes.tokenizers import TOKENIZER, read_text_tokenizers
from polymodal.training.freezing import keep_adapters
from polymodal.training.weights import read_weights

LOADED = ("auto", "fp32", *WEIGHTS_IN_FEWER_BITS)
"""How weights may be held; see :func:`load`."""


def load(path: str | os.PathLike[str], device: str | None = None, weights: str = "auto") -> Model:
    """The model of a run folder or of a published checkpoint.

    Args:
        path: the folder that ``polymodal train`` or ``quickstart`` wrote, a checkpoint folder as model hubs lay it out,
            or a hub id.
        device: ``cpu`` or ``cuda``; None takes the recipe's choice.
        weights: how to hold them. ``auto``: in the number format that most of them are stored in, mapped from a
            checkpoint's file and not copied. ``fp32``: in float32. ``bf16``, ``int8`` or ``int4``: in fewer bits; see
            :mod:`polymodal.inference.quantised`.

    Raises:
        MissingExtraError: if int8 or int4 is asked for and torchao is not installed.
        CheckpointError: if the folder is neither, or its weights do not match its recipe or config.
        ConfigError: if a published architecture has no native form.
    """
    if weights not in LOADED:
        raise ConfigError(f"weights: {unknown('form', weights, LOADED)}")
    model = Model(load_assembly(path, as_stored=weights != "fp32"), device)
    if weights in WEIGHTS_IN_FEWER_BITS:
        quantise(model.network, weights)
    return model


def load_assembly(path: str | os.PathLike[str], *, as_stored: bool = False) -> Assembly:
    """The parts of :func:`load`'s model.

    Args:
        path: see :func:`load`.
        as_stored: whether a published checkpoint keeps its number format; else it becomes float32.

    Raises:
        CheckpointError, ConfigError: as :func:`load`.
    """
    folder = Path(path)
    if not (folder / RECIPE).is_file() and (is_checkpoint(folder) or not folder.exists()):
        return load_published(path, as_stored=as_stored)
    if missing := missing_files(folder):
        raise CheckpointError(
            f"{folder}: is not a run folder: {', '.join(missing)} missing; expected what 'polymodal train' leaves there"
        )
    recipe = load_recipe(folder / RECIPE)
    parts = assemble(recipe, Tokenizer.load(folder / TOKENIZER), read_text_tokenizers(folder), with_sources=False)
    keep_adapters(parts.network, ((stage.name, stage.train) for stage in recipe.stages))
    read_weights(parts.network, folder / WEIGHTS)
    return parts
