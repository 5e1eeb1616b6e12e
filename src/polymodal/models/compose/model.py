"""The composed model: encode, connect, enter, read out.

Shape legend: ``U`` units, ``N`` features, ``M`` tokens, ``D`` width, ``I`` items, ``S`` samples, ``B`` rows,
``T`` tokens of a row, ``E`` embedding width, ``K`` predicted tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import Tensor, nn

from polymodal.core.batch import Batch, Outputs, StreamBatch
from polymodal.core.config import unknown
from polymodal.core.errors import ConfigError
from polymodal.models.backbones.decoder import Decoder, DecoderConfig, batch_layout, supervised_index
from polymodal.models.backbones.table import MergeConfig
from polymodal.models.compose.config import ModelConfig, StreamConfig
from polymodal.models.compose.merge import Item, Merge
from polymodal.models.encoders.base import Features
from polymodal.models.heads.table import HeadInputs, ProjectionHead
from polymodal.models.layers.cache import KVCache

PASSES = ("sequence", "embed", "merge", "match")


class Stream(nn.Module):
    """One stream's modules: its encoder, and its connector where it enters something."""

    def __init__(self, config: StreamConfig, out_dim: int | None) -> None:
        super().__init__()
        self.encoder: nn.Module = config.encoder.build()
        self.connector: nn.Module | None = None
        if config.connector is not None and out_dim is not None:
            self.connector = config.connector.build(config.encoder.width, out_dim)


class MultimodalModel(nn.Module):
    """Streams, a backbone and heads, assembled from a config.

    Parameter names are stable: ``streams.<name>.encoder...``, ``streams.<name>.connector...``, ``backbone...``,
    ``heads.<name>...``.

    Args:
        config: the model.
        vocab_size: size of the tokenizer.
    """

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        backbone = config.backbone
        width = getattr(backbone, "width", None)
        self.streams = nn.ModuleDict(
            {
                name: Stream(_with_vocabulary(stream, vocab_size), width if stream.enters.use != "none" else None)
                for name, stream in config.streams.items()
            }
        )
        self.backbone: nn.Module | None = None
        if isinstance(backbone, DecoderConfig):
            self.backbone = backbone.build(vocab_size)
        elif isinstance(backbone, MergeConfig):
            self.backbone = Merge(backbone, {name: config.streams[name].enters for name in config.merge_streams})
        inputs = HeadInputs(
            state_width=width,
            vocab_size=vocab_size,
            stream_widths={name: stream.encoder.width for name, stream in config.streams.items()},
            embedding=self.backbone.embed_tokens if isinstance(self.backbone, Decoder) else None,
        )
        self.heads = nn.ModuleDict({name: head.build(inputs) for name, head in config.heads.items()})

    @property
    def decoder(self) -> Decoder:
        """The decoder backbone.

        Raises:
            ConfigError: if the model has another one.
        """
        if not isinstance(self.backbone, Decoder):
            raise ConfigError(f"this needs a decoder backbone; the model's backbone is {self.config.backbone.use!r}")
        return self.backbone

    def head(self, use: str) -> nn.Module:
        """The head of the given kind.

        Raises:
            ConfigError: if the model has none.
        """
        for name, config in self.config.heads.items():
            if config.use == use:
                return self.heads[name]
        raise ConfigError(f"the model has no head of the kind {use!r}; its heads: {sorted(self.config.heads)}")

    def _stream(self, name: str) -> Stream:
        stream = self.streams[name]
        assert isinstance(stream, Stream)
        return stream

    def encode(self, name: str, stream: StreamBatch) -> Features:
        """Run the encoder of stream ``name`` over a batch's units, or take the cached features."""
        if stream.features is not None:
            return Features(*stream.features)
        features: Features = self._stream(name).encoder(stream.values, stream.lengths)
        return features

    def forward(self, batch: Batch, passes: Collection[str] = ("sequence",)) -> Outputs:
        """Run the passes that the objectives ask for; every encoder runs at most once.

        Args:
            batch: tensors on the model's device (``to_device``).
            passes: of ``sequence`` (token logits), ``embed`` (shared space), ``merge`` (merged state), ``match`` (that,
                and beside it mismatched samples of the batch).

        Raises:
            ConfigError: if a pass is unknown, or the model has no head or backbone for it.
        """
        wanted = set(passes)
        if wanted - set(PASSES):
            raise ConfigError(unknown("pass", sorted(wanted - set(PASSES))[0], PASSES))
        features = {name: self.encode(name, batch.streams[name]) for name in self._needed(batch, wanted)}
        outputs = Outputs()
        if "sequence" in wanted:
            self._sequence(batch, features, outputs)
        if "embed" in wanted:
            self._embed(batch, features, outputs)
        if wanted & {"merge", "match"}:
            self._merge(batch, features, outputs, with_mismatches="match" in wanted)
        return outputs

    def _needed(self, batch: Batch, passes: set[str]) -> Iterable[str]:
        names: set[str] = set()
        if "sequence" in passes:
            names |= set(self.config.sequence_streams)
        if passes & {"merge", "match"}:
            names |= set(self.config.merge_streams)
        if "embed" in passes:
            names |= set(self._projection().projs)
        return [name for name in batch.streams if name in names]

    def embed_sequence(self, batch: Batch, features: dict[str, Features] | None = None) -> Tensor:
        """Token embeddings ``[B, T, D]`` with every placeholder replaced by its media token.

        Raises:
            ConfigError: if a stream gives another number of tokens than it has placeholders.
        """
        x_BTD = self.decoder.embed(batch.ids)
        rows, tokens, width = x_BTD.shape
        flat = x_BTD.reshape(-1, width)
        for name in self.config.sequence_streams:
            stream = batch.streams.get(name)
            if stream is None:
                continue
            found = (features or {}).get(name) or self.encode(name, stream)
            media = self.connect(name, found)
            if len(media) != len(stream.token_index):
                raise ConfigError(
                    f"stream {name!r}: {len(media)} media tokens for {len(stream.token_index)} placeholders "
                    f"({len(stream.unit_counts)} items); what the config derives and what its modules give differ"
                )
            flat = flat.index_copy(0, stream.token_index, media.to(flat.dtype))
        return flat.view(rows, tokens, width)

    def connect(self, name: str, features: Features) -> Tensor:
        """The valid tokens of all units of a stream, in unit order: ``[sum M, D]``."""
        connector = self._stream(name).connector
        assert connector is not None
        tokens_UMD, is_valid_UM = connector(features.x_UND, features.is_valid_UN)
        if bool(is_valid_UM.all()):
            return torch.flatten(tokens_UMD, 0, 1)
        return torch.as_tensor(tokens_UMD[is_valid_UM])

    def states(self, batch: Batch, cache: KVCache | None = None) -> Tensor:
        """Final decoder states ``[B, T, D]`` of a batch, filling ``cache`` if there is one."""
        return torch.as_tensor(self.decoder(self.embed_sequence(batch), batch_layout(batch), cache))

    def token_logits(self, states: Tensor) -> Tensor:
        """Vocabulary logits of decoder states, ``[..., V]``."""
        return torch.as_tensor(self.head("next_token")(states))

    def _sequence(self, batch: Batch, features: dict[str, Features], outputs: Outputs) -> None:
        states_BTD = self.decoder(self.embed_sequence(batch, features), batch_layout(batch))
        source_K, outputs.token_targets, outputs.token_samples = supervised_index(batch)
        # Only states that predict a target meet the vocabulary matrix.
        outputs.token_logits = self.token_logits(torch.flatten(states_BTD, 0, 1)[source_K])

    def _projection(self) -> ProjectionHead:
        head = self.head("projection")
        assert isinstance(head, ProjectionHead)
        return head

    def _embed(self, batch: Batch, features: dict[str, Features], outputs: Outputs) -> None:
        head = self._projection()
        for name in head.projs:
            if name in features:
                stream = batch.streams[name]
                pooled_ID = pool_items(features[name].pooled_UD, stream.unit_counts)
                outputs.embeddings[name] = (head(pooled_ID, name), stream.sample_of_item)
        outputs.scale, outputs.bias = head.scale, head.bias

    def _merge(self, batch: Batch, features: dict[str, Features], outputs: Outputs, *, with_mismatches: bool) -> None:
        if not isinstance(self.backbone, Merge):
            raise ConfigError(f"this needs a merge backbone; the model's backbone is {self.config.backbone.use!r}")
        items: dict[str, Item] = {}
        for name in self.config.merge_streams:
            connector = self._stream(name).connector
            if name in features and connector is not None:
                items[name] = (connector, features[name], batch.streams[name])
        tokens, is_valid = self.backbone.lay_out(items, batch.num_samples)
        outputs.merged = self.backbone.fuse(tokens, is_valid)
        for name, config in self.config.heads.items():
            if config.use == "class":
                outputs.class_logits = self.heads[name](outputs.merged)
            elif config.use == "matching":
                outputs.match_logits = self.heads[name](outputs.merged).squeeze(-1)
        if with_mismatches:
            *mixed, outputs.mismatch_samples = self.backbone.mismatch(tokens, is_valid)
            # Nothing to mismatch: the modules need not stand empty batches.
            states = self.backbone.fuse(*mixed) if len(outputs.mismatch_samples) else outputs.merged[:0]
            outputs.mismatch_logits = self.head("matching")(states).squeeze(-1)


def pool_items(pooled_UD: Tensor, unit_counts: list[int]) -> Tensor:
    """Mean over each item's units: ``[I, D]``."""
    if all(count == 1 for count in unit_counts):
        return pooled_UD
    return torch.stack([part.mean(0) for part in torch.split(pooled_UD, unit_counts)])


def _with_vocabulary(stream: StreamConfig, vocab_size: int) -> StreamConfig:
    """A text encoder's vocabulary is the tokenizer's; no recipe types it."""
    if stream.modality != "text":
        return stream
    encoder = stream.encoder.model_copy(update={"vocab_size": vocab_size})
    return stream.model_copy(update={"encoder": encoder})


def supports(config: ModelConfig) -> set[str]:
    """The passes that a model of this config can run."""
    kinds = {head.use for head in config.heads.values()}
    found = set()
    if "next_token" in kinds:
        found.add("sequence")
    if "projection" in kinds:
        found.add("embed")
    if isinstance(config.backbone, MergeConfig):
        found |= {"merge", "match"} if "matching" in kinds else {"merge"}
    return found
