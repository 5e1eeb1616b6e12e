"""View sets beside conversations in one batch: the sequence is that of the conversations alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import toys
from toys import build, decoder_data, medium, mixed

from polymodal.core.samples import Sample


def views(index: int, *names: str) -> Sample:
    return Sample(f"v{index}", views={name: medium(name, seed=90 + index) for name in names})


def with_views() -> list[Sample]:
    first, second, *rest = mixed()
    return [views(0, "image", "audio"), first, views(1, "sensor"), second, *rest, views(2, "image")]


def looking() -> dict[str, Any]:
    data = decoder_data()
    for name in ("image", "audio"):
        data["streams"][name] = toys.stream(name, enters={"use": "cross_attention", "mask": "latest_media"})
    return data


def two_sided() -> dict[str, Any]:
    side = {"width": 24, "depth": 1, "heads": 4, "relative_buckets": 8}
    return {**decoder_data(), "backbone": {"use": "encoder_decoder", "encoder": side, "decoder": side}}


@pytest.mark.parametrize("data", [decoder_data(), looking(), two_sided()], ids=["decoder", "looking", "two_sided"])
@pytest.mark.parametrize("packed", [True, False])
def test_view_sets_take_no_part_in_the_sequence(data: dict[str, Any], packed: bool) -> None:
    toy = build(data)
    with torch.no_grad():
        alone = toy.network(toy.batch(mixed(), packed=packed))
        beside = toy.network(toy.batch(with_views(), packed=packed))
    torch.testing.assert_close(beside.token_logits, alone.token_logits)
    assert beside.token_targets.tolist() == alone.token_targets.tolist()
    place = torch.tensor([1, 3, 4, 5, 6])
    assert beside.token_samples.tolist() == place[alone.token_samples].tolist(), "numbered as in the whole batch"


@pytest.mark.parametrize("packed", [True, False])
def test_view_sets_alone_predict_nothing(packed: bool) -> None:
    toy = build(decoder_data())
    outputs = toy.network(toy.batch([views(0, "image"), views(1, "sensor")], packed=packed))
    assert outputs.token_logits.shape == (0, toy.tokenizer.size)
    assert outputs.token_targets.numel() == outputs.token_samples.numel() == 0
