"""Typed, frozen configuration values, and the tables that name their variants.

A :class:`Config` is an immutable pydantic model that refuses unknown keys. A variant (one encoder, one
connector, ...) carries its exact name in a ``use`` field, and a :class:`Table` maps those names to classes.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterable, Iterator
from types import UnionType
from typing import Annotated, Any, Generic, TypeVar, Union, cast, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, SerializeAsAny, ValidationError

from polymodal.core.errors import ConfigError

C = TypeVar("C", bound="Config")


class Config(BaseModel):
    """A frozen typed value; unknown keys are errors that name the nearest valid key."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    @classmethod
    def parse(cls: type[C], value: Any, where: str = "") -> C:
        """Build the config from plain data.

        Args:
            value: a mapping as YAML or JSON gives it, or an instance, which is returned as it is.
            where: the dotted place of ``value`` in its file, for messages.

        Raises:
            ConfigError: naming every wrong key or value, and the valid keys.
        """
        if isinstance(value, cls):
            return value
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            raise ConfigError(_explain(error, cls, where)) from None

    def to_data(self) -> dict[str, Any]:
        """Plain data that :meth:`parse` turns back into an equal value."""
        return self.model_dump(mode="json")


class Table(Generic[C]):
    """The explicit list of the variants of one kind, looked up by exact name.

    Args:
        kind: what the variants are, for messages (``"encoder"``).
        variants: config classes, each with a ``use: Literal["name"]`` field.
    """

    def __init__(self, kind: str, variants: Iterable[type[C]]) -> None:
        self.kind = kind
        self._classes: dict[str, type[C]] = {}
        for variant in variants:
            name = variant.model_fields["use"].default
            if name in self._classes:
                raise AssertionError(f"two {kind}s are called {name!r}")
            self._classes[name] = variant

    def __iter__(self) -> Iterator[str]:
        return iter(self._classes)

    def __getitem__(self, name: str) -> type[C]:
        if not isinstance(name, str) or name not in self._classes:
            raise ConfigError(unknown(self.kind, name, self._classes))
        return self._classes[name]

    def parse(self, value: Any, where: str = "") -> C:
        """Build the variant that ``value['use']`` names; a bare string stands for ``{use: string}``.

        Raises:
            ConfigError: if ``use`` is missing or unknown, or a key is wrong.
        """
        if isinstance(value, tuple(self._classes.values())):
            return cast(C, value)
        if isinstance(value, str):
            value = {"use": value}
        if not isinstance(value, dict) or "use" not in value:
            found = f"keys {sorted(map(str, value))}" if isinstance(value, dict) else f"{value!r}"
            raise ConfigError(
                f"{where or self.kind}: found {found}, expected a mapping with 'use', "
                f"one of: {', '.join(self._classes)}"
            )
        return self[value["use"]].parse(value, where or f"{self.kind} {value['use']}")

    def field(self) -> Any:
        """The annotation of a config field that holds one variant of this table."""
        return Annotated[SerializeAsAny[Config], BeforeValidator(self.parse)]


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def unknown(kind: str, name: object, valid: Iterable[str]) -> str:
    """The message for an unknown name: what was found, the nearest valid name, and all valid ones."""
    names = list(valid)
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"unknown {kind} {_short(name)}{hint} Valid: {', '.join(names) or 'none'}"


def _explain(error: ValidationError, cls: type[Config], where: str) -> str:
    lines = []
    for problem in error.errors():
        place = ".".join(str(step) for step in (where, *problem["loc"]) if step != "")
        if problem["type"] == "extra_forbidden":
            key = str(problem["loc"][-1])
            fields = _fields_at(cls, problem["loc"][:-1])
            lines.append(f"{place}: {unknown('key', key, fields)}")
        elif problem["type"] == "missing":
            lines.append(f"{place}: this key is required")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            # Checks of whole configs say themselves what they found; all of the config would tell nobody.
            is_told = problem["type"] == "value_error" and ("found" in message or isinstance(problem["input"], dict))
            found = "" if is_told else f"; found {problem['input']!r:.80}"
            lines.append(f"{place}: {message}{found}" if place else f"{message}{found}")
    return "\n".join(lines)


def _fields_at(cls: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """The keys that are valid at a place below ``cls``, reached through lists, mappings and what may be None."""
    kinds: list[Any] = [cls]
    for step in path:
        kinds = [inner for kind in kinds for inner in _below(kind, str(step))]
    return [name for kind in kinds if _is_model(kind) for name in kind.model_fields]


def _below(kind: Any, step: str) -> list[Any]:
    if _is_model(kind):
        return _kinds(kind.model_fields[step].annotation) if step in kind.model_fields else []
    return [inner for item in get_args(kind) for inner in _kinds(item)]


def _kinds(annotation: Any) -> list[Any]:
    """What an annotation allows, one by one."""
    if get_origin(annotation) in (Union, UnionType):
        return [kind for item in get_args(annotation) for kind in _kinds(item)]
    return _kinds(get_args(annotation)[0]) if get_origin(annotation) is Annotated else [annotation]


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


class _UniqueKeys(yaml.SafeLoader):
    """YAML says that keys are unique, and PyYAML takes the last of equal ones in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "expected a plain key", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def load_yaml(text: str, where: str) -> dict[str, Any]:
    """Read one YAML mapping; a number such as ``1e-3``, which YAML 1.1 calls a string, is read by the field's type.

    Raises:
        ConfigError: if the text is not YAML, not a mapping, or has a key twice.
    """
    try:
        data = yaml.load(text, _UniqueKeys)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"{where}: not valid YAML: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: found {type(data).__name__}, expected a mapping of keys to values")
    return data


def apply_overrides(data: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of ``data`` with each ``key.sub=value`` applied; list items are reached by index or by their ``name``.

    Values are read as YAML. Example: ``stages.align.steps=10`` sets ``steps`` of the stage named ``align``.

    Raises:
        ConfigError: if an override has no ``=``, or passes through a value that is not a mapping or a list.
    """
    # The order of keys is kept: that of the streams is the order in which fusions number them.
    result = copy.deepcopy(data)
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not path:
            raise ConfigError(f"override {override!r}: expected key.sub=value")
        steps = path.split(".")
        place: Any = result
        for step in steps[:-1]:
            place = _enter(place, step, override)
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f"override {override!r}: the value is not valid YAML") from None
        if isinstance(place, list):
            place[_index(place, steps[-1], override)] = value
        else:
            place[steps[-1]] = value
    return result


def _enter(place: Any, step: str, override: str) -> Any:
    if isinstance(place, list):
        return place[_index(place, step, override)]
    inner = place.setdefault(step, {})
    if not isinstance(inner, dict | list):
        raise ConfigError(f"override {override!r}: {step!r} is the value {inner!r}, not a mapping")
    return inner


def _index(items: list[Any], step: str, override: str) -> int:
    if step.isdigit() and int(step) < len(items):
        return int(step)
    names = [str(item.get("name")) for item in items if isinstance(item, dict)]
    if step in names:
        return names.index(step)
    raise ConfigError(f"override {override!r}: {unknown('list entry', step, names)}")
