"""What is read out of a model for each pass: which streams it needs, and which outputs it fills.

Shape legend: ``I`` items, ``S`` samples, ``D`` width, ``T`` tokens of a row, ``K`` predicted tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from polymodal.core.batch import Batch, CtcOutput, Outputs
from polymodal.core.errors import ConfigError, SampleError
from polymodal.models.backbones.decoder import supervised_index
from polymodal.models.backbones.encoder import EncoderBackbone, EncoderBackboneConfig
from polymodal.models.backbones.latent import LatentBackbone, LatentConfig
from polymodal.models.backbones.table import MergeConfig
from polymodal.models.compose.config import ModelConfig
from polymodal.models.compose.joint import JointRun
from polymodal.models.compose.merge import Item, Merge
from polymodal.models.compose.negatives import Mismatches, matching_groups, mixed_samples
from polymodal.models.compose.pooling import pool_items
from polymodal.models.compose.queries import QueryRun
from polymodal.models.compose.told import conversations
from polymodal.models.compose.whole_items import compare_pairs, read_latents, rebuild_patches
from polymodal.models.encoders.base import Features
from polymodal.models.heads.ctc import CtcHead, join_units
from polymodal.models.heads.prompted_pairs import PromptedPairsConfig
from polymodal.models.heads.table import ClassConfig, MatchingConfig, ProjectionHead

if TYPE_CHECKING:
    from polymodal.models.compose.model import MultimodalModel


@dataclass(frozen=True, slots=True)
class Run:
    """One batch's way through a model.

    Args:
        model: the model.
        batch: the batch.
        wanted: names of the passes.
        features: of the streams that were encoded.
        outputs: to fill.
    """

    model: MultimodalModel
    batch: Batch
    wanted: Collection[str]
    features: Mapping[str, Features]
    outputs: Outputs

    @property
    def joint(self) -> JointRun:
        """The same with an encoder backbone."""
        return JointRun(self.model, self.batch, self.features)

    @property
    def queries(self) -> QueryRun:
        """The same with a Q-Former that reads texts."""
        return QueryRun(self.model, self.batch, self.features)


@dataclass(frozen=True, slots=True)
class Readout:
    """What one pass, or several that share a run, read.

    Args:
        passes: their names.
        streams: those that must be encoded, of a model.
        read: fills the outputs of a run.
    """

    passes: frozenset[str]
    streams: Callable[[MultimodalModel], Iterable[str]]
    read: Callable[[Run], None]


def read_sequence(run: Run) -> None:
    """Token logits and targets of the decoder's sequence; view sets of the batch have none."""
    batch, features, samples_S = conversations(run.batch, run.features)
    source_K, run.outputs.token_targets, samples_K = supervised_index(batch)
    run.outputs.token_samples = samples_K if samples_S is None else samples_S[samples_K]
    if not batch.num_samples:
        run.outputs.token_logits = run.model.token_logits(run.model.decoder.embed(run.outputs.token_targets[None])[0])
        return
    # Only states that predict a target are computed to the end and meet the vocabulary matrix.
    run.outputs.token_logits = run.model.token_logits(run.model.states_at(batch, source_K, features))


def projection(model: MultimodalModel) -> ProjectionHead:
    """The head of the shared space.

    Raises:
        ConfigError: if the model has none.
    """
    head = model.head("projection")
    assert isinstance(head, ProjectionHead)
    return head


def read_embeddings(run: Run) -> None:
    """Unit vectors of the streams that the shared space holds."""
    head, outputs = projection(run.model), run.outputs
    for name in head.projs:
        if name in run.features and name in head.config.through:
            met = run.joint if run.model.config.queried_pair is None else run.queries
            pooled_ID, samples_I = met.alone(name)
            outputs.embeddings[name] = (head(pooled_ID, name), samples_I)
        elif name in run.features:
            stream = run.batch.streams[name]
            pooled_ID = pool_items(run.features[name].pooled_UD, stream.unit_counts)
            outputs.embeddings[name] = (head(pooled_ID, name), stream.sample_of_item)
    outputs.scale, outputs.bias = head.scale, head.bias
    if head.has_own_scales:
        outputs.pair_scale = head.pair_scale


def sample_streams(model: MultimodalModel) -> list[str]:
    """The streams that whole samples are read from."""
    config = model.config
    names = [*config.merge_streams, *config.latent_streams, *(config.queried_pair or ())]
    if isinstance(model.backbone, EncoderBackbone):
        names += [*config.sequence_streams, *config.watched_streams]
    classified = _classified(config)
    return names if classified is None else [*names, str(classified[1].stream)]


def read_samples(run: Run) -> None:
    """What is read of whole samples, by the backbone that the model has."""
    model, wanted, negatives = run.model, run.wanted, mismatches_of(run)
    if _matches_queries(model.config):
        run.queries.merge(run.outputs, negatives)
    elif _classified(model.config) is not None and "merge" in wanted:
        _classify(run)
    elif isinstance(model.backbone, LatentBackbone) and "merge" in wanted:
        read_latents(model, run.batch, run.features, run.outputs)
    elif isinstance(model.backbone, EncoderBackbone):
        run.joint.merge(run.outputs, negatives)
    elif "match_hard" in wanted:
        raise ConfigError(f"hard negatives need the backbone 'encoder'; found {model.config.backbone.use!r}")
    else:
        _merge(run, negatives)


def mismatches_of(run: Run) -> Mismatches | None:
    """Of what the passes ask mismatched samples to be mixed; None: they ask for none."""
    if "match_any" in run.wanted:
        return Mismatches("random", torch.arange(run.batch.num_samples))
    if not {"match", "match_hard"} & set(run.wanted):
        return None
    texts = [name for name, stream in run.model.config.streams.items() if stream.modality == "text"]
    return Mismatches("hard" if "match_hard" in run.wanted else "random", matching_groups(run.batch, texts))


def _matches_queries(config: ModelConfig) -> bool:
    """Whether the matching head reads a Q-Former's queries."""
    return any(isinstance(head, MatchingConfig) and head.at == "queries" for head in config.heads.values())


def _classified(config: ModelConfig) -> tuple[str, ClassConfig] | None:
    """The class head that reads a stream without a backbone, and its name; None where there is none."""
    heads = config.heads.items()
    return next(((n, h) for n, h in heads if isinstance(h, ClassConfig) and h.stream is not None), None)


def _classify(run: Run) -> None:
    """Class logits of every sample from the items of one stream, whose states are averaged."""
    classified, batch = _classified(run.model.config), run.batch
    assert classified is not None
    name, head = classified
    stream = batch.streams.get(head.stream or "")
    counts_S = torch.zeros(batch.num_samples, dtype=torch.int64)
    if stream is not None:
        counts_S = torch.bincount(stream.sample_of_item, minlength=batch.num_samples)
    if stream is None or not bool(counts_S.all()):
        absent = batch.sample_ids[int((counts_S == 0).int().argmax())]
        raise SampleError(absent, f"has no item of the stream {head.stream!r}, which is classified")
    found = run.features[str(head.stream)]
    state_ID = pool_items(head.read(found.x_UND, found.is_valid_UN, found.pooled_UD), stream.unit_counts)
    sums_SD = state_ID.new_zeros(batch.num_samples, state_ID.shape[1])
    sums_SD = sums_SD.index_add(0, stream.sample_of_item, state_ID)
    run.outputs.merged = sums_SD / counts_S[:, None].to(sums_SD)
    run.outputs.class_logits = run.model.heads[name](run.outputs.merged)


def _merge(run: Run, mismatches: Mismatches | None) -> None:
    model, outputs = run.model, run.outputs
    if not isinstance(model.backbone, Merge):
        raise ConfigError(f"this needs a merge backbone; the model's backbone is {model.config.backbone.use!r}")
    items: dict[str, Item] = {}
    for name in model.config.merge_streams:
        connector = model.modules_of(name).connector
        if name in run.features and connector is not None:
            items[name] = (connector, run.features[name], run.batch.streams[name])
    tokens, is_valid = model.backbone.lay_out(items, run.batch.num_samples)
    outputs.merged = model.backbone.fuse(tokens, is_valid)
    for name, config in model.config.heads.items():
        if config.use == "class":
            outputs.class_logits = model.heads[name](outputs.merged)
        elif config.use == "matching":
            outputs.match_logits = model.heads[name](outputs.merged).squeeze(-1)
    if mismatches is not None:
        *mixed, outputs.mismatch_samples = mixed_samples(mismatches, tokens, is_valid, outputs.embeddings)
        # Nothing to mismatch: the modules need not stand empty batches.
        states = model.backbone.fuse(*mixed) if len(outputs.mismatch_samples) else outputs.merged[:0]
        outputs.mismatch_logits = model.head("matching")(states).squeeze(-1)


def _paired(model: MultimodalModel) -> tuple[str, str]:
    config = model.head("prompted_pairs").config
    assert isinstance(config, PromptedPairsConfig)
    return config.video, config.text


def ctc_head(model: MultimodalModel) -> CtcHead:
    """The head for connectionist temporal classification.

    Raises:
        ConfigError: if the model has none.
    """
    head = model.head("ctc")
    assert isinstance(head, CtcHead)
    return head


def read_ctc(run: Run) -> None:
    """Logits over a stream's features."""
    head = ctc_head(run.model)
    config = head.config
    if config.stream not in run.features:
        logits = head.proj.weight.new_zeros(0, 0, len(config.vocabulary))
        none = torch.zeros(0, dtype=torch.int64, device=logits.device)
        run.outputs.ctc = CtcOutput(logits, none, none, config.blank, config.encode)
        return
    found, stream = run.features[config.stream], run.batch.streams[config.stream]
    logits, lengths = join_units(head(found.x_UND), found.is_valid_UN, stream.unit_counts)
    run.outputs.ctc = CtcOutput(logits, lengths, stream.sample_of_item, config.blank, config.encode)


def read_pools(run: Run) -> None:
    """What ``pooler`` heads make of pooled vectors."""
    for name, config in run.model.config.heads.items():
        if config.use != "pooler":
            continue
        head = run.model.heads[name]
        if config.stream is None:
            joint = run.joint
            run.outputs.pooled[name] = head(joint.states(*joint.lay_out(run.features)).pooled_SW)
        elif config.stream in run.features:
            pooled_UD, counts = run.features[config.stream].pooled_UD, run.batch.streams[config.stream].unit_counts
            run.outputs.pooled[name] = head(pool_items(pooled_UD, counts))


READOUTS = (
    Readout(
        frozenset(("sequence",)),
        lambda model: (*model.config.sequence_streams, *model.config.watched_streams),
        read_sequence,
    ),
    Readout(frozenset(("embed",)), lambda model: projection(model).projs, read_embeddings),
    Readout(frozenset(("merge", "match", "match_any", "match_hard")), sample_streams, read_samples),
    Readout(frozenset(("pairs",)), _paired, lambda run: compare_pairs(run.model, run.batch, run.features, run.outputs)),
    Readout(frozenset(("rebuild",)), lambda model: (), lambda run: rebuild_patches(run.model, run.batch, run.outputs)),
    Readout(frozenset(("ctc",)), lambda model: (ctc_head(model).config.stream,), read_ctc),
    Readout(frozenset(("pool",)), lambda model: model.config.streams, read_pools),
)
"""In the order in which they are read: hard negatives are chosen by the embeddings of the same run."""
PASSES = tuple(name for readout in READOUTS for name in sorted(readout.passes))


_PASS_OF_HEAD = {
    "next_token": "sequence",
    "projection": "embed",
    "ctc": "ctc",
    "masked_patches": "rebuild",
    "prompted_pairs": "pairs",
    "pooler": "pool",
    "masked_token": "masked",
}
"""Passes that a head makes possible, whatever the backbone."""


def supports(config: ModelConfig) -> set[str]:
    """The passes that a model of this config can run."""
    kinds = {head.use for head in config.heads.values()}
    found = {needed for kind, needed in _PASS_OF_HEAD.items() if kind in kinds}
    is_encoder = isinstance(config.backbone, EncoderBackboneConfig)
    if isinstance(config.backbone, LatentConfig) or _classified(config) is not None:
        found.add("merge")
    if isinstance(config.backbone, MergeConfig) or is_encoder:
        found |= {"merge", "match", "match_any"} if "matching" in kinds else {"merge"}
    if _matches_queries(config):
        found |= {"merge", "match", "match_any"}
    if (is_encoder or _matches_queries(config)) and {"matching", "projection"} <= kinds:
        found.add("match_hard")
    is_queried = any(
        getattr(head, "at", None) == "queries" for head in config.heads.values() if head.use == "masked_token"
    )
    if "masked_token" in kinds and (is_encoder or is_queried):
        found.add("caption")
    return found
