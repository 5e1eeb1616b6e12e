"""Draws against closed forms."""

from __future__ import annotations

import pytest
import torch

from polymodal.core.errors import CheckpointError, ConfigError
from polymodal.inference.sampling import Sampling, draw, make_generator

PROBABILITIES = torch.tensor([0.05, 0.5, 0.15, 0.3])
LOGITS = PROBABILITIES.log() + 3.0


def frequencies(sampling: Sampling, count: int = 20_000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    drawn = draw(LOGITS.expand(count, -1), sampling, generator)
    assert drawn.dtype == torch.int64 and drawn.shape == (count,)
    return torch.bincount(drawn, minlength=4) / count


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"temperature": 1.0}, PROBABILITIES),
        ({"temperature": 0.5}, PROBABILITIES**2 / (PROBABILITIES**2).sum()),
        ({"temperature": 2.0}, PROBABILITIES**0.5 / (PROBABILITIES**0.5).sum()),
        ({"temperature": 1.0, "top_k": 2}, torch.tensor([0, 0.625, 0, 0.375])),
        ({"temperature": 1.0, "top_k": 9}, PROBABILITIES),
        ({"temperature": 1.0, "top_p": 0.5}, torch.tensor([0, 1.0, 0, 0])),
        ({"temperature": 1.0, "top_p": 0.51}, torch.tensor([0, 0.625, 0, 0.375])),
        ({"temperature": 1.0, "top_p": 0.9}, torch.tensor([0, 0.5, 0.15, 0.3]) / 0.95),
        ({"temperature": 1.0, "top_p": 0.01}, torch.tensor([0, 1.0, 0, 0])),
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.6}, torch.tensor([0, 0.625, 0, 0.375])),
    ],
    ids=str,
)
def test_frequencies_are_those_of_the_closed_form(settings: dict[str, float], expected: torch.Tensor) -> None:
    found = frequencies(Sampling.parse(settings))
    assert torch.equal(found > 0, expected > 0)
    torch.testing.assert_close(found, expected.float(), atol=0.015, rtol=0)


def test_greedy_takes_the_best_and_needs_no_generator() -> None:
    assert draw(LOGITS[None], Sampling(), None).tolist() == [1]
    assert make_generator(Sampling(), torch.device("cpu")) is None


def test_top_k_keeps_k_tokens_even_where_logits_tie() -> None:
    drawn = draw(torch.zeros(5000, 4), Sampling(temperature=1.0, top_k=2), torch.Generator().manual_seed(0))
    assert len(drawn.unique()) == 2


def test_rows_are_drawn_independently() -> None:
    logits = torch.tensor([[0.0, 50.0], [50.0, 0.0]])
    assert draw(logits, Sampling(temperature=1.0, top_p=0.9), torch.Generator().manual_seed(0)).tolist() == [1, 0]


def test_generators_of_a_seed_are_equal_and_others_are_not() -> None:
    def numbers(seed: int | None) -> list[float]:
        generator = make_generator(Sampling(temperature=1.0, seed=seed), torch.device("cpu"))
        return torch.rand(3, generator=generator).tolist()

    assert numbers(3) == numbers(3) != numbers(4)
    assert numbers(None) != numbers(None)


@pytest.mark.parametrize(
    "data",
    [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.5}, {"top_k": -1}, {"max_new_tokens": 0}, {"temprature": 1}],
    ids=str,
)
def test_impossible_settings_are_refused(data: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        Sampling.parse(data)


@pytest.mark.parametrize("data", [{"top_p": 0.9}, {"top_k": 2}], ids=str)
def test_what_narrows_a_draw_is_refused_where_nothing_is_drawn(data: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"with temperature 0, which takes .* expected a temperature above 0"):
        Sampling.parse(data)
    assert Sampling.parse({**data, "temperature": 1.0})


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_refused(temperature: float) -> None:
    logits = torch.tensor([[0.0, 1.0], [0.0, torch.nan]])
    with pytest.raises(CheckpointError, match=r"logits that are no numbers .* fetch the checkpoint again"):
        draw(logits, Sampling(temperature=temperature), None)
