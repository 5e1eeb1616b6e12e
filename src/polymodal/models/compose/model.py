"""The composed model: encode, connect, enter, read out.

Shape legend: ``U`` units, ``N`` features, ``M`` tokens, ``D`` width, ``I`` items, ``S`` samples, ``B`` rows,
``T`` tokens of a row, ``E`` embedding width, ``K`` predicted tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from polymodal.core.batch import Batch, CtcOutput, Outputs, StreamBatch
from polymodal.core.config import unknown
from polymodal.core.errors import ConfigError, SampleError
from polymodal.core.passes import Pass, TokenPass
from polymodal.models.backbones.decoder import CausalBackbone, CausalConfig, batch_layout, supervised_index
from polymodal.models.backbones.encoder import EncoderBackbone, EncoderBackboneConfig
from polymodal.models.backbones.latent import LatentBackbone, LatentConfig
from polymodal.models.backbones.table import MergeConfig
from polymodal.models.compose.config import ModelConfig, StreamConfig
from polymodal.models.compose.joint import JointRun
from polymodal.models.compose.merge import Item, Merge
from polymodal.models.compose.whole_items import compare_pairs, read_latents, rebuild_patches
from polymodal.models.connectors.arrangements import Arrangement
from polymodal.models.encoders.base import Features
from polymodal.models.entries.memory import Watched, lay_out
from polymodal.models.heads.ctc import CtcHead, join_units
from polymodal.models.heads.prompted_pairs import PromptedPairsConfig, PromptedPairsHead
from polymodal.models.heads.table import ClassConfig, HeadInputs, ProjectionHead
from polymodal.models.layers.cache import KVCache
from polymodal.models.layers.memory import Memory

Words = tuple[Tensor, Tensor]
PASSES = ("sequence", "embed", "merge", "match", "match_hard", "ctc", "rebuild", "pairs", "pool")


class Stream(nn.Module):
    """One stream's modules: its encoder, and its connector where it enters something."""

    def __init__(self, config: StreamConfig, out_dim: int | None) -> None:
        super().__init__()
        self.encoder: nn.Module = config.encoder.build()
        self.connector: nn.Module | None = None
        if config.connector is not None and out_dim is not None:
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
    """

    def __init__(
        self, config: ModelConfig, vocab_size: int, controls: Mapping[str, Mapping[str, int]] | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.controls = dict(controls or {})
        backbone = config.backbone
        width = getattr(backbone, "width", None)
        entered = getattr(backbone, "input_width", width)
        self.streams = nn.ModuleDict(
            {
                name: Stream(
                    _with_vocabulary(stream, vocab_size),
                    None if stream.enters.use == "none" else _tokens_width(config, name, entered),
                )
                for name, stream in config.streams.items()
            }
        )
        for name, stream in config.streams.items():
            if stream.shares is not None:
                _share_trunk(name, self._stream(name).encoder, stream.shares, self._stream(stream.shares).encoder)
            if stream.shares_tokens and stream.shares is not None:
                _share_tokens(name, self._stream(name), stream.shares, self._stream(stream.shares))
        self.backbone: nn.Module | None = None
        if isinstance(backbone, CausalConfig):
            look = config.look
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
        )
        self.heads = nn.ModuleDict({name: head.build(inputs) for name, head in config.heads.items()})

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

    def forward(self, batch: Batch, passes: Collection[Pass] = ("sequence",)) -> Outputs:
        """Run the passes that the objectives ask for; every encoder runs at most once.

        Args:
            batch: tensors on the model's device (``to_device``).
            passes: of ``sequence`` (token logits), ``embed`` (shared space), ``merge`` (merged state), ``match`` (that,
                and beside it mismatched samples of the batch; ``match_hard``: such as look alike in the shared space),
                ``ctc`` (tokens of a stream's features), or a :class:`TokenPass`.

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
        needed = self._needed(batch, wanted | {"merge"} if token_passes else wanted)
        features = {name: self.encode(name, batch.streams[name]) for name in needed}
        outputs = Outputs()
        if "sequence" in wanted:
            self._sequence(batch, features, outputs)
        if "embed" in wanted:
            self._embed(batch, features, outputs)
        if wanted & {"merge", "match", "match_hard"}:
            self._read_samples(batch, features, outputs, wanted)
        if "pairs" in wanted:
            compare_pairs(self, batch, features, outputs)
        if "rebuild" in wanted:
            rebuild_patches(self, batch, outputs)
        if "ctc" in wanted:
            outputs.ctc = self._ctc(batch, features)
        if "pool" in wanted:
            self._pool(batch, features, outputs)
        if token_passes:
            outputs.tokens = JointRun(self, batch, features).tokens(token_passes)
        return outputs

    def _read_samples(self, batch: Batch, features: dict[str, Features], outputs: Outputs, wanted: set[str]) -> None:
        """What is read of whole samples, by the backbone that the model has."""
        if self.class_stream is not None and "merge" in wanted:
            self._classify(batch, features, outputs)
        elif isinstance(self.backbone, LatentBackbone) and "merge" in wanted:
            read_latents(self, batch, features, outputs)
        elif isinstance(self.backbone, EncoderBackbone):
            hard = "hard" if "match_hard" in wanted else None
            JointRun(self, batch, features).merge(outputs, hard or ("random" if "match" in wanted else None))
        elif "match_hard" in wanted:
            raise ConfigError(f"hard negatives need the backbone 'encoder'; found {self.config.backbone.use!r}")
        else:
            self._merge(batch, features, outputs, with_mismatches="match" in wanted)

    def _needed(self, batch: Batch, passes: set[str]) -> Iterable[str]:
        names: set[str] = set()
        if "sequence" in passes:
            names |= {*self.config.sequence_streams, *self.config.watched_streams}
        if passes & {"merge", "match", "match_hard"}:
            names |= {*self.config.merge_streams, *self.config.latent_streams}
            if isinstance(self.backbone, EncoderBackbone):
                names |= {*self.config.sequence_streams, *self.config.watched_streams}
            names |= {self.class_stream} if self.class_stream is not None else set()
        if "pool" in passes:
            names |= set(self.config.streams)
        if "embed" in passes:
            names |= set(self._projection().projs)
        if "pairs" in passes:
            head = self.prompted_pairs
            names |= {head.video, head.text}
        if "ctc" in passes:
            names.add(self.ctc_head.config.stream)
        return [name for name in batch.streams if name in names]

    def embed_sequence(self, batch: Batch, features: dict[str, Features] | None = None) -> Tensor:
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
        arrangement = self._stream(name).arrangement
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
        connector = self._stream(name).connector
        if connector is None:
            return features.x_UND, features.is_valid_UN
        read = {} if words is None else {"words": words}
        tokens_UMD, is_valid_UM = connector(features.x_UND, features.is_valid_UN, **read)
        return tokens_UMD, is_valid_UM

    def memory(self, batch: Batch, features: dict[str, Features] | None = None) -> Memory | None:
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

    def states(self, batch: Batch, cache: KVCache | None = None) -> Tensor:
        """Final decoder states ``[B, T, D]`` of a batch, filling ``cache`` if there is one.

        A cache that has read something remembers what the decoder looks at.
        """
        memory = self.memory(batch) if cache is None or cache.length == 0 else None
        return torch.as_tensor(self.decoder(self.embed_sequence(batch), batch_layout(batch), cache, memory))

    def token_logits(self, states: Tensor) -> Tensor:
        """Vocabulary logits of decoder states, ``[..., V]``."""
        return torch.as_tensor(self.head("next_token")(states))

    def _sequence(self, batch: Batch, features: dict[str, Features], outputs: Outputs) -> None:
        states_BTD = self.decoder(
            self.embed_sequence(batch, features), batch_layout(batch), None, self.memory(batch, features)
        )
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
            if name in features and name in head.config.through:
                pooled_ID, samples_I = JointRun(self, batch, features).alone(name)
                outputs.embeddings[name] = (head(pooled_ID, name), samples_I)
            elif name in features:
                stream = batch.streams[name]
                pooled_ID = pool_items(features[name].pooled_UD, stream.unit_counts)
                outputs.embeddings[name] = (head(pooled_ID, name), stream.sample_of_item)
        outputs.scale, outputs.bias = head.scale, head.bias
        if head.has_own_scales:
            outputs.pair_scale = head.pair_scale

    @property
    def class_stream(self) -> str | None:
        """The stream that a class head reads without a backbone; None where there is none."""
        return next((h.stream for h in self.config.heads.values() if isinstance(h, ClassConfig)), None)

    def _classify(self, batch: Batch, features: dict[str, Features], outputs: Outputs) -> None:
        """Class logits of every sample from the items of one stream, whose states are averaged."""
        name, head = next((n, h) for n, h in self.config.heads.items() if isinstance(h, ClassConfig))
        stream = batch.streams.get(head.stream or "")
        counts_S = torch.zeros(batch.num_samples, dtype=torch.int64)
        if stream is not None:
            counts_S = torch.bincount(stream.sample_of_item, minlength=batch.num_samples)
        if stream is None or not bool(counts_S.all()):
            absent = batch.sample_ids[int((counts_S == 0).int().argmax())]
            raise SampleError(absent, f"has no item of the stream {head.stream!r}, which is classified")
        found = features[str(head.stream)]
        state_ID = pool_items(head.read(found.x_UND, found.is_valid_UN, found.pooled_UD), stream.unit_counts)
        sums_SD = state_ID.new_zeros(batch.num_samples, state_ID.shape[1])
        sums_SD = sums_SD.index_add(0, stream.sample_of_item, state_ID)
        outputs.merged = sums_SD / counts_S[:, None].to(sums_SD)
        outputs.class_logits = self.heads[name](outputs.merged)

    @property
    def prompted_pairs(self) -> PromptedPairsConfig:
        """The config of the head that compares videos with texts.

        Raises:
            ConfigError: if the model has none.
        """
        head = self.head("prompted_pairs")
        assert isinstance(head, PromptedPairsHead)
        return head.config

    @property
    def ctc_head(self) -> CtcHead:
        """The head for connectionist temporal classification.

        Raises:
            ConfigError: if the model has none.
        """
        head = self.head("ctc")
        assert isinstance(head, CtcHead)
        return head

    def _ctc(self, batch: Batch, features: dict[str, Features]) -> CtcOutput:
        config = self.ctc_head.config
        if config.stream not in features:
            logits = self.ctc_head.proj.weight.new_zeros(0, 0, len(config.vocabulary))
            none = torch.zeros(0, dtype=torch.int64, device=logits.device)
            return CtcOutput(logits, none, none, config.blank, config.encode)
        found, stream = features[config.stream], batch.streams[config.stream]
        logits, lengths = join_units(self.ctc_head(found.x_UND), found.is_valid_UN, stream.unit_counts)
        return CtcOutput(logits, lengths, stream.sample_of_item, config.blank, config.encode)

    def _pool(self, batch: Batch, features: dict[str, Features], outputs: Outputs) -> None:
        for name, config in self.config.heads.items():
            if config.use != "pooler":
                continue
            if config.stream is None:
                run = JointRun(self, batch, features)
                outputs.pooled[name] = self.heads[name](run.states(*run.lay_out(features)).pooled_SW)
            elif config.stream in features:
                pooled_ID = pool_items(features[config.stream].pooled_UD, batch.streams[config.stream].unit_counts)
                outputs.pooled[name] = self.heads[name](pooled_ID)

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


def pool_neighbours(media_MD: Tensor, pools: list[tuple[int, int]]) -> Tensor:
    """Means of neighbouring tokens of each item; the last mean of an item is over what is left.

    Args:
        media_MD: the tokens of all items, one after another.
        pools: per item, its tokens and how many neighbours become one; empty for no pooling.
    """
    if not pools or sum(tokens for tokens, _ in pools) != len(media_MD):
        # A wrong number is the caller's to name.
        return media_MD
    parts = []
    for item_MD, (_, pool) in zip(torch.split(media_MD, [tokens for tokens, _ in pools]), pools, strict=True):
        whole = len(item_MD) - len(item_MD) % pool
        parts.append(item_MD[:whole].view(-1, pool, item_MD.shape[1]).mean(dim=1))
        if whole < len(item_MD):
            parts.append(item_MD[whole:].mean(dim=0, keepdim=True))
    return torch.cat(parts)


def pool_items(pooled_UD: Tensor, unit_counts: list[int]) -> Tensor:
    """Mean over each item's units: ``[I, D]``."""
    if all(count == 1 for count in unit_counts):
        return pooled_UD
    return torch.stack([part.mean(0) for part in torch.split(pooled_UD, unit_counts)])


def _share_trunk(name: str, encoder: nn.Module, shared: str, other: nn.Module) -> None:
    """Make the trunk of one stream's encoder that of another's.

    Raises:
        ConfigError: if one of them has no trunk, or they differ.
    """
    mine, theirs = getattr(encoder, "trunk", None), getattr(other, "trunk", None)
    for stream, trunk in ((name, mine), (shared, theirs)):
        if not isinstance(trunk, nn.Module):
            raise ConfigError(f"streams.{name}.shares: the encoder of the stream {stream!r} has no trunk to share")
    assert isinstance(mine, nn.Module) and isinstance(theirs, nn.Module)
    own, shared_shapes = ({key: x.shape for key, x in trunk.state_dict().items()} for trunk in (mine, theirs))
    if own != shared_shapes:
        wrong = sorted(key for key in own.keys() | shared_shapes.keys() if own.get(key) != shared_shapes.get(key))
        raise ConfigError(
            f"streams.{name}.shares: the trunks of {name!r} and {shared!r} differ in {wrong[0]}; give both encoders "
            "the same sizes"
        )
    encoder.trunk = theirs


def _share_tokens(name: str, stream: Stream, shared: str, other: Stream) -> None:
    """Make the connector of one stream, and what its arrangement has learned, those of another.

    Raises:
        ConfigError: if one of them has no connector, or they differ.
    """
    shapes = [
        None if part is None else {key: x.shape for key, x in part.state_dict().items()}
        for part in (stream.connector, other.connector)
    ]
    if shapes[0] is None or shapes[0] != shapes[1]:
        raise ConfigError(
            f"streams.{name}.shares_tokens: the connectors of {name!r} and {shared!r} differ, or one has none; give "
            "both the same"
        )
    stream.connector = other.connector
    if isinstance(stream.arrangement, Arrangement) and isinstance(other.arrangement, Arrangement):
        stream.arrangement.newline = other.arrangement.newline


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


def supports(config: ModelConfig) -> set[str]:
    """The passes that a model of this config can run."""
    kinds = {head.use for head in config.heads.values()}
    found = set()
    if "next_token" in kinds:
        found.add("sequence")
    if "projection" in kinds:
        found.add("embed")
    if "ctc" in kinds:
        found.add("ctc")
    if "masked_patches" in kinds:
        found.add("rebuild")
    if "prompted_pairs" in kinds:
        found.add("pairs")
    if isinstance(config.backbone, LatentConfig):
        found.add("merge")
    if isinstance(config.backbone, MergeConfig | EncoderBackboneConfig):
        found |= {"merge", "match"} if "matching" in kinds else {"merge"}
    if isinstance(config.backbone, EncoderBackboneConfig) and {"matching", "projection"} <= kinds:
        found.add("match_hard")
    if "pooler" in kinds:
        found.add("pool")
    if "masked_token" in kinds:
        found |= {"masked", "caption"} if isinstance(config.backbone, EncoderBackboneConfig) else {"masked"}
    if any(isinstance(head, ClassConfig) and head.stream is not None for head in config.heads.values()):
        found.add("merge")
    return found
