"""What the evaluation transforms of ``open_clip`` and ``timm`` call of torchvision, on PIL pictures.

torchvision does not load here, so that the two packages' own functions (``open_clip.transform.image_transform``,
``timm.data.create_transform``) run on these few operations instead: sizes, modes, roundings and their order are theirs.
Source: ``torchvision.transforms.functional`` (``_compute_resized_output_size``, ``center_crop``) and its
``_functional_pil`` (``resize``, ``crop``, ``pad``).
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import torch
from torch import Tensor

from .torchvision_stub import import_stubbed

Picture = PIL.Image.Image


def resize(image: Picture, size: Any, interpolation: str) -> Picture:
    """A number is the shorter edge, the longer one is cut to whole pixels; a pair is height and width."""
    if isinstance(size, int) or len(size) == 1:
        edge = size if isinstance(size, int) else size[0]
        width, height = image.size
        short, long = min(width, height), max(width, height)
        longer = int(edge * long / short)
        size = (longer, edge) if width <= height else (edge, longer)
    return image.resize((size[1], size[0]), PIL.Image.Resampling[interpolation])


def crop(image: Picture, top: int, left: int, height: int, width: int) -> Picture:
    return image.crop((left, top, left + width, top + height))


def center_crop(image: Picture, size: Any) -> Picture:
    height, width = (size, size) if isinstance(size, int) else size
    assert image.width >= width and image.height >= height
    return crop(image, round((image.height - height) / 2), round((image.width - width) / 2), height, width)


def pad(image: Picture, padding: list[int], fill: Any = 0, padding_mode: str = "constant") -> Picture:
    colour = tuple(fill) if isinstance(fill, list | tuple) else (fill,) * 3
    return PIL.ImageOps.expand(image, tuple(padding), colour)


def to_tensor(image: Picture) -> Tensor:
    return torch.from_numpy(np.array(image).transpose(2, 0, 1)).float().div(255)


def normalize(mean: Any, std: Any) -> Any:
    mean_C11, std_C11 = (torch.as_tensor(x).float()[:, None, None] for x in (mean, std))
    return lambda x: (x - mean_C11) / std_C11


def compose(steps: list[Any]) -> Any:
    def run(image: Any) -> Any:
        for step in steps:
            image = step.forward(image) if hasattr(step, "forward") else step(image)
        return image

    return run


FUNCTIONAL = SimpleNamespace(
    resize=resize, crop=crop, pad=pad, to_tensor=to_tensor, get_dimensions=lambda image: (3, image.height, image.width)
)
TRANSFORMS = {
    "Resize": lambda size, interpolation: lambda image: resize(image, size, interpolation),
    "CenterCrop": lambda size: lambda image: center_crop(image, size),
    "Normalize": normalize,
    "Compose": compose,
}


class _ToTensor:
    def __call__(self, image: Picture) -> Tensor:
        return to_tensor(image)


def open_clip_transform(monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], size: int) -> Any:
    """The package's own evaluation transform of a ``preprocess_cfg``, the size set as ``create_model`` sets it."""
    module = import_stubbed("open_clip").transform
    for name, part in TRANSFORMS.items():
        monkeypatch.setattr(module, name, part)
    monkeypatch.setattr(module, "F", FUNCTIONAL)
    monkeypatch.setattr(module, "MaybeToTensor", _ToTensor)
    given = module.merge_preprocess_dict(module.PreprocessCfg(), {**config, "size": size})
    return module.image_transform_v2(module.PreprocessCfg(**given), is_train=False)


def timm_transform(monkeypatch: pytest.MonkeyPatch, config: dict[str, Any]) -> Any:
    """The package's own evaluation transform of a ``pretrained_cfg``."""
    import_stubbed("timm")
    data, transforms = import_stubbed("timm.data"), import_stubbed("timm.data.transforms")
    factory, models = import_stubbed("timm.data.transforms_factory"), import_stubbed("timm.models._pretrained")
    monkeypatch.setattr(factory, "transforms", SimpleNamespace(**TRANSFORMS))
    monkeypatch.setattr(factory, "MaybeToTensor", _ToTensor)
    monkeypatch.setattr(transforms, "F", FUNCTIONAL)
    prepared = models.PretrainedCfg(**config).to_dict()
    return data.create_transform(**data.resolve_data_config(pretrained_cfg=prepared), is_training=False)
