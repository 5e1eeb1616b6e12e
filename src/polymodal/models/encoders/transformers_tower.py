"""What a tower of the ``transformers`` library takes and gives, found out once and kept as plain data.

Legend: ``U`` units, ``N`` features, ``D`` width, ``L`` length of a unit, ``S`` side of an image, ``M`` bands,
``P`` side of a patch.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from polymodal.core.config import Config, unknown
from polymodal.core.errors import ConfigError
from polymodal.models.transformers_library import from_config, library, library_config, linear_for_conv1d, tensors_of

Form = Literal["pixels", "patches", "frames", "wave", "spectrum", "mels_first", "mels_image", "rows", "ids"]
Axes = Literal["tokens", "channels_first", "channels_last", "tracks"]

_BANDS_FIRST = (
    "whisper",
    "qwen2_audio_encoder",
    "moonshine_streaming_encoder",
    "voxtral_encoder",
    "audioflamingo3_encoder",
)
"""Architectures whose spectrograms are ``[U, M, L]``."""
_SUB_CONFIGS = {"image": "vision_config", "video": "vision_config", "audio": "audio_config", "text": "text_config"}
_LENGTHS: dict[str, Callable[[Any], int | None]] = {
    "video": lambda config: _first(config, "num_frames", "frames_per_clip"),
    "audio": lambda config: (
        2 * config.max_source_positions
        if config.model_type in _BANDS_FIRST
        else config.max_length
        if config.model_type == "audio-spectrogram-transformer"
        else None
    ),
    "sensor": lambda config: _first(config, "context_length"),
}
"""The one length that a tower takes, by modality."""


class TowerFacts(Config):
    """What the features of a tower are.

    Args:
        width: ``D``.
        form: how units are given to the tower.
        unit_shape: of one unit without its ragged axis.
        length: the one length of a unit; None for any.
        features: their number per unit, where it is always the same.
        stride: else ``(length + offset) // stride`` features, less the skipped ones.
        offset: see ``stride``.
        least: the shortest length that the tower takes; shorter units are filled up to it.
        skipped: leading tokens that are no features.
        axes: the order of the output's axes: ``[U, N, D]``, ``[U, D, ...]``, ``[U, ..., D]`` with several axes of
            positions, or ``[U, channels, N, D]``.
        pool: where the pooled vector comes from.
    """

    width: int
    form: Form
    unit_shape: tuple[int, ...]
    length: int | None = None
    features: int | None = None
    stride: int = 1
    offset: int = 0
    least: int = 1
    skipped: int = 0
    axes: Axes = "tokens"
    pool: Literal["own", "mean", "first"] = "mean"

    def count(self, length: int) -> int:
        """Features of a unit of this length."""
        if self.features is not None:
            return self.features
        return (max(length, self.least) + self.offset) // self.stride - self.skipped


def part_config(data: Mapping[str, Any], modality: str) -> dict[str, Any]:
    """The config of the tower of a modality: the checkpoint's, or the part of it that is for the modality."""
    inner = data.get(_SUB_CONFIGS.get(modality, ""))
    if not isinstance(inner, dict):
        return dict(data)
    if "model_type" not in inner:
        whole = library_config(data)
        return {**inner, "model_type": getattr(whole, _SUB_CONFIGS[modality]).model_type}
    return dict(inner)


def tower_class(config: Any) -> tuple[Any, Callable[[Any], Any]]:
    """The class that builds and loads a tower, and what of its model the tower is."""
    auto = library().AutoModel
    if getattr(config, "is_encoder_decoder", False):
        return auto, lambda model: model.get_encoder()
    if type(config) in library().MODEL_MAPPING:
        return auto, lambda model: model
    # A tower without a place in the library's tables (CLAP's): the class that has its config.
    module = importlib.import_module(type(config).__module__.replace("configuration_", "modeling_"))
    classes = [c for c in vars(module).values() if getattr(c, "config_class", None) is type(config)]
    named = [c for c in classes if c.__name__.endswith("Model") and not c.__name__.endswith("PreTrainedModel")]
    if not named:
        raise ConfigError(f"config: the library has no tower for {config.model_type!r}")
    return named[0], lambda model: model


def build_tower(data: Mapping[str, Any]) -> Any:
    """A tower with random weights.

    Raises:
        ConfigError: if the library has none for this config.
    """
    config = library_config(data)
    auto, pick = tower_class(config)
    return linear_for_conv1d(pick(from_config(auto, config)))


def inputs_of(facts: TowerFacts, model: Any, values: Tensor) -> dict[str, Tensor]:
    """Units as the tower's own arguments.

    Args:
        facts: of the tower.
        model: the tower.
        values: units of one length, ``[U, 3, S, S]`` or ``[U, L, ...]``.
    """
    if facts.form == "patches":
        return _patches(values, model.config.patch_size)
    if facts.form == "ids":
        return {"input_ids": values}
    if facts.form == "wave":
        values = values[..., 0]
    elif facts.form == "mels_first":
        values = values.transpose(1, 2)
    elif facts.form == "mels_image":
        values = values[:, None]
    return {model.main_input_name: values}


def _patches(images: Tensor, side: int) -> dict[str, Tensor]:
    """Squares of a picture as rows, for towers that take pictures of any shape (NaFlex)."""
    units, _, height, width = images.shape
    rows, cols = height // side, width // side
    cut = images.unfold(2, side, side).unfold(3, side, side)
    patches = cut.permute(0, 2, 3, 4, 5, 1).reshape(units, rows * cols, -1)
    shape = torch.tensor([rows, cols], device=images.device).expand(units, 2)
    mask = torch.ones(units, rows * cols, dtype=torch.int64, device=images.device)
    return {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": shape}


def uniform(output: Any, name: str, layer: int, axes: Axes) -> Tensor:
    """One of a tower's outputs as ``[U, N, D]``."""
    x: Tensor = _chosen(output, name, layer)
    if axes == "channels_first":
        return x.flatten(2).transpose(1, 2)
    return x if axes == "tokens" else x.flatten(1, -2)


def _chosen(output: Any, name: str, layer: int) -> Tensor:
    if layer != -1:
        states = output.get("hidden_states")
        if not states or len(states) < -layer:
            raise ConfigError(f"layer {layer}: the tower gives {len(states or ())} hidden states")
        return torch.as_tensor(states[layer])
    if not isinstance(output.get(name), Tensor):
        raise ConfigError(unknown("output of the tower", name, tensors_of(output)))
    return torch.as_tensor(output[name])


def probe(
    modality: str,
    config: Mapping[str, Any],
    output: str = "last_hidden_state",
    layer: int = -1,
    skip: int = 0,
    pool: str | None = None,
    size_px: int | None = None,
    length: int | None = None,
) -> TowerFacts:
    """Run a tower without weights (on the meta device) and see what it gives.

    Raises:
        ConfigError: if it cannot be built or run, or the number of its features does not follow from the length.
    """
    settings = library_config(config)
    with torch.device("meta"):
        # Some towers make a tensor of their own way, on the CPU.
        model = build_tower(config).eval().to("meta")
    form, shape = _form(modality, settings, model, size_px)
    fixed = length or (_LENGTHS[modality](settings) if modality in _LENGTHS else None)
    facts = TowerFacts(width=1, form=form, unit_shape=shape, length=fixed, skipped=skip)
    trial = _Trial(model, facts, modality, with_states=layer != -1)
    try:
        found = trial.run(fixed or trial.start)
    except Exception:  # noqa: BLE001  (some towers read values, which nothing without memory has)
        trial.model = build_tower(config).eval()
        found = trial.run(fixed or trial.start)
    axes, width = _axes(_chosen(found, output, layer), modality)
    num_tokens = uniform(found, output, layer, axes).shape[1]
    if num_tokens <= skip:
        raise ConfigError(f"skip: found {skip}, the tower gives {num_tokens} tokens")
    facts = facts.model_copy(update={"width": width, "axes": axes, "pool": _pool(pool, found, width)})
    if modality == "image" or fixed is not None:
        return facts.model_copy(update={"features": num_tokens - skip})
    law = _law(lambda tokens: uniform(trial.run(tokens), output, layer, axes).shape[1], trial.start, skip)
    return facts.model_copy(update=law)


class _Trial:
    """Runs a tower on zeros.

    Args:
        model: the tower, on the device meta or with memory.
        facts: how it is fed.
        modality: of its units.
        with_states: whether hidden states are asked for.
    """

    def __init__(self, model: Any, facts: TowerFacts, modality: str, with_states: bool) -> None:
        self.model, self.facts, self.modality = model, facts, modality
        self.options = {"output_hidden_states": True} if with_states else {}
        self.start = 24 if modality == "text" else 4096
        """A length that is long enough for every tower, and not too long for towers of texts."""

    @torch.no_grad()
    def run(self, length: int) -> Any:
        """The output for two units of a length.

        Raises:
            ConfigError: if the tower does not take them.
        """
        device, shape = next(self.model.parameters()).device, self.facts.unit_shape
        dims = (2, *shape) if self.modality == "image" else (2, length, *shape)
        dtype = torch.int64 if self.modality == "text" else torch.float32
        values = torch.zeros(dims, dtype=dtype, device=device)
        try:
            with torch.device(device):
                return self.model(**inputs_of(self.facts, self.model, values), return_dict=True, **self.options)
        except Exception as error:  # noqa: BLE001  (whatever units of the wrong shape provoke)
            kind, what = self.model.config.model_type, "" if self.modality == "image" else f" of length {length}"
            raise ConfigError(
                f"config: {kind} does not take {self.modality} units{what} and shape {shape}: {error}; say size_px or "
                "length, the one size that it takes"
            ) from None


def _form(modality: str, config: Any, model: Any, size_px: int | None) -> tuple[Form, tuple[int, ...]]:
    """How units are given, and their shape."""
    if modality in ("image", "video"):
        if "spatial_shapes" in inspect.signature(model.forward).parameters:
            side = size_px or config.patch_size * math.isqrt(config.num_patches)
            return "patches", (3, side, side)
        side = size_px or _first(config, "image_size", "crop_size") or 224
        return ("pixels" if modality == "image" else "frames"), (3, side, side)
    if modality == "text":
        return "ids", ()
    if modality == "sensor":
        return "rows", (_first(config, "num_input_channels", "input_size") or 1,)
    bands = _first(config, "num_mel_bins", "feature_size", "input_feat_per_channel", "feature_projection_input_dim")
    if config.model_type in _BANDS_FIRST:
        return "mels_first", (bands or 80,)
    if config.model_type == "clap_audio_model":
        return "mels_image", (bands or 64,)
    if model.main_input_name == "input_features" or config.model_type == "audio-spectrogram-transformer":
        return "spectrum", (bands or 80,)
    return "wave", (1,)


def _axes(x: Tensor, modality: str) -> tuple[Axes, int]:
    """The order of an output's axes, and its width."""
    shape = tuple(x.shape)
    if len(shape) == 3:
        return "tokens", shape[2]
    if len(shape) == 4 and modality == "sensor":
        return "tracks", shape[3]
    if len(shape) == 4 and modality in ("image", "video", "audio"):
        # Pictures are square: the two equal axes are its rows and columns.
        is_last = shape[1] == shape[2] and shape[2] != shape[3]
        return ("channels_last", shape[3]) if is_last else ("channels_first", shape[1])
    raise ConfigError(f"output: found the shape {shape}, expected [units, features, width] or a map of features")


def _pool(wanted: str | None, output: Any, width: int) -> str:
    own = output.get("pooler_output")
    has_own = isinstance(own, Tensor) and own.flatten(1).shape[1] == width
    if wanted == "own" and not has_own:
        raise ConfigError(f"pool: own: the tower gives no pooled vector of width {width}; choose mean or first")
    return wanted or ("own" if has_own else "mean")


def _law(count: Callable[[int], int], start: int, skip: int) -> dict[str, int]:
    """``stride``, ``offset`` and ``least`` with ``count(length) == (length + offset) // stride`` from ``least`` on.

    Strided layers one after another, padded or not, always make such a law; it is read off two steps and then checked.

    Raises:
        ConfigError: if there is none.
    """
    first = count(start)
    one = _next_step(count, start, first)
    two = _next_step(count, one, count(one))
    stride = two - one
    offset = (first + 1) * stride - one
    least = _least(count, range(max(1, (1 + skip) * stride - offset), start, stride))
    for length in (least, least + stride - 1, one - 1, one, two + stride // 2):
        if count(length) != (length + offset) // stride:
            raise ConfigError(
                f"config: the number of features does not follow from the length of a unit ({length} gives "
                f"{count(length)}, expected {(length + offset) // stride}); say length, the one that units are filled "
                "up to"
            )
    return {"stride": stride, "offset": offset, "least": least}


def _least(count: Callable[[int], int], lengths: range) -> int:
    """The first of these lengths that the tower takes."""
    for length in lengths[:64]:
        with contextlib.suppress(ConfigError):
            count(length)
            return length
    return lengths.stop


def _next_step(count: Callable[[int], int], low: int, value: int) -> int:
    """The shortest length above ``low`` with more than ``value`` features."""
    high = low + 1
    while count(high) <= value:
        low, high = high, high + 2 * (high - low)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) <= value else (low, middle)
    return high


def _first(config: Any, *names: str) -> int | None:
    """The first of these keys that a config has."""
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, list | tuple) and value:
            value = value[0]
        if isinstance(value, int):
            return value
    return None
