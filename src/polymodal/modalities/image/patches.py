"""Pictures as the patches that they are cut into, whatever their proportions.

Shapes: ``L`` patches, ``P`` side of a patch.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator, model_validator

from polymodal.core.batch import ModelInput
from polymodal.core.parts import Image, Part
from polymodal.modalities.decoding import expect_part
from polymodal.modalities.image.decode import decode_image
from polymodal.modalities.image.header import probe_image
from polymodal.modalities.image.reader import Triple, checked_std
from polymodal.modalities.image.resize import Resample, fit_to_canvas
from polymodal.modalities.reader import Reader, ReaderConfig


class PatchesReaderConfig(ReaderConfig):
    """A picture is scaled to a whole number of patches and cut; its proportions stay, as far as patches allow.

    Source: ViLT, arXiv 2102.03334, section 4.1 (shorter edge 384, longer at most 640).
    """

    modality: ClassVar[str] = "image"
    use: Literal["patches"] = "patches"
    patch_size: int = Field(default=16, ge=1, le=256)
    """Side of a patch in pixels."""
    size_px: int | None = Field(default=None, ge=1, le=4096)
    """Side of the square that every picture is stretched to; None keeps proportions by the two edges."""
    shortest_px: int = Field(default=384, ge=1, le=4096)
    """Shorter edge."""
    longest_px: int = Field(default=640, ge=1, le=8192)
    """Longer edge at most; the shorter one then is smaller."""
    resample: Resample = "bicubic"
    rescale: float = Field(1 / 255, gt=0)
    """Factor of a pixel, before mean and deviation."""
    mean: Triple = (0.5, 0.5, 0.5)
    """Taken from each channel."""
    std: Triple = (0.5, 0.5, 0.5)
    """Each channel is divided by it."""

    _check_std = field_validator("std")(checked_std)

    @model_validator(mode="after")
    def _edges(self) -> Self:
        edges = (self.shortest_px, self.longest_px) if self.size_px is None else (self.size_px, self.size_px)
        if edges[0] > edges[1] or edges[0] < self.patch_size:
            raise ValueError(f"expected patch_size <= shorter edge <= longer edge; found {self.patch_size}, {edges}")
        if self.size_px is not None and self.size_px % self.patch_size:
            raise ValueError(f"size_px {self.size_px} is not a multiple of patch_size {self.patch_size}")
        return self

    def grid(self, width_px: int, height_px: int) -> tuple[int, int]:
        """Rows and columns of patches of a picture of this size."""
        side = self.patch_size
        if self.size_px is not None:
            return self.size_px // side, self.size_px // side
        scale = self.shortest_px / min(width_px, height_px)
        scale = min(scale, self.longest_px / max(width_px, height_px))
        # Rounded to whole pixels first, then down to whole patches, as the published preprocessing does.
        rows, columns = (int(scale * edge + 0.5) // side for edge in (height_px, width_px))
        return max(rows, 1), max(columns, 1)


class PatchesReader(Reader):
    """Picture -> float32 ``[L, 3 P P + 2]``: the patches in reading order, channel by channel, and where each stands.

    The last two numbers are its row and its column, 0 for the first and 1 for the last of the picture.
    """

    modality = "image"
    is_ragged = True
    config: PatchesReaderConfig

    @property
    def unit_shape(self) -> tuple[int, ...]:
        """``(3 P P + 2,)``."""
        return (3 * self.config.patch_size**2 + 2,)

    def measure(self, part: Part) -> tuple[int, ...]:
        """The number of patches, from the header."""
        header = probe_image(expect_part(part, Image), self.limits)
        rows, columns = self.config.grid(header.width_px, header.height_px)
        return (rows * columns,)

    def read(self, part: Part) -> ModelInput:
        """Decode, scale, normalise and cut."""
        config = self.config
        pixels = decode_image(expect_part(part, Image), self.limits)
        height, width = pixels.shape[:2]
        rows, columns = config.grid(width, height)
        side = config.patch_size
        canvas = fit_to_canvas(
            pixels,
            (rows * side, columns * side),
            "stretch",
            config.mean,
            config.std,
            resample=config.resample,
            rescale=config.rescale,
        )
        return ModelInput([cut_patches(canvas, side)], (rows * columns,), size_px=(width, height))


def cut_patches(canvas_3HW: NDArray[np.float32], side: int) -> NDArray[np.float32]:
    """Patches with their places, ``[L, 3 P P + 2]``.

    Worked example: of 2 x 3 patches, the last one of the first row stands at (0, 1), that of the second at (1, 1).
    """
    rows, columns = canvas_3HW.shape[1] // side, canvas_3HW.shape[2] // side
    cut = canvas_3HW.reshape(3, rows, side, columns, side).transpose(1, 3, 0, 2, 4).reshape(rows * columns, -1)
    down = np.repeat(np.arange(rows) / max(rows - 1, 1), columns)
    right = np.tile(np.arange(columns) / max(columns - 1, 1), rows)
    return np.concatenate([cut, down[:, None], right[:, None]], axis=1).astype(np.float32)
