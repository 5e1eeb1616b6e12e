"""Classification. Shape legend: ``S`` samples, ``U`` units, ``N`` features, ``D`` width, ``C`` classes."""

from __future__ import annotations

from typing import Literal, Self

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from polymodal.models.heads.base import HeadConfig, HeadInputs
from polymodal.models.heads.latent_queries import QueryClassHead


class ClassConfig(HeadConfig):
    """A linear classifier on the merged state, or on what the encoder of one stream makes of an item."""

    use: Literal["class"] = "class"
    classes: tuple[str, ...]
    """Names of the classes, in logit order; a sample's ``label`` is one of them."""
    stream: str | None = None
    """The stream that is classified, without a backbone; None: the merged state."""
    take: Literal["pooled", "mean", "pooled_mean"] = "pooled"
    """Of a stream: its pooled vector, the mean of its features (SigLIP), or one beside the other (DINOv2)."""

    hidden: PositiveInt | None = None
    """Width of a layer, norm and gelu before the logits (ViLT's question answering: twice the state's); None: none."""
    norm_eps: float = Field(default=1e-5, gt=0)
    """Of that norm."""
    query_heads: PositiveInt | None = None
    """With a latent backbone: a learned query looks at the latents with so many heads, and what it sees is classified
    (Perceiver IO); None: the mean of the latents is."""

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        if len(self.classes) < 2 or len(set(self.classes)) != len(self.classes):
            raise ValueError("expected at least two distinct class names")
        if self.stream is None and self.take != "pooled":
            raise ValueError("'take' says what is read of a stream; name the 'stream', or leave 'take' out")
        return self

    def build(self, inputs: HeadInputs) -> nn.Module:
        """``[S, D] -> [S, C]``, or ``[S, L, D] -> [S, C]`` for one that asks latents."""
        if self.query_heads is not None:
            return QueryClassHead(self._width(inputs), len(self.classes), self.query_heads)
        if self.stream is None:
            width = self._width(inputs)
        else:
            pooled = self._stream_width(self.stream, inputs)
            features = int(getattr(inputs.stream_encoders.get(self.stream), "width", pooled))
            width = {"pooled": pooled, "mean": features, "pooled_mean": pooled + features}[self.take]
        if self.hidden is None:
            return nn.Linear(width, len(self.classes))
        return nn.Sequential(
            nn.Linear(width, self.hidden),
            nn.LayerNorm(self.hidden, eps=self.norm_eps),
            nn.GELU(),
            nn.Linear(self.hidden, len(self.classes)),
        )

    def read(self, x_UND: Tensor, is_valid_UN: Tensor, pooled_UD: Tensor) -> Tensor:
        """What is classified of each unit of the stream ``[U, D]``, from an encoder's features."""
        if self.take == "pooled":
            return pooled_UD
        valid_UN1 = is_valid_UN[..., None]
        mean_UD = (x_UND * valid_UN1).sum(dim=1) / valid_UN1.sum(dim=1).clamp(min=1)
        return mean_UD if self.take == "mean" else torch.cat((pooled_UD, mean_UD), dim=1)
