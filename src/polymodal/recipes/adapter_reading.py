"""The hub's adapter files as adapters of ours; the inverse of :mod:`polymodal.recipes.adapter_layout`.

Legend: ``N`` layers, ``G`` key-value heads, ``P`` virtual tokens, ``K`` head width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from polymodal.core.errors import CheckpointError, ConfigError
from polymodal.models.adapters import ADAPTERS, Adapter, AdapterConfig
from polymodal.models.backbones.decoder import Decoder
from polymodal.recipes.adapter_names import PREFIX, HubNames, Place

_LEAVES = {
    "lora_A.weight": "lora_a",
    "lora_B.weight": "lora_b",
    "lora_embedding_A": "lora_a",
    "lora_embedding_B": "lora_b",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "ia3_l": "gain",
    "down": "down",
    "down_bias": "down_bias",
    "up": "up",
    "up_bias": "up_bias",
    "base_layer.weight": "base",
}
"""The end of a stored name -> our parameter."""
_UNKNOWN_OPTIONS = [
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "alora_invocation_tokens",
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
]
_KINDS = ("LORA", "IA3", "PROMPT_TUNING", "PREFIX_TUNING", "BOTTLENECK")


def read_layout(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], network: nn.Module, names: HubNames, where: str
) -> dict[str, Adapter]:
    """The adapters of a file, by our path.

    Args:
        config: ``adapter_config.json``.
        tensors: by stored name.
        network: the model that they are for; not changed.
        names: its hub names.
        where: for messages.

    Raises:
        CheckpointError: if tensors match nothing, are missing, or have another shape.
        ConfigError: if the kind or an option has no native form.
    """
    kind = config.get("peft_type")
    if kind not in _KINDS:
        raise ConfigError(f"{where}: found peft_type {kind!r}, expected one of {', '.join(_KINDS)}")
    set_options = [key for key in _UNKNOWN_OPTIONS if config.get(key)]
    if set_options or config.get("bias", "none") != "none":
        named = set_options[0] if set_options else "bias"
        raise ConfigError(f"{where}: found {named}: {config[named]!r}, which has no native form; expected it unset")
    if kind in ("PROMPT_TUNING", "PREFIX_TUNING"):
        return _read_virtual(kind, tensors, network, where)
    held = _by_layer(tensors, network, names, where)
    adapters = {}
    for path, leaves in held.items():
        own = _config(config, names.by_layer.get(path), path, leaves, where)
        module = network.get_submodule(path)
        adapter = own.build(module, path)
        _fill(adapter, leaves, f"{where}: {path}")
        adapters[path] = adapter
    return adapters


def _by_layer(
    tensors: Mapping[str, Tensor], network: nn.Module, names: HubNames, where: str
) -> dict[str, dict[str, Tensor]]:
    """Our layer -> our parameter -> tensor.

    Raises:
        CheckpointError: listing every tensor that matches nothing.
    """
    held: dict[str, dict[str, Tensor]] = {}
    strange = []
    for stored, tensor in tensors.items():
        found = re.fullmatch(rf"(?:{re.escape(PREFIX)})?(.+?)\.({'|'.join(map(re.escape, _LEAVES))})", stored)
        places = None if found is None else _places(found[1], found[2], network, names)
        if found is None or not places:
            strange.append(stored)
            continue
        for place in places.values():
            leaf = _LEAVES[found[2]]
            piece = _piece(tensor, leaf, place)
            if leaf == "base":
                _same_base(piece, network.get_submodule(place.layer), f"{where}: {stored}")
            else:
                held.setdefault(place.layer, {})[leaf] = piece
    if strange:
        raise CheckpointError(
            f"{where}: {len(strange)} of {len(tensors)} tensors match nothing in this model, so that the adapter would "
            f"not do what it learned: {', '.join(sorted(strange))}. Was it trained on another base?"
        )
    return held


def _places(module: str, leaf: str, network: nn.Module, names: HubNames) -> dict[int, Place] | None:
    if leaf in ("down", "down_bias", "up", "up_bias"):
        known = any(path == module for path, _ in network.named_modules())
        return {0: Place(module, module)} if known else None
    return names.module(module)


def _piece(tensor: Tensor, leaf: str, place: Place) -> Tensor:
    """What a layer of ours takes of a fused tensor: its outputs."""
    if leaf == "base":
        tensor = tensor.t() if place.is_transposed else tensor
    if place.of == 1 or leaf == "lora_a" or (leaf == "gain" and tensor.shape[0] == 1):
        return tensor
    return tensor.chunk(place.of)[place.index]


def _same_base(tensor: Tensor, module: nn.Module, where: str) -> None:
    weight = module.weight
    assert isinstance(weight, Tensor)
    if tensor.shape != weight.shape or not bool((tensor.to(weight) == weight).all()):
        raise CheckpointError(f"{where}: brings another base weight than this model has; expected the same base")


def _config(
    config: Mapping[str, Any], place: Place | None, path: str, leaves: Mapping[str, Tensor], where: str
) -> AdapterConfig:
    if config["peft_type"] == "BOTTLENECK":
        return ADAPTERS.parse({**config["bottleneck"], "match": [path]}, where)
    if config["peft_type"] == "IA3":
        gain = leaves["gain"]
        on_inputs = gain.ndim == 2 and gain.shape[0] == 1
        return ADAPTERS.parse({"use": "ia3", "match": [path], "inputs": [path] if on_inputs else []})
    if "lora_a" not in leaves:
        raise CheckpointError(f"{where}: {path}: found no lora_A beside {sorted(leaves)}, expected both halves")
    module = path if place is None else place.module
    data = {
        "use": "dora" if config.get("use_dora") else "lora",
        "rank": leaves["lora_a"].shape[0],
        "alpha": _pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8)),
        "dropout": config.get("lora_dropout", 0.0),
        "rank_stabilised": bool(config.get("use_rslora")),
        "match": [path],
    }
    return ADAPTERS.parse(data, where)


def _pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that ends a module's name, as the reference library reads them."""
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern.removeprefix('^')})", module):
            return value
    return default


def _fill(adapter: Adapter, leaves: Mapping[str, Tensor], where: str) -> None:
    own = dict(adapter.named_parameters())
    if own.keys() != leaves.keys():
        raise CheckpointError(f"{where}: found {sorted(leaves)}, expected {sorted(own)}")
    for name, parameter in own.items():
        tensor = leaves[name].reshape(-1) if name in ("gain", "magnitude") else leaves[name]
        if tensor.shape != parameter.shape:
            raise CheckpointError(
                f"{where}: {name}: found shape {tuple(tensor.shape)}, expected {tuple(parameter.shape)}; was the "
                "adapter trained on another base?"
            )
        parameter.data.copy_(tensor)


def _read_virtual(kind: str, tensors: Mapping[str, Tensor], network: nn.Module, where: str) -> dict[str, Adapter]:
    decoders = {path: module for path, module in network.named_modules() if isinstance(module, Decoder)}
    if set(tensors) != {"prompt_embeddings"}:
        raise CheckpointError(f"{where}: found the tensors {sorted(tensors)}, expected 'prompt_embeddings' alone")
    if len(decoders) != 1:
        raise CheckpointError(f"{where}: virtual tokens are for a model with a decoder, found {len(decoders)}")
    (path, decoder), stored = next(iter(decoders.items())), tensors["prompt_embeddings"]
    use = "prompt" if kind == "PROMPT_TUNING" else "prefix"
    adapter = ADAPTERS.parse({"use": use, "tokens": stored.shape[0]}, where).build(decoder, "")
    if use == "prompt":
        _fill(adapter, {"prompt": stored}, where)
        return {path: adapter}
    layers, heads, tokens, head_dim = dict(adapter.named_parameters())["keys"].shape
    if stored.shape[1] != 2 * layers * heads * head_dim:
        raise CheckpointError(
            f"{where}: prompt_embeddings: found {stored.shape[1]} numbers a token, expected "
            f"{2 * layers * heads * head_dim}: {layers} layers, {heads} key-value heads of {head_dim}"
        )
    both = stored.view(tokens, layers, 2, heads, head_dim).permute(1, 2, 3, 0, 4)
    _fill(adapter, {"keys": both[:, 0], "values": both[:, 1]}, where)
    return {path: adapter}
