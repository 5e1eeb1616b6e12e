"""Fewer tokens inside a bidirectional transformer: merging like ones, or dropping those that the class token ignores.

Every number of tokens is known beforehand. The order of the tokens that stay is kept.

Legend: ``U`` units, ``T`` tokens, ``N`` tokens that may go (the body), ``D`` width, ``H`` heads, ``K`` head width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import PositiveInt, model_validator
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from polymodal.core.config import Config, Table
from polymodal.core.errors import ConfigError
from polymodal.models.layers.attention import Step
from polymodal.models.layers.layout import Layout
from polymodal.models.layers.transformer import Block, Transformer


class ReductionConfig(Config, ABC):
    """Base of the ways to lessen tokens."""

    use: str

    @abstractmethod
    def schedule(self, num_tokens: int, depth: int) -> tuple[int, ...]:
        """How many tokens go in each block.

        Args:
            num_tokens: tokens of the body at the start.
            depth: blocks.

        Raises:
            ConfigError: if it cannot be done.
        """

    @abstractmethod
    def lessen(self, x_UTD: Tensor, sizes_UT: Tensor, look: Look) -> tuple[Tensor, Tensor]:
        """The tokens that stay, and their sizes.

        Args:
            x_UTD: the tokens.
            sizes_UT: how many first tokens each stands for.
            look: what attention saw.
        """

    def left(self, num_tokens: int, depth: int) -> int:
        """Tokens of the body after all blocks."""
        return num_tokens - sum(self.schedule(num_tokens, depth))


class MergeTokens(ReductionConfig):
    """Bipartite soft matching: every second token may join the most similar of the others; pairs become their mean.

    Attention is proportional: a token that stands for s others counts s times.

    Source: ToMe, Bolya et al. 2210.09461, sections 3.1 to 3.3; similarity is the cosine of the keys' mean over heads.
    """

    use: Literal["merge"] = "merge"
    tokens: PositiveInt | None = None
    """Tokens that are left after the last block; each block merges about as many as the others."""
    per_layer: PositiveInt | None = None
    """Or: tokens that each block merges, at most half of what it has."""

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.tokens is None) == (self.per_layer is None):
            raise ValueError("expected exactly one of 'tokens' and 'per_layer'")
        return self

    def schedule(self, num_tokens: int, depth: int) -> tuple[int, ...]:
        """See :meth:`ReductionConfig.schedule`; worked example: 16 to 2 tokens in 3 blocks is ``(8, 4, 2)``."""
        if self.per_layer is None:
            assert self.tokens is not None
            return _even(num_tokens, self.tokens, depth)
        steps = []
        for _ in range(depth):
            steps.append(min(self.per_layer, num_tokens // 2))
            num_tokens -= steps[-1]
        return tuple(steps)

    def lessen(self, x_UTD: Tensor, sizes_UT: Tensor, look: Look) -> tuple[Tensor, Tensor]:
        """See :meth:`ReductionConfig.lessen`."""
        from_UR, into_UR = bipartite_match(look.keys_UTK, look.first, look.count, look.num_gone)
        weighted_UTD = x_UTD * sizes_UT[..., None]
        wide_URD = from_UR[..., None].expand(-1, -1, x_UTD.shape[2])
        into_URD = into_UR[..., None].expand_as(wide_URD)
        weighted_UTD = weighted_UTD.scatter_add(1, into_URD, weighted_UTD.gather(1, wide_URD))
        sizes_UT = sizes_UT.scatter_add(1, into_UR, sizes_UT.gather(1, from_UR))
        gone_UT = torch.zeros_like(sizes_UT, dtype=torch.bool).scatter(1, from_UR, True)
        return _stay(weighted_UTD / sizes_UT[..., None], sizes_UT, ~gone_UT)


class PruneTokens(ReductionConfig):
    """In a few blocks, the tokens that the class token attends to least are dropped.

    Source: EViT, Liang et al. 2202.07800, section 3.2, without its fused token.
    """

    use: Literal["prune"] = "prune"
    tokens: PositiveInt
    """Tokens that are left after the last of the blocks."""
    layers: tuple[int, ...] = ()
    """The blocks, from 0; empty: after a quarter, a half and three quarters of the depth."""

    def schedule(self, num_tokens: int, depth: int) -> tuple[int, ...]:
        """See :meth:`ReductionConfig.schedule`; each of the blocks keeps the same share of what it has."""
        layers = sorted(set(self.layers or (depth // 4, depth // 2, 3 * depth // 4)))
        if layers[0] < 0 or layers[-1] >= depth:
            raise ConfigError(f"prune: found the blocks {layers}, expected some of 0 to {depth - 1}")
        if self.tokens > num_tokens:
            raise ConfigError(f"prune: found tokens: {self.tokens}, there are only {num_tokens}")
        steps, have = [0] * depth, num_tokens
        for place, layer in enumerate(layers, 1):
            kept = round(num_tokens * (self.tokens / num_tokens) ** (place / len(layers)))
            steps[layer], have = have - kept, kept
        return tuple(steps)

    def lessen(self, x_UTD: Tensor, sizes_UT: Tensor, look: Look) -> tuple[Tensor, Tensor]:
        """See :meth:`ReductionConfig.lessen`."""
        body = slice(look.first, look.first + look.count)
        stays = torch.zeros_like(sizes_UT, dtype=torch.bool)
        stays[:, : look.first] = stays[:, look.first + look.count :] = True
        best_UR = look.class_attention_UT[:, body].topk(look.count - look.num_gone, dim=1).indices
        return _stay(x_UTD, sizes_UT, stays.scatter(1, best_UR + look.first, True))


REDUCTIONS: Table[ReductionConfig] = Table("reduction of tokens", [MergeTokens, PruneTokens])
"""Every way to lessen tokens by name."""


class Look:
    """What the attention of a block saw.

    Args:
        block: the block.
        normed_UTD: what its attention read.
        sizes_UT: how many first tokens each stands for.
        first: tokens before the body, which always stay.
        count: tokens of the body.
        num_gone: tokens of it that go now.
    """

    def __init__(
        self, block: Block, normed_UTD: Tensor, sizes_UT: Tensor, first: int, count: int, num_gone: int
    ) -> None:
        self.first, self.count, self.num_gone = first, count, num_gone
        self._attention, self._normed_UTD, self._sizes_UT = block.attention, normed_UTD, sizes_UT

    @property
    @torch.no_grad()
    def keys_UTK(self) -> Tensor:
        """Keys, their mean over heads."""
        attention = self._attention
        keys: Tensor = attention.k_proj(self._normed_UTD).unflatten(-1, (attention.kv_heads, attention.head_dim))
        return keys.mean(dim=2)

    @property
    @torch.no_grad()
    def class_attention_UT(self) -> Tensor:
        """How the first token attends to all, the mean over heads."""
        attention = self._attention
        query_UHK = attention.q_proj(self._normed_UTD[:, 0]).unflatten(-1, (attention.heads, attention.head_dim))
        keys_UTHK = attention.k_proj(self._normed_UTD).unflatten(-1, (attention.kv_heads, attention.head_dim))
        scale = attention.head_dim**-0.5 if attention.scale is None else attention.scale
        scores_UHT = torch.einsum("uhk,uthk->uht", query_UHK, keys_UTHK) * scale + self._sizes_UT.log()[:, None]
        return scores_UHT.softmax(dim=2).mean(dim=1)


def bipartite_match(keys_UTK: Tensor, first: int, count: int, num_merged: int) -> tuple[Tensor, Tensor]:
    """Which tokens join which: ``(from, into)``, int64 ``[U, num_merged]`` places among all tokens.

    Of the body, the tokens 0, 2, 4, ... each propose to the most similar of 1, 3, 5, ...; the best pairs are taken.

    Args:
        keys_UTK: what similarity is measured on.
        first: tokens before the body.
        count: tokens of the body.
        num_merged: pairs, at most half of the body.
    """
    body_UNK = F.normalize(keys_UTK[:, first : first + count].float(), dim=-1)
    best_UA, partner_UA = (body_UNK[:, 0::2] @ body_UNK[:, 1::2].transpose(1, 2)).max(dim=2)
    chosen_UR = best_UA.argsort(dim=1, descending=True, stable=True)[:, :num_merged]
    return first + 2 * chosen_UR, first + 2 * partner_UA.gather(1, chosen_UR) + 1


def run_reduced(
    transformer: Transformer, x_UTD: Tensor, config: ReductionConfig, first: int, count: int
) -> tuple[Tensor, Tensor]:
    """Run a pre-norm bidirectional stack that lessens its tokens between attention and MLP.

    Args:
        transformer: the stack.
        x_UTD: its input: ``first`` tokens that stay, ``count`` that may go, and others that stay.
        config: how they go.
        first: tokens before the body.
        count: tokens of the body.

    Returns:
        The states of the tokens that are left, in order, ``[U, T', D]``, and how many first tokens each stands for,
        ``[U, T']``.
    """
    sizes_UT = torch.ones(x_UTD.shape[:2], dtype=x_UTD.dtype, device=x_UTD.device)
    for block, num_gone in zip(transformer.blocks, config.schedule(count, len(transformer.blocks)), strict=True):
        assert isinstance(block, Block)
        if transformer.checkpointing and torch.is_grad_enabled():
            x_UTD, sizes_UT = checkpoint(
                _block, block, x_UTD, sizes_UT, config, (first, count, num_gone), use_reentrant=False
            )
        else:
            x_UTD, sizes_UT = _block(block, x_UTD, sizes_UT, config, (first, count, num_gone))
        count -= num_gone
    if transformer.final_norm is not None:
        x_UTD = transformer.final_norm(x_UTD)
    return x_UTD, sizes_UT


def _block(
    block: Block, x_UTD: Tensor, sizes_UT: Tensor, config: ReductionConfig, body: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    normed_UTD = block.enter(x_UTD, block.attention_norm)
    # Proportional attention: the logarithm of a size adds to every score of that token as a key.
    mask = sizes_UT.log()[:, None, None] if isinstance(config, MergeTokens) else None
    step = Step(Layout(causal=False), None, mask, False)
    x_UTD = block.add(x_UTD, block.attention(normed_UTD, step, 0), block.attention_scale, block.attention_norm)
    if body[2]:
        x_UTD, sizes_UT = config.lessen(x_UTD, sizes_UT, Look(block, normed_UTD, sizes_UT, *body))
    return block.add(x_UTD, block.mlp(block.enter(x_UTD, block.mlp_norm)), block.mlp_scale, block.mlp_norm), sizes_UT


def _stay(x_UTD: Tensor, sizes_UT: Tensor, stays_UT: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens that stay, as many in every unit, in their order."""
    units = len(x_UTD)
    return x_UTD[stays_UT].view(units, -1, x_UTD.shape[2]), sizes_UT[stays_UT].view(units, -1)


def _even(num_tokens: int, wanted: int, depth: int) -> tuple[int, ...]:
    """Merges per block that end at ``wanted``: even, or more at first where later blocks could not do it."""
    if wanted > num_tokens or _least(num_tokens, depth) > wanted:
        least = _least(num_tokens, depth)
        raise ConfigError(
            f"merge: found tokens: {wanted}, expected {least} to {num_tokens}: {depth} blocks halve {num_tokens} "
            "tokens at most"
        )
    steps = []
    for layer in range(depth):
        later = depth - layer - 1
        step = -(-(num_tokens - wanted) // (later + 1))
        while step < num_tokens // 2 and _least(num_tokens - step, later) > wanted:
            step += 1
        steps.append(min(step, num_tokens // 2))
        num_tokens -= steps[-1]
    return tuple(steps)


def _least(num_tokens: int, depth: int) -> int:
    """The fewest tokens after ``depth`` halvings."""
    for _ in range(depth):
        num_tokens -= num_tokens // 2
    return num_tokens
