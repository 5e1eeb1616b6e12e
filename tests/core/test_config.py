"""Configs, tables, overrides and YAML: what is wrong is said by name, with what would be right."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from pydantic import BeforeValidator, Field, model_validator

from polymodal.core.config import Config, Table, apply_overrides, load_yaml, unknown
from polymodal.core.errors import ConfigError


class Red(Config):
    use: Literal["red"] = "red"
    depth: int = 2
    rate: float = 0.5


class Blue(Config):
    use: Literal["blue"] = "blue"


class Checked(Config):
    """Two fields that must agree."""

    low: int = 0
    high: int = 1

    @model_validator(mode="after")
    def _agree(self) -> Checked:
        if self.low > self.high:
            raise ValueError(f"found low: {self.low}, expected at most {self.high}")
        return self


COLOURS: Table[Config] = Table("colour", [Red, Blue])


class Inner(Config):
    width: int


class Outer(Config):
    inner: Inner = Inner(width=3)
    colour: COLOURS.field() = Red()  # type: ignore[valid-type]
    names: tuple[str, ...] = ()


class Whole(Config):
    """Configs in a list, in a mapping, and one that may be None."""

    listed: tuple[Outer, ...] = ()
    mapped: dict[str, Outer] = Field(default_factory=dict)
    maybe: Annotated[Inner, "note"] | None = None


class Nested(Config):
    """Whose part is parsed by its own rules."""

    part: Annotated[Checked, BeforeValidator(Checked.parse)]


def message(make: Any) -> str:
    with pytest.raises(ConfigError) as error:
        make()
    return str(error.value)


def test_what_was_found_is_said_once() -> None:
    assert message(lambda: Checked.parse({"low": 3}, "range")) == "range: found low: 3, expected at most 1"
    assert message(lambda: Checked.parse({"low": "x"}, "range")).endswith("; found 'x'")
    assert message(lambda: Outer.parse({"names": [{"a": 1}]})).endswith("; found {'a': 1}")


def test_a_table_takes_a_name_a_mapping_or_a_config() -> None:
    assert COLOURS.parse("red") == COLOURS.parse({"use": "red"}) == Red()
    value = Red(depth=4)
    assert COLOURS.parse(value) is value
    assert list(COLOURS) == ["red", "blue"] and COLOURS["blue"] is Blue


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("rde", "unknown colour 'rde'; did you mean 'red'? Valid: red, blue"),
        ("green?", "unknown colour 'green?'. Valid: red, blue"),
        ({"depth": 3}, "colour: found keys ['depth'], expected a mapping with 'use', one of: red, blue"),
        ({1: 2, "a": 3}, "colour: found keys ['1', 'a'], expected a mapping with 'use', one of: red, blue"),
        (7, "colour: found 7, expected a mapping with 'use', one of: red, blue"),
        (None, "colour: found None, expected a mapping with 'use', one of: red, blue"),
        ({"use": ["red"]}, "unknown colour ['red']; did you mean 'red'? Valid: red, blue"),
        (
            {"use": "red", "dept": 3},
            "colour red.dept: unknown key 'dept'; did you mean 'depth'? Valid: use, depth, rate",
        ),
        ({"use": "red", "depth": "x"}, "colour red.depth: Input should be a valid integer"),
        ({"use": "red", "rate": float("nan")}, "colour red.rate: Input should be a finite number"),
    ],
    ids=str,
)
def test_a_table_says_what_is_wrong(value: Any, expected: str) -> None:
    assert message(lambda: COLOURS.parse(value)).startswith(expected)


def test_two_variants_of_one_name_are_a_fault_of_the_program() -> None:
    with pytest.raises(AssertionError, match="two colours are called 'red'"):
        Table("colour", [Red, Red])


def test_every_wrong_key_is_named_with_its_place() -> None:
    found = message(lambda: Outer.parse({"inner": {"widht": 3}, "nmaes": []}, "recipe.yaml"))
    assert "recipe.yaml.inner.width: this key is required" in found
    assert "recipe.yaml.inner.widht: unknown key 'widht'; did you mean 'width'? Valid: width" in found
    assert "recipe.yaml.nmaes: unknown key 'nmaes'; did you mean 'names'? Valid: inner, colour, names" in found


@pytest.mark.parametrize(
    "value",
    [
        {"listed": [{}, {"inner": {"width": 1, "widht": 3}}]},
        {"mapped": {"a": {"inner": {"width": 1, "widht": 3}}}},
        {"maybe": {"width": 1, "widht": 3}},
    ],
    ids=str,
)
def test_the_nearest_key_is_that_of_the_place(value: Any) -> None:
    assert message(lambda: Whole.parse(value)).endswith("did you mean 'width'? Valid: width")


def test_what_a_part_says_stands_behind_its_place_alone() -> None:
    assert message(lambda: Nested.parse({"part": {"low": 3}}, "x")) == "x.part: found low: 3, expected at most 1"


def test_configs_are_frozen_and_reload_equal() -> None:
    value = Outer.parse({"colour": "blue", "names": ["a"]})
    assert Outer.parse(value.to_data()) == value
    assert value.to_data() == {"inner": {"width": 3}, "colour": {"use": "blue"}, "names": ["a"]}
    with pytest.raises(ValueError, match="frozen"):
        value.inner = Inner(width=1)  # type: ignore[misc]


def test_the_nearest_name_is_offered_only_where_it_is_near() -> None:
    assert unknown("key", "wdth", ["width", "depth"]) == "unknown key 'wdth'; did you mean 'width'? Valid: width, depth"
    assert unknown("key", "zzz", ["width"]) == "unknown key 'zzz'. Valid: width"


def test_overrides_reach_mappings_list_entries_by_name_and_by_index() -> None:
    data = {"stages": [{"name": "align", "steps": 5}, {"name": "tune"}], "seed": 0}
    new = apply_overrides(
        data, ["stages.align.steps=10", "stages.1.lr=1e-3", "seed=3", "model.width=8", "names=[a, b]", "note=a=b"]
    )
    assert new["stages"] == [{"name": "align", "steps": 10}, {"name": "tune", "lr": "1e-3"}]
    assert (new["seed"], new["model"], new["names"], new["note"]) == (3, {"width": 8}, ["a", "b"], "a=b")
    assert data["stages"][0]["steps"] == 5


def test_overrides_keep_the_order_of_keys_and_the_original() -> None:
    data = {"text": {"b": 1, "a": 2}, "image": {}, "audio": {}}
    new = apply_overrides(data, ["text.a=3"])
    assert list(new) == ["text", "image", "audio"] and list(new["text"]) == ["b", "a"]
    assert data["text"]["a"] == 2


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("steps", "override 'steps': expected key.sub=value"),
        ("=3", "override '=3': expected key.sub=value"),
        ("seed.x=3", "override 'seed.x=3': 'seed' is the value 0, not a mapping"),
        ("stages.algin.steps=3", "unknown list entry 'algin'; did you mean 'align'? Valid: align"),
        ("stages.7=3", "unknown list entry '7'. Valid: align"),
        ("seed=[1", "override 'seed=[1': the value is not valid YAML"),
    ],
)
def test_an_override_that_leads_nowhere_is_refused(override: str, expected: str) -> None:
    data = {"stages": [{"name": "align"}], "seed": 0}
    assert expected in message(lambda: apply_overrides(data, [override]))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [1", "r.yaml: not valid YAML"),
        ("- 1", "r.yaml: found list, expected a mapping"),
        ("", "r.yaml: found NoneType, expected a mapping"),
        ("a: 1\nb: 2\na: 3", "r.yaml: not valid YAML: the key 'a' stands twice"),
        ("x: {a: 1, a: 2}", "the key 'a' stands twice"),
        ("a: !!python/object/apply:os.system [ls]", "r.yaml: not valid YAML"),
        ("[" * 5000, "r.yaml: not valid YAML"),
        ("a: \x00", "r.yaml: not valid YAML"),
        ("? [1, 2]\n: 3\n? {a: b}\n: 4", "r.yaml: not valid YAML"),
        ("a: 2026-99-99", "r.yaml: not valid YAML"),
    ],
    ids=lambda text: text[:20],
)
def test_what_is_no_recipe_is_refused(text: str, expected: str) -> None:
    assert expected in message(lambda: load_yaml(text, "r.yaml"))


def test_yaml_numbers_in_scientific_form_are_numbers() -> None:
    data = load_yaml("use: red\nrate: 1e-3\n", "r.yaml")
    assert data["rate"] == "1e-3"
    assert COLOURS.parse(data) == Red(rate=0.001)


def test_yaml_anchors_and_merges_work() -> None:
    assert load_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}", "r")["b"] == {"x": 3, "y": 2}
