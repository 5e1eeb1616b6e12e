"""Adapters as the hub's files hold them: ``adapter_config.json`` and tensors by the hub's names.

Where the hub fuses what are several layers of ours (GPT-2's queries, keys and values), their updates are joined into
one of the sum of their ranks, block by block, which is exact.

Legend: ``I`` inputs, ``O`` outputs, ``R`` rank, ``P`` virtual tokens, ``D`` width.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from polymodal.core.errors import ConfigError
from polymodal.models.adapters import Adapter
from polymodal.models.adapters.bottleneck import Bottleneck
from polymodal.models.adapters.dora import DoRA
from polymodal.models.adapters.ia3 import IA3
from polymodal.models.adapters.lora import EmbeddingLoRA, LowRank, LowRankConfig
from polymodal.models.adapters.prefix import Prefix
from polymodal.models.adapters.prompt import Prompt
from polymodal.recipes.adapter_names import PREFIX, HubNames, Place, pieces_of

Files = tuple[dict[str, Any], dict[str, Tensor]]
"""The config, and the tensors by name."""


def to_layout(adapters: Mapping[str, Adapter], names: HubNames, where: str) -> Files:
    """Config and tensors of one adapter.

    Args:
        adapters: our path -> the adapter there.
        names: the hub's names.
        where: for messages.

    Raises:
        ConfigError: if the hub's layout cannot hold it.
    """
    kinds = sorted({adapter.config.use for adapter in adapters.values()})  # type: ignore[attr-defined]
    if len(kinds) != 1:
        raise ConfigError(f"{where}: found the kinds {kinds} under one name, expected one kind; name them apart")
    first = next(iter(adapters.values()))
    common = {"base_model_name_or_path": names.base, "inference_mode": True, "modules_to_save": None}
    if isinstance(first, Prompt | Prefix):
        config, tensors = _virtual(first)
    elif isinstance(first, Bottleneck):
        config, tensors = _bottleneck(adapters)
    elif isinstance(first, IA3):
        config, tensors = _ia3(adapters, names, where)
    else:
        config, tensors = _low_rank(adapters, names, where)
    return {**common, **config}, tensors


def _low_rank(adapters: Mapping[str, Adapter], names: HubNames, where: str) -> Files:
    tensors: dict[str, Tensor] = {}
    shapes: dict[str, tuple[int, float]] = {}
    configs: list[LowRankConfig] = [adapter.config for adapter in adapters.values()]  # type: ignore[misc]
    for key, values in (
        ("dropout", {c.dropout for c in configs}),
        ("rank_stabilised", {c.rank_stabilised for c in configs}),
    ):
        if len(values) != 1:
            raise ConfigError(f"{where}: found {key} {sorted(values)}, expected one value for all layers")
    for module, pieces in pieces_of(names, iter(adapters)).items():
        places = [names.by_layer[layer] for layer in pieces.values()]
        held, shapes[module] = _joined([adapters[place.layer] for place in places], places, where)  # type: ignore[misc]
        tensors.update({f"{PREFIX}{module}.{leaf}": tensor for leaf, tensor in held.items()})
    (rank, alpha), _ = Counter(shapes.values()).most_common(1)[0]
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": configs[0].dropout,
        "use_rslora": configs[0].rank_stabilised,
        "use_dora": isinstance(next(iter(adapters.values())), DoRA),
        "bias": "none",
        "fan_in_fan_out": any(names.by_layer[layer].is_transposed for layer in adapters),
        "target_modules": list(shapes),
        "rank_pattern": {module: own for module, (own, _) in shapes.items() if own != rank},
        "alpha_pattern": {module: own for module, (_, own) in shapes.items() if own != alpha},
    }
    return config, tensors


def _joined(
    adapters: Sequence[LowRank], places: Sequence[Place], where: str
) -> tuple[dict[str, Tensor], tuple[int, float]]:
    """Leaves of a hub module's update, its rank and its alpha."""
    config = adapters[0].config
    if isinstance(adapters[0], EmbeddingLoRA):
        pair: dict[str, Tensor] = {"lora_embedding_A": adapters[0].lora_a, "lora_embedding_B": adapters[0].lora_b}
        return pair, (config.rank, _plain(config.alpha))
    whole, of = places[0].of == len(places), places[0].of
    if isinstance(adapters[0], DoRA) and not whole:
        raise ConfigError(
            f"{where}: the hub fuses {of} layers into {places[0].module}, and a DoRA stands on {len(places)} of them; "
            "expected all or none"
        )
    leaves: dict[str, Tensor] = {}
    if of == 1 or (whole and all(torch.equal(a.lora_a, adapters[0].lora_a) for a in adapters)):
        leaves["lora_A.weight"] = adapters[0].lora_a
        leaves["lora_B.weight"] = torch.cat([a.lora_b for a in adapters])
        rank, alpha = config.rank, config.alpha
    else:
        leaves["lora_A.weight"] = torch.cat([a.lora_a for a in adapters])
        rank = len(leaves["lora_A.weight"])
        alpha = config.scale * (math.sqrt(rank) if config.rank_stabilised else rank)
        outputs = adapters[0].lora_b.shape[0]
        joined = adapters[0].lora_b.new_zeros(of * outputs, rank)
        start = 0
        for adapter, place in zip(adapters, places, strict=True):
            end = start + adapter.config.rank
            joined[place.index * outputs : (place.index + 1) * outputs, start:end] = (
                adapter.lora_b.detach() * adapter.config.scale / config.scale
            )
            start = end
        leaves["lora_B.weight"] = joined
    if isinstance(adapters[0], DoRA):
        leaves["lora_magnitude_vector"] = torch.cat([a.magnitude for a in adapters if isinstance(a, DoRA)])
    return leaves, (rank, _plain(alpha))


def _plain(alpha: float) -> float:
    return int(alpha) if alpha == int(alpha) else alpha


def _ia3(adapters: Mapping[str, Adapter], names: HubNames, where: str) -> Files:
    tensors: dict[str, Tensor] = {}
    feedforward, modules = [], []
    for module, pieces in pieces_of(names, iter(adapters)).items():
        own: list[IA3] = [adapters[layer] for layer in pieces.values()]  # type: ignore[misc]
        of = names.by_layer[next(iter(pieces.values()))].of
        gains = {index: adapter.gain.detach() for index, adapter in zip(pieces, own, strict=True)}
        if own[0].on_inputs:
            if of > 1:
                raise ConfigError(
                    f"{where}: the hub fuses {of} layers into {module}, whose inputs cannot differ in gain"
                )
            feedforward.append(module)
            tensors[f"{PREFIX}{module}.ia3_l"] = gains[0][None]
        else:
            ones = torch.ones_like(next(iter(gains.values())))
            tensors[f"{PREFIX}{module}.ia3_l"] = torch.cat([gains.get(index, ones) for index in range(of)])[:, None]
        modules.append(module)
    transposed = any(names.by_layer[layer].is_transposed for layer in adapters)
    config = {"target_modules": modules, "feedforward_modules": feedforward, "fan_in_fan_out": transposed}
    return {"peft_type": "IA3", "task_type": None, **config}, tensors


def _virtual(adapter: Prompt | Prefix) -> Files:
    common = {"task_type": "CAUSAL_LM", "num_transformer_submodules": 1, "num_virtual_tokens": adapter.config.tokens}
    if isinstance(adapter, Prompt):
        config = {"peft_type": "PROMPT_TUNING", "token_dim": adapter.prompt.shape[1], "prompt_tuning_init": "RANDOM"}
        return {**common, **config}, {"prompt_embeddings": adapter.prompt}
    layers, heads, tokens, head_dim = adapter.keys.shape
    # [N, 2, G, P, K] -> [P, N, 2, G, K], as the hub flattens it.
    flat_PD = torch.stack((adapter.keys, adapter.values), 1).permute(3, 0, 1, 2, 4).reshape(tokens, -1)
    config = {
        "peft_type": "PREFIX_TUNING",
        "token_dim": heads * head_dim,
        "num_layers": layers,
        "num_attention_heads": heads,
        "prefix_projection": False,
    }
    return {**common, **config}, {"prompt_embeddings": flat_PD}


def _bottleneck(adapters: Mapping[str, Adapter]) -> Files:
    """The hub has no layout for these: ours, under our names."""
    first = next(iter(adapters.values())).config
    tensors: dict[str, Tensor] = {
        f"{PREFIX}{path}.{leaf}": tensor
        for path, adapter in adapters.items()
        for leaf, tensor in adapter.named_parameters()
    }
    config = {"peft_type": "BOTTLENECK", "target_modules": list(adapters)}
    return {**config, "bottleneck": {**first.to_data(), "match": list(adapters)}}, tensors
