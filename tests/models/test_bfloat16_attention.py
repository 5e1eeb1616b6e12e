"""Attention under bfloat16 on CPU: the backward pass there is slow, so training attends in float32."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from polymodal.models.layers.layout import Layout
from polymodal.models.layers.transformer import Transformer, TransformerConfig

LENGTHS = (7, 8, 8, 15, 16)


def test_training_in_bfloat16_on_cpu_attends_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where there is a backward pass: answering keeps its number format."""
    seen = []
    plain = F.scaled_dot_product_attention

    def watched(q: torch.Tensor, *rest: object, **more: object) -> torch.Tensor:
        seen.append(q.dtype)
        return plain(q, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    stack = Transformer(TransformerConfig(width=16, depth=1, heads=2, rope_theta=100.0))
    x, layout = torch.randn(1, sum(LENGTHS), 16), Layout.packed(LENGTHS, causal=True)
    exact = stack(x, layout)
    seen.clear()
    with torch.autocast("cpu", torch.bfloat16):
        trained = stack(x, layout)
        assert set(seen) == {torch.float32}
        seen.clear()
        with torch.no_grad():
            stack(x, layout)
    assert set(seen) == {torch.bfloat16}
    assert torch.allclose(trained.float(), exact, atol=0.1)
