"""ImageBind (``model_type: imagebind``): six modalities bound by images in one space.

The published code keeps one trunk, one stem and one head for each modality; images and videos share theirs. A folder
holds its tensors under the published names, a tokenizer (CLIP's), and a ``config.json`` that may name sizes other than
the published ones.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from polymodal.core.errors import ConfigError
from polymodal.models.compose.config import ModelConfig
from polymodal.models.encoders.bind import BindAudioConfig, BindFields, BindSensorConfig, BindVisionFields
from polymodal.models.heads.table import ProjectionConfig
from polymodal.models.presets.architecture import Architecture, Size, Vocabulary
from polymodal.models.weights import HubConfigs, NameTable, Reshape, Rule, Slice

_HUGE: dict[str, Any] = {
    "out_embed_dim": 1024,
    "image_size": 224,
    "video_frames": 2,
    "vision": {"width": 1280, "depth": 32, "heads": 16, "patch_size": 14},
    "text": {"width": 1024, "depth": 24, "heads": 16, "vocab_size": 49408, "context_length": 77},
    "audio": {"width": 768, "depth": 12, "heads": 12, "patch_size": 16, "stride": 10, "num_mels": 128, "frames": 204},
    "depth": {"width": 384, "depth": 12, "heads": 8, "patch_size": 16},
    "thermal": {"width": 768, "depth": 12, "heads": 12, "patch_size": 16},
    "imu": {"width": 512, "depth": 6, "heads": 8, "patch_size": 8, "num_channels": 6, "num_samples": 2000},
}
"""The published model ``imagebind_huge``; its code has no ``config.json``, these keys are ours."""
_SCALES = {"audio": 20.0, "depth": 5.0, "thermal": 10.0, "imu": 5.0}
"""Of each modality's vectors, fixed; the texts' is learned, images and videos have none."""
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_STACK = ("width", "depth", "heads")
_KEYS = {
    "image": {"patch_size": "patch_size"},
    "text": {"vocab_size": "vocab_size", "context_length": "max_tokens"},
    "audio": {"patch_size": "patch_size", "stride": "stride", "num_mels": "num_mels", "frames": "num_frames"},
    "depth": {"patch_size": "patch_size"},
    "thermal": {"patch_size": "patch_size"},
    "imu": {"patch_size": "patch_size", "num_channels": "num_channels", "num_samples": "num_samples"},
}
"""Key of a modality's config -> field of its encoder."""
_STREAMS = ("image", "video", "text", "audio", "depth", "thermal", "imu")
_HUB_NAMES = {"image": "vision"}
_STEMS = {"depth": "depth_stem.", "imu": "imu_stem."}
"""What the published code calls the stems of two modalities; the others' is one class and name."""


def to_model(configs: HubConfigs) -> dict[str, Any]:
    """Seven streams, of which images and videos share a trunk, and the space of all."""
    given = _sizes(configs.config)
    size = given["image_size"]
    vision = {**_stack(given["vision"]), "image_size": size, "patch_size": given["vision"]["patch_size"]}
    vision |= {"frames": given["video_frames"], "embed_norm": True}
    other = {"stem_norm": True, "extra_key": True}
    pixels = {"size_px": size, "resize": "crop", "mean": _CLIP_MEAN, "std": _CLIP_STD}
    streams: dict[str, Any] = {
        "image": _stream("image", {"use": "bind_image", **vision}, {"use": "image", **pixels}),
        "video": {
            **_stream(
                "video",
                {"use": "bind_video", **vision},
                {"use": "video", "num_frames": 5 * given["video_frames"], **pixels},
            ),
            "shares": "image",
        },
        "text": _text(given["text"], configs),
        "audio": _audio(given["audio"], other),
    }
    for name in ("depth", "thermal"):
        own = {"image_size": size, "patch_size": given[name]["patch_size"], "channels": 1}
        reader = {"use": "image", "size_px": size, "resize": "crop", "mean": (0.0,) * 3, "std": (1.0,) * 3}
        streams[name] = _stream("image", {"use": "bind_image", **_stack(given[name]), **own, **other}, reader)
        streams[name]["view"] = name
    imu = {key: given["imu"][key] for key in ("patch_size", "num_channels", "num_samples")}
    reader = {"use": "sensor", "num_channels": imu["num_channels"]}
    streams["imu"] = _stream("sensor", {"use": "bind_sensor", **_stack(given["imu"]), **imu, **other}, reader)
    head = {
        "use": "projection",
        "dim": given["out_embed_dim"],
        "streams": _STREAMS,
        "shared": {"video": "image"},
        "output_scales": {"text": None, **_SCALES},
        "bias": None,
    }
    tokenizer = {}
    if configs.folder is None:
        tokenizer = {"vocab_size": given["text"]["vocab_size"], "rows": given["text"]["vocab_size"]}
    return {"streams": streams, "backbone": "none", "heads": {"projection": head}, "tokenizer": tokenizer}


def _sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """The published sizes with what a config says otherwise."""
    found = {}
    for key, value in _HUGE.items():
        own = config.get(key, {} if isinstance(value, dict) else value)
        found[key] = {**value, **own} if isinstance(value, dict) else own
    return found


def _stack(given: Mapping[str, Any]) -> dict[str, Any]:
    return {key: given[key] for key in _STACK}


def _stream(modality: str, encoder: dict[str, Any], reader: dict[str, Any]) -> dict[str, Any]:
    return {"modality": modality, "encoder": encoder, "reader": reader}


def _text(given: Mapping[str, Any], configs: HubConfigs) -> dict[str, Any]:
    encoder = {
        "use": "text_transformer",
        **_stack(given),
        "vocab_size": given["vocab_size"],
        "max_tokens": given["context_length"],
        "norm_eps": 1e-6,
        "causal": True,
        # The end token has the highest id.
        "pool": "highest",
    }
    reader: dict[str, Any] = {"use": "text", "max_tokens": given["context_length"], "add_special": True}
    if configs.folder is not None:
        reader["tokenizer"] = str(configs.folder)
    return _stream("text", encoder, reader)


def _audio(given: Mapping[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Clips of two seconds, whose 198 frames are filled to 204, normalised by AudioSet's mean and deviation."""
    encoder = {
        "use": "bind_audio",
        **_stack(given),
        **other,
        "num_mels": given["num_mels"],
        "num_frames": given["frames"],
        "patch_size": given["patch_size"],
        "stride": given["stride"],
    }
    reader = {
        "use": "audio",
        "representation": "fbank",
        "num_mels": given["num_mels"],
        "clip_s": round((given["frames"] - 4) * 0.01, 6),
        "fill_frames": given["frames"],
        "mean": -4.268,
        "std": 9.138,
    }
    return _stream("audio", encoder, reader)


def names(model: ModelConfig, stored: Collection[str]) -> NameTable:
    """Names of the published ``ImageBindModel``."""
    table = NameTable(
        [Rule("heads.projection.log_scales.text", "modality_postprocessors.text.1.log_logit_scale")],
        ignored=(
            "modality_preprocessors.text.mask",
            "modality_postprocessors.{p}.1.log_logit_scale",
            "modality_preprocessors.{p}.pos_embedding_helper.{q}.pos_embed",
        ),
    )
    for name, stream in model.streams.items():
        if stream.shares is None:
            table += _stream_names(name, stream.encoder)
    return table


def _stream_names(name: str, encoder: Any) -> NameTable:
    hub = _HUB_NAMES.get(name, name)
    ours, before = f"streams.{name}.encoder.", f"modality_preprocessors.{hub}."
    if name == "text":
        embedding = [
            Rule(ours + "token_embed.weight", before + "token_embedding.weight"),
            _one(ours + "positions.weight", before + "pos_embed", encoder.width, rows=True),
        ]
        blocks = _block_names(ours + "transformer.", hub, encoder)
        return NameTable([*embedding, *blocks, *_head_names(ours, name, "proj.", 1)])
    trunk = ours + ("trunk.trunk." if isinstance(encoder, BindVisionFields) else "trunk.")
    places = before + ("pos_embed" if isinstance(encoder, BindSensorConfig) else "pos_embedding_helper.pos_embed")
    stem = before + _STEMS.get(name, "rgbt_stem.")
    rules = [
        _patch_rule(ours, stem, encoder),
        Rule(trunk + "stem_norm.{p}", stem + "norm_layer.{p}"),
        _one(trunk + "cls_token", before + "cls_token", encoder.width),
        _one(trunk + "positions.weight", places, encoder.width, rows=True),
        Rule(trunk + "embed_norm.{p}", f"modality_trunks.{hub}.pre_transformer_layer.0.{{p}}"),
        *_block_names(trunk + "transformer.", hub, encoder),
    ]
    # Between norm and map stands the choice of the class token, and for the sensors a dropout.
    return NameTable([*rules, *_head_names(trunk, name, "", 3 if name == "imu" else 2)])


def _one(ours: str, hub: str, width: int, *, rows: bool = False) -> Rule:
    return Rule(ours, hub, Reshape((-1, width), (1, -1, width)) if rows else Reshape((width,), (1, 1, width)))


def _patch_rule(ours: str, stem: str, encoder: Any) -> Rule:
    if isinstance(encoder, BindSensorConfig):
        return Rule(ours + "patch_proj.{p}", stem + "proj.{p}")
    if isinstance(encoder, BindAudioConfig):
        return Rule(ours + "patch_embed.{p}", stem + "proj.{p}")
    if encoder.frames > 1:
        # The first module of the stem repeats a picture as a clip of frames.
        return Rule(ours + "trunk.patch_weight", stem + "proj.1.weight")
    side = encoder.patch_size
    shape = (encoder.width, encoder.channels, side, side)
    return Rule(ours + "trunk.patch_weight", stem + "proj.weight", Reshape((*shape[:2], 1, *shape[2:]), shape))


def _block_names(ours: str, hub: str, encoder: Any) -> list[Rule]:
    width, heads = encoder.width, encoder.heads
    to_heads = Reshape((heads, width // heads), (1, 1, width))
    mine, theirs = ours + "blocks.{i}.", f"modality_trunks.{hub}.blocks.{{i}}."
    fused = [
        Rule(f"{mine}attention.{part}.{kind}", f"{theirs}attn.in_proj_{kind}", Slice(place, 3))
        for place, part in enumerate(("q_proj", "k_proj", "v_proj"))
        for kind in ("weight", "bias")
    ]
    return [
        *fused,
        Rule(mine + "attention.out_proj.{p}", theirs + "attn.out_proj.{p}"),
        Rule(mine + "attention.extra_k", theirs + "attn.bias_k", to_heads),
        Rule(mine + "attention.extra_v", theirs + "attn.bias_v", to_heads),
        Rule(mine + "attention_norm.{p}", theirs + "norm_1.{p}"),
        Rule(mine + "mlp_norm.{p}", theirs + "norm_2.{p}"),
        Rule(mine + "mlp.up_proj.{p}", theirs + "mlp.fc1.{p}"),
        Rule(mine + "mlp.down_proj.{p}", theirs + "mlp.fc2.{p}"),
    ]


def _head_names(ours: str, name: str, inner: str, place: int) -> list[Rule]:
    """The last norm, which is our trunk's, and the map."""
    head = f"modality_heads.{_HUB_NAMES.get(name, name)}.{inner}"
    norm = "transformer.final_norm.{p}"
    return [
        Rule(ours + norm, f"{head}0.{{p}}"),
        Rule(f"heads.projection.projs.{name}.{{p}}", f"{head}{place}.{{p}}"),
    ]


def to_hub(model: ModelConfig, vocabulary: Vocabulary) -> dict[str, dict[str, Any]]:
    """``config.json`` with the keys of this module.

    Raises:
        ConfigError: if streams or head are not those of ImageBind.
    """
    head = model.heads.get("projection")
    if set(model.streams) != set(_STREAMS) or not isinstance(head, ProjectionConfig):
        raise ConfigError(
            f"imagebind: found the streams {sorted(model.streams)} and the heads {sorted(model.heads)}, expected "
            f"{sorted(_STREAMS)} and a projection head"
        )
    encoders = {name: stream.encoder for name, stream in model.streams.items()}
    wrong = [name for name in _STREAMS if name != "text" and not isinstance(encoders[name], BindFields)]
    if wrong:
        raise ConfigError(f"imagebind: found other encoders for {wrong}, expected those called 'bind_...'")
    config: dict[str, Any] = {
        "model_type": "imagebind",
        "out_embed_dim": head.dim,
        "image_size": encoders["image"].image_size,
        "video_frames": encoders["image"].frames,
    }
    for name in ("image", "text", "audio", "depth", "thermal", "imu"):
        encoder = encoders[name]
        keys = _KEYS[name]
        own = {theirs: getattr(encoder, mine) for theirs, mine in keys.items()}
        config[_HUB_NAMES.get(name, name)] = {**{key: getattr(encoder, key) for key in _STACK}, **own}
    return {"config.json": config}


IMAGEBIND = Architecture(
    "imagebind",
    ("imagebind",),
    "ImageBind, arXiv 2305.05665, section 3.2",
    to_model=to_model,
    names=names,
    to_hub=to_hub,
    sizes={"imagebind-huge": Size({"model_type": "imagebind"}, 1_200_781_057)},
)
"""See the module. Published: 1.2B."""
