"""The composed model: encode, connect, enter, read out.

Shape legend: ``U`` units, ``N`` features, ``M`` tokens, ``D`` width, ``I`` items, ``S`` samples, ``B`` rows,
``T`` tokens of a row, ``E`` embedding width, ``K`` predicted tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from polymodal.core.batch import Batch, Outputs, StreamBatch
from polymodal.core.config import unknown
from polymodal.core.errors import ConfigError
from polymodal.core.passes import Pass, TokenPass
from polymodal.models.backbones.decoder import CausalBackbone, CausalConfig, Decoder, batch_layout
from polymodal.models.backbones.encoder import EncoderBackboneConfig
from polymodal.models.backbones.latent import LatentConfig
from polymodal.models.backbones.table import MergeConfig
from polymodal.models.compose.config import ModelConfig, StreamConfig
from polymodal.models.compose.joint import JointRun, Shown
from polymodal.models.compose.merge import Merge
from polymodal.models.compose.pooling import pool_neighbours
from polymodal.models.compose.readouts import PASSES, READOUTS, Run, sample_streams
from polymodal.models.compose.sharing import share_tokens, share_trunk
from polymodal.models.encoders.base import Encoder, Features
from polymodal.models.entries.memory import Watched, lay_out
from polymodal.models.heads.table import HeadInputs
from polymodal.models.layers.cache import KVCache
from polymodal.models.layers.dropping import Dropping, MediaDrop
from polymodal.models.layers.memory import Memory

Words = tuple[Tensor, Tensor]
Within = Callable[[], AbstractContextManager[Any]]


class Stream(nn.Module):
    """One stream's modules: its encoder, and its connector where it enters something."""

    def __init__(self, config: StreamConfig, out_dim: int | None, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.connector: nn.Module | None = None
        reads_words = getattr(config.connector, "words", False)
        if config.connector is not None and (out_dim is not None or reads_words):
            self.connector = config.connector.build(config.encoder.width, out_dim)
        self.arrangement: nn.Module | None = None
        if config.arrange is not None and out_dim is not None:
            self.arrangement = config.arrange.build(out_dim)


class MultimodalModel(nn.Module):
    """Streams, a backbone and heads, assembled from a config.

    Parameter names are stable: ``streams.<name>.encoder...``, ``streams.<name>.connector...``, ``backbone...``,
    ``heads.<name>...``.

    Args:
        config: the model.
        vocab_size: size of the tokenizer.
        controls: per text stream, the control tokens of its tokenizer and their ids, for masked modelling.
        later: encoders, the backbone and heads, by path, whose weights are put in before use, and what they are built
            within: a context in which they take no memory; "" for all of them.
    """

    config: ModelConfig

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        controls: Mapping[str, Mapping[str, int]] | None = None,
        later: Mapping[str, Within] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.controls = dict(controls or {})
        backbone = config.backbone
        width = getattr(backbone, "width", None)
        entered = getattr(backbone, "input_width", width)
        self.streams = nn.ModuleDict()
        for name, given in config.streams.items():
            stream = _with_vocabulary(given, vocab_size)
            out_dim = None if stream.enters.use == "none" else _tokens_width(config, name, entered)
            with _within(f"streams.{name}.encoder", later):
                encoder = stream.encoder.build()
            self.streams[name] = Stream(stream, out_dim, encoder)
        for name, stream in config.streams.items():
            if stream.shares is not None:
                share_trunk(name, self.modules_of(name), stream.shares, self.modules_of(stream.shares))
            if stream.shares_tokens and stream.shares is not None:
                share_tokens(name, self.modules_of(name), stream.shares, self.modules_of(stream.shares))
        self.backbone: nn.Module | None = None
        if isinstance(backbone, CausalConfig):
            look = config.look
            with _within("backbone", later):
                self.backbone = (backbone if look is None else backbone.looking(look)).build(vocab_size)
        elif isinstance(backbone, EncoderBackboneConfig):
            look = config.look
            self.backbone = (backbone if look is None else backbone.looking(look)).build(config.sequence_streams)
        elif isinstance(backbone, LatentConfig):
            self.backbone = backbone.build([n for n in config.latent_streams if config.streams[n].enters.code])
        elif isinstance(backbone, MergeConfig):
            self.backbone = Merge(backbone, {name: config.streams[name].enters for name in config.merge_streams})
        inputs = HeadInputs(
            state_width=width,
            vocab_size=vocab_size,
            stream_widths={name: stream.encoder.pooled_width for name, stream in config.streams.items()},
            embedding=getattr(self.backbone, "embed_tokens", None),
            added_embedding=getattr(self.backbone, "embed_added", None),
            own_head=getattr(self.backbone, "own_head", None),
            stream_encoders={name: stream.encoder for name, stream in config.streams.items()},
            token_embeddings=self._token_embeddings(),
            query_width=config.query_width,
        )
        self.heads = nn.ModuleDict()
        for name, head in config.heads.items():
            with _within(f"heads.{name}", later):
                self.heads[name] = head.build(inputs)

    def _token_embeddings(self) -> dict[str, nn.Embedding]:
        found = {name: getattr(stream.encoder, "token_embed", None) for name, stream in self.streams.items()}
        return {name: embedding for name, embedding in found.items() if isinstance(embedding, nn.Embedding)}

    @property
    def decoder(self) -> CausalBackbone:
        """The decoder backbone, ours or the adapter's.

        Raises:
            ConfigError: if the model has another one.
        """
        if not isinstance(self.backbone, CausalBackbone):
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

    def modules_of(self, name: str) -> Stream:
        """The modules of a stream."""
        stream = self.streams[name]
        assert isinstance(stream, Stream)
        return stream

    def encode(self, name: str, stream: StreamBatch) -> Features:
        """Run the encoder of stream ``name`` over a batch's units, or take the cached features."""
        if stream.features is not None:
            return Features(*stream.features)
        encoder, values = self.modules_of(name).encoder, stream.values
        if isinstance(encoder, Encoder) and values.is_floating_point():
            # Media come in float32.
            values = values.to(encoder.dtype)
        features: Features = encoder(values, stream.lengths)
        return features

    def forward(
        self,
        batch: Batch,
        passes: Collection[Pass] = ("sequence",),
        shown: Mapping[TokenPass, Mapping[str, Shown]] | None = None,
    ) -> Outputs:
        """Run the passes that the objectives ask for; every encoder runs at most once.

        Args:
            batch: tensors on the model's device (``to_device``).
            passes: of ``sequence`` (token logits), ``embed`` (shared space), ``merge`` (merged state), ``match`` (that,
                and beside it mismatched samples of the batch; ``match_any``: whatever their labels; ``match_hard``:
                such as look alike in the shared space), ``ctc`` (tokens of a stream's features), or a
                :class:`TokenPass`.
            shown: per run of masked modelling and stream, what is hidden; else it is drawn.

        Raises:
            ConfigError: if a pass is unknown, or the model has no head or backbone for it.
        """
        wanted = {needed for needed in passes if isinstance(needed, str)}
        token_passes = [needed for needed in passes if isinstance(needed, TokenPass)]
        if "match_hard" in wanted:
            # Hard negatives are chosen by the similarities of the same run.
            wanted.add("embed")
        if wanted - set(PASSES):
            raise ConfigError(unknown("pass", sorted(wanted - set(PASSES))[0], PASSES))
        readouts = [readout for readout in READOUTS if readout.passes & wanted]
        needed = {name for readout in readouts for name in readout.streams(self)}
        if token_passes:
            needed |= {*sample_streams(self)}
        features = {name: self.encode(name, batch.streams[name]) for name in batch.streams if name in needed}
        outputs = Outputs()
        penalties = {f"streams.{name}": found.penalty for name, found in features.items()}
        outputs.penalties = {name: penalty for name, penalty in penalties.items() if penalty is not None}
        for readout in readouts:
            readout.read(Run(self, batch, wanted, features, outputs))
        if token_passes:
            outputs.tokens = JointRun(self, batch, features, shown).tokens(token_passes)
        return outputs

    def embed_sequence(self, batch: Batch, features: Mapping[str, Features] | None = None) -> Tensor:
        """Token embeddings ``[B, T, D]`` with every placeholder replaced by its media token.

        Raises:
            ConfigError: if a stream gives another number of tokens than it has placeholders.
        """
        x_BTD = self.decoder.embed_batch(batch)
        rows, tokens, width = x_BTD.shape
        flat = x_BTD.reshape(-1, width)
        for name in self.config.sequence_streams:
            stream = batch.streams.get(name)
            if stream is None:
                continue
            found = (features or {}).get(name) or self.encode(name, stream)
            media = pool_neighbours(self.connect(name, found, stream, self.words(batch, name)), stream.pools)
            if len(media) != len(stream.token_index):
                raise ConfigError(
                    f"stream {name!r}: {len(media)} media tokens for {len(stream.token_index)} placeholders "
                    f"({len(stream.unit_counts)} items); what the config derives and what its modules give differ"
                )
            flat = flat.index_copy(0, stream.token_index, media.to(flat.dtype))
        return flat.view(rows, tokens, width)

    def words(self, batch: Batch, name: str) -> Words | None:
        """The embedded instruction ``[U, L, D]`` and ``[U, L]`` of a stream's units, for a connector that reads it."""
        instruction = self.config.instruction_stream
        if instruction is None or not getattr(self.config.streams[name].connector, "words", False):
            return None
        stream, given = batch.streams[name], batch.streams[instruction]
        found = self.encode(instruction, given)
        counts = torch.tensor(stream.unit_counts, device=stream.sample_of_item.device)
        rows_U = torch.searchsorted(given.sample_of_item, stream.sample_of_item.repeat_interleave(counts))
        return found.x_UND[rows_U], found.is_valid_UN[rows_U]

    def connect(self, name: str, features: Features, stream: StreamBatch, words: Words | None = None) -> Tensor:
        """The valid tokens of all items of a stream, in item order: ``[sum M, D]``; ``words`` as :meth:`words`."""
        tokens_UMD, is_valid_UM = self.unit_tokens(name, features, words)
        arrangement = self.modules_of(name).arrangement
        if arrangement is not None:
            units = [x_MD[valid_M] for x_MD, valid_M in zip(tokens_UMD, is_valid_UM, strict=True)]
            starts = list(accumulate(map(len, stream.items), initial=0))
            parts = [arrangement(units[a:b], item) for (a, b), item in zip(pairwise(starts), stream.items, strict=True)]
            return torch.cat(parts)
        if bool(is_valid_UM.all()):
            return torch.flatten(tokens_UMD, 0, 1)
        return torch.as_tensor(tokens_UMD[is_valid_UM])

    def unit_tokens(self, name: str, features: Features, words: Words | None = None) -> tuple[Tensor, Tensor]:
        """What a stream gives per unit ``[U, M, D]`` and ``[U, M]``: its connector's tokens, or its features."""
        connector = self.modules_of(name).connector
        if connector is None:
            return features.x_UND, features.is_valid_UN
        read = {} if words is None else {"words": words}
        tokens_UMD, is_valid_UM = connector(features.x_UND, features.is_valid_UN, **read)
        return tokens_UMD, is_valid_UM

    def memory(self, batch: Batch, features: Mapping[str, Features] | None = None) -> Memory | None:
        """What the decoder looks at: one row per sample; None if no stream enters by cross-attention."""
        look, watched = self.config.look, []
        if look is None:
            return None
        for name in self.config.watched_streams:
            stream = batch.streams.get(name)
            if stream is None:
                continue
            found = (features or {}).get(name) or self.encode(name, stream)
            only_latest = self.config.streams[name].enters.mask == "latest_media"
            watched.append(Watched(*self.unit_tokens(name, found), stream, only_latest))
        return lay_out(watched, batch, look.width, next(self.decoder.parameters()))

    def states(
        self,
        batch: Batch,
        cache: KVCache | None = None,
        features: Mapping[str, Features] | None = None,
        drop: MediaDrop | None = None,
    ) -> Tensor:
        """Final decoder states ``[B, T, D]`` of a batch, filling ``cache`` if there is one.

        A cache that has read something remembers what the decoder looks at. Streams without ``features`` are encoded.
        With ``drop``, the states of dropped media tokens are zero.
        """
        x_BTD = self.embed_sequence(batch, features)
        memory = self.memory(batch, features) if cache is None or cache.length == 0 else None
        layout = batch_layout(batch)
        if drop is not None:
            layout = replace(layout, dropping=self._dropping(batch, drop))
        return torch.as_tensor(self.decoder(x_BTD, layout, cache, memory))

    def states_at(self, batch: Batch, read_K: Tensor, features: Mapping[str, Features] | None = None) -> Tensor:
        """Final decoder states ``[K, D]`` of the valid tokens at these places of the flattened batch, and no more."""
        x_BTD = self.embed_sequence(batch, features)
        return self.decoder.read(x_BTD, batch_layout(batch), read_K, self.memory(batch, features))

    def _dropping(self, batch: Batch, drop: MediaDrop) -> Dropping:
        if not isinstance(self.decoder, Decoder):
            raise ConfigError(f"drop_media: found the backbone {self.config.backbone.use!r}, expected 'decoder'")
        is_media = torch.zeros(batch.ids.numel(), dtype=torch.bool, device=batch.ids.device)
        for name in self.config.sequence_streams:
            if name in batch.streams:
                is_media[batch.streams[name].token_index] = True
        return Dropping(drop, is_media.view(batch.ids.shape), batch.is_valid.sum(1) - 1)

    def token_logits(self, states: Tensor) -> Tensor:
        """Vocabulary logits of decoder states, ``[..., V]``."""
        return torch.as_tensor(self.head("next_token")(states))


def _within(path: str, later: Mapping[str, Within] | None) -> AbstractContextManager[Any]:
    """What a part is built within."""
    found = later or {}
    return found.get(path, found.get("", nullcontext))()


def _tokens_width(config: ModelConfig, stream: str, entered: int | None) -> int | None:
    """Width of what a stream's connector gives: the backbone's input, or that of the memory it stands in."""
    return config.memory_width(stream) if stream in config.watched_streams else entered


def _with_vocabulary(stream: StreamConfig, vocab_size: int) -> StreamConfig:
    """A text encoder's vocabulary is the tokenizer's and never typed, unless the stream has a tokenizer of its own."""
    reader = stream.reader
    if stream.modality != "text" or getattr(reader, "tokenizer", None) is not None or getattr(reader, "bytes", False):
        return stream
    encoder = stream.encoder.model_copy(update={"vocab_size": vocab_size})
    return stream.model_copy(update={"encoder": encoder})
