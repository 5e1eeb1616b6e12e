"""The contract of every reader: bytes or arrays of one modality -> model input, and its size from the header alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from polymodal.core.batch import ModelInput
from polymodal.core.config import Config
from polymodal.core.errors import CorruptMediaError
from polymodal.core.limits import Limits
from polymodal.core.parts import Part


class ReaderConfig(Config):
    """Base of the reader configs, one per modality; the fields are the preprocessing constants of a checkpoint."""

    modality: ClassVar[str] = ""


class Reader(ABC):
    """Turns parts of one modality into model input.

    ``measure`` reads no more than the header, and ``read`` returns units of exactly the lengths that ``measure``
    promised; :func:`checked_read` holds every reader to that.
    """

    modality: ClassVar[str]
    is_ragged: ClassVar[bool]
    """Whether units have a length axis (axis 0) that may differ; False for images."""

    def __init__(self, config: Any, limits: Limits) -> None:
        self.config = config
        self.limits = limits

    @abstractmethod
    def measure(self, part: Part) -> tuple[int, ...]:
        """The length of each unit that ``read`` will give.

        Raises:
            MediaError: if the header is unreadable or above the limits.
        """

    @abstractmethod
    def read(self, part: Part) -> ModelInput:
        """Decode and prepare the part.

        Raises:
            MediaError: if the content is damaged or above the limits.
        """

    def read_into(self, part: Part, rows_U: NDArray[np.float32]) -> ModelInput:
        """As ``read``, with the units written into rows of a batch where that is possible; a copy less.

        Args:
            part: what is read.
            rows_U: one row per promised unit; its content is undefined if the units turn out not to stand there.
        """
        return self.read(part)

    def among(self, count: int) -> Reader:
        """What reads an item of a conversation that has ``count`` items for this reader; itself, as a rule."""
        return self

    @property
    @abstractmethod
    def unit_shape(self) -> tuple[int, ...]:
        """Shape of one unit without its ragged axis: ``(3, H, W)``, ``(mels,)``, ``(channels,)``, ..."""


def checked_read(
    reader: Reader, part: Part, lengths: tuple[int, ...], rows_U: NDArray[np.float32] | None = None
) -> ModelInput:
    """Read a part (into ``rows_U``, see :meth:`Reader.read_into`) and prove that its units have the promised lengths.

    Raises:
        MediaError: as ``reader.read`` does, or if the content does not have the size that the header stated.
    """
    result = reader.read(part) if rows_U is None else reader.read_into(part, rows_U)
    if result.lengths != lengths:
        name = getattr(part, "name", part.modality)
        raise CorruptMediaError(
            name,
            f"the header promises units of lengths {lengths}, the content gives {result.lengths}; "
            "the file is truncated or its header is wrong",
        )
    return result
