"""Weight-only storage in fewer bits: bfloat16, int8 and int4, for a model that is only used.

Linear layers of encoders, connectors and backbones are stored in int8 (one scale per output) or int4 (one scale and one
offset per group of inputs); activations are not quantised. Embeddings, norms, heads, and layers whose weight is shared
keep their precision: they are a small part of a large model, and the answer depends on them most.

Legend: ``...`` any leading axes, ``I`` inputs, ``O`` outputs, ``N`` groups of inputs.
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from polymodal.core.errors import ConfigError, MissingExtraError
from polymodal.models.compose import MultimodalModel

WEIGHTS = ("bf16", "int8", "int4")
_GROUPS = (64, 32)
"""Inputs that share a scale in int4, the first that divides a layer's."""
_CPU_OUTPUTS = 16
"""The packed CPU kernel takes a multiple of so many outputs."""


@dataclass(frozen=True, slots=True)
class Quantised:
    """What became of a model.

    Args:
        layers: how many layers are stored as what.
        bytes_before: of all parameters and buffers.
        bytes_after: likewise.
    """

    layers: dict[str, int]
    bytes_before: int
    bytes_after: int


@torch.no_grad()
def quantise(network: MultimodalModel, weights: str) -> Quantised:
    """Store a model's weights in fewer bits, in place; it computes the same within rounding, and can no longer train.

    ``int4`` stores layers that its kernel does not take (inputs no multiple of 32; on the CPU, outputs no multiple of
    16) in ``int8``. On CUDA, what is not quantised becomes bfloat16.

    Args:
        network: on its device.
        weights: ``bf16``, ``int8`` or ``int4``.

    Raises:
        ConfigError: if the kind is unknown, or there is no layer to quantise.
        MissingExtraError: if int8 or int4 is asked for and torchao is not installed.
    """
    if weights not in WEIGHTS:
        raise ConfigError(f"weights: found {weights!r}, expected one of {', '.join(WEIGHTS)}")
    before = num_bytes(network)
    device = next(network.parameters()).device
    counts: Counter[str] = Counter()
    if weights == "bf16" or device.type == "cuda":
        network.to(torch.bfloat16)
    if weights != "bf16":
        torchao = _torchao()
        layers = list(_layers(network))
        if not layers:
            raise ConfigError(f"weights: found no linear layer to store in {weights}, expected at least one; use bf16")
        for layer in layers:
            counts[_store(layer, weights, device, torchao)] += 1
    return Quantised(dict(counts), before, num_bytes(network))


def num_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones once, in the form that they are stored in."""
    tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return sum(_bytes(tensor) for tensor in tensors.values())


def _bytes(tensor: Tensor) -> int:
    if type(tensor) in (Tensor, nn.Parameter) or not hasattr(tensor, "__tensor_flatten__"):
        return tensor.numel() * tensor.element_size()
    names, _ = tensor.__tensor_flatten__()
    return sum(_bytes(getattr(tensor, name)) for name in names)


def _torchao() -> Any:
    """The library, quietly: on import it warns of every optional kernel that this machine has no use for."""
    for noisy in ("torchao", "torch.utils._pytree"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import torchao.quantization
            import torchao.quantization.utils
        except ImportError:
            raise MissingExtraError("torchao", "quant", "storing weights in int8 or int4") from None
    return torchao.quantization


def _layers(network: nn.Module) -> Iterator[nn.Linear]:
    """The linear layers to store in fewer bits."""
    owners = Counter(id(p) for _, p in network.named_parameters(remove_duplicate=False))
    for path, module in network.named_modules():
        if type(module) is nn.Linear and not path.startswith("heads.") and owners[id(module.weight)] == 1:
            yield module


def _store(layer: nn.Linear, weights: str, device: torch.device, torchao: Any) -> str:
    """Quantise one layer; what it is stored as."""
    group = next((size for size in _GROUPS if layer.in_features % size == 0), None)
    fits = group is not None and (device.type == "cuda" or layer.out_features % _CPU_OUTPUTS == 0)
    if weights == "int8" or not fits:
        torchao.quantize_(layer, torchao.Int8WeightOnlyConfig())
        return "int8"
    if device.type == "cuda":
        config = torchao.Int4WeightOnlyConfig(group_size=group, int4_packing_format="tile_packed_to_4d")
        torchao.quantize_(layer, config)
    else:
        assert group is not None
        _pack(layer, group, torchao)
    return "int4"


class Int4Linear(nn.Linear):
    """A linear layer whose weight is stored in int4, for the CPU.

    Buffers: ``packed`` uint8 ``[O, I / 2]`` in the kernel's order; ``scales`` ``[N, O, 2]``, scale and offset.
    """

    packed: Tensor
    scales: Tensor
    group: int

    def forward(self, input: Tensor) -> Tensor:
        """``[..., I]`` to ``[..., O]``, in the input's dtype."""
        flat = input.reshape(-1, self.in_features)
        out = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, self.packed, self.group, self.scales.to(flat.dtype))
        out = out if self.bias is None else out + self.bias.to(out.dtype)
        return out.view(*input.shape[:-1], self.out_features)  # type: ignore[no-any-return]

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """See :meth:`dequantised`; computed anew each time."""
        return self.dequantised()

    def dequantised(self) -> Tensor:
        """The weight that the layer stands for, ``[O, I]``."""
        eye = torch.eye(self.in_features, dtype=self.scales.dtype)
        out: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(eye, self.packed, self.group, self.scales)
        return out.t()


def _pack(layer: nn.Linear, group: int, torchao: Any) -> None:
    """Turn the object itself into an Int4Linear: every place that holds it sees it."""
    weight_OI = layer.weight.detach()
    numbers_OI, scales = torchao.utils.groupwise_affine_quantize_tensor(weight_OI, 4, group, dtype=weight_OI.dtype)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers_OI.to(torch.int32), 1)
    del layer.weight
    layer.__class__ = Int4Linear
    assert isinstance(layer, Int4Linear)
    layer.register_buffer("packed", packed)
    layer.register_buffer("scales", scales)
    layer.group = group
