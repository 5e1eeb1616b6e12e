"""Pairs of a picture and a text in a Q-Former: the passes of BLIP-2's first stage.

Shape legend: ``S`` samples, ``I`` those that have a stream, ``U`` units, ``N`` features of a sample, ``M`` queries,
``L`` words, ``D`` width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from polymodal.core.batch import Batch, Outputs, TokenOutput
from polymodal.core.errors import ConfigError
from polymodal.models.compose.merge import by_sample
from polymodal.models.compose.negatives import Mismatches, mixed_samples
from polymodal.models.connectors.qformer import QFormer
from polymodal.models.encoders.base import Features
from polymodal.models.heads.masked_token import MaskedTokenHead
from polymodal.models.layers.memory import Memory

if TYPE_CHECKING:
    from polymodal.models.compose.model import MultimodalModel

Rows = tuple[Tensor, Tensor]
"""What one stream gives, a row per sample ``[S, N or L, D]``, and what of it is valid ``[S, N or L]``."""


class QueryRun:
    """One batch's way through the Q-Former that reads texts beside its queries.

    Source: BLIP-2, arXiv 2301.12597, section 3.2.

    Args:
        model: the model.
        batch: the batch.
        features: of the streams that were encoded.

    Raises:
        ConfigError: if the model has no such Q-Former, or several.
    """

    def __init__(self, model: MultimodalModel, batch: Batch, features: Mapping[str, Features]) -> None:
        self.model, self.batch, self.features = model, batch, features
        if model.config.queried_pair is None:
            raise ConfigError("this needs one stream whose connector reads words, and one text stream that gives them")
        self.media, self.words = model.config.queried_pair
        connector = model.modules_of(self.media).connector
        assert isinstance(connector, QFormer)
        self.qformer = connector

    def alone(self, name: str) -> tuple[Tensor, Tensor]:
        """What stands for a stream in the shared space, and the samples ``[I]``.

        States ``[I, M, D]`` of all queries for the picture; the first word's ``[I, D]`` for the text.
        """
        x_SND, is_valid_SN = self._rows(name)
        samples_I = torch.unique(self.batch.streams[name].sample_of_item)
        own = x_SND[samples_I], is_valid_SN[samples_I]
        if name == self.words:
            return self.qformer.read(None, own)[1][:, 0], samples_I
        return self.qformer.read(Memory(*own))[0], samples_I

    def merge(self, outputs: Outputs, mismatches: Mismatches | None) -> None:
        """Fill what the matching head says of whole samples.

        Args:
            outputs: to fill.
            mismatches: of which samples that do not belong together are mixed as well; None: none.
        """
        tokens, is_valid = {}, {}
        for name in (self.media, self.words):
            tokens[name], is_valid[name] = self._rows(name)
        outputs.match_logits = self._match(tokens, is_valid)
        if mismatches is None:
            return
        if not {self.media, self.words} <= self.features.keys():
            # Nothing of the batch is a pair.
            outputs.mismatch_samples = torch.zeros(0, dtype=torch.int64, device=outputs.match_logits.device)
            outputs.mismatch_logits = outputs.match_logits[:0]
            return
        mixed, valid, samples = mixed_samples(mismatches, tokens, is_valid, outputs.embeddings)
        outputs.mismatch_samples = samples
        outputs.mismatch_logits = self._match(mixed, valid) if len(samples) else outputs.match_logits[:0]

    def caption(self, head: MaskedTokenHead) -> TokenOutput:
        """Each word but the first from those before it and from the queries, which see no word."""
        if self.words not in self.features:
            return TokenOutput()
        x_SLD, is_word_SL = self._rows(self.words)
        _, states_SLD = self.qformer.read(Memory(*self._rows(self.media)), (x_SLD, is_word_SL), causal=True)
        stream = self.batch.streams[self.words]
        if stream.values is None:
            raise ConfigError(f"stream {self.words!r}: captions need its words; take its encoder out of the cache")
        ids_SL = by_sample(stream.values, stream, self.batch.num_samples)
        is_target = is_word_SL[:, 1:] & is_word_SL[:, :-1]
        return TokenOutput(head(states_SLD[:, :-1][is_target]), ids_SL[:, 1:][is_target], is_target.nonzero()[:, 0])

    def _match(self, tokens: Mapping[str, Tensor], is_valid: Mapping[str, Tensor]) -> Tensor:
        """The mean over the queries of the head's logits; ``[S]``."""
        memory = Memory(tokens[self.media], is_valid[self.media])
        states_SMD, _ = self.qformer.read(memory, (tokens[self.words], is_valid[self.words]))
        logits_SM1: Tensor = self.model.head("matching")(states_SMD)
        return logits_SM1.mean(1).squeeze(-1)

    def _rows(self, name: str) -> Rows:
        """A stream's features, a row per sample; one empty place where no sample has it."""
        num_samples = self.batch.num_samples
        if name not in self.features:
            width = self.model.config.streams[name].encoder.width
            x_S1D = self.qformer.queries.new_zeros(num_samples, 1, width)
            return x_S1D, torch.zeros(num_samples, 1, dtype=torch.bool, device=x_S1D.device)
        stream, found = self.batch.streams[name], self.features[name]
        return (
            by_sample(found.x_UND, stream, num_samples),
            by_sample(found.is_valid_UN, stream, num_samples),
        )
