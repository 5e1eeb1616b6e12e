from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageFile
import PIL.ImageOps
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from hostile import encoded_image, picture

from polymodal.core.errors import ConfigError, CorruptMediaError, LimitError, UnsupportedMediaError
from polymodal.core.limits import Limits
from polymodal.core.parts import Audio, Image
from polymodal.modalities.image import (
    ImageReader,
    ImageReaderConfig,
    closest_grid,
    decode_image,
    fit_to_canvas,
    fullest_grid,
    probe_image,
)
from polymodal.modalities.reader import checked_read

LIMITS = Limits()
SHARED = Path(os.environ.get("POLYMODAL_SHARED_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
PHOTOS = sorted((SHARED / "coco-mini" / "images").glob("*.jpg"))


def read(source: object, **config: object) -> list[np.ndarray]:
    reader = ImageReader(ImageReaderConfig.parse({"size_px": 16, **config}), LIMITS)
    part = Image(source)
    return checked_read(reader, part, reader.measure(part)).units


def reference_of(data: bytes) -> np.ndarray:
    return np.asarray(PIL.Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize("format", ["PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_decode_equals_pillow(format: str, tmp_path: Path) -> None:
    data = encoded_image(format)
    path = tmp_path / "picture"
    path.write_bytes(data)
    expected = reference_of(data)
    for source in (data, bytearray(data), path, str(path)):
        pixels = decode_image(Image(source), LIMITS)
        assert pixels.dtype == np.uint8 and pixels.flags.c_contiguous
        np.testing.assert_array_equal(pixels, expected)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_jpeg_is_near_pillow(options: dict) -> None:
    data = encoded_image("JPEG", quality=95, **options)
    difference = decode_image(Image(data), LIMITS).astype(int) - reference_of(data)
    assert np.abs(difference).max() <= 3


def test_grey_and_cmyk_jpeg() -> None:
    grey = encoded_image("JPEG", picture()[:, :, 0], quality=95)
    np.testing.assert_allclose(decode_image(Image(grey), LIMITS), reference_of(grey), atol=2)
    file = io.BytesIO()
    PIL.Image.fromarray(picture()).convert("CMYK").save(file, "JPEG", quality=95)
    assert probe_image(Image(file.getvalue()), LIMITS).mode == "CMYK"
    np.testing.assert_array_equal(decode_image(Image(file.getvalue()), LIMITS), reference_of(file.getvalue()))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied_once(format: str, orientation: int) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    data = encoded_image(format, picture(), exif=exif)
    upright = PIL.ImageOps.exif_transpose(PIL.Image.open(io.BytesIO(data)))
    expected = np.asarray(upright.convert("RGB"))
    header = probe_image(Image(data), LIMITS)
    assert (header.height_px, header.width_px) == expected.shape[:2]
    pixels = decode_image(Image(data), LIMITS)
    np.testing.assert_allclose(pixels, expected, atol=3)
    in_memory = PIL.Image.open(io.BytesIO(data))
    np.testing.assert_allclose(decode_image(Image(in_memory), LIMITS), expected, atol=3)
    np.testing.assert_allclose(decode_image(Image(upright), LIMITS), expected, atol=3)


def test_exif_behind_the_pixels_of_a_png_does_not_decode_them(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded_image("PNG")
    monkeypatch.setattr(PIL.ImageFile.ImageFile, "load", lambda self: pytest.fail("probe decoded pixels"))
    assert probe_image(Image(data), LIMITS).size_px == (64, 48)


def test_alpha_is_composited_on_white() -> None:
    rgba = np.dstack([picture(), np.full((48, 64), 51, np.uint8)])
    expected = np.round(picture() * 0.2 + 255 * 0.8)
    for source in (rgba, encoded_image("PNG", rgba), PIL.Image.fromarray(rgba)):
        np.testing.assert_allclose(decode_image(Image(source), LIMITS), expected, atol=1)
    assert decode_image(Image(np.zeros((2, 2, 4), np.uint8)), LIMITS).min() == 255


def test_palette_with_transparency_becomes_white_there() -> None:
    image = PIL.Image.fromarray(picture()).quantize(16)
    file = io.BytesIO()
    image.save(file, "PNG", transparency=image.getpixel((0, 0)))
    assert decode_image(Image(file.getvalue()), LIMITS)[0, 0].tolist() == [255, 255, 255]


def test_sixteen_bit_grey_is_scaled() -> None:
    grey = np.array([[0, 128, 32768, 65535]], np.uint16)
    pixels = decode_image(Image(encoded_image("PNG", grey)), LIMITS)
    assert pixels[0, :, 0].tolist() == [0, 0, 128, 255] and pixels.shape == (1, 4, 3)


def test_arrays_are_copied() -> None:
    array = picture()
    pixels = decode_image(Image(array), LIMITS)
    pixels[:] = 0
    assert array.any()
    assert decode_image(Image(array[:, :, 0]), LIMITS).shape == (48, 64, 3)


@pytest.mark.parametrize(
    ("source", "kind", "message"),
    [
        (np.zeros((4, 4, 3), np.float32), UnsupportedMediaError, "multiply by 255"),
        (np.zeros((3, 8, 8), np.uint8), UnsupportedMediaError, "channels last"),
        (np.zeros((4,), np.uint8), UnsupportedMediaError, "expected \\[H, W\\]"),
        (np.zeros((0, 4, 3), np.uint8), CorruptMediaError, "no values"),
        (7, UnsupportedMediaError, "found a int, expected a path or bytes"),
        (b"", CorruptMediaError, "empty"),
        (b"<html>Not Found</html>", UnsupportedMediaError, "web page"),
        ("/no/such/file.jpg", CorruptMediaError, "/no/such/file.jpg: cannot be read"),
        ("/tmp", CorruptMediaError, "not a regular file"),
        ("a\0b", CorruptMediaError, "cannot be read"),
        (PIL.Image.new("F", (4, 4)), UnsupportedMediaError, "pixel mode 'F'"),
    ],
)
def test_bad_sources(source: object, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        decode_image(Image(source), LIMITS)


def test_limits_are_applied_to_the_header() -> None:
    data = encoded_image("JPEG")
    with pytest.raises(LimitError, match=r"64 x 48 = 3,072 pixels, the limit \(image_pixels\) is 3,000"):
        probe_image(Image(data), Limits(image_pixels=3000))
    with pytest.raises(LimitError, match="image_side_px"):
        probe_image(Image(picture()), Limits(image_side_px=50))
    with pytest.raises(LimitError, match="file_bytes"):
        probe_image(Image(data), Limits(file_bytes=100))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF"])
def test_truncated_files_are_errors(format: str, tmp_path: Path) -> None:
    data = encoded_image(format)
    for share in (0.5, 0.8, 0.95):
        path = tmp_path / "cut.bin"
        path.write_bytes(data[: int(share * len(data))])
        with pytest.raises(CorruptMediaError, match=r"cut\.bin.*truncated"):
            decode_image(Image(path), LIMITS)


def test_closest_grid() -> None:
    assert closest_grid(800, 400, 224, 6) == (1, 2)
    assert closest_grid(400, 1200, 224, 6) == (3, 1)
    assert closest_grid(100, 100, 224, 6) == (1, 1)
    assert closest_grid(1000, 1000, 224, 6) == (2, 2)
    assert closest_grid(65_000, 1, 224, 6) == (1, 6)
    assert closest_grid(500, 300, 224, 1) == (1, 1)


def test_fullest_grid_is_that_of_transformers() -> None:
    reference = pytest.importorskip("transformers.image_processing_utils").select_best_resolution
    grids = ImageReaderConfig().grids
    rng = np.random.default_rng(0)
    for width, height in rng.integers(10, 2000, (200, 2)).tolist():
        rows, cols = fullest_grid(width, height, 336, grids)
        best = reference((height, width), [[r * 336, c * 336] for r, c in grids])
        assert (rows * 336, cols * 336) == tuple(best)


def test_crop_equals_resizing_then_cutting(monkeypatch: pytest.MonkeyPatch) -> None:
    for height, width in ((48, 64), (97, 41), (480, 640), (30, 31)):
        whole = picture(height, width)
        scale = 32 / min(height, width)
        cover = (max(32, int(width * scale)), max(32, int(height * scale)))
        big = np.asarray(PIL.Image.fromarray(whole).resize(cover, PIL.Image.Resampling.BICUBIC))
        top, left = (cover[1] - 32) // 2, (cover[0] - 32) // 2
        expected = big[top : top + 32, left : left + 32].transpose(2, 0, 1) / 255
        cropped = fit_to_canvas(whole, (32, 32), "crop", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        np.testing.assert_allclose(cropped, expected, atol=1e-6)
        monkeypatch.setattr("polymodal.modalities.image.resize._MAX_SURPLUS", 0)
        without_surplus = fit_to_canvas(whole, (32, 32), "crop", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        np.testing.assert_allclose(without_surplus, expected, atol=1.01 / 255)
        monkeypatch.undo()


def test_crop_from_a_larger_picture() -> None:
    whole = picture(90, 60)
    found = fit_to_canvas(whole, (32, 32), "crop", (0, 0, 0), (1, 1, 1), shortest_edge_px=40, resample="bilinear")
    big = np.asarray(PIL.Image.fromarray(whole).resize((40, 60), PIL.Image.Resampling.BILINEAR))
    np.testing.assert_allclose(found, big[14:46, 4:36].transpose(2, 0, 1) / 255, atol=1e-6)


def test_pad_square_then_scale() -> None:
    mean = (0.48145466, 0.4578275, 0.40821073)
    wide = np.full((20, 40, 3), 200, np.uint8)
    found = fit_to_canvas(wide, (8, 8), "pad_square", mean, (1, 1, 1), resample="nearest")
    np.testing.assert_allclose(
        found[:, 0, 0], [122 / 255 - mean[0], 116 / 255 - mean[1], 104 / 255 - mean[2]], atol=1e-6
    )
    np.testing.assert_allclose(found[:, 4, 4], 200 / 255 - np.asarray(mean), atol=1e-6)
    for fit in ("pad", "pad_square"):
        black = fit_to_canvas(wide, (8, 8), fit, mean, (1, 1, 1), fill="black", resample="nearest")
        np.testing.assert_allclose(black[:, 0, 0], -np.asarray(mean), atol=1e-6)


def test_rescale() -> None:
    white = np.full((4, 4, 3), 255, np.uint8)
    unit = ImageReader(ImageReaderConfig(size_px=4, rescale=1 / 127.5, mean=(1, 1, 1), std=(1, 1, 1)), LIMITS).read(
        Image(white)
    )
    np.testing.assert_allclose(unit.units[0], 1, atol=1e-6)


def test_stretch_and_pad() -> None:
    white = np.full((20, 40, 3), 255, np.uint8)
    stretched = fit_to_canvas(white, (8, 8), "stretch", (0.5, 0.5, 0.5), (0.25, 0.5, 1.0))
    assert stretched.dtype == np.float32 and stretched.shape == (3, 8, 8)
    np.testing.assert_allclose(stretched[:, 3, 3], [2, 1, 0.5], atol=1e-6)
    padded = fit_to_canvas(white, (8, 8), "pad", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    np.testing.assert_array_equal(padded[0, :, 3], [0, 0, 1, 1, 1, 1, 0, 0])


@pytest.mark.parametrize("fit", ["stretch", "crop", "pad", "pad_square"])
def test_extreme_shapes_stay_small(fit: str) -> None:
    for source in (np.zeros((1, 60_000), np.uint8), np.zeros((60_000, 1), np.uint8), np.zeros((1, 1), np.uint8)):
        assert read(source, resize=fit)[0].shape == (3, 16, 16)


def test_fixed_reads_one_tile() -> None:
    reader = ImageReader(ImageReaderConfig(size_px=16), LIMITS)
    item = reader.read(Image(picture()))
    assert item.lengths == (1,) and item.grid is None and item.size_px == (64, 48)
    assert item.units[0].shape == reader.unit_shape == (3, 16, 16)
    assert item.units[0].dtype == np.float32 and not reader.is_ragged


def test_tiles_come_row_by_row_after_the_thumbnail() -> None:
    quarters = np.zeros((64, 64, 3), np.uint8)
    quarters[:32, 32:], quarters[32:, :32], quarters[32:, 32:] = 85, 170, 255
    config = {"resolution": "tiles", "max_tiles": 4, "mean": (0, 0, 0), "std": (1, 1, 1)}
    units = read(quarters, **config)
    assert [round(float(unit[0, 4, 4]) * 3) for unit in units[1:]] == [0, 1, 2, 3]
    assert round(float(units[0][0, 12, 12]) * 3) == 3
    assert len(read(quarters, **config, thumbnail=False)) == 4
    assert len(read(np.zeros((10, 10, 3), np.uint8), **config)) == 1
    reader = ImageReader(ImageReaderConfig.parse({"size_px": 16, **config}), LIMITS)
    assert reader.read(Image(quarters)).grid == (2, 2)


def test_anyres_uses_its_grids() -> None:
    assert len(read(picture(30, 90), resolution="anyres", resize="pad")) == 4
    assert len(read(picture(30, 90), resolution="anyres", grids=[[1, 2]])) == 3
    assert len(read(picture(30, 90), resolution="anyres", grids=[[1, 2]], thumbnail=False)) == 2


def test_lengths_follow_the_upright_shape() -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    data = encoded_image("JPEG", picture(32, 96), exif=exif)
    reader = ImageReader(ImageReaderConfig(size_px=16, resolution="tiles", max_tiles=3), LIMITS)
    item = checked_read(reader, Image(data), (1, 1, 1, 1))
    assert item.grid == (3, 1) and item.size_px == (32, 96)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"std": [0.5, 0, 0.5]}, "three positive numbers"),
        ({"grids": []}, "at least one"),
        ({"grids": [[0, 2]]}, "at least 1"),
        ({"size_px": 0}, "size_px"),
        ({"resize": "squash"}, "'stretch', 'crop', 'pad' or 'pad_square'"),
        ({"shortest_edge_px": 256}, "belongs to resize: crop"),
        ({"shortest_edge_px": 200, "resize": "crop"}, "below size_px 224"),
        ({"mean": [0.5, 0.5]}, "mean"),
    ],
)
def test_wrong_configs(config: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ImageReaderConfig.parse(config)


def test_other_parts_are_refused() -> None:
    with pytest.raises(UnsupportedMediaError, match=r"a\.wav: found a part of modality 'audio', expected 'image'"):
        ImageReader(ImageReaderConfig(), LIMITS).measure(Audio("a.wav"))


@pytest.mark.skipif(not PHOTOS, reason="the folder shared/data/coco-mini is absent")
@pytest.mark.parametrize("resolution", ["fixed", "tiles", "anyres"])
def test_photographs(resolution: str) -> None:
    for path in PHOTOS[:8]:
        for unit in read(path, size_px=64, resolution=resolution, resize="pad"):
            assert unit.shape == (3, 64, 64) and np.abs(unit).max() <= 1.0001


@pytest.mark.parametrize(
    "config",
    [{}, {"resize": "pad", "fill": "black"}, {"resize": "crop"}, {"resize": "pad_square"}, {"resolution": "tiles"}],
)
def test_reading_into_rows_gives_the_same_units(config: dict) -> None:
    reader = ImageReader(ImageReaderConfig.parse({"size_px": 16, **config}), LIMITS)
    part = Image(picture(24, 40))
    units = reader.read(part).units
    rows = np.full((len(units), 3, 16, 16), np.nan, np.float32)
    into = reader.read_into(part, rows).units
    np.testing.assert_array_equal(into, units)
    assert len(units) > 1 or into[0].base is rows


def test_a_header_is_read_again_once_the_file_changes(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"

    def write(width: int, changed_ns: int) -> None:
        path.write_bytes(encoded_image("JPEG", picture(8, width)))
        os.utime(path, ns=(changed_ns, changed_ns))

    write(16, 10**18)
    assert [probe_image(Image(path), LIMITS).width_px for _ in range(2)] == [16, 16]
    write(24, 10**18 + 1)
    assert probe_image(Image(path), LIMITS).width_px == 24
    assert decode_image(Image(path), LIMITS).shape == (8, 24, 3)
    with pytest.raises(LimitError, match="24 x 8 = 192 pixels"):
        probe_image(Image(path), Limits(image_pixels=100))
    path.unlink()
    with pytest.raises(CorruptMediaError, match=r"a\.jpg.*cannot be read"):
        probe_image(Image(path), LIMITS)


def test_a_file_that_lost_its_end_behind_its_header_is_still_found(tmp_path: Path) -> None:
    """Known headers spare no check of the content: the same size and time, other bytes."""
    path, data = tmp_path / "a.jpg", encoded_image("JPEG", picture(64, 64))
    path.write_bytes(data)
    os.utime(path, ns=(10**18, 10**18))
    assert decode_image(Image(path), LIMITS).shape == (64, 64, 3)
    other = encoded_image("JPEG", picture(32, 32))
    for damaged in (data[: len(data) // 2] + bytes(len(data) - len(data) // 2), other + bytes(len(data) - len(other))):
        with path.open("r+b") as file:
            file.write(damaged)
        os.utime(path, ns=(10**18, 10**18))
        with pytest.raises(CorruptMediaError, match=r"decoding the JPEG failed|the header states 64 x 64"):
            decode_image(Image(path), LIMITS)


def test_rounding_says_where_the_middle_begins_and_how_large_the_inside_is() -> None:
    columns = np.repeat(np.arange(7, dtype=np.uint8)[None, :, None], 3, axis=2).repeat(4, axis=0)  # 4 rows, 7 columns
    plain: dict[str, object] = {"size_px": 4, "resize": "crop", "rescale": 1.0, "mean": (0, 0, 0), "std": (1, 1, 1)}
    found = {
        rounding: ImageReader(ImageReaderConfig.parse({**plain, "rounding": rounding}), LIMITS)
        .read(Image(columns))
        .units[0][0, 0]
        for rounding in ("down", "nearest")
    }
    assert found["down"].tolist() == [1, 2, 3, 4] and found["nearest"].tolist() == [2, 3, 4, 5]
    # 7 columns and 4 rows in a square of 4: the inside has 2.29 rows, which are 3 or 2.
    padded = {
        rounding: ImageReader(
            ImageReaderConfig.parse({**plain, "resize": "pad", "fill": (200, 7, 9), "rounding": rounding}), LIMITS
        )
        .read(Image(columns))
        .units[0]
        for rounding in ("down", "nearest")
    }
    assert (padded["down"][0, :, 0] == 200).tolist() == [False, False, False, True]
    assert (padded["nearest"][0, :, 0] == 200).tolist() == [True, False, False, True]
    assert padded["nearest"][:, 0, 0].tolist() == [200, 7, 9]
    with pytest.raises(ConfigError, match="fill"):
        ImageReaderConfig.parse({"fill": [1, 2, 256]}, "reader")


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_extreme_shapes_have_a_nearest_middle_too(fit: str) -> None:
    for source in (np.zeros((1, 60_000), np.uint8), np.zeros((60_000, 1), np.uint8), np.zeros((1, 1), np.uint8)):
        assert read(source, resize=fit, rounding="nearest")[0].shape == (3, 16, 16)
