"""The merge backbone: per-sample tokens of several streams -> one state, with a stated policy for absent modalities.

Shape legend: ``S`` samples, ``M`` tokens, ``W`` width, ``U`` units, ``I`` items.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from polymodal.core.batch import StreamBatch
from polymodal.models.backbones.table import MergeConfig
from polymodal.models.encoders.base import Features
from polymodal.models.entries.fusions import FUSIONS
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
            {name: nn.Parameter(torch.randn(config.width) * 0.02) for name, e in entries.items() if e.missing == "learned"}
        )
        self.fusion = FUSIONS.parse(config.fusion).build(list(entries), config.width)

    def forward(self, items: Mapping[str, Item], num_samples: int) -> Tensor:
        """The merged states ``[S, W]``.

        Args:
            items: per stream that has items in the batch, its connector, features and batch.
            num_samples: ``S``.
        """
        tokens: dict[str, Tensor] = {}
        is_valid: dict[str, Tensor] = {}
        for name in self.entries:
            if name in items:
                tokens[name], is_valid[name] = self._lay_out(name, *items[name], num_samples)
        example = next(iter(tokens.values()))
        for name in self.entries:
            if name not in tokens:
                tokens[name] = example.new_zeros(num_samples, 1, self.config.width)
                is_valid[name] = torch.zeros(num_samples, 1, dtype=torch.bool, device=example.device)
        if self.training:
            self._drop(is_valid)
        for name in self.missing:
            tokens[name], is_valid[name] = self._stand_in(tokens[name], is_valid[name], self.missing[name])
        state: Tensor = self.fusion(tokens, is_valid)
        return state

    def _lay_out(
        self, name: str, connector: nn.Module, features: Features, stream: StreamBatch, num_samples: int
    ) -> tuple[Tensor, Tensor]:
        """Tokens ``[S, M, W]``: the units of a sample's items one after another."""
        if self.entries[name].take == "pooled":
            ones = torch.ones(len(features.pooled_UD), 1, dtype=torch.bool, device=features.pooled_UD.device)
            x_UMW, valid_UM = connector(features.pooled_UD.unsqueeze(1), ones)
        else:
            x_UMW, valid_UM = connector(features.x_UND, features.is_valid_UN)
        counts = torch.tensor(stream.unit_counts, device=x_UMW.device)
        sample_of_unit = torch.repeat_interleave(stream.sample_of_item, counts)
        units_of_sample = torch.bincount(sample_of_unit, minlength=num_samples)
        slots = int(units_of_sample.max())
        first_unit = units_of_sample.cumsum(0) - units_of_sample
        slot_of_unit = torch.arange(len(sample_of_unit), device=x_UMW.device) - first_unit[sample_of_unit]
        place = sample_of_unit * slots + slot_of_unit
        num_tokens = x_UMW.shape[1]
        tokens = x_UMW.new_zeros(num_samples * slots, num_tokens, x_UMW.shape[2]).index_copy(0, place, x_UMW)
        valid = torch.zeros(num_samples * slots, num_tokens, dtype=torch.bool, device=x_UMW.device)
        valid[place] = valid_UM
        return tokens.view(num_samples, slots * num_tokens, -1), valid.view(num_samples, slots * num_tokens)

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
