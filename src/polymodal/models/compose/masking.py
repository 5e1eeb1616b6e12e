"""What masked modelling hides: tokens of texts as BERT does, blocks of patches as BEiT does.

Draws come from torch's generator on the CPU, whose state is part of a checkpoint: a resumed run hides the same.

Legend: ``U`` units, ``L`` places.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from polymodal.core.errors import ConfigError

MASK_TOKENS = ("<|mask|>", "[MASK]", "<mask>")
"""What tokenizers call the token that stands for a hidden one; the first is ours."""
_MIN_BLOCK = 0.08
"""Smallest block as a share of all patches (BEiT: 16 of 196)."""
_MIN_ASPECT = 0.3
"""Flattest block, rows to columns (BEiT, appendix B)."""
_MAX_TRIES = 100


@dataclass(frozen=True, slots=True)
class TokenChoice:
    """Which ids masking may use.

    Args:
        mask_id: stands for a hidden token.
        control_ids: never hidden, and never put in the place of another.
        size: number of ids.
    """

    mask_id: int
    control_ids: tuple[int, ...]
    size: int

    @classmethod
    def of(cls, controls: Mapping[str, int], size: int) -> TokenChoice:
        """The choice of a tokenizer.

        Raises:
            ConfigError: if it has no token for hidden ones.
        """
        for name in MASK_TOKENS:
            if name in controls:
                return cls(controls[name], tuple(sorted(controls.values())), size)
        raise ConfigError(
            f"masked_text: the tokenizer has no token for hidden ones; expected one of {', '.join(MASK_TOKENS)} among "
            f"its control tokens {sorted(controls)}"
        )


def mask_tokens(ids_UL: Tensor, is_valid_UL: Tensor, rate: float, choice: TokenChoice) -> tuple[Tensor, Tensor]:
    """Hide a share of each text's tokens, at least one of them.

    Of the chosen places 80% become the mask token, 10% a random token, and 10% stay as they are; all are predicted.

    Source: BERT, arXiv 1810.04805, section 3.1 and appendix A.1.

    Args:
        ids_UL: int64 token ids.
        is_valid_UL: bool, False on padding.
        rate: share of the tokens that may be hidden.
        choice: which ids may be.

    Returns:
        The ids with hidden places replaced, and bool ``[U, L]``: which places are to be predicted.
    """
    controls = torch.tensor(choice.control_ids)
    ids, may_hide = ids_UL.cpu(), is_valid_UL.cpu() & ~torch.isin(ids_UL.cpu(), controls)
    place_UL = torch.rand(ids.shape).masked_fill(~may_hide, 2.0).argsort(1).argsort(1)
    available_U1 = may_hide.sum(1, keepdim=True)
    wanted_U1 = (available_U1 * rate).round().clamp(min=1).minimum(available_U1)
    is_masked = place_UL < wanted_U1
    kind_UL = torch.rand(ids.shape)
    ordinary = torch.ones(choice.size, dtype=torch.bool)
    ordinary[controls] = False
    pool = ordinary.nonzero().squeeze(1)
    random_UL = pool[torch.randint(len(pool), ids.shape)]
    ids = torch.where(is_masked & (kind_UL < 0.8), choice.mask_id, ids)
    ids = torch.where(is_masked & (kind_UL >= 0.8) & (kind_UL < 0.9), random_UL, ids)
    return ids.to(ids_UL.device), is_masked.to(ids_UL.device)


def mask_blocks(grids: Collection[tuple[int, int]], rate: float, width: int, device: torch.device) -> Tensor:
    """Hide rectangles of patches of each picture until a share of them is hidden.

    Source: BEiT, arXiv 2106.08254, algorithm 1; the last block is cut to reach the share exactly.

    Args:
        grids: rows and columns of each picture's patches.
        rate: share of the patches that is hidden; at least one is, and one is not where there are several.
        width: places of a row of the result.
        device: where it is to be.

    Returns:
        Bool ``[U, width]``, True on hidden patches in reading order.
    """
    mask_UL = torch.zeros(len(grids), width, dtype=torch.bool)
    for row, (rows, columns) in enumerate(grids):
        mask_UL[row, : rows * columns] = _blocks(rows, columns, rate).flatten()
    return mask_UL.to(device)


def _blocks(rows: int, columns: int, rate: float) -> Tensor:
    total = rows * columns
    wanted = max(1, min(round(rate * total), max(total - 1, 1)))
    is_masked = torch.zeros(rows, columns, dtype=torch.bool)
    smallest = max(1.0, _MIN_BLOCK * total)
    for _ in range(_MAX_TRIES):
        left = wanted - int(is_masked.sum())
        if left <= 0:
            break
        draws = torch.rand(4).tolist()
        size = smallest + draws[0] * max(left - smallest, 0.0)
        aspect = math.exp((2 * draws[1] - 1) * -math.log(_MIN_ASPECT))
        height = min(rows, max(1, round(math.sqrt(size * aspect))))
        width = min(columns, max(1, round(math.sqrt(size / aspect))))
        top, start = int(draws[2] * (rows - height + 1)), int(draws[3] * (columns - width + 1))
        block = torch.zeros_like(is_masked)
        block[top : top + height, start : start + width] = True
        new = (block & ~is_masked).nonzero()[:left]
        is_masked[new[:, 0], new[:, 1]] = True
    missing = wanted - int(is_masked.sum())
    if missing > 0:
        open_places = (~is_masked).nonzero()[:missing]
        is_masked[open_places[:, 0], open_places[:, 1]] = True
    return is_masked


def normalised_patches(patches_ULP: Tensor) -> Tensor:
    """Each patch with mean 0 and deviation 1 (MAE, arXiv 2111.06377, section 3)."""
    mean, variance = patches_ULP.mean(-1, keepdim=True), patches_ULP.var(-1, keepdim=True)
    return (patches_ULP - mean) / (variance + 1e-6).sqrt()
