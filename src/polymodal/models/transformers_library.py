"""What the adapter needs of the ``transformers`` library, which is an optional extra and imported in functions only.

The encoder ``encoders.transformers_encoder`` and the backbone ``backbones.transformers_decoder`` stand on it; nothing
else of the package knows the library. It is pinned to one minor version: its interfaces move with each.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polymodal.core.config import unknown
from polymodal.core.errors import CheckpointError, ConfigError, MissingExtraError

VERSION = "5.23"
"""The minor version that the adapter is tested with."""
_NOT_ARCHITECTURE = ("_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype", "auto_map")
"""Keys of ``config.json`` that say where a checkpoint comes from and how it is stored, not what is computed."""


def library() -> Any:
    """The library.

    Raises:
        MissingExtraError: if it is not installed.
        ConfigError: if another minor version is.
    """
    try:
        import transformers
    except ImportError:
        raise MissingExtraError("transformers", "hub", "a part with use: transformers") from None
    # Its bars for every file that it reads or writes are no concern of who trains a recipe.
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if not transformers.__version__.startswith(f"{VERSION}."):
        raise ConfigError(
            f"use: transformers: found version {transformers.__version__} of the library, expected {VERSION}.x, which "
            f"the adapter is proven with; pip install 'transformers=={VERSION}.*'"
        )
    return transformers


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The architecture that a folder's ``config.json`` names, without what does not concern it.

    Raises:
        CheckpointError: if there is none, or it is no JSON object.
    """
    path = Path(folder) / "config.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}; expected a checkpoint folder") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: found {type(data).__name__}, expected a JSON object")
    return {key: value for key, value in data.items() if key not in _NOT_ARCHITECTURE}


def library_config(data: Mapping[str, Any]) -> Any:
    """The library's config object.

    Raises:
        ConfigError: if it does not know the ``model_type``, or refuses a value.
    """
    known = library().CONFIG_MAPPING
    kind = data.get("model_type")
    if kind not in known:
        raise ConfigError(f"config.model_type: {unknown('architecture', kind, known)}"[:600])
    try:
        config = known[kind].from_dict(dict(data))
    except Exception as error:  # noqa: BLE001  (the library checks configs with errors of many kinds)
        raise ConfigError(f"config: the library refuses this {kind} config: {error}") from None
    return config


def from_config(auto: Any, config: Any) -> nn.Module:
    """A model with new random weights in float32.

    Args:
        auto: one of the library's auto classes, or a model class.
        config: the library's config.

    Raises:
        ConfigError: if the auto class has no model for it, or it cannot be built.
    """
    try:
        build = getattr(auto, "from_config", None) or auto._from_config
        model: nn.Module = build(config, dtype=torch.float32)
    except Exception as error:  # noqa: BLE001  (wrong sizes raise whatever they provoke)
        raise ConfigError(f"config: {config.model_type} cannot be built by {auto.__name__}: {error}") from None
    return model


def linear_for_conv1d(model: nn.Module) -> nn.Module:
    """``model`` with every transposed linear layer (GPT-2's ``Conv1D``) as an ordinary one, so that adapters fit."""
    transposed = library().pytorch_utils.Conv1D
    for path, module in list(model.named_modules()):
        if isinstance(module, transposed):
            inputs, outputs = module.weight.shape
            with torch.device("meta"):
                linear = nn.Linear(inputs, outputs)
            linear.weight = nn.Parameter(module.weight.detach().t().contiguous())
            linear.bias = nn.Parameter(module.bias.detach())
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, linear)
    return model


def loaded_part(loader: Callable[[], tuple[Any, Collection[str]]], where: str, optional: tuple[str, ...] = ()) -> Any:
    """A model of the library with a checkpoint's weights.

    Args:
        loader: gives the model and the names of the tensors that the checkpoint lacks.
        where: the folder, for messages.
        optional: beginnings of names that may be absent, because the part does not use them.

    Raises:
        CheckpointError: if the library cannot read it, or a tensor is missing or has another shape.
    """
    try:
        model, missing = loader()
    except Exception as error:  # noqa: BLE001  (damaged files, wrong shapes and odd layouts raise many kinds)
        raise CheckpointError(f"{where}: the library cannot load it: {error}") from None
    needed = sorted(name for name in missing if not optional or not name.startswith(optional))
    if needed:
        raise CheckpointError(
            f"{where}: {len(needed)} tensor(s) missing: {', '.join(needed[:6])}; expected all that config.json needs"
        )
    return model


def set_checkpointing(model: Any, is_on: bool) -> None:
    """Recompute the blocks of a library model in the backward pass, where it can."""
    if is_on and model.supports_gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    elif not is_on and model.is_activation_checkpointing:
        model.activation_checkpointing_disable()


def tensors_of(output: Any) -> dict[str, Tensor]:
    """The tensors of a model's output by name."""
    return {name: value for name, value in output.items() if isinstance(value, Tensor)}
