"""Tiles of any resolution in published checkpoints (``image_grid_pinpoints``), to an image reader and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polymodal.core.errors import ConfigError
from polymodal.modalities.image import ImageReaderConfig
from polymodal.models.presets.image_reader import image_preprocessor, image_reader

_OWN = ("image_grid_pinpoints", "do_pad")


def anyres_reader(
    preprocessor: Mapping[str, Any], config: Mapping[str, Any], pinpoints: list[list[int]], size_px: int, kind: str
) -> dict[str, Any]:
    """The reader of a checkpoint that cuts pictures along the best of several grids.

    Args:
        preprocessor: ``preprocessor_config.json``; {} where there is none.
        config: ``config.json``.
        pinpoints: sizes (height, width) of the grids where neither says them.
        size_px: side of the encoder's image.
        kind: the processor that treats one tile alike, a key of ``image_reader.DEFAULTS``.

    Raises:
        ConfigError: if the two files disagree, or a size is no grid of tiles.
    """
    chosen = config.get("image_grid_pinpoints") or pinpoints
    cut = preprocessor.get("image_grid_pinpoints") or chosen
    if cut != chosen:
        raise ConfigError(
            f"image_grid_pinpoints: found {cut} in preprocessor_config.json and {chosen} in config.json, expected the "
            "same; the tokens would not stand where the tiles were cut"
        )
    tile = {key: value for key, value in preprocessor.items() if key not in _OWN}
    reader = image_reader({**tile, "image_processor_type": kind} if tile else {}, size_px, kind)
    if reader["size_px"] != size_px or reader.get("shortest_edge_px") is not None:
        raise ConfigError(
            f"preprocessor_config.json: found tiles of {reader['size_px']} pixels (shortest edge "
            f"{reader.get('shortest_edge_px')}), expected those of the vision tower, {size_px}, without a crop"
        )
    wrong = [sides for sides in chosen if len(sides) != 2 or sides[0] % size_px or sides[1] % size_px]
    if wrong:
        raise ConfigError(f"image_grid_pinpoints: found {wrong[0]}, expected multiples of the tile's {size_px} pixels")
    grids = tuple((height // size_px, width // size_px) for height, width in chosen)
    return {**reader, "resolution": "anyres", "resize": "pad", "fill": "black", "grids": grids}


def anyres_preprocessor(reader: Any, kind: str, processor: str) -> dict[str, Any]:
    """``preprocessor_config.json`` of such a reader.

    Args:
        reader: of tiles.
        kind: the processor that treats one tile alike.
        processor: the one that will read the file.

    Raises:
        ConfigError: if the reader does something else.
    """
    is_tiled = isinstance(reader, ImageReaderConfig) and reader.resolution == "anyres" and reader.thumbnail
    if not is_tiled or (reader.resize, reader.fill) != ("pad", "black"):
        raise ConfigError(
            f"{processor}: found another reader, expected resolution: anyres with a thumbnail, resize: pad, fill: black"
        )
    resize = "crop" if kind == "CLIPImageProcessor" else "stretch"
    tile = reader.model_copy(update={"resolution": "fixed", "resize": resize, "fill": "mean"})
    return {
        **image_preprocessor(tile, kind),
        "image_processor_type": processor,
        "do_pad": True,
        "image_grid_pinpoints": pinpoints_of(reader),
    }


def pinpoints_of(reader: Any) -> list[list[int]]:
    """Sizes (height, width) of the grids in pixels."""
    return [[rows * reader.size_px, cols * reader.size_px] for rows, cols in reader.grids]
