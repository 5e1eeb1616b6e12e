"""Samples mixed of parts that do not belong together: of any others, or of those that look alike.

Legend: ``S`` samples, ``C`` streams, ``M`` tokens, ``W`` width, ``E`` embedding width, ``N`` mixed samples.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from polymodal.core.batch import Batch, StreamBatch, group_numbers
from polymodal.core.errors import ConfigError

Tokens = Mapping[str, Tensor]


class Mismatches(NamedTuple):
    """What mismatched samples are mixed of.

    Args:
        kind: ``random``: of any others; ``hard``: of those that look alike.
        groups_S: int64 number of each sample's group; samples of one group are never mixed with each other.
    """

    kind: Literal["random", "hard"]
    groups_S: Tensor


def matching_groups(batch: Batch, texts: Iterable[str]) -> Tensor:
    """An int64 number for each sample ``[S]``, equal for samples of one label and, without labels, of equal texts.

    Args:
        batch: of ``S`` samples.
        texts: the streams that hold texts, compared as the model reads them: by token ids, or by the keys of cached
            features.
    """
    spoken: list[list[Hashable]] = [[] for _ in batch.labels]
    if None in batch.labels:
        for name in texts:
            if name in batch.streams:
                for sample, text in _texts(batch.streams[name]):
                    spoken[sample].append((name, text))
    labelled = zip(batch.labels, spoken, strict=True)
    return torch.tensor(group_numbers(tuple(own) or None if label is None else label for label, own in labelled))


def _texts(stream: StreamBatch) -> Iterator[tuple[int, Hashable]]:
    """The sample of each text of a stream, and the text, as something that can be compared."""
    owners = stream.sample_of_item.tolist()
    if stream.values is None:
        return zip(owners, stream.keys, strict=True)
    ids = [tuple(row[:length]) for row, length in zip(stream.values.tolist(), stream.lengths.tolist(), strict=True)]
    ends = list(itertools.accumulate(stream.unit_counts))
    items = (tuple(ids[end - count : end]) for end, count in zip(ends, stream.unit_counts, strict=True))
    return zip(owners, items, strict=True)


def mixed_samples(
    mismatches: Mismatches, tokens: Tokens, is_valid: Tokens, embeddings: Mapping[str, tuple[Tensor, Tensor]]
) -> tuple[Tokens, Tokens, Tensor]:
    """Samples that do not belong together, by :func:`hard_mismatched` or :func:`mismatched`.

    Arguments and result are as there.
    """
    if mismatches.kind == "hard":
        return hard_mismatched(tokens, is_valid, embeddings, mismatches.groups_S)
    return mismatched(tokens, is_valid, mismatches.groups_S)


def mismatched(tokens: Tokens, is_valid: Tokens, groups_S: Tensor) -> tuple[Tokens, Tokens, Tensor]:
    """Samples with one of their streams, drawn at random, taken from a random sample of another group.

    Worked example, streams ``a b``: samples ``a0 b0``, ``a1 b1`` and ``a2``, each a group, may give ``a0 b1`` and
    ``a2 b1``, of the samples ``[0 1]``; sample 2 has nothing that could contradict ``a2``. If samples 0 and 1 are one
    group, nothing contradicts ``b0`` and ``b1``, and they can give ``a2 b0`` and ``a2 b1`` alone.

    Args:
        tokens: per stream that enters the backbone, ``[S, M, W]``.
        is_valid: bool ``[S, M]`` likewise; a sample without a valid token of a stream does not have it.
        groups_S: int64 number of each sample's group.

    Returns:
        tokens and validity of ``N`` mixed samples, and the ``[N]`` int64 samples that they were made of. A sample with
        a single stream, or for whose streams no other group has anything to put there, is not among them.
    """
    has_SC = torch.stack([is_valid[name].any(1) for name in tokens], dim=1).cpu()
    is_other_SS = groups_S[:, None] != groups_S
    has_donor_SC = (is_other_SS[:, :, None] & has_SC).any(1)
    may_swap_SC = has_SC & (has_SC.sum(1, keepdim=True) > 1) & has_donor_SC
    best_S, column_S = torch.rand(may_swap_SC.shape).masked_fill(~may_swap_SC, -1.0).max(1)
    samples_N = (best_S >= 0).nonzero().squeeze(1)
    column_N = column_S[samples_N]
    may_give_NS = is_other_SS[samples_N] & has_SC.T[column_N]
    donors_N = torch.rand(may_give_NS.shape).masked_fill(~may_give_NS, -1.0).argmax(1)
    mixed: dict[str, Tensor] = {}
    mixed_valid: dict[str, Tensor] = {}
    for column, name in enumerate(tokens):
        from_N = torch.where(column_N == column, donors_N, samples_N).to(tokens[name].device)
        mixed[name], mixed_valid[name] = tokens[name][from_N], is_valid[name][from_N]
    return mixed, mixed_valid, samples_N.to(tokens[name].device)


def hard_mismatched(
    tokens: Tokens,
    is_valid: Tokens,
    embeddings: Mapping[str, tuple[Tensor, Tensor]],
    groups_S: Tensor,
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Each sample once for every ordered pair of its streams, the second stream taken from a sample that looks alike.

    Source: ALBEF, arXiv 2107.07651, section 3.2: of an image, a text with chance by their contrastive similarity, and
    the other way round; here similarities are those of the model itself, without its momentum twin.

    Args:
        tokens: per stream that enters the backbone, ``[S, M, W]``.
        is_valid: bool ``[S, M]`` likewise.
        embeddings: per stream of the shared space, ``(vectors [I, E], sample of each)``; of one stream several vectors
            of each item ``[I, M, E]``, of which the best counts.
        groups_S: int64 number of each sample's group; samples of one group are no negatives of each other.

    Returns:
        As :func:`mismatched`.

    Raises:
        ConfigError: if fewer than two of the streams are in the shared space.
    """
    names = [name for name in tokens if name in embeddings]
    if len(names) < 2:
        raise ConfigError(
            f"hard negatives: found {names} of the entering streams {sorted(tokens)} in the shared space, expected two "
            "or more, whose similarities choose them"
        )
    is_same_SS = (groups_S[:, None] == groups_S).to(next(iter(tokens.values())).device)
    table = {name: _by_sample(embeddings[name], len(groups_S)) for name in names}
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


def _by_sample(embedding: tuple[Tensor, Tensor], num_samples: int) -> tuple[Tensor, Tensor]:
    """Vectors ``[S, E]`` of each sample's last item, and which samples have one."""
    vectors_IE, samples_I = embedding
    has_S = torch.zeros(num_samples, dtype=torch.bool, device=samples_I.device)
    has_S[samples_I] = True
    rows_SE = vectors_IE.new_zeros(num_samples, *vectors_IE.shape[1:])
    return rows_SE.index_copy(0, samples_I, vectors_IE.detach()), has_S
