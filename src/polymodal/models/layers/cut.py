"""A stack that goes on with fewer tokens from some block on.

Legend: ``B`` rows, ``T`` tokens, ``S`` tokens that stay, ``D`` width.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from polymodal.core.errors import ConfigError
from polymodal.models.layers.attention import Step
from polymodal.models.layers.dropping import Watch
from polymodal.models.layers.layout import Layout


class Cut:
    """One pass through a stack whose later blocks read fewer tokens; see :class:`MediaDrop`.

    The tokens that stay keep their positions. The later blocks' keys and values lie in a cache of their own
    (:attr:`KVCache.later`), which holds the tokens that stayed.

    Args:
        step: of the whole sequence.
        tokens: ``T``.
        depth: blocks of the stack.

    Raises:
        ConfigError: if nothing can be dropped in such a pass.
    """

    def __init__(self, step: Step, tokens: int, depth: int) -> None:
        self.step = self.later = step
        self.watch: Watch | None = None
        self.after = depth
        self.index_BS: Tensor | None = None
        """Places of the tokens that stay; None while all do."""
        self.tokens = tokens
        dropping, cache = step.layout.dropping, step.cache
        if cache is not None and cache.later is not None:
            self.after = cache.later.first_layer
            _, mask, _ = cache.later.begin(tokens)
            self.later = replace(step, mask=mask, is_causal=False, cache=cache.later, is_first=False)
        elif dropping is not None and dropping.is_any:
            self.after = dropping.config.after
            if self.after >= depth:
                raise ConfigError(f"drop_media: found after: {self.after}, expected less than the {depth} blocks")
            if step.layout.segment_lengths is not None or not step.is_causal:
                raise ConfigError(
                    "drop_media: found a packed layout, a window, relative positions, virtual tokens or tokens read "
                    "before; expected causal rows that are read as a whole"
                )
            self.watch = Watch(dropping)

    def before(self, layer: int, x_BTD: Tensor) -> tuple[Tensor, Step]:
        """What a block reads."""
        if layer == self.after and self.watch is not None:
            x_BTD = self._drop(x_BTD, self.watch)
        if layer >= self.after:
            return x_BTD, self.later
        if layer == self.after - 1 and self.watch is not None:
            return x_BTD, replace(self.step, watch=self.watch)
        return x_BTD, self.step

    def end(self, x_BSD: Tensor) -> Tensor:
        """Close the caches; states ``[B, T, D]`` with zeros where tokens were dropped."""
        cache, is_valid_BS = self.step.cache, self.later.layout.is_valid_BT
        if cache is not None:
            cache.end(self.tokens, self.step.layout.is_valid_BT)
            if cache.later is not None:
                cache.later.end(x_BSD.shape[1], is_valid_BS)
        if self.index_BS is None:
            return x_BSD
        if is_valid_BS is not None:
            x_BSD = x_BSD * is_valid_BS[..., None]
        out_BTD = x_BSD.new_zeros(len(x_BSD), self.tokens, x_BSD.shape[2])
        return out_BTD.scatter(1, self.index_BS[..., None].expand_as(x_BSD), x_BSD)

    def _drop(self, x_BTD: Tensor, watch: Watch) -> Tensor:
        assert watch.received_BT is not None
        is_kept_BT, layout, cache = watch.dropping.keeps(watch.received_BT), self.step.layout, self.step.cache
        if layout.is_valid_BT is not None:
            is_kept_BT = is_kept_BT & layout.is_valid_BT
        counts_B = is_kept_BT.sum(1)
        longest = int(counts_B.amax())
        # Those that stay stand first, in their order.
        index_BS = is_kept_BT.int().argsort(dim=1, descending=True, stable=True)[:, :longest]
        self.index_BS = index_BS
        is_valid_BS = torch.arange(longest, device=x_BTD.device) < counts_B[:, None]
        rope = self.step.rope
        if rope is not None:
            cos, sin = (_chosen(table.expand(len(x_BTD), -1, -1, -1), index_BS) for table in rope)
            rope = cos, sin
        self.later = replace(self.step, layout=Layout.padded(is_valid_BS, causal=True), rope=rope)
        if cache is not None:
            later = cache.split(self.after, cache.max_tokens - x_BTD.shape[1] + longest)
            later.begin(longest)
            self.later = replace(self.later, cache=later)
        return _chosen(x_BTD, index_BS)


def _chosen(x: Tensor, index_BS: Tensor) -> Tensor:
    """The tokens ``[B, S, ...]`` of ``[B, T, ...]`` at the given places."""
    rows_B1 = torch.arange(len(x), device=x.device)[:, None]
    return x[rows_B1, index_BS]
