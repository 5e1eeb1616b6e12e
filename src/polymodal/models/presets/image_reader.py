"""Image preprocessing of published checkpoints: ``preprocessor_config.json`` to an image reader, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polymodal.core.errors import ConfigError
from polymodal.modalities.image import ImageReaderConfig

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_HALF = (0.5, 0.5, 0.5)

_CROP = {"size": {"shortest_edge": 224}, "crop_size": 224, "do_center_crop": True}
_STRETCH = {"size": {"height": 224, "width": 224}, "do_center_crop": False}
DEFAULTS: dict[str, dict[str, Any]] = {
    "CLIPImageProcessor": {**_CROP, "resample": 3, "image_mean": CLIP_MEAN, "image_std": CLIP_STD},
    "BitImageProcessor": {**_CROP, "resample": 3, "image_mean": CLIP_MEAN, "image_std": CLIP_STD},
    "ViTImageProcessor": {**_STRETCH, "resample": 2, "image_mean": _HALF, "image_std": _HALF},
    "SiglipImageProcessor": {**_STRETCH, "resample": 3, "image_mean": _HALF, "image_std": _HALF},
    "BlipImageProcessor": {**_STRETCH, "resample": 3, "image_mean": CLIP_MEAN, "image_std": CLIP_STD},
    "FlavaImageProcessor": {**_STRETCH, "resample": 3, "image_mean": CLIP_MEAN, "image_std": CLIP_STD},
    "ConvNextImageProcessor": {
        "size": {"shortest_edge": 384},
        "crop_pct": 224 / 256,
        "resample": 3,
        "image_mean": IMAGENET_MEAN,
        "image_std": IMAGENET_STD,
    },
}
"""What each processor does where its file is silent."""
_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
_WARP_FROM_PX = 384
"""``ConvNextImageProcessor`` stretches pictures from this size on, and crops below it."""


def image_reader(preprocessor: Mapping[str, Any], size_px: int, kind: str) -> dict[str, Any]:
    """The reader of a checkpoint's preprocessing.

    Args:
        preprocessor: ``preprocessor_config.json``; {} where there is none.
        size_px: side of the encoder's image, for checkpoints without the file.
        kind: the processor that the architecture uses where the file does not name one; a key of :data:`DEFAULTS`.

    Raises:
        ConfigError: if the file asks for what the image reader does not do, naming it.
    """
    name = str(preprocessor.get("image_processor_type") or preprocessor.get("feature_extractor_type") or kind)
    name = name.removesuffix("Fast").removesuffix("Pil").replace("FeatureExtractor", "ImageProcessor")
    if name not in DEFAULTS:
        raise ConfigError(f"preprocessor_config.json: found {name!r}, expected one of {', '.join(DEFAULTS)}")
    if preprocessor:
        given = {**DEFAULTS[name], **{key: value for key, value in preprocessor.items() if value is not None}}
    else:
        given = {**DEFAULTS[name], "crop_size": size_px}
        given["size"] = dict.fromkeys(DEFAULTS[name]["size"], size_px)
    if not given.get("do_resize", True) or given.get("do_pad", False):
        raise ConfigError("preprocessor_config.json: found do_resize: false or do_pad: true, expected resizing alone")
    resample = given["resample"]
    if resample not in _RESAMPLE:
        raise ConfigError(f"preprocessor_config.json: found resample: {resample}, expected one of {list(_RESAMPLE)}")
    does_normalize = given.get("do_normalize", True)
    return {
        "use": "image",
        **_geometry(given, name),
        "resample": _RESAMPLE[resample],
        "rescale": given.get("rescale_factor", 1 / 255) if given.get("do_rescale", True) else 1.0,
        "mean": tuple(given["image_mean"]) if does_normalize else (0.0, 0.0, 0.0),
        "std": tuple(given["image_std"]) if does_normalize else (1.0, 1.0, 1.0),
    }


def _geometry(given: Mapping[str, Any], name: str) -> dict[str, Any]:
    """``size_px``, ``resize`` and ``shortest_edge_px``."""
    size = given["size"]
    if isinstance(size, int):
        shortest = name in ("CLIPImageProcessor", "BitImageProcessor", "ConvNextImageProcessor")
        size = {"shortest_edge": size} if shortest else {"height": size, "width": size}
    edge = size.get("shortest_edge")
    if name == "ConvNextImageProcessor":
        if edge >= _WARP_FROM_PX:
            return {"size_px": edge, "resize": "stretch"}
        return _crop(edge, int(edge / given["crop_pct"]))
    crop = given.get("crop_size")
    sides = {crop} if isinstance(crop, int) else {crop["height"], crop["width"]} if crop else set()
    if edge is not None and given["do_center_crop"] and len(sides) == 1:
        return _crop(sides.pop(), edge)
    stretched = {size.get("height"), size.get("width")}
    if edge is None and len(stretched) == 1 and (not given["do_center_crop"] or sides == stretched):
        return {"size_px": stretched.pop(), "resize": "stretch"}
    raise ConfigError(
        f"preprocessor_config.json: found size {size}, crop_size {crop}, do_center_crop {given['do_center_crop']}; "
        "expected a square, or a shortest edge with a square centre crop"
    )


def _crop(size_px: int, edge: int) -> dict[str, Any]:
    return {"size_px": size_px, "resize": "crop", "shortest_edge_px": None if edge == size_px else edge}


def image_preprocessor(reader: Any, kind: str) -> dict[str, Any]:
    """``preprocessor_config.json`` of a reader.

    Args:
        reader: of one fixed tile.
        kind: the processor that will read it, a key of :data:`DEFAULTS`.

    Raises:
        ConfigError: if that processor cannot do what the reader does.
    """
    if not isinstance(reader, ImageReaderConfig):
        raise ConfigError(f"{kind}: found the reader {getattr(reader, 'use', None)!r}, expected 'image'")
    if reader.resolution != "fixed" or reader.resize not in ("stretch", "crop"):
        raise ConfigError(
            f"{kind}: found resolution {reader.resolution!r} with resize {reader.resize!r}, expected fixed with "
            "stretch or crop"
        )
    side = reader.size_px
    shared = {
        "image_processor_type": kind,
        "do_resize": True,
        "resample": next(code for code, name in _RESAMPLE.items() if name == reader.resample),
        "do_rescale": True,
        "rescale_factor": reader.rescale,
        "do_normalize": True,
        "image_mean": list(reader.mean),
        "image_std": list(reader.std),
    }
    if kind == "ConvNextImageProcessor":
        does_warp = side >= _WARP_FROM_PX
        if does_warp != (reader.resize == "stretch"):
            raise ConfigError(
                f"{kind}: stretches from {_WARP_FROM_PX} pixels on and crops below; found {reader.resize}"
            )
        crop_pct = {} if does_warp else {"crop_pct": side / (reader.shortest_edge_px or side)}
        return {**shared, "size": {"shortest_edge": side}, **crop_pct}
    if reader.resize == "stretch":
        return {**shared, "size": {"height": side, "width": side}, "do_center_crop": False}
    return {
        **shared,
        "size": {"shortest_edge": reader.shortest_edge_px or side},
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
    }


def resample_name(code: int) -> str:
    """The interpolation of a published code.

    Raises:
        ConfigError: if there is none.
    """
    if code not in _RESAMPLE:
        raise ConfigError(f"preprocessor_config.json: found resample: {code}, expected one of {list(_RESAMPLE)}")
    return _RESAMPLE[code]


def resample_code(name: str) -> int:
    """The inverse of :func:`resample_name`."""
    return next(code for code, mine in _RESAMPLE.items() if mine == name)
