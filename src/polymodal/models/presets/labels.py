"""Class names as published configs hold them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def class_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The classes of a ``config.json``: ``id2label`` in the order of its ids, or ``LABEL_0`` ... by ``num_labels``."""
    by_id = config.get("id2label")
    if not by_id:
        return tuple(f"LABEL_{index}" for index in range(config.get("num_labels", 2)))
    names = [str(by_id[key]) for key in sorted(by_id, key=int)]
    # ImageNet has two classes called "crane"; a label must name one.
    return tuple(f"{name} ({index})" if name in names[:index] else name for index, name in enumerate(names))


def label_config(classes: Sequence[str]) -> dict[str, Any]:
    """The keys of a ``config.json`` that hold class names."""
    return {
        "id2label": {str(index): name for index, name in enumerate(classes)},
        "label2id": {name: index for index, name in enumerate(classes)},
    }
