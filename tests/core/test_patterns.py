"""Paths and patterns over dotted names."""

from __future__ import annotations

import pytest

from polymodal.core.errors import ConfigError
from polymodal.core.patterns import match_names, matches, nearest

NAMES = ["streams.image.connector.0.weight", "streams.audio.connector.0.weight", "backbone.norm.weight"]


@pytest.mark.parametrize(
    ("pattern", "num"),
    [
        ("streams.image", 1),
        ("streams.image.connector.0.weight", 1),
        ("streams.*.connector", 2),
        ("*.weight", 3),
        ("streams.[ai]*", 2),
        ("streams.im", 0),
        ("image", 0),
        ("streams.im?ge", 1),
    ],
)
def test_matches(pattern, num):
    assert sum(matches(pattern, name) for name in NAMES) == num


def test_a_pattern_that_matches_nothing():
    with pytest.raises(ConfigError) as error:
        match_names("streams.imge", NAMES, "parameter", "train[0]")
    assert str(error.value) == (
        "train[0]: no parameter matches 'streams.imge'; nearest: streams.image, streams, streams.audio. "
        "Expected a whole dotted path, or a pattern with *"
    )
    with pytest.raises(ConfigError, match="there is none to choose from"):
        match_names("*", [], "parameter", "train[0]")


def test_the_nearest_is_also_found_by_its_last_part():
    assert nearest("connectr", NAMES, 2) == ["streams.image.connector", "streams.audio.connector"]
    assert nearest("norm", NAMES, 1) == ["backbone.norm"]
