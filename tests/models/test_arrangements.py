"""Arrangements of tiles: the number of tokens is derived, rows end with the learned token, padding is left out."""

from __future__ import annotations

import itertools
import pickle

import numpy as np
import pytest
import torch

from polymodal.core.batch import TileLengths
from polymodal.core.errors import ConfigError
from polymodal.core.limits import Limits
from polymodal.core.parts import Image
from polymodal.modalities.image import ImageReader, ImageReaderConfig
from polymodal.models.compose import ModelConfig
from polymodal.models.connectors.arrangements import PooledFramesConfig, TileRowsConfig
from polymodal.models.encoders.vit import VitConfig
from polymodal.models.encoders.vit_frames import VitFramesConfig

_SIDE = 3


def units(lengths: tuple[int, ...], width: int = 2) -> list[torch.Tensor]:
    tokens = torch.arange(len(lengths) * _SIDE**2 * width, dtype=torch.float32)
    return list(tokens.view(len(lengths), _SIDE**2, width))


@pytest.mark.parametrize("max_tiles", [None, 1, 2, 4])
def test_the_derived_number_is_what_the_module_gives(max_tiles: int | None) -> None:
    config = TileRowsConfig(max_tiles=max_tiles)
    module = config.build(2)
    for rows, cols, width_px, height_px in itertools.product((1, 2, 3), (1, 2, 4), (1, 30, 77), (2, 31, 90)):
        lengths = TileLengths((1,) * (rows * cols + 1), (rows, cols), (width_px, height_px))
        found = module(units(lengths), lengths)
        assert len(found) == config.num_tokens([_SIDE**2] * len(lengths), lengths)
        assert torch.equal(found[: _SIDE**2], units(lengths)[0])
        # Of a picture that is next to nothing on this grid, nothing but the whole picture may be left.
        assert len(found) == _SIDE**2 or torch.equal(found[-1], module.newline)


def test_rows_stand_across_tiles_and_end_with_the_learned_token() -> None:
    config = TileRowsConfig()
    module = config.build(2)
    # 2 tiles side by side, a picture of 6 x 1: one of three rows shows it, the outer two are padding.
    lengths = TileLengths((1, 1, 1), (1, 2), (60, 10))
    given = units(lengths)
    expected = torch.cat((given[0], given[1][3:6], given[2][3:6], module.newline[None]))
    assert torch.equal(module(given, lengths), expected)


def test_a_picture_of_one_unit_is_followed_by_the_token() -> None:
    module = TileRowsConfig().build(2)
    found = module(units((1,)), (1,))
    assert torch.equal(found, torch.cat((units((1,))[0], module.newline[None])))
    assert TileRowsConfig().num_tokens([9], (1,)) == 10


def test_the_learned_token_learns() -> None:
    module = TileRowsConfig().build(2)
    lengths = TileLengths((1, 1, 1), (1, 2), (20, 10))
    module(units(lengths), lengths).sum().backward()
    # 3 rows end with it.
    assert module.newline.grad is not None and module.newline.grad.tolist() == [3.0, 3.0]


def test_units_that_are_no_tiles_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"tile_rows: found units of \[9, 9\] tokens .* resolution: anyres or tiles"):
        TileRowsConfig().num_tokens([9, 9], (1, 1))


def test_lengths_of_tiles_survive_pickling() -> None:
    lengths = TileLengths((1, 1, 1), (1, 2), (60, 10))
    again = pickle.loads(pickle.dumps(lengths))
    assert (again, again.grid, again.size_px) == ((1, 1, 1), (1, 2), (60, 10))


def test_only_sequences_of_its_modality_are_arranged() -> None:
    image = {"modality": "image", "encoder": {"use": "vit"}, "arrange": {"use": "tile_rows"}}
    with pytest.raises(ConfigError, match=r"arrange 'tile_rows' lays out the tokens of image .* enters by 'none'"):
        ModelConfig.parse({"streams": {"image": image}, "backbone": "none"})


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_frames_are_pooled_and_the_video_ends_with_the_learned_token(factor: int) -> None:
    config = PooledFramesConfig(factor=factor)
    module = config.build(2)
    frames = (4, 1)
    given = [torch.randn(count * 25, 2) for count in frames]
    found = module(given, frames)
    side = -(-5 // factor)
    assert len(found) == config.num_tokens([count * 25 for count in frames], frames) == 5 * side**2 + 1
    assert torch.equal(found[-1], module.newline)
    # A frame is pooled as it would be alone, in order.
    alone = module([given[0][25:50]], (1,))
    torch.testing.assert_close(alone[:-1], found[side**2 : 2 * side**2])
    if factor == 1:
        torch.testing.assert_close(found[:-1], torch.cat(given))


def test_frames_are_seen_as_the_image_encoder_sees_them() -> None:
    size = {"width": 8, "depth": 1, "heads": 2, "image_size": 8, "patch_size": 4}
    frames, image = VitFramesConfig(**size).build(), VitConfig(**size).build()
    frames.trunk = image.trunk
    values = torch.randn(2, 3, 3, 8, 8)
    found = frames(values, torch.tensor([3, 1]))
    expected = image(values.flatten(0, 1), torch.ones(6, dtype=torch.int64)).x_UND
    torch.testing.assert_close(found.x_UND[0], expected[:3].flatten(0, 1))
    torch.testing.assert_close(found.x_UND[1, :4], expected[3])
    assert found.is_valid_UN.sum(dim=1).tolist() == [frames.config.num_features(3), frames.config.num_features(1)]


def test_one_of_several_pictures_is_one_tile() -> None:
    pixels = np.full((30, 90, 3), 200, np.uint8)
    reader = ImageReader(ImageReaderConfig(size_px=12, resolution="anyres", cut="single", resize="pad"), Limits())
    assert len(reader.measure(Image(pixels))) == len(reader.among(1).measure(Image(pixels))) == 4
    tile = reader.among(2).read(Image(pixels)).units
    # Filled up to a square with the mean colour, which is next to zero after normalisation.
    assert len(tile) == 1 and abs(tile[0][:, 0]).max() < 0.01 and tile[0][:, 6].min() > 0.5
    every = ImageReader(ImageReaderConfig(size_px=12, resolution="anyres"), Limits())
    assert every.among(2) is every
    with pytest.raises(ConfigError, match="cut: single belongs to resolution: tiles or anyres"):
        ImageReaderConfig.parse({"cut": "single"})
