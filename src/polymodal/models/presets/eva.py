"""EVA and EVA-02 image towers in timm's layout, and inside EVA-CLIP and BLIP-2."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from polymodal.core.config import unknown
from polymodal.core.errors import ConfigError
from polymodal.modalities.image import ImageReaderConfig, Resample
from polymodal.models.compose.config import ModelConfig
from polymodal.models.encoders.vit import VitConfig
from polymodal.models.heads.table import ClassConfig
from polymodal.models.presets.architecture import Architecture, Size, Vocabulary, require
from polymodal.models.presets.image_reader import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD
from polymodal.models.presets.towers import grid_fields
from polymodal.models.weights import HubConfigs, NameTable, Reshape, Rule, Slice


@dataclass(frozen=True, slots=True)
class Halves:
    """Rotary partners that stand side by side in the file, and in the two halves of a head here.

    Args:
        heads: number of heads.
        index: which of three fused parts the rule takes; None where queries and keys have tensors of their own. The
            third part, the values, does not turn.
    """

    heads: int
    index: int | None = None

    @property
    def order(self) -> int:
        """See ``Change``."""
        return self.index or 0

    @property
    def pieces(self) -> int:
        """See ``Change``."""
        return 1 if self.index is None else 3

    def load(self, stored: Tensor) -> Tensor:
        """Each head's even coordinates, then its odd ones."""
        if self.index is not None:
            stored = stored.chunk(3)[self.index]
        return stored if self.index == 2 else self._apart(stored)

    def save(self, ours: Sequence[Tensor]) -> Tensor:
        """Side by side again."""
        back = [part if place == 2 else self._together(part) for place, part in enumerate(ours)]
        return torch.cat(back) if len(back) > 1 else back[0]

    def _apart(self, x: Tensor) -> Tensor:
        return x.reshape(self.heads, -1, 2, *x.shape[1:]).transpose(1, 2).reshape(x.shape)

    def _together(self, x: Tensor) -> Tensor:
        return x.reshape(self.heads, 2, -1, *x.shape[1:]).transpose(1, 2).reshape(x.shape)


_GIANT = {"patch_size": 14, "embed_dim": 1408, "depth": 40, "num_heads": 16, "mlp_ratio": 6144 / 1408}
_EVA02 = {"mlp_ratio": 4 * 2 / 3, "swiglu_mlp": True, "use_rot_pos_emb": True, "ref_feat_shape": (16, 16)}
_UNFUSED = {**_EVA02, "qkv_fused": False, "scale_mlp": True}
_TINY = {**_EVA02, "patch_size": 14, "embed_dim": 192, "depth": 12, "num_heads": 3}
_SMALL = {**_EVA02, "patch_size": 14, "embed_dim": 384, "depth": 12, "num_heads": 6}
_BASE = {**_UNFUSED, "patch_size": 14, "embed_dim": 768, "depth": 12, "num_heads": 12}
_LARGE = {**_UNFUSED, "patch_size": 14, "embed_dim": 1024, "depth": 24, "num_heads": 16}
_CLIP = {"scale_attn_inner": True, "global_pool": "token"}
# In spite of its name EVA-01's block, but for the place of the norms.
_ENORMOUS: dict[str, Any] = {
    "patch_size": 14,
    "embed_dim": 1792,
    "depth": 64,
    "num_heads": 16,
    "mlp_ratio": 15360 / 1792,
}
_ENORMOUS |= {"use_post_norm": True, "global_pool": "token"}
TIMM: dict[str, dict[str, Any]] = {
    "eva_giant_patch14_224": _GIANT,
    "eva_giant_patch14_336": {**_GIANT, "img_size": 336},
    "eva_giant_patch14_560": {**_GIANT, "img_size": 560},
    "eva_giant_patch14_clip_224": {**_GIANT, "global_pool": "token"},
    "eva02_tiny_patch14_224": _TINY,
    "eva02_tiny_patch14_336": {**_TINY, "img_size": 336},
    "eva02_small_patch14_224": _SMALL,
    "eva02_small_patch14_336": {**_SMALL, "img_size": 336},
    "eva02_base_patch14_224": _BASE,
    "eva02_base_patch14_448": {**_BASE, "img_size": 448},
    "eva02_large_patch14_224": _LARGE,
    "eva02_large_patch14_448": {**_LARGE, "img_size": 448},
    "eva02_base_patch16_clip_224": {**_BASE, **_CLIP, "patch_size": 16},
    "eva02_large_patch14_clip_224": {**_LARGE, **_CLIP},
    "eva02_large_patch14_clip_336": {**_LARGE, **_CLIP, "img_size": 336},
    "eva02_enormous_patch14_clip_224": _ENORMOUS,
}
"""Arguments of timm's models by name."""
_DEFAULTS: dict[str, Any] = {
    "img_size": 224,
    "mlp_ratio": 4.0,
    "swiglu_mlp": False,
    "qkv_fused": True,
    "scale_mlp": False,
    "scale_attn_inner": False,
    "use_rot_pos_emb": False,
    "ref_feat_shape": None,
    "use_post_norm": False,
    "global_pool": "avg",
}
_REQUIRED = ("patch_size", "embed_dim", "depth", "num_heads")


def encoder(name: str, args: Mapping[str, Any]) -> dict[str, Any]:
    """The encoder of one of timm's models.

    Args:
        name: a key of :data:`TIMM`.
        args: arguments that differ from that model's.

    Raises:
        ConfigError: if the name or an argument is unknown.
    """
    if name not in TIMM:
        raise ConfigError(unknown("EVA model", name, TIMM))
    given = {**_DEFAULTS, **TIMM[name], **args}
    strange = sorted(set(given) - set(_DEFAULTS) - set(_REQUIRED))
    if strange:
        raise ConfigError(f"{name}: {unknown('argument', strange[0], (*_REQUIRED, *_DEFAULTS))}")
    require(given, name, global_pool=("avg", "token"))
    is_gated, by_token = given["swiglu_mlp"], given["global_pool"] == "token"
    sub_norm = "both" if given["scale_attn_inner"] else "mlp" if given["scale_mlp"] else "none"
    return {
        "use": "vit",
        **grid_fields(given["img_size"], given["patch_size"]),
        "width": given["embed_dim"],
        "depth": given["depth"],
        "heads": given["num_heads"],
        "mlp_dim": int(given["embed_dim"] * given["mlp_ratio"]),
        "activation": "silu" if is_gated else "gelu",
        "norm_eps": 1e-6,
        "gated": is_gated,
        "sub_norm": sub_norm,
        "branch_norm": given["use_post_norm"],
        "key_bias": False,
        "rope_grid": given["ref_feat_shape"][0] if given["use_rot_pos_emb"] else None,
        "pool": "cls" if by_token else "cls_mean",
        "norm_features": by_token,
    }


def to_model(configs: HubConfigs) -> dict[str, Any]:
    """An image stream without a backbone, and a ``class`` head where the checkpoint has one."""
    config = configs.config
    args = dict(config.get("model_args") or {})
    args.setdefault(
        "global_pool", config.get("global_pool", TIMM.get(config["architecture"], {}).get("global_pool", "avg"))
    )
    data = encoder(config["architecture"], args)
    # Older folders hold the preprocessing beside the architecture's name.
    stream = {"modality": "image", "encoder": data, "reader": _reader(config.get("pretrained_cfg", config), data)}
    classes = config.get("label_names") or [f"LABEL_{index}" for index in range(config.get("num_classes", 0))]
    heads = {"class": {"use": "class", "stream": "image", "classes": tuple(classes)}} if classes else {}
    return {"streams": {"image": stream}, "backbone": "none", "heads": heads}


_PREPARED: dict[str, Any] = {
    "crop_pct": 0.875,
    "crop_mode": "center",
    "interpolation": "bicubic",
    "mean": IMAGENET_MEAN,
    "std": IMAGENET_STD,
}
"""What timm does where a checkpoint's preprocessing is silent."""
_MODES = {"crop": "center", "stretch": "squash", "pad": "border"}
"""How a picture meets the canvas -> timm's name of it."""


def border_colour(mean: Sequence[float]) -> tuple[int, ...]:
    """The mean colour as timm pads with it, bytes."""
    return tuple(round(255 * value) for value in mean)


def _reader(config: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """Timm's evaluation transform.

    ``center``: the shorter edge to ``size / crop_pct``, and the middle of it; ``squash``: both edges to the size;
    ``border``: the longer edge to the size, the rest in the mean colour.

    Source: ``transforms_imagenet_eval`` and ``resolve_data_config`` of timm.
    """
    given = {**_PREPARED, **{key: value for key, value in config.items() if value is not None}}
    require(given, "timm", crop_mode=tuple(_MODES.values()), interpolation=get_args(Resample))
    size, mean = data["image_size"], tuple(given["mean"])
    if tuple(given.get("input_size", (3, size, size))) != (3, size, size):
        raise ConfigError(f"timm: found input_size {given['input_size']}, expected [3, {size}, {size}], the model's")
    edge, mode = int(size / given["crop_pct"]), given["crop_mode"]
    if edge < size or (mode != "center" and edge != size):
        found = f"crop_mode {mode} with crop_pct {given['crop_pct']}"
        raise ConfigError(f"timm: found {found}, expected {'at most ' if mode == 'center' else ''}1.0")
    return {
        "use": "image",
        "size_px": size,
        "resize": next(fit for fit, name in _MODES.items() if name == mode),
        "shortest_edge_px": edge if edge > size else None,
        "rounding": "nearest",
        "fill": border_colour(mean) if mode == "border" else "mean",
        "resample": given["interpolation"],
        "mean": mean,
        "std": tuple(given["std"]),
    }


def tower_names(ours: str, hub: str, encoder: VitConfig, *, is_fused: bool) -> NameTable:
    """Names of a tower.

    Args:
        ours: path of the encoder, ``streams.image.encoder.``.
        hub: path of the stored tower, ``visual.trunk.``.
        encoder: its config.
        is_fused: whether queries, keys and values are stored as one matrix.
    """
    trunk, width = ours + "trunk.", encoder.width
    block, stored = trunk + "transformer.blocks.{i}.", hub + "blocks.{i}."
    norm = "norm" if encoder.norm_features else "fc_norm"
    return NameTable(
        [
            Rule(trunk + "patch_embed.{p}", hub + "patch_embed.proj.{p}"),
            Rule(trunk + "cls_token", hub + "cls_token", Reshape((-1,), (1, 1, -1))),
            Rule(trunk + "learned_positions.weight", hub + "pos_embed", Reshape((-1, width), (1, -1, width))),
            Rule(trunk + "transformer.final_norm.{p}", f"{hub}{norm}.{{p}}"),
            Rule(trunk + "pooled_norm.{p}", f"{hub}{norm}.{{p}}"),
            Rule(trunk + "pooled_proj.{p}", hub + "head.{p}"),
            Rule(block + "attention_norm.{p}", stored + "norm1.{p}"),
            Rule(block + "mlp_norm.{p}", stored + "norm2.{p}"),
            Rule(block + "attention.sub_norm.{p}", stored + "attn.norm.{p}"),
            Rule(block + "attention.out_proj.{p}", stored + "attn.proj.{p}"),
            *_attention_rules(block + "attention.", stored + "attn.", encoder, is_fused),
            *_mlp_rules(block + "mlp.", stored + "mlp.", encoder, is_fused),
        ]
    )


def _attention_rules(ours: str, hub: str, encoder: VitConfig, is_fused: bool) -> list[Rule]:
    turns = encoder.rope_grid is not None
    parts = ("q_proj", "k_proj", "v_proj")
    if not is_fused:
        change = {"change": Halves(encoder.heads)} if turns else {}
        rules = [Rule(f"{ours}{part}.{{p}}", f"{hub}{part}.{{p}}", **change) for part in parts[:2]]
        return [*rules, Rule(f"{ours}v_proj.{{p}}", f"{hub}v_proj.{{p}}")]
    heads = encoder.heads
    fused = [
        Rule(f"{ours}{part}.weight", hub + "qkv.weight", Halves(heads, place) if turns else Slice(place, 3))
        for place, part in enumerate(parts)
    ]
    bias = {"change": Halves(heads)} if turns else {}
    return [*fused, Rule(ours + "q_proj.bias", hub + "q_bias", **bias), Rule(ours + "v_proj.bias", hub + "v_bias")]


def _mlp_rules(ours: str, hub: str, encoder: VitConfig, is_fused: bool) -> list[Rule]:
    down = Rule(ours + "down_proj.{p}", hub + "fc2.{p}")
    if not encoder.gated:
        return [down, Rule(ours + "up_proj.{p}", hub + "fc1.{p}")]
    if is_fused:
        gate, up = (Rule(f"{ours}{n}_proj.{{p}}", hub + "fc1.{p}", Slice(k, 2)) for k, n in enumerate(("gate", "up")))
    else:
        gate, up = (Rule(f"{ours}{n}_proj.{{p}}", f"{hub}fc1_{s}.{{p}}") for n, s in (("gate", "g"), ("up", "x")))
    return [down, gate, up, Rule(ours + "sub_norm.{p}", hub + "norm.{p}")]


def is_fused(data: VitConfig) -> bool:
    """Whether timm stores this encoder's queries, keys and values as one: all but EVA-02's base and large."""
    return data.sub_norm == "none"


def names(model: ModelConfig, stored: Collection[str]) -> NameTable:
    """Names of timm's ``Eva``."""
    data = _encoder(model)
    table = tower_names("streams.image.encoder.", "", data, is_fused=is_fused(data))
    return table + NameTable([Rule("heads.class.{p}", "head.{p}")])


def to_hub(model: ModelConfig, vocabulary: Vocabulary) -> dict[str, dict[str, Any]]:
    """``config.json`` of timm, which names the nearest model and the arguments that differ."""
    data, reader = _encoder(model), model.streams["image"].reader
    if not isinstance(reader, ImageReaderConfig) or reader.resize not in _MODES:
        raise ConfigError(f"eva: found the reader {reader}, expected 'image' with resize stretch, crop or pad")
    if reader.resize == "pad" and reader.fill not in ("mean", border_colour(reader.mean)):
        raise ConfigError(f"eva: found the fill {reader.fill}, expected the mean colour {border_colour(reader.mean)}")
    name, args = nearest(data)
    head = next(iter(model.heads.values()), None)
    classes = head.classes if isinstance(head, ClassConfig) else ()
    pretrained = {
        "input_size": [3, data.image_size, data.image_size],
        "fixed_input_size": True,
        "interpolation": reader.resample,
        "crop_pct": data.image_size / (reader.shortest_edge_px or data.image_size),
        "crop_mode": _MODES[reader.resize],
        "mean": list(reader.mean),
        "std": list(reader.std),
        "num_classes": len(classes),
    }
    config: dict[str, Any] = {
        "architecture": name,
        "num_classes": len(classes),
        "num_features": data.width,
        "global_pool": "token" if data.pool == "cls" else "avg",
        "model_args": args,
        "pretrained_cfg": pretrained,
    }
    if classes:
        config["label_names"] = list(classes)
    return {"config.json": config}


def nearest(data: VitConfig) -> tuple[str, dict[str, Any]]:
    """The model of :data:`TIMM` that an encoder needs the fewest other arguments than, and those."""
    args = {
        "img_size": data.image_size,
        "patch_size": data.patch_size,
        "embed_dim": data.width,
        "depth": data.depth,
        "num_heads": data.heads,
        "mlp_ratio": (data.mlp_dim or 4 * data.width) / data.width,
        "swiglu_mlp": data.gated,
        "qkv_fused": is_fused(data),
        "scale_mlp": data.sub_norm != "none",
        "scale_attn_inner": data.sub_norm == "both",
        "use_rot_pos_emb": data.rope_grid is not None,
        "ref_feat_shape": data.rope_grid and (data.rope_grid, data.rope_grid),
        "use_post_norm": data.branch_norm,
        "global_pool": "token" if data.pool == "cls" else "avg",
    }
    found = {name: _differing(args, {**_DEFAULTS, **published}) for name, published in TIMM.items()}
    name = min(found, key=lambda name: len(found[name]))
    return name, found[name]


def _differing(args: Mapping[str, Any], published: Mapping[str, Any]) -> dict[str, Any]:
    width = args["embed_dim"]
    same_mlp = int(width * published["mlp_ratio"]) == int(width * args["mlp_ratio"])
    kept = {
        key: value for key, value in args.items() if published[key] != value and not (key == "mlp_ratio" and same_mlp)
    }
    return {key: value for key, value in kept.items() if key != "global_pool"}


def _encoder(model: ModelConfig) -> VitConfig:
    data = model.streams["image"].encoder if list(model.streams) == ["image"] else None
    fits = isinstance(data, VitConfig) and not data.key_bias and data.pool in ("cls", "cls_mean")
    if not isinstance(data, VitConfig) or not fits or any(head.use != "class" for head in model.heads.values()):
        raise ConfigError(
            "eva: found a model of other parts, expected one image stream with the encoder 'vit', its keys without a "
            "bias, and no head but 'class'"
        )
    return data


def _size(name: str, parameters: int, crop_pct: float = 0.9) -> Size:
    prepared = {"crop_pct": crop_pct, "mean": CLIP_MEAN, "std": CLIP_STD}
    return Size({"architecture": name, "num_classes": 0, "pretrained_cfg": prepared}, parameters)


EVA = Architecture(
    "eva",
    tuple(f"timm/{name}" for name in TIMM),
    "EVA, arXiv 2211.07636, section 3; EVA-02, arXiv 2303.11331, section 2.1; layout of timm",
    to_model=to_model,
    names=names,
    to_hub=to_hub,
    sizes={
        name: _size(name, count, 1.0 if name.endswith("336") else 0.9)
        for name, count in {
            "eva_giant_patch14_224": 1_011_146_112,
            "eva_giant_patch14_clip_224": 1_011_146_112,
            "eva02_tiny_patch14_224": 5_502_144,
            "eva02_small_patch14_224": 21_621_120,
            "eva02_base_patch14_224": 85_758_720,
            "eva02_large_patch14_224": 303_268_800,
            "eva02_base_patch16_clip_224": 85_869_312,
            "eva02_large_patch14_clip_224": 303_317_952,
            "eva02_large_patch14_clip_336": 303_645_632,
            "eva02_enormous_patch14_clip_224": 4_348_720_896,
        }.items()
    },
)
"""See the module."""
