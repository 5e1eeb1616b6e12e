"""Samples mixed of parts that do not belong together: of any others, or of those that look alike.

Legend: ``S`` samples, ``E`` embedding width, ``N`` mixed samples.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from polymodal.core.errors import ConfigError
from polymodal.models.compose.merge import mismatched

Tokens = Mapping[str, Tensor]


def mixed_samples(
    kind: str,
    tokens: Tokens,
    is_valid: Tokens,
    embeddings: Mapping[str, tuple[Tensor, Tensor]],
    labels: Sequence[str | None],
) -> tuple[Tokens, Tokens, Tensor]:
    """Samples that do not belong together: by :func:`hard_mismatched` if ``kind`` is ``hard``, else of any others.

    Arguments and result are as there.
    """
    if kind == "hard":
        return hard_mismatched(tokens, is_valid, embeddings, labels)
    return mismatched(tokens, is_valid)


def hard_mismatched(
    tokens: Tokens,
    is_valid: Tokens,
    embeddings: Mapping[str, tuple[Tensor, Tensor]],
    labels: Sequence[str | None],
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Each sample once for every ordered pair of its streams, the second stream taken from a sample that looks alike.

    Source: ALBEF, arXiv 2107.07651, section 3.2: of an image, a text with chance by their contrastive similarity, and
    the other way round; here similarities are those of the model itself, without its momentum twin.

    Args:
        tokens: per stream that enters the backbone, ``[S, M, W]``.
        is_valid: bool ``[S, M]`` likewise.
        embeddings: per stream of the shared space, ``(vectors [I, E], sample of each)``; of one stream several vectors
            of each item ``[I, M, E]``, of which the best counts.
        labels: samples of one label belong together, and are no negatives of each other.

    Returns:
        As :func:`~polymodal.models.compose.merge.mismatched`.

    Raises:
        ConfigError: if fewer than two of the streams are in the shared space.
    """
    names = [name for name in tokens if name in embeddings]
    if len(names) < 2:
        raise ConfigError(
            f"hard negatives: found {names} of the entering streams {sorted(tokens)} in the shared space, expected two "
            "or more, whose similarities choose them"
        )
    num_samples = len(labels)
    is_same_SS = _same(labels).to(next(iter(tokens.values())).device)
    table = {name: _by_sample(embeddings[name], num_samples) for name in names}
    samples, sources, swapped = [], [], []
    for first, second in itertools.permutations(names, 2):
        (x_SE, has_x_S), (y_SE, has_y_S) = table[first], table[second]
        may_SS = (has_x_S & has_y_S)[:, None] & has_y_S & ~is_same_SS
        rows = may_SS.any(1).nonzero().squeeze(1)
        if len(rows):
            samples.append(rows)
            sources.append(draw_similar(_similarities(x_SE, y_SE)[rows], may_SS[rows]))
            swapped += [second] * len(rows)
    if not samples:
        none = torch.zeros(0, dtype=torch.int64, device=is_same_SS.device)
        return {n: x[none] for n, x in tokens.items()}, {n: valid[none] for n, valid in is_valid.items()}, none
    samples_N, sources_N = torch.cat(samples), torch.cat(sources)
    mixed, valid = {}, {}
    for name in tokens:
        is_swapped_N = torch.tensor([other == name for other in swapped], device=samples_N.device)
        from_N = torch.where(is_swapped_N, sources_N, samples_N)
        mixed[name], valid[name] = tokens[name][from_N], is_valid[name][from_N]
    return mixed, valid, samples_N


def draw_similar(similarity_NS: Tensor, may_NS: Tensor, temperature: float = 0.07) -> Tensor:
    """One column of each row, with chances by the softmax of its similarities; int64 ``[N]``.

    Args:
        similarity_NS: cosines.
        may_NS: bool, which columns may be drawn; some of each row.
        temperature: of the softmax.
    """
    with torch.no_grad():
        chances_NS = (similarity_NS.float() / temperature).masked_fill(~may_NS, -torch.inf).softmax(1)
        drawn: Tensor = torch.multinomial(chances_NS.cpu(), 1).squeeze(1)
    return drawn.to(similarity_NS.device)


def _similarities(x_SE: Tensor, y_SE: Tensor) -> Tensor:
    """Cosines ``[S, S]``; where one side has several vectors ``[S, M, E]``, the best of them (BLIP-2, section 3.2)."""
    if y_SE.ndim == 3:
        return _similarities(y_SE, x_SE).T
    scores = x_SE @ y_SE.T
    return scores if x_SE.ndim == 2 else scores.amax(1)


def _same(labels: Sequence[str | None]) -> Tensor:
    """Bool ``[S, S]``: a sample and itself, and samples of one label."""
    numbers: dict[object, int] = {}
    groups = torch.tensor(
        [numbers.setdefault(("sample", i) if label is None else label, len(numbers)) for i, label in enumerate(labels)]
    )
    return groups[:, None] == groups


def _by_sample(embedding: tuple[Tensor, Tensor], num_samples: int) -> tuple[Tensor, Tensor]:
    """Vectors ``[S, E]`` of each sample's last item, and which samples have one."""
    vectors_IE, samples_I = embedding
    has_S = torch.zeros(num_samples, dtype=torch.bool, device=samples_I.device)
    has_S[samples_I] = True
    rows_SE = vectors_IE.new_zeros(num_samples, *vectors_IE.shape[1:])
    return rows_SE.index_copy(0, samples_I, vectors_IE.detach()), has_S
