"""Published architectures as configs on our blocks."""

from polymodal.models.presets.architecture import Architecture, Size, Vocabulary
from polymodal.models.presets.table import ARCHITECTURES, find_architecture, find_size, published_names

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "Size",
    "Vocabulary",
    "find_architecture",
    "find_size",
    "published_names",
]
