"""Runs over whole items: latents over all streams, videos against texts, and rebuilt patches of one stream.

Shape legend: ``S`` samples, ``M`` tokens, ``L`` latents, ``D`` width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from polymodal.core.batch import Batch, Outputs
from polymodal.core.errors import ConfigError
from polymodal.models.backbones.latent import LatentBackbone
from polymodal.models.compose.merge import by_sample
from polymodal.models.encoders.base import Features
from polymodal.models.heads.latent_queries import QueryClassHead, QueryTokenHead
from polymodal.models.heads.masked_patches import MaskedPatchesHead
from polymodal.models.heads.prompted_pairs import PromptedPairsHead

if TYPE_CHECKING:
    from polymodal.models.compose.model import MultimodalModel


def latents(model: MultimodalModel, batch: Batch, features: Mapping[str, Features]) -> Tensor:
    """The latents ``[S, L, D]`` of every sample, whichever streams it has.

    Raises:
        ConfigError: if the model has another backbone, or no stream has an item.
    """
    if not isinstance(model.backbone, LatentBackbone):
        raise ConfigError(f"this needs a latent backbone; the model's backbone is {model.config.backbone.use!r}")
    tokens: dict[str, Tensor] = {}
    is_valid: dict[str, Tensor] = {}
    for name in model.config.latent_streams:
        if name in features:
            stream = batch.streams[name]
            x_UMC, valid_UM = model.unit_tokens(name, features[name])
            tokens[name] = by_sample(x_UMC, stream, batch.num_samples)
            is_valid[name] = by_sample(valid_UM, stream, batch.num_samples)
    states: Tensor = model.backbone(tokens, is_valid)
    return states


def read_latents(model: MultimodalModel, batch: Batch, features: Mapping[str, Features], outputs: Outputs) -> None:
    """Fill what the heads of a latent backbone say: classes, matches, and the tokens of queried texts."""
    outputs.latents = latents(model, batch, features)
    outputs.merged = outputs.latents.mean(dim=1)
    for name, head in model.heads.items():
        kind = model.config.heads[name].use
        if kind == "class":
            outputs.class_logits = head(outputs.latents if isinstance(head, QueryClassHead) else outputs.merged)
        elif kind == "matching":
            outputs.match_logits = head(outputs.merged).squeeze(-1)
        elif isinstance(head, QueryTokenHead):
            outputs.queried[head.config.stream] = head(outputs.latents)


def compare_pairs(model: MultimodalModel, batch: Batch, features: Mapping[str, Features], outputs: Outputs) -> None:
    """Fill what a ``prompted_pairs`` head says of every video and every text of the batch.

    Raises:
        ConfigError: if the batch has no video or no text.
    """
    head = model.head("prompted_pairs")
    assert isinstance(head, PromptedPairsHead)
    video, text = head.config.video, head.config.text
    if video not in features or text not in features:
        raise ConfigError(
            f"prompted_pairs: found a batch with {sorted(features)}, expected both {video!r} and {text!r}"
        )
    outputs.pair_logits = head(features[video], features[text].pooled_UD).logits_VT
    outputs.pair_samples = (batch.streams[video].sample_of_item, batch.streams[text].sample_of_item)


def rebuild_patches(model: MultimodalModel, batch: Batch, outputs: Outputs) -> None:
    """Fill what a ``masked_patches`` head rebuilds; nothing where no sample has its stream.

    Raises:
        ConfigError: if the model has no such head, or only cached features of its stream are there.
    """
    head = model.head("masked_patches")
    assert isinstance(head, MaskedPatchesHead)
    name = head.config.stream
    stream = batch.streams.get(name)
    if stream is None:
        outputs.rebuilt = outputs.rebuilt_targets = head.out.weight.new_zeros(0, head.out.out_features)
        return
    if stream.values is None:
        raise ConfigError(f"masked_patches: stream {name!r} holds cached features, and rebuilding needs its frames")
    encoder = model.streams[name].encoder
    outputs.rebuilt, outputs.rebuilt_targets = head(encoder, stream.values, stream.lengths)
