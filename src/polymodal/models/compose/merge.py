"""The merge backbone: per-sample tokens of several streams -> one state, with a stated policy for absent modalities.

Shape legend: ``S`` samples, ``M`` tokens, ``W`` width, ``U`` units, ``C`` streams.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from polymodal.core.batch import StreamBatch
from polymodal.core.errors import ConfigError
from polymodal.models.backbones.table import MergeConfig
from polymodal.models.encoders.base import Features
from polymodal.models.entries.fusions import FUSIONS, Tokens
from polymodal.models.entries.table import MergeEntry

Item = tuple[nn.Module, Features, StreamBatch]


class Merge(nn.Module):
    """Connects each stream, lays its tokens out per sample, applies the absence policy, and fuses.

    Args:
        config: the backbone.
        entries: per merged stream, how it enters.
    """

    def __init__(self, config: MergeConfig, entries: Mapping[str, MergeEntry]) -> None:
        super().__init__()
        self.config = config
        self.entries = dict(entries)
        self.missing = nn.ParameterDict(
            {
                name: nn.Parameter(torch.randn(config.width) * config.width**-0.5)
                for name, e in entries.items()
                if e.missing == "learned"
            }
        )
        self.fusion = FUSIONS.parse(config.fusion).build(list(entries), config.width)

    def forward(self, items: Mapping[str, Item], num_samples: int) -> Tensor:
        """The merged states ``[S, W]``.

        Args:
            items: per stream that has items in the batch, its connector, features and batch.
            num_samples: ``S``.

        Raises:
            ConfigError: if no merged stream has an item in the batch.
        """
        return self.fuse(*self.lay_out(items, num_samples))

    def lay_out(self, items: Mapping[str, Item], num_samples: int) -> tuple[Tokens, Tokens]:
        """Per merged stream, connected tokens ``[S, M, W]`` and which are valid ``[S, M]``, after modality dropout.

        Raises:
            ConfigError: if no merged stream has an item in the batch.
        """
        tokens: dict[str, Tensor] = {}
        is_valid: dict[str, Tensor] = {}
        for name in self.entries:
            if name in items:
                tokens[name], is_valid[name] = self._place(name, *items[name], num_samples)
        if not tokens:
            raise ConfigError(f"merge: no sample of the batch has one of the merged streams {sorted(self.entries)}")
        example = next(iter(tokens.values()))
        for name in self.entries:
            if name not in tokens:
                tokens[name] = example.new_zeros(num_samples, 1, self.config.width)
                is_valid[name] = torch.zeros(num_samples, 1, dtype=torch.bool, device=example.device)
        if self.training:
            self._drop(is_valid)
        return tokens, is_valid

    def fuse(self, tokens: Tokens, is_valid: Tokens) -> Tensor:
        """The states ``[S, W]`` of laid-out tokens, learned stand-ins included."""
        tokens, is_valid = dict(tokens), dict(is_valid)
        for name in self.missing:
            tokens[name], is_valid[name] = self._stand_in(tokens[name], is_valid[name], self.missing[name])
        state: Tensor = self.fusion(tokens, is_valid)
        return state

    def _place(
        self, name: str, connector: nn.Module, features: Features, stream: StreamBatch, num_samples: int
    ) -> tuple[Tensor, Tensor]:
        """Tokens ``[S, M, W]``: the units of a sample's items one after another."""
        if self.entries[name].take == "pooled":
            ones = torch.ones(len(features.pooled_UD), 1, dtype=torch.bool, device=features.pooled_UD.device)
            x_UMW, valid_UM = connector(features.pooled_UD.unsqueeze(1), ones)
        else:
            x_UMW, valid_UM = connector(features.x_UND, features.is_valid_UN)
        return by_sample(x_UMW, stream, num_samples), by_sample(valid_UM, stream, num_samples)

    def _drop(self, is_valid: dict[str, Tensor]) -> None:
        """Modality dropout: each sample may lose streams, never its last one."""
        names = [name for name, entry in self.entries.items() if entry.dropout > 0]
        if not names:
            return
        present = torch.stack([is_valid[name].any(1) for name in self.entries], dim=1)
        rates = torch.tensor([entry.dropout for entry in self.entries.values()])
        lost = (torch.rand(present.shape) < rates).to(present.device) & present
        keeps_none = (present & ~lost).sum(1) == 0
        lost[keeps_none] = False
        for column, name in enumerate(self.entries):
            is_valid[name] = is_valid[name] & ~lost[:, column, None]

    @staticmethod
    def _stand_in(tokens_SMW: Tensor, is_valid_SM: Tensor, learned_W: Tensor) -> tuple[Tensor, Tensor]:
        """One learned token in place of a modality that a sample lacks."""
        is_absent_S = ~is_valid_SM.any(1)
        first = torch.where(is_absent_S[:, None], learned_W.to(tokens_SMW.dtype), tokens_SMW[:, 0])
        tokens = torch.cat([first.unsqueeze(1), tokens_SMW[:, 1:]], dim=1)
        valid = torch.cat([(is_valid_SM[:, :1] | is_absent_S[:, None]), is_valid_SM[:, 1:]], dim=1)
        return tokens, valid


def by_sample(x_UM: Tensor, stream: StreamBatch, num_samples: int) -> Tensor:
    """The units of each sample's items one after another: ``[U, M, ...]`` to ``[S, slots * M, ...]``, zero-padded.

    Worked example: units ``a b`` of sample 0 and ``c`` of sample 2 become rows ``a b``, ``. .`` and ``c .``.
    """
    counts = torch.tensor(stream.unit_counts, device=x_UM.device)
    sample_of_unit = torch.repeat_interleave(stream.sample_of_item, counts)
    units_of_sample = torch.bincount(sample_of_unit, minlength=num_samples)
    slots = int(units_of_sample.max())
    first_unit = units_of_sample.cumsum(0) - units_of_sample
    slot_of_unit = torch.arange(len(sample_of_unit), device=x_UM.device) - first_unit[sample_of_unit]
    place = sample_of_unit * slots + slot_of_unit
    rows = x_UM.new_zeros(num_samples * slots, *x_UM.shape[1:]).index_copy(0, place, x_UM)
    return rows.view(num_samples, slots * x_UM.shape[1], *x_UM.shape[2:])
