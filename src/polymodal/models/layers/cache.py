"""Keys and values of what a causal transformer has read, preallocated.

Legend: ``B`` rows, ``T`` new tokens, ``H`` key-value heads, ``K`` head width, ``M`` tokens in the cache after the step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from polymodal.core.errors import ConfigError
from polymodal.models.layers.memory import Memory


class KVCache:
    """The state of incremental decoding: passed in, filled in place, owned by the caller.

    Rows may have different lengths: prompts are padded on the right, and each row appends at its own place, over its
    padding. A query at position p sees the slots 0 .. p of its row, so that stale slots are never seen.

    Args:
        num_layers: layers of the transformer.
        rows: ``B``.
        kv_heads: ``H``.
        max_tokens: slots of each row.
        head_dim: ``K``.
        dtype: of keys and values.
        device: where they are.
    """

    def __init__(
        self,
        num_layers: int,
        rows: int,
        kv_heads: int,
        max_tokens: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (num_layers, rows, kv_heads, max_tokens, head_dim)
        # Zeros, not uninitialised memory: a masked slot that held NaN would still poison the weighted sum.
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.max_tokens = max_tokens
        self.memory: Memory | None = None
        """What cross-attending layers look at, as the next tokens see it; encoded once."""
        self.memory_keys: dict[int, tuple[Tensor, Tensor]] = {}
        """Its keys and values ``[B, H, M, K]`` of each such layer."""
        self.num_virtual = 0
        """Slots before the first token of every row that hold virtual tokens; see :meth:`reserve`."""
        self.is_pure = False
        """Whether :meth:`append` keeps nothing, so that a block may be run twice."""
        self.later: KVCache | None = None
        """Of the later layers, where they read fewer tokens; see :meth:`split`."""
        self.first_layer = 0
        """The layer that the first keys and values are of."""
        self._lengths = [0] * rows
        self._slots_BT: Tensor | None = None
        self._end = 0

    @property
    def rows(self) -> int:
        """``B``."""
        return len(self._lengths)

    @property
    def length(self) -> int:
        """Tokens in the longest row."""
        return max(self._lengths)

    @property
    def lengths_B(self) -> Tensor:
        """Tokens in each row, int64 on the cache's device."""
        return torch.tensor(self._lengths, dtype=torch.int64, device=self.keys.device)

    def reserve(self, virtual: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Put virtual tokens before every row: always seen, never counted as tokens of the row.

        Args:
            virtual: keys and values ``[1, H, P, K]`` of each layer.

        Raises:
            ConfigError: if the cache has read something already.
        """
        if self.length or self.num_virtual:
            raise ConfigError(f"key-value cache: found {self.length} tokens, expected none before virtual tokens")
        keys = torch.stack([keys[0] for keys, _ in virtual]).to(self.keys)[:, None].expand(-1, self.rows, -1, -1, -1)
        values = torch.stack([v[0] for _, v in virtual]).to(self.values)[:, None].expand(-1, self.rows, -1, -1, -1)
        self.keys = torch.cat((keys, self.keys), 3)
        self.values = torch.cat((values, self.values), 3)
        self.num_virtual = keys.shape[3]

    def begin(self, tokens: int) -> tuple[Tensor, Tensor | None, bool]:
        """Open a step that reads ``tokens`` new tokens in every row.

        Returns:
            positions ``[B, T]`` or ``[1, T]`` of the new tokens, the mask ``[B or 1, 1, T, M]`` or None, and whether
            attention among the new tokens alone with a causal flag is enough (the cache is empty).

        Raises:
            ConfigError: if the tokens do not fit.
        """
        start, device = self.length, self.keys.device
        if start + tokens > self.max_tokens:
            raise ConfigError(
                f"key-value cache: found {start} + {tokens} tokens, expected at most {self.max_tokens}; "
                "make the cache larger or shorten the prompt"
            )
        self._end = start + tokens
        new_T = torch.arange(tokens, device=device)
        if min(self._lengths) == start:
            self._slots_BT = None
            positions_BT = (start + new_T)[None]
            if tokens == 1 or (start == 0 and not self.num_virtual):
                return positions_BT + self.num_virtual, None, start == 0 and not self.num_virtual
        else:
            self._slots_BT = positions_BT = self.lengths_B[:, None] + new_T
        # Virtual tokens have negative places here, so that every token sees them.
        seen_M = torch.arange(-self.num_virtual, self._end, device=device)
        return positions_BT + self.num_virtual, (seen_M <= positions_BT[..., None])[:, None], False

    def append(self, layer: int, keys_BHTK: Tensor, values_BHTK: Tensor) -> tuple[Tensor, Tensor]:
        """Store one layer's new keys and values; returns views ``[B, H, M, K]`` of all that the step may see."""
        keys, values = self.keys[layer - self.first_layer], self.values[layer - self.first_layer]
        end = self.num_virtual + self._end
        if self._slots_BT is None:
            start = end - keys_BHTK.shape[2]
            keys[:, :, start:end] = keys_BHTK
            values[:, :, start:end] = values_BHTK
        else:
            rows_B1 = torch.arange(self.rows, device=keys.device)[:, None]
            slots_BT = self._slots_BT + self.num_virtual
            keys[rows_B1, :, slots_BT] = keys_BHTK.transpose(1, 2).to(keys.dtype)
            values[rows_B1, :, slots_BT] = values_BHTK.transpose(1, 2).to(values.dtype)
        return keys[:, :, :end], values[:, :, :end]

    def end(self, tokens: int, is_valid_BT: Tensor | None) -> None:
        """Close the step: each row grows by its valid tokens (which stand before its padding)."""
        grown = [tokens] * self.rows if is_valid_BT is None else is_valid_BT.sum(dim=1).tolist()
        self._lengths = [length + int(new) for length, new in zip(self._lengths, grown, strict=True)]

    def remember(self, memory: Memory | None) -> Memory | None:
        """Take a new memory, or give back the one that is held."""
        if memory is not None:
            self.memory_keys = {}
            self.memory = memory.following()
            return memory
        return self.memory

    def split(self, layer: int, max_tokens: int) -> KVCache:
        """Give the layers from ``layer`` on an empty cache of their own, in the same memory, with fewer slots."""
        later = KVCache(0, self.rows, 0, 0, 0)
        later.keys, later.values = (both[layer:, :, :, :max_tokens] for both in (self.keys, self.values))
        later.max_tokens, later.first_layer = max_tokens, layer
        self.keys, self.values, self.later = self.keys[:layer], self.values[:layer], later
        return later

    @property
    def num_visible(self) -> int:
        """Slots that the open step may see, its own tokens included."""
        return self._end

    @property
    def num_bytes(self) -> int:
        """Bytes of all keys and values."""
        held = [self.keys, self.values, *(part for pair in self.memory_keys.values() for part in pair)]
        return sum(part.numel() * part.element_size() for part in held) + (self.later.num_bytes if self.later else 0)

    def crop(self, length: int) -> None:
        """Forget everything after the first ``length`` tokens of each row."""
        self._lengths = [min(old, length) for old in self._lengths]

    def clone(self, rows: int | None = None, max_tokens: int | None = None) -> KVCache:
        """An independent copy, optionally of one row repeated, with more or fewer slots.

        Args:
            rows: repeat a one-row cache this many times (a shared prefix); None keeps the rows.
            max_tokens: slots of the copy; None keeps them.

        Raises:
            ConfigError: if several rows are to be repeated, the tokens do not fit, or some were dropped for a question.
        """
        if self.later is not None:
            raise ConfigError("key-value cache: found tokens dropped for one question, expected all of them in a copy")
        if rows is not None and self.rows != 1:
            raise ConfigError(f"key-value cache: found {self.rows} rows, expected 1 row to repeat {rows} times")
        slots = self.max_tokens if max_tokens is None else max_tokens
        if slots < self.length:
            raise ConfigError(f"key-value cache: found {self.length} tokens, expected at most the copy's {slots}")
        layers, old_rows, heads, _, head_dim = self.keys.shape
        new_rows = rows or old_rows
        held = self.num_virtual + self.length
        copy = KVCache(layers, new_rows, heads, self.num_virtual + slots, head_dim, self.keys.dtype, self.keys.device)
        copy.max_tokens, copy.num_virtual = slots, self.num_virtual
        copy.keys[:, :, :, :held] = self.keys[:, :, :, :held]
        copy.values[:, :, :, :held] = self.values[:, :, :, :held]
        copy._lengths = self._lengths * (new_rows // old_rows)
        rows_B = torch.arange(old_rows, device=self.keys.device).repeat(new_rows // old_rows)
        copy._take_memory(self, rows_B)
        return copy

    def select(self, rows_B: Tensor) -> None:
        """Keep the given rows in the given order (finished rows leave a batch)."""
        self.keys = self.keys[:, rows_B]
        self.values = self.values[:, rows_B]
        self._lengths = [self._lengths[row] for row in rows_B.tolist()]
        if self.later is not None:
            self.later.select(rows_B)
        self._take_memory(self, rows_B)

    def _take_memory(self, other: KVCache, rows_B: Tensor) -> None:
        self.memory = None if other.memory is None else other.memory.select(rows_B)
        self.memory_keys = {layer: (k[rows_B], v[rows_B]) for layer, (k, v) in other.memory_keys.items()}
