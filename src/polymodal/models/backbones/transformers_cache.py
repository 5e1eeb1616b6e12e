"""Incremental decoding of library models, behind the interface of our key-value cache.

Shape legend: ``B`` rows, ``T`` new tokens, ``L`` slots, ``D`` width of the embeddings, ``S`` width of the states.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor

from polymodal.core.errors import ConfigError
from polymodal.models.layers.cache import KVCache
from polymodal.models.transformers_library import library

Run = Callable[..., Tensor]
"""``(x_BTD, **options) -> states [B, T, S]``."""


class Cache(KVCache, ABC):
    """What a library model has read; rows may have different lengths.

    Args:
        rows: ``B``.
        max_tokens: the most tokens of a row.
        device: where they are.
    """

    def __init__(self, rows: int, max_tokens: int, device: torch.device) -> None:
        self.max_tokens = max_tokens
        self.memory, self.memory_keys = None, {}
        self.device = device
        self._lengths = [0] * rows

    @property
    def lengths_B(self) -> Tensor:
        """Tokens in each row."""
        return torch.tensor(self._lengths, dtype=torch.int64, device=self.device)

    def read(self, run: Run, x_BTD: Tensor, is_valid_BT: Tensor | None) -> Tensor:
        """Read new tokens, padded on the right.

        Returns:
            Their states ``[B, T, S]``; meaningless at padding.

        Raises:
            ConfigError: if they do not fit.
        """
        if self.length + x_BTD.shape[1] > self.max_tokens:
            raise ConfigError(
                f"key-value cache: found {self.length} + {x_BTD.shape[1]} tokens, expected at most {self.max_tokens}; "
                "make the cache larger or shorten the prompt"
            )
        states = self._read(run, x_BTD, is_valid_BT)
        self.end(x_BTD.shape[1], is_valid_BT)
        return states

    def clone(self, rows: int | None = None, max_tokens: int | None = None) -> Self:
        """See :meth:`KVCache.clone`."""
        if rows is not None and self.rows != 1:
            raise ConfigError(f"key-value cache: found {self.rows} rows, expected 1 row to repeat {rows} times")
        slots = self.max_tokens if max_tokens is None else max_tokens
        if slots < self.length:
            raise ConfigError(f"key-value cache: found {self.length} tokens, expected at most the copy's {slots}")
        twin = copy.copy(self)
        twin.max_tokens = slots
        twin._lengths = list(self._lengths)
        twin._own()
        if rows is not None:
            twin.select(torch.zeros(rows, dtype=torch.int64, device=self.device))
        return twin

    def select(self, rows_B: Tensor) -> None:
        """See :meth:`KVCache.select`."""
        self._select(rows_B)
        self._lengths = [self._lengths[row] for row in rows_B.tolist()]

    @abstractmethod
    def _read(self, run: Run, x_BTD: Tensor, is_valid_BT: Tensor | None) -> Tensor: ...

    @abstractmethod
    def _select(self, rows_B: Tensor) -> None: ...

    @abstractmethod
    def _own(self) -> None:
        """Make what is held independent of the cache that this one was copied from."""


class LibraryCache(Cache):
    """The library's keys and values; rows end together, padding stands before them, as the library's masks expect."""

    def __init__(self, rows: int, max_tokens: int, device: torch.device) -> None:
        super().__init__(rows, max_tokens, device)
        # Without the model's config every layer keeps all it has read, sliding ones too, so that a prefix can be cut.
        self._held = library().DynamicCache()

    @property
    def num_bytes(self) -> int:
        """Bytes of all keys and values."""
        tensors = [t for layer in self._held.layers for t in (layer.keys, layer.values) if t is not None]
        return sum(t.numel() * t.element_size() for t in tensors)

    def _read(self, run: Run, x_BTD: Tensor, is_valid_BT: Tensor | None) -> Tensor:
        rows, tokens = x_BTD.shape[:2]
        if is_valid_BT is None or bool(is_valid_BT.all()):
            return run(x_BTD, past_key_values=self._held, use_cache=True, **self._mask(tokens))
        if self.length:
            raise ConfigError("found padded tokens after the first ones, expected the same number in every row")
        # Right padding becomes left padding: slot t of a row holds its token t - (longest - own length).
        new_B = is_valid_BT.sum(dim=1)
        place_BT = torch.arange(tokens, device=x_BTD.device) - (tokens - new_B)[:, None]
        x_BTD = x_BTD.gather(1, place_BT.clamp(min=0)[..., None].expand_as(x_BTD))
        options = {"attention_mask": (place_BT >= 0).long(), "position_ids": place_BT.clamp(min=0)}
        states = run(x_BTD, past_key_values=self._held, use_cache=True, **options)
        back_BT = (torch.arange(tokens, device=x_BTD.device) + (tokens - new_B)[:, None]).clamp(max=tokens - 1)
        return states.gather(1, back_BT[..., None].expand(rows, tokens, states.shape[-1]))

    def _mask(self, tokens: int) -> dict[str, Tensor]:
        """The mask and the positions of ``tokens`` new ones; nothing where no row has padding."""
        if min(self._lengths) == self.length:
            return {}
        slots = torch.arange(self.length + tokens, device=self.device)
        mask = (slots >= (self.length - self.lengths_B)[:, None]).long()
        return {
            "attention_mask": mask,
            "position_ids": self.lengths_B[:, None] + torch.arange(tokens, device=self.device),
        }

    def crop(self, length: int) -> None:
        """See :meth:`KVCache.crop`.

        Raises:
            ConfigError: if rows of different lengths are to be cut.
        """
        if length >= self.length:
            return
        if min(self._lengths) != self.length:
            raise ConfigError("found rows of different lengths, expected equal ones: only those can be cut")
        self._held.crop(length - self.length)
        super().crop(length)

    def _select(self, rows_B: Tensor) -> None:
        self._held.batch_select_indices(rows_B)
        # Slots that are padding in every row that stays.
        unused = self.length - max(self._lengths[row] for row in rows_B.tolist())
        for layer in self._held.layers if unused else ():
            layer.keys, layer.values = layer.keys[:, :, unused:], layer.values[:, :, unused:]

    def _own(self) -> None:
        self._held = copy.deepcopy(self._held)


class ReplayCache(Cache):
    """The embeddings of everything read, which is read again for every new token: exact for any architecture, slow."""

    def __init__(self, rows: int, max_tokens: int, device: torch.device) -> None:
        super().__init__(rows, max_tokens, device)
        self._x_BLD: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of the embeddings."""
        return 0 if self._x_BLD is None else self._x_BLD.numel() * self._x_BLD.element_size()

    def _read(self, run: Run, x_BTD: Tensor, is_valid_BT: Tensor | None) -> Tensor:
        rows, tokens, width = x_BTD.shape
        end = self.length + tokens
        whole = x_BTD.new_zeros(rows, end, width)
        if self._x_BLD is not None:
            whole[:, : self.length] = self._x_BLD[:, : self.length]
        slots_BT = self.lengths_B[:, None] + torch.arange(tokens, device=x_BTD.device)
        whole = whole.scatter(1, slots_BT[..., None].expand_as(x_BTD), x_BTD)
        self._x_BLD = whole
        states: Any = run(whole)
        return torch.as_tensor(states.gather(1, slots_BT[..., None].expand(rows, tokens, states.shape[-1])))

    def _select(self, rows_B: Tensor) -> None:
        if self._x_BLD is not None:
            self._x_BLD = self._x_BLD[rows_B]

    def _own(self) -> None:
        """Nothing is written in place."""
