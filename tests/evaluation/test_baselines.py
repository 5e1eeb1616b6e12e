from collections import Counter

import numpy as np
import pytest

from polymodal.core.parts import Audio, Image, Text
from polymodal.core.samples import Message, Sample, conversation
from polymodal.evaluation.baselines import blind, majority, shuffle_media, wording_majority
from polymodal.evaluation.metrics import exact_match


def question(i: int, family: str, *media) -> Sample:
    return Sample(f"{i}", (Message("user", (*media, Text(f"Q{i}?"))),), meta={"family": family})


def test_blind_keeps_the_words_only():
    sample = conversation(Image("a.png"), "What is", Audio("a.wav"), "it?")
    assert blind(sample).media() == ()
    assert blind(sample).messages[0].text == "What isit?"


def test_majority_is_the_best_constant_per_family():
    families = ["x"] * 5 + ["y"] * 3
    answers = ["a", "b", "B.", "c", "b", "one", "two", "two"]
    assert majority(families, answers) == ["b"] * 5 + ["two"] * 3


def test_wording_majority_finds_what_words_give_away():
    rng = np.random.default_rng(0)
    wordings = [f"w{i}" for i in rng.integers(4, size=400)]
    leaking = [{"w0": "yes", "w1": "no", "w2": "yes", "w3": "no"}[wording] for wording in wordings]
    families = ["f"] * 400
    assert exact_match(wording_majority(families, wordings, leaking), leaking).mean() == 1.0
    honest = [str(answer) for answer in rng.integers(2, size=400)]
    assert exact_match(wording_majority(families, wordings, honest), honest).mean() == pytest.approx(0.5, abs=0.1)


def test_wording_majority_does_not_memorise_unique_wordings():
    rng = np.random.default_rng(1)
    answers = [str(answer) for answer in rng.integers(10, size=200)]
    guesses = wording_majority(["f"] * 200, [f"w{i}" for i in range(200)], answers)
    assert exact_match(guesses, answers).mean() < 0.25
    assert wording_majority(["f"], ["w"], ["yes"]) == [""]


@pytest.mark.parametrize("seed", range(5))
def test_shuffles_are_derangements_within_family_and_modalities(seed):
    samples = [question(i, "colour", Image(f"{i % 20}.png")) for i in range(40)]
    samples += [question(i, "colour", Image(f"{i}.png"), Audio(f"{i}.wav")) for i in range(40, 50)]
    samples += [question(i, "count", Image(f"{i}.png")) for i in range(50, 60)]
    shuffled = shuffle_media(samples, seed=seed)
    taken: dict[str, list[str]] = {}
    for before, after in zip(samples, shuffled, strict=True):
        assert after is not None
        assert after.id == before.id
        assert after.messages[0].text == before.messages[0].text
        old, new = ([part.name for part in sample.media()] for sample in (before, after))
        assert [part.modality for part in after.media()] == [part.modality for part in before.media()]
        assert not set(old) & set(new)
        families = {s.meta["family"] for s in samples if [part.name for part in s.media()] == new}
        assert families == {before.meta["family"]}
        taken.setdefault(str(before.meta["family"]), []).extend(new)
    for family, names in taken.items():
        original = [part.name for s in samples if s.meta["family"] == family for part in s.media()]
        assert Counter(names) == Counter(original)
    again = shuffle_media(samples, seed=seed)
    assert [[p.name for p in s.media()] for s in again] == [[p.name for p in s.media()] for s in shuffled]


def test_equal_content_in_memory_counts_as_the_same_media():
    pixels = np.zeros((2, 2, 3), dtype=np.uint8)
    same = [question(0, "f", Image(pixels)), question(1, "f", Image(pixels.copy()))]
    assert shuffle_media(same) == [None, None]
    other = question(2, "f", Image(pixels + 1))
    shuffled = shuffle_media([*same, other])
    assert shuffled[0].media()[0] is other.media()[0]
    assert shuffled[2].media()[0].content_key() == same[0].media()[0].content_key()


def test_a_question_without_partner_or_media_is_left_out():
    assert shuffle_media([question(0, "f", Image("a.png")), question(1, "g", Image("b.png"))]) == [None, None]
    assert shuffle_media([question(0, "f"), question(1, "f")]) == [None, None]


def test_views_are_shuffled_too():
    views = [Sample(f"{i}", views={"image": Image(f"{i}.png"), "text": Text(f"{i}")}) for i in range(2)]
    shuffled = shuffle_media(views)
    assert [sample.views["image"].name for sample in shuffled] == ["1.png", "0.png"]
    assert [sample.views["text"].text for sample in shuffled] == ["0", "1"]
