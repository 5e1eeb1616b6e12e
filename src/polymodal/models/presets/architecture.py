"""A published architecture: a translation of its configs, a table of its tensor names, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from polymodal.core.errors import ConfigError
from polymodal.models.compose.config import ModelConfig
from polymodal.models.weights import HubConfigs, NameTable


@dataclass(frozen=True, slots=True)
class Size:
    """A published size.

    Args:
        config: its ``config.json``, as far as it differs from the library's defaults.
        parameters: its number of parameters, shared ones once.
        preprocessor: its ``preprocessor_config.json``.
        unused: how many of the parameters are none of ours: what comes after the layer whose features are read, and
            fixed tables of positions.
    """

    config: Mapping[str, Any]
    parameters: int
    preprocessor: Mapping[str, Any] = field(default_factory=dict)
    unused: int = 0


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What an export must know of the tokenizer.

    Args:
        size: number of ids.
        controls: control tokens and their ids.
        bos_id: id of the token that begins a text, if there is one.
        eos_id: id of the token that ends one.
        pad_id: id of the token that fills rows.
    """

    size: int
    controls: Mapping[str, int] = field(default_factory=dict)
    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None


@dataclass(frozen=True, slots=True)
class Architecture:
    """One published architecture.

    Args:
        name: what ``presets`` and ``export`` call it.
        model_types: the values of ``model_type`` in ``config.json`` that it reads.
        source: paper and section.
        to_model: configs of a checkpoint -> plain data of a :class:`ModelConfig`. Raises ConfigError for what the
            architecture knows and we do not build; nothing is dropped in silence.
        names: (model, stored names or () when exporting) -> the table of names.
        to_hub: (model, vocabulary) -> JSON files by name (``config.json``, ``preprocessor_config.json``, ...). Raises
            ConfigError if the model is not of this architecture.
        sizes: published checkpoints by name.
        classes: the library's classes (``architectures`` in ``config.json``) that it reads, where another one reads the
            others of the same ``model_type``; empty for all.
        config_file: what an export calls its config.
        weights_file: what an export calls its weights.
        float32: pieces of stored names (``wo`` of ``block.0.wo.weight``) whose tensors compute in float32 in a float16
            checkpoint, where the architecture would overflow or lose too much otherwise (the library's
            ``_keep_in_fp32_modules``).
    """

    name: str
    model_types: tuple[str, ...]
    source: str
    to_model: Callable[[HubConfigs], dict[str, Any]]
    names: Callable[[ModelConfig, Collection[str]], NameTable]
    to_hub: Callable[[ModelConfig, Vocabulary], dict[str, dict[str, Any]]]
    sizes: Mapping[str, Size] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    config_file: str = "config.json"
    weights_file: str = "model.safetensors"
    float32: tuple[str, ...] = ()

    def reads(self, configs: HubConfigs) -> bool:
        """Whether it reads a checkpoint of these configs."""
        return configs.model_type in self.model_types and (
            not self.classes or bool({*configs.classes} & {*self.classes})
        )

    def model(self, configs: HubConfigs) -> ModelConfig:
        """The model of a checkpoint's configs.

        Raises:
            ConfigError: if a config asks for what we do not build, naming it.
        """
        return ModelConfig.parse(self.to_model(configs), f"{self.name} ({configs.folder or 'config'})")


def require(configs: Mapping[str, Any], where: str, **expected: Any) -> None:
    """Prove that config values are those that the translation assumes; an absent key counts as fitting.

    Worked example: ``require(config, "gpt2", scale_attn_by_inverse_layer_idx=False)``.

    Raises:
        ConfigError: naming the first key that differs.
    """
    for key, value in expected.items():
        allowed = value if isinstance(value, tuple) else (value,)
        if key in configs and configs[key] not in allowed:
            raise ConfigError(
                f"{where}: found {key}: {configs[key]!r}, expected {' or '.join(map(repr, allowed))}: there is no "
                "native form of it; use the adapter, {use: transformers, from: ...}"
            )
