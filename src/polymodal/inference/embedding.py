"""Vectors of single parts in a model's shared space.

Legend: ``N`` parts, ``M`` vectors of a part, ``E`` embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from polymodal.core.config import unknown
from polymodal.core.errors import ConfigError, SampleError
from polymodal.core.parts import Part
from polymodal.core.samples import Sample
from polymodal.inference.engine import Engine
from polymodal.models.heads.table import ProjectionHead


def embed_parts(
    engine: Engine, parts: Sequence[Part], batch_size: int = 64, stream: str | None = None
) -> NDArray[np.float32]:
    """Unit vectors of parts, float32 ``[N, E]``, or ``[N, M, E]`` of a stream whose items have several.

    Args:
        engine: of a model with a projection head.
        parts: texts and media.
        batch_size: parts at a time; the vectors of one do not depend on the others.
        stream: the stream that reads all of them; None takes the first of each part's modality without a view of its
            own.

    Raises:
        ConfigError: if the model has no projection head, or no such stream, or some parts have one vector and some
            several.
        SampleError: if no stream of the shared space takes a part's modality.
    """
    head = engine.model.head("projection")
    assert isinstance(head, ProjectionHead)
    streams = engine.model.config.streams
    if stream is not None and stream not in head.projs:
        raise ConfigError(unknown("stream of the projection head", stream, list(head.projs)))
    offered = [name for name in head.projs if stream == name or (stream is None and streams[name].view is None)]
    spaces = {streams[name].modality: name for name in reversed(offered)}
    by_modality: dict[str, list[int]] = {}
    for index, part in enumerate(parts):
        if part.modality not in spaces:
            raise SampleError(f"part {index}", f"is {part.modality}, the shared space holds {sorted(spaces)}")
        by_modality.setdefault(part.modality, []).append(index)
    vectors: dict[int, NDArray[np.float32]] = {}
    counts: dict[str, int] = {}
    for modality, indices in by_modality.items():
        view = streams[spaces[modality]].view or modality
        for start in range(0, len(indices), batch_size):
            rows = indices[start : start + batch_size]
            found, _ = engine.embed([Sample(f"part {i}", views={view: parts[i]}) for i in rows])[spaces[modality]]
            counts[modality] = 1 if found.ndim == 2 else found.shape[1]
            vectors.update(zip(rows, found, strict=True))
    if len({found.shape for found in vectors.values()}) > 1:
        raise ConfigError(
            f"embed: found {' and '.join(f'{count} vectors for each {name}' for name, count in counts.items())}, "
            "expected parts with as many vectors; embed each modality in a call of its own"
        )
    if not vectors:
        return np.zeros((0, head.config.dim), dtype=np.float32)
    return np.stack([vectors[index] for index in range(len(parts))])
