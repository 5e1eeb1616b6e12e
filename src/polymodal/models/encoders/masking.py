"""What an encoder offers to masked modelling: places that can be hidden, and what stood there.

Legend: ``U`` units, ``N`` features of a unit (what stands before the patches included), ``P`` values of a patch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from polymodal.models.encoders.base import Encoder, Features


class PatchMasking(Encoder, ABC):
    """An encoder of patches whose contents can be replaced by a learned token."""

    @abstractmethod
    def grids(self, values: Tensor, lengths_U: Tensor) -> list[tuple[int, int]]:
        """Rows and columns of the patches of each unit."""

    @abstractmethod
    def patches(self, values: Tensor) -> Tensor:
        """The contents of the patches, ``[U, L, P]``; padding holds anything."""

    @property
    @abstractmethod
    def first_patch(self) -> int:
        """How many features stand before those of the patches."""

    @abstractmethod
    def encode_masked(self, values: Tensor, lengths_U: Tensor, is_masked_UL: Tensor) -> Features:
        """As ``forward``, with the contents of the masked patches hidden: their places stay.

        Raises:
            ConfigError: if the encoder has no learned token to stand for them.
        """
