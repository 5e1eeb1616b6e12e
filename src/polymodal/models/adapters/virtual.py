"""Virtual tokens: what prompt and prefix tuning put before every sequence of a decoder.

They come first and see nothing of what follows, so that their keys and values are the same for every row. They are made
once for each pass and given to attention as if they came from a cache; real tokens follow at the positions after them.

Legend: ``B`` rows, ``T`` tokens of a row, ``S`` packed samples, ``P`` virtual tokens, ``D`` width, ``G`` key-value
heads, ``K`` head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from polymodal.core.errors import ConfigError
from polymodal.models.adapters.base import Adapted, Adapter, AdapterConfig, adapted_class
from polymodal.models.backbones.decoder import CausalBackbone, Decoder
from polymodal.models.layers.cache import KVCache
from polymodal.models.layers.layout import Layout
from polymodal.models.layers.memory import Memory

KeyValues = tuple[Tensor, Tensor]
"""Keys and values ``[1, G, P, K]`` of one layer."""


class VirtualConfig(AdapterConfig):
    """Base of the adapters that stand on a decoder and give it virtual tokens."""

    noun: ClassVar[str] = "decoder"

    def fits(self, module: nn.Module, field: str) -> bool:
        """Decoders whose positions are absolute or rotary."""
        return isinstance(module, Decoder) and module.config.transformer.relative_buckets is None


class VirtualTokens(Adapter):
    """Base of those adapters."""

    def key_values(self, decoder: AdaptedDecoder, before: list[KeyValues]) -> list[KeyValues]:
        """Keys and values of every layer, given those of the virtual tokens before these (empty: none)."""
        raise NotImplementedError


class VirtualCache(KVCache):
    """Stands in for a cache in one pass: before each layer's keys and values stand those of the virtual tokens.

    Worked example, two virtual tokens and two real ones, rows are queries: ``1 1 1 0`` and ``1 1 1 1``.

    Args:
        before: keys and values of the virtual tokens of each layer; empty if there are none.
        layout: of the real tokens, padded and causal, with the positions that they have after the virtual ones.
        records: keep the keys and values of this pass in :attr:`recorded`.
    """

    def __init__(self, before: Sequence[KeyValues], layout: Layout, *, records: bool = False) -> None:
        super().__init__(0, 1, 1, 0, 1)
        self.before, self.layout = before, layout
        self.is_pure = not records
        self.recorded: list[KeyValues] = []

    def begin(self, tokens: int) -> tuple[Tensor, Tensor | None, bool]:
        """See :meth:`KVCache.begin`."""
        positions_BT = self.layout.positions_BT
        assert positions_BT is not None
        if not self.before:
            return positions_BT, None, True
        mask = self.layout.mask
        if mask is None:
            mask = torch.ones(tokens, tokens, dtype=torch.bool, device=positions_BT.device).tril()[None, None]
        virtual = mask.new_ones(*mask.shape[:3], self.before[0][0].shape[2])
        return positions_BT, torch.cat((virtual, mask), -1), False

    def append(self, layer: int, keys_BHTK: Tensor, values_BHTK: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`KVCache.append`."""
        if not self.is_pure:
            self.recorded.append((keys_BHTK, values_BHTK))
        if not self.before:
            return keys_BHTK, values_BHTK
        rows = keys_BHTK.shape[0]
        keys, values = (part.to(keys_BHTK.dtype).expand(rows, -1, -1, -1) for part in self.before[layer])
        return torch.cat((keys, keys_BHTK), 2), torch.cat((values, values_BHTK), 2)

    def end(self, tokens: int, is_valid_BT: Tensor | None) -> None:
        """Nothing is kept."""


@adapted_class(Decoder)
class AdaptedDecoder(Adapted, Decoder):
    """A decoder that reads virtual tokens before every sequence: packed, padded, cached or not."""

    def forward(
        self, x_BTD: Tensor, layout: Layout, cache: KVCache | None = None, memory: Memory | None = None
    ) -> Tensor:
        """See :meth:`Decoder.forward`.

        Raises:
            ConfigError: if the virtual tokens leave no learned position for a real one.
        """
        if not self.active:
            return self._own(x_BTD, layout, cache, memory)
        if cache is not None and cache.num_virtual:
            return self._own(x_BTD, self._after(layout, cache.num_virtual, x_BTD), cache, memory)
        before = self.virtual_tokens()
        num_virtual = before[0][0].shape[2]
        if cache is not None:
            cache.reserve(before)
            return self._own(x_BTD, self._after(layout, num_virtual, x_BTD), cache, memory)
        if layout.segment_lengths is None:
            layout = self._after(layout, num_virtual, x_BTD)
            return self._own(x_BTD, layout, VirtualCache(before, layout), memory)
        index_ST, rows = _as_rows(layout, x_BTD.device)
        rows = self._after(rows, num_virtual, x_BTD)
        assert rows.is_valid_BT is not None
        states_STD = self._own(x_BTD[0][index_ST], rows, VirtualCache(before, rows), memory)
        return states_STD[rows.is_valid_BT][None]

    def read(self, x_BTD: Tensor, layout: Layout, read_K: Tensor, memory: Memory | None = None) -> Tensor:
        """See :meth:`Decoder.read`; behind virtual tokens, which are read with a cache, the whole stack runs."""
        own = CausalBackbone if self.active else Decoder
        return own.read(self, x_BTD, layout, read_K, memory)

    def virtual_tokens(self) -> list[KeyValues]:
        """Keys and values of every active adapter's tokens, in order."""
        before: list[KeyValues] = []
        for adapter in self.chosen:
            assert isinstance(adapter, VirtualTokens)
            new = adapter.key_values(self, before)
            before = [_joined(*pair) for pair in zip(before, new, strict=True)] if before else new
        return before

    def read_virtual(self, x_1PD: Tensor, before: list[KeyValues]) -> list[KeyValues]:
        """Run the stack over virtual tokens; their keys and values in every layer."""
        start = before[0][0].shape[2] if before else 0
        positions = start + torch.arange(x_1PD.shape[1], device=x_1PD.device)[None]
        layout = Layout.padded(None, causal=True, positions_BT=positions)
        cache = VirtualCache(before, layout, records=True)
        self._own(x_1PD, layout, cache)
        return cache.recorded

    def _own(self, x_BTD: Tensor, layout: Layout, cache: KVCache | None, memory: Memory | None = None) -> Tensor:
        return Decoder.forward(self, x_BTD, layout, cache, memory)

    def _after(self, layout: Layout, num_virtual: int, x_BTD: Tensor) -> Layout:
        """The layout with every position moved behind the virtual tokens."""
        positions_BT = layout.positions(x_BTD.shape[1], x_BTD.device) + num_virtual
        if self.embed_positions is not None:
            last = int(positions_BT.max())
            if last >= self.embed_positions.num_embeddings:
                raise ConfigError(
                    f"decoder: found {num_virtual} virtual tokens and {last + 1 - num_virtual} real ones, expected at "
                    f"most {self.embed_positions.num_embeddings} together, the learned positions; shorten one of them"
                )
        return replace(layout, positions_BT=positions_BT)


def _joined(before: KeyValues, new: KeyValues) -> KeyValues:
    return torch.cat((before[0], new[0]), 2), torch.cat((before[1], new[1]), 2)


def _as_rows(layout: Layout, device: torch.device) -> tuple[Tensor, Layout]:
    """Packed samples as padded rows: the place ``[S, T]`` of each of their tokens in the packed row, and the layout.

    Worked example, lengths ``(3, 2)``: places ``[[0 1 2] [3 4 4]]``, valid ``[[1 1 1] [1 1 0]]``.
    """
    lengths = layout.segment_lengths or ()
    lengths_S = torch.tensor(lengths, device=device)
    tokens_T = torch.arange(max(lengths), device=device)
    starts_S = lengths_S.cumsum(0) - lengths_S
    index_ST = starts_S[:, None] + torch.minimum(tokens_T[None], lengths_S[:, None] - 1)
    positions_BT = layout.positions(sum(lengths), device)[0][index_ST]
    return index_ST, Layout(True, tokens_T[None] < lengths_S[:, None], None, positions_BT)
