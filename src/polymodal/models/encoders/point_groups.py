"""Groups of neighbouring points, then a transformer.

Legend: ``U`` clouds, ``L`` points, ``C`` channels (xyz first), ``G`` groups, ``K`` points of a group, ``D`` width.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from polymodal.modalities.points import PointsReaderConfig
from polymodal.models.encoders.base import Encoder, Features, TransformerEncoderConfig, finish, pool_max
from polymodal.models.layers import Layout, Transformer, TransformerConfig
from polymodal.models.layers.convolution import valid_mask
from polymodal.models.layers.norm import TokenBatchNorm


class PointGroupsConfig(TransformerEncoderConfig):
    """Farthest-point sampling, nearest neighbours, a small PointNet for each group, a transformer over groups.

    Source: Point-BERT, arXiv 2111.14819, section 3.1 and figure 2. By default layer in place of batch norm, and the
    code of a group's centre is added once; ``embedding: published`` and ``centres: every_block`` are as published.
    Deviations either way: colour goes in beside the relative coordinates, and the first centre is the point farthest
    from the mean, so that the order of points does not matter.
    """

    use: Literal["point_groups"] = "point_groups"
    modality: ClassVar[str] = "points"
    num_groups: int = Field(default=32, ge=1)
    """Groups of a cloud; a cloud of fewer points has one for each point."""
    group_size: int = Field(default=16, ge=1)
    """Neighbours in a group, its centre included; a smaller cloud is one group of all its points."""
    colour: bool = True
    """Whether points carry rgb after xyz."""
    embedding: Literal["plain", "published"] = "plain"
    """What makes a vector of a group: layers as wide as the transformer with layer norm, or the published ones (128,
    256, 512, 256) with batch norm, then a linear map."""
    centre_hidden: int | None = Field(default=None, ge=1)
    """Hidden width of the map from a centre to its code (published: 128); None: ``width``."""
    centres: Literal["once", "every_block"] = "once"
    """Where the codes of the centres are added: before the first block, or before every block."""
    qkv_bias: bool = True
    """Whether queries, keys and values have a bias (published: none)."""
    pool: Literal["mean", "cls", "cls_max"] = "mean"
    """The pooled vector: the mean of the features, a class token, or that beside the maximum of the features."""
    num_points: int = Field(default=512, ge=1)
    """Points that the default reader takes; the encoder itself takes any number."""

    @property
    def pooled_width(self) -> int:
        """``width``, or twice that for ``cls_max``."""
        return self.width * (2 if self.pool == "cls_max" else 1)

    def stack(self, depth: int | None = None, final_norm: bool = True) -> TransformerConfig:
        """The transformer's config."""
        return super().stack(depth, final_norm).model_copy(update={"qkv_bias": self.qkv_bias})

    @property
    def unit_shape(self) -> tuple[int, ...]:
        """``(6,)`` with colour, else ``(3,)``."""
        return (6 if self.colour else 3,)

    def num_features(self, length: int) -> int:
        """One for each group."""
        return min(length, self.num_groups)

    def default_reader(self) -> PointsReaderConfig:
        """Clouds of at most ``num_points`` points."""
        return PointsReaderConfig(num_points=self.num_points, colour=self.colour)

    def build(self) -> PointGroups:
        """The module."""
        return PointGroups(self)


@torch.no_grad()
def farthest_points(xyz_UL3: Tensor, is_valid_UL: Tensor, count: int) -> Tensor:
    """Indices ``[U, count]`` of points spread out: each is the one farthest from those chosen before it.

    The first is the one farthest from the mean of the valid points, so that the choice does not depend on the order of
    points. A cloud of fewer than ``count`` points repeats some of them after all have been chosen.

    Source: PointNet++, arXiv 1706.02413, section 3.2 (which starts at random).
    """
    weight_UL1 = is_valid_UL[..., None].to(xyz_UL3.dtype)
    mean_U3 = (xyz_UL3 * weight_UL1).sum(dim=1) / weight_UL1.sum(dim=1).clamp(min=1)
    outside_UL = ~is_valid_UL
    distance_UL = (xyz_UL3 - mean_U3[:, None]).square().sum(dim=-1).masked_fill(outside_UL, -1.0)
    rows_U = torch.arange(len(xyz_UL3), device=xyz_UL3.device)
    nearest_UL = torch.full_like(distance_UL, torch.inf).masked_fill(outside_UL, -1.0)
    chosen = [distance_UL.argmax(dim=1)]
    for _ in range(count - 1):
        last_U3 = xyz_UL3[rows_U, chosen[-1]]
        nearest_UL = torch.minimum(nearest_UL, (xyz_UL3 - last_U3[:, None]).square().sum(dim=-1))
        # A chosen point is at distance 0 of itself; -0.5 keeps it behind a duplicate that is not chosen yet.
        nearest_UL[rows_U, chosen[-1]] = -0.5
        chosen.append(nearest_UL.argmax(dim=1))
    return torch.stack(chosen, dim=1)


@torch.no_grad()
def nearest_points(xyz_UL3: Tensor, is_valid_UL: Tensor, centre_UG3: Tensor, count: int) -> Tensor:
    """Indices ``[U, G, K]``, ``K = min(count, L)``, of the nearest valid points of each centre, nearest first.

    Where a cloud has fewer valid points than K, the nearest one is repeated.
    """
    distance_UGL = (centre_UG3[:, :, None] - xyz_UL3[:, None]).square().sum(dim=-1)
    distance_UGL = distance_UGL.masked_fill(~is_valid_UL[:, None], torch.inf)
    near_UGK, index_UGK = distance_UGL.topk(min(count, xyz_UL3.shape[1]), dim=-1, largest=False)
    return torch.where(near_UGK.isinf(), index_UGK[..., :1], index_UGK)


class GroupEncoder(nn.Module):
    """A PointNet in small: each point alone, the group's maximum beside each, each alone again, the maximum.

    Args:
        channels: ``C`` of a point.
        width: ``D``.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(channels, width), nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, width))
        self.second = nn.Sequential(
            nn.Linear(2 * width, width), nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, width)
        )

    def forward(self, groups_UGKC: Tensor) -> Tensor:
        """Map ``[U, G, K, C]`` to ``[U, G, D]``; repeated points change nothing."""
        x_UGKD = self.first(groups_UGKC)
        whole_UGKD = x_UGKD.amax(dim=2, keepdim=True).expand_as(x_UGKD)
        out: Tensor = self.second(torch.cat((whole_UGKD, x_UGKD), dim=-1)).amax(dim=2)
        return out


class PublishedGroupEncoder(nn.Module):
    """The same with the published widths and batch norm, then a linear map to the transformer's width.

    Args:
        channels: ``C`` of a point.
        width: ``D``.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(channels, 128), TokenBatchNorm(128), nn.ReLU(), nn.Linear(128, 256))
        self.second = nn.Sequential(nn.Linear(512, 512), TokenBatchNorm(512), nn.ReLU(), nn.Linear(512, 256))
        self.reduce = nn.Linear(256, width)

    def forward(self, groups_GKC: Tensor) -> Tensor:
        """Map ``[..., K, C]`` to ``[..., D]``."""
        x_GKD = self.first(groups_GKC)
        whole_GKD = x_GKD.amax(dim=-2, keepdim=True).expand_as(x_GKD)
        out: Tensor = self.reduce(self.second(torch.cat((whole_GKD, x_GKD), dim=-1)).amax(dim=-2))
        return out


class PointGroups(Encoder):
    """See :class:`PointGroupsConfig`."""

    config: PointGroupsConfig

    def __init__(self, config: PointGroupsConfig) -> None:
        super().__init__()
        self.config = config
        width, hidden = config.width, config.centre_hidden or config.width
        is_plain = config.embedding == "plain"
        self.group = (GroupEncoder if is_plain else PublishedGroupEncoder)(config.unit_shape[0], width)
        self.centre_proj = nn.Sequential(nn.Linear(3, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.transformer = Transformer(config.stack())
        has_cls = config.pool != "mean"
        self.cls_token = nn.Parameter(torch.randn(width) * width**-0.5) if has_cls else None
        self.cls_code = nn.Parameter(torch.randn(width) * width**-0.5) if has_cls else None

    def forward(self, values: Tensor, lengths_U: Tensor) -> Features:
        """Encode clouds ``[U, L, C]``."""
        self.require_shape(values)
        config = self.config
        is_valid_UL = valid_mask(lengths_U, values.shape[1])
        # Neighbours are told apart in float32, whatever the weights are stored in.
        xyz_UL3 = values[..., :3].float()
        centres_UG = farthest_points(xyz_UL3, is_valid_UL, min(config.num_groups, values.shape[1]))
        rows_U1 = torch.arange(len(values), device=values.device)[:, None]
        centre_UG3 = xyz_UL3[rows_U1, centres_UG]
        near_UGK = nearest_points(xyz_UL3, is_valid_UL, centre_UG3, config.group_size)
        groups_UGKC = values[rows_U1[..., None], near_UGK]
        centre_UG3 = centre_UG3.to(values.dtype)
        relative_UGK3 = groups_UGKC[..., :3] - centre_UG3[:, :, None]
        groups_UGKC = torch.cat((relative_UGK3, groups_UGKC[..., 3:]), dim=-1)
        is_valid_UG = valid_mask(lengths_U.clamp(max=config.num_groups), groups_UGKC.shape[1])
        codes_UGD = self.centre_proj(centre_UG3)
        # Only real groups are seen, and counted by batch norms.
        x_UGD = torch.zeros_like(codes_UGD)
        x_UGD[is_valid_UG] = self.group(groups_UGKC[is_valid_UG][:, None])[:, 0].to(x_UGD.dtype)
        if self.cls_token is None or self.cls_code is None:
            return finish(self._related(x_UGD, codes_UGD, is_valid_UG), is_valid_UG)
        x_UTD = torch.cat((self.cls_token.expand(len(values), 1, -1), x_UGD), dim=1)
        codes_UTD = torch.cat((self.cls_code.expand(len(values), 1, -1), codes_UGD), dim=1)
        with_cls = torch.cat((is_valid_UG.new_ones(len(values), 1), is_valid_UG), dim=1)
        states_UTD = self._related(x_UTD, codes_UTD, with_cls)
        pooled_UD = states_UTD[:, 0]
        if config.pool == "cls_max":
            pooled_UD = torch.cat((pooled_UD, pool_max(states_UTD[:, 1:], is_valid_UG)), dim=1)
        return finish(states_UTD[:, 1:], is_valid_UG, pooled_UD)

    def _related(self, x_UTD: Tensor, codes_UTD: Tensor, is_valid_UT: Tensor) -> Tensor:
        """The transformer's states, with the codes of the centres added where the config says."""
        layout, stack = Layout.padded(is_valid_UT, causal=False), self.transformer
        if self.config.centres == "once":
            out: Tensor = stack(x_UTD + codes_UTD, layout)
            return out
        step = stack.step(x_UTD, layout)
        for layer in range(len(stack.blocks)):
            x_UTD = stack.run_block(layer, x_UTD + codes_UTD, step)
        return x_UTD if stack.final_norm is None else stack.final_norm(x_UTD)
