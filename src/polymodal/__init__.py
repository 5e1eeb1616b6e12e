"""Polymodal: compose, train, measure and ask multimodal models.

``import polymodal as pm`` imports nothing else and has no effects; a public name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polymodal.core.parts import Audio, Image, Points, Sensor, Text, Video
    from polymodal.core.samples import Message, Sample
    from polymodal.inference.sampling import Sampling
    from polymodal.recipes.api import build, check, evaluate, load, train
    from polymodal.recipes.loading import load_recipe
    from polymodal.recipes.model import Answer, Model

__version__ = "0.1.0"

_HOMES = {
    "polymodal.core.parts": ("Text", "Image", "Audio", "Video", "Points", "Sensor"),
    "polymodal.core.samples": ("Message", "Sample"),
    "polymodal.inference.sampling": ("Sampling",),
    "polymodal.recipes.api": ("build", "check", "evaluate", "load", "train"),
    "polymodal.recipes.loading": ("load_recipe",),
    "polymodal.recipes.model": ("Answer", "Model"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Answer",
    "Audio",
    "Image",
    "Message",
    "Model",
    "Points",
    "Sample",
    "Sampling",
    "Sensor",
    "Text",
    "Video",
    "build",
    "check",
    "evaluate",
    "load",
    "load_recipe",
    "train",
]


def __getattr__(name: str) -> Any:
    """Load a public name from its home on first use (PEP 562)."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'polymodal' has no attribute {name!r}; it has: {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
