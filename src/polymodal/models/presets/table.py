"""Every published architecture that is read natively."""

from __future__ import annotations

from polymodal.core.config import unknown
from polymodal.core.errors import ConfigError
from polymodal.models.presets.architecture import Architecture, Size
from polymodal.models.presets.vit import VIT
from polymodal.models.weights import HubConfigs

ARCHITECTURES: dict[str, Architecture] = {architecture.name: architecture for architecture in (VIT,)}
"""Architectures by name."""


def find_architecture(configs: HubConfigs) -> Architecture:
    """The architecture that reads a checkpoint's configs.

    Raises:
        ConfigError: if there is none, naming the ``model_type`` and what can be done.
    """
    for architecture in ARCHITECTURES.values():
        if configs.model_type in architecture.model_types:
            return architecture
    known = sorted({kind for architecture in ARCHITECTURES.values() for kind in architecture.model_types})
    raise ConfigError(
        f"{configs.folder}: {unknown('model_type', configs.model_type, known)}. "
        "Use it as a part instead: {use: transformers, from: FOLDER} as an encoder or a backbone"
    )


def find_size(name: str) -> tuple[Architecture, Size]:
    """The architecture and the published size called ``name``.

    Raises:
        ConfigError: if there is none.
    """
    for architecture in ARCHITECTURES.values():
        if name in architecture.sizes:
            return architecture, architecture.sizes[name]
    raise ConfigError(unknown("published model", name, published_names()))


def published_names() -> list[str]:
    """Names of all published sizes."""
    return [name for architecture in ARCHITECTURES.values() for name in architecture.sizes]
