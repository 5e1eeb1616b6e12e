"""Masked pretraining on pixels: from the tubelets that are left, predict those that are hidden.

Legend: ``U`` videos, ``T`` steps, ``P`` places of a step, ``N = T P`` tubelets, ``V`` visible, ``M`` masked, ``K``
masked ones of all videos, ``C`` values of a tubelet, ``D`` width.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from polymodal.core.errors import ConfigError
from polymodal.models.encoders.tubelet import TubeletConfig, TubeletEncoder
from polymodal.models.heads.base import HeadConfig, HeadInputs
from polymodal.models.layers import Layout, Transformer, TransformerConfig, initialise
from polymodal.models.layers.positions import interleaved_sinusoidal


class MaskedPatchesConfig(HeadConfig):
    """A light decoder that rebuilds hidden tubelets; the encoder sees the others alone.

    Source: VideoMAE, arXiv 2203.12602, section 3.3: tubes (the same places in every step), a share of 0.9, an
    asymmetric decoder, pixels normalised per tubelet.
    """

    use: Literal["masked_patches"] = "masked_patches"
    stream: str
    """A video stream whose encoder is ``tubelet`` with ``attention: joint``."""
    width: int = Field(default=384, ge=2, multiple_of=2)
    depth: int = Field(default=4, ge=1)
    heads: int = Field(default=6, ge=1)
    mlp_dim: int | None = Field(default=None, ge=1)
    """Hidden width of the MLPs; None: 4 x width."""
    mask_ratio: float = Field(default=0.9, gt=0, lt=1)
    """Share of the places that are hidden, in every step alike; at least one stays and one is hidden."""
    targets: Literal["normalised", "values"] = "normalised"
    """Model input as it is, or each channel of each tubelet less its mean, over its deviation."""

    def build(self, inputs: HeadInputs) -> MaskedPatchesHead:
        """The head; needs a stream with a ``tubelet`` encoder."""
        self._stream_width(self.stream, inputs)
        encoder = inputs.stream_encoders.get(self.stream)
        if not isinstance(encoder, TubeletConfig) or encoder.attention != "joint":
            raise ConfigError(
                f"head {self.use}: found stream {self.stream!r} with the encoder {getattr(encoder, 'use', None)!r}, "
                "expected the encoder 'tubelet' with attention: joint, which can leave tubelets out"
            )
        return MaskedPatchesHead(self, encoder)


class MaskedPatchesHead(nn.Module):
    """See :class:`MaskedPatchesConfig`."""

    def __init__(self, config: MaskedPatchesConfig, encoder: TubeletConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.in_proj = nn.Linear(encoder.width, width, bias=False)
        self.mask_token = nn.Parameter(torch.randn(width) * width**-0.5)
        stack = TransformerConfig.parse(
            {
                "width": width,
                "depth": config.depth,
                "heads": config.heads,
                "mlp_dim": config.mlp_dim,
                "activation": encoder.activation,
                "norm_eps": encoder.norm_eps,
                "key_bias": None if encoder.key_bias else False,
            }
        )
        self.transformer = Transformer(stack)
        # The norm in front of the output keeps the default epsilon, whatever the blocks have.
        self.transformer.final_norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, encoder.tubelet_size * encoder.patch_size**2 * 3)
        initialise(self.in_proj, 1)
        initialise(self.out, 1)

    def forward(
        self, encoder: TubeletEncoder, values: Tensor, lengths_U: Tensor, is_masked_UN: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Hide, encode the rest, rebuild.

        Args:
            encoder: of the stream.
            values: ``[U, L, 3, S, S]``.
            lengths_U: frames of each video.
            is_masked_UN: what is hidden, as many in every video, all of one length; None draws tubes.

        Returns:
            Predictions and targets ``[K, C]``; a tubelet's values stand frame, row, column, channel.
        """
        size = encoder.config.tubelet_size
        predictions, targets = [], []
        for steps in sorted(set(((lengths_U + size - 1) // size).tolist())):
            rows = (lengths_U + size - 1) // size == steps
            tubelets_UTPC = encoder.cut(values[rows, : steps * size], lengths_U[rows])
            mask = self.draw(tubelets_UTPC) if is_masked_UN is None else is_masked_UN[rows]
            predictions.append(self._rebuild(encoder.visible(tubelets_UTPC, mask), mask).flatten(0, 1))
            targets.append(self._targets(tubelets_UTPC.flatten(1, 2)[mask], encoder.config))
        return torch.cat(predictions), torch.cat(targets)

    def draw(self, tubelets_UTPC: Tensor) -> Tensor:
        """Random tubes, bool ``[U, N]``, True on what is hidden."""
        num_units, steps, places = tubelets_UTPC.shape[:3]
        hidden = min(max(1, round(self.config.mask_ratio * places)), places - 1)
        order_UP = torch.rand(num_units, places, device=tubelets_UTPC.device).argsort(dim=1)
        return (order_UP < hidden).repeat(1, steps)

    def _rebuild(self, x_UVD: Tensor, is_masked_UN: Tensor) -> Tensor:
        """Predictions ``[U, M, C]`` of the hidden tubelets, in order."""
        codes_ND = interleaved_sinusoidal(is_masked_UN.shape[1], self.config.width, x_UVD.device).to(x_UVD)
        codes_UND = codes_ND.expand(len(x_UVD), -1, -1)
        seen_UVD = self.in_proj(x_UVD)
        seen_UVD = seen_UVD + codes_UND[~is_masked_UN].view_as(seen_UVD)
        hidden_UMD = self.mask_token + codes_UND[is_masked_UN].view(len(x_UVD), -1, self.config.width)
        states_UND = self.transformer(torch.cat((seen_UVD, hidden_UMD), dim=1), Layout(causal=False))
        out: Tensor = self.out(states_UND[:, seen_UVD.shape[1] :])
        return out

    def _targets(self, masked_KC: Tensor, encoder: TubeletConfig) -> Tensor:
        patch = encoder.patch_size
        # From channel by channel to pixel by pixel, the order of the published weights.
        pixels_KX3 = masked_KC.view(-1, 3, encoder.tubelet_size * patch * patch).transpose(1, 2)
        if self.config.targets == "normalised":
            mean, deviation = pixels_KX3.mean(dim=1, keepdim=True), pixels_KX3.std(dim=1, keepdim=True)
            pixels_KX3 = (pixels_KX3 - mean) / (deviation + 1e-6)
        return pixels_KX3.flatten(1)
