"""Writes ``docs/reference/recipe.md``, every key of a recipe, from the config classes themselves.

Usage: ``python scripts/make_reference.py [FILE]``. A test compares the file in the repository with what this writes.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import BeforeValidator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from polymodal.core.config import Config, Table
from polymodal.evaluation.tasks import TASKS
from polymodal.models.adapters import ADAPTERS
from polymodal.objectives import table as objectives
from polymodal.recipes.schema import Recipe

OUT = Path(__file__).resolve().parents[1] / "docs" / "reference" / "recipe.md"

_HEAD = """# Every key of a recipe

Written by `scripts/make_reference.py` from the config classes; do not edit it by hand. The guide is
[recipes.md](../guide/recipes.md).

A key that holds *one of* a table takes a mapping with `use`, or the bare name where the defaults are meant:
`connector: mlp` is `connector: {use: mlp}`. "required" stands where there is no default.
"""

_MEANINGS = {
    "activation": "The nonlinearity of its MLPs",
    "betas": "Decay of the running means of the gradient and of its square",
    "depth": "Number of blocks",
    "dropout": "Share of activations that are zero in training",
    "heads": "Attention heads; they divide the width",
    "min_ratio": "The last rate over the highest",
    "norm_eps": "Added to the variance in norms",
    "resample": "The filter of resizing",
    "width": "Width of its states",
}
"""What keys mean that mean the same wherever they stand; a docstring that says more goes first."""


def reference() -> str:
    """The whole page."""
    configs = list(dict.fromkeys(_walk(Recipe, set())))
    tables = [table for config in configs for table in _tables_of(config)]
    tables += [TASKS, ADAPTERS, *(value for value in vars(objectives).values() if isinstance(value, Table))]
    distinct = {table.kind: table for table in tables}
    variants = {distinct[kind][name] for kind in distinct for name in distinct[kind]}
    parts = [_HEAD]
    parts += [_section(config, _title(config), shows_use=True) for config in configs if config not in variants]
    for kind in sorted(distinct):
        parts.append(f"## Table: {kind}\n\n{', '.join(f'`{name}`' for name in distinct[kind])}\n")
        parts += [_section(distinct[kind][name], f"{kind} `{name}`", level=3) for name in distinct[kind]]
    return "\n".join(parts)


def _walk(config: type[Config], seen: set[type[Config]]) -> Iterator[type[Config]]:
    """A config and every config its fields hold, tables apart, outermost first."""
    if config in seen:
        return
    seen.add(config)
    yield config
    for field in config.model_fields.values():
        for inner in _types_in(field.annotation):
            if inner is not Config:
                yield from _walk(inner, seen)
    for table in _tables_of(config):
        for name in table:
            inside = list(_walk(table[name], seen))
            yield from inside


def _types_in(annotation: Any) -> Iterator[type[Config]]:
    if isinstance(annotation, type) and issubclass(annotation, Config):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _types_in(argument)


def _tables_of(config: type[Config]) -> list[Table[Any]]:
    return [table for field in config.model_fields.values() if (table := _table_of(field)) is not None]


def _table_of(field: FieldInfo) -> Table[Any] | None:
    """The table whose entry a field holds: its ``parse`` is the field's validator."""
    for mark in (*field.metadata, *_marks(field.annotation)):
        if isinstance(mark, BeforeValidator):
            owner = getattr(mark.func, "__self__", None)
            if isinstance(owner, Table):
                return owner
    return None


def _marks(annotation: Any) -> Iterator[Any]:
    yield from getattr(annotation, "__metadata__", ())
    for argument in typing.get_args(annotation):
        yield from _marks(argument)


def _title(config: type[Config]) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", config.__name__.removesuffix("Config")).lower().capitalize()


def _section(config: type[Config], title: str, level: int = 2, *, shows_use: bool = False) -> str:
    about, arguments = _docstring(config)
    told = arguments | _attribute_docs(config)
    rows = [
        f"| `{name}` | {_kind(field)} | {_default(field)} | {_cell(told.get(name, _MEANINGS.get(name, '')))} |"
        for name, field in config.model_fields.items()
        if name != "use" or shows_use
    ]
    lines = [f"{'#' * level} {title}", "", about, ""]
    if rows:
        lines += ["| key | type | default | meaning |", "| --- | --- | --- | --- |", *rows, ""]
    return "\n".join(lines)


def _docstring(config: type[Config]) -> tuple[str, dict[str, str]]:
    """The first paragraph of a class's docstring, and what its ``Args`` say; those of its bases as well."""
    told: dict[str, str] = {}
    for base in reversed([cls for cls in config.__mro__ if issubclass(cls, Config)]):
        text = inspect.cleandoc(base.__doc__ or "")
        _, marker, rest = text.partition("Args:\n")
        if not marker:
            continue
        block = re.split(r"\n(?=\S)", rest)[0]
        for name, meaning in re.findall(r"(?:^ {4}|; (?=\w+: ))(\w+): ((?:.|\n(?! {4}\w+:))*)", block, re.MULTILINE):
            told[name] = meaning
    about = inspect.cleandoc(config.__doc__ or "").split("\n\n")[0]
    return re.sub(r"\s+", " ", about).replace("``", "`"), told


def _attribute_docs(config: type[Config]) -> dict[str, str]:
    """The strings that stand below fields."""
    told: dict[str, str] = {}
    for base in reversed([cls for cls in config.__mro__ if issubclass(cls, Config) and cls is not Config]):
        body = typing.cast(ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]).body
        for field, below in pairwise(body):
            named = isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
            if named and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                told[field.target.id] = str(below.value.value)
    return told


def _kind(field: FieldInfo) -> str:
    table = _table_of(field)
    if table is not None:
        text = _link(table)
        if typing.get_origin(field.annotation) is dict:
            text = f"mapping of names, each to {text}"
        return text + (", or null" if type(None) in typing.get_args(field.annotation) else "")
    return _cell(_type(field.annotation))


def _link(table: Table[Any]) -> str:
    return f"one of [{table.kind}](#table-{table.kind})"


def _type(annotation: Any) -> str:
    if annotation in [ADAPTERS[name] for name in ADAPTERS]:
        return _link(ADAPTERS)
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type(arguments[0])
    if origin is typing.Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type(inner) for inner in arguments)
    if annotation is type(None):
        return "null"
    if origin in (tuple, list):
        inner = list(dict.fromkeys(_type(argument) for argument in arguments if argument is not ...))
        return f"list of {' and '.join(inner)}"
    if origin is dict:
        return f"mapping of names to {_type(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return f"[{_title(annotation).lower()}](#{_title(annotation).lower().replace(' ', '-')})"
    names = {str: "text", int: "whole number", float: "number", bool: "true or false", Any: "any"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, Config):
        name = getattr(value, "use", None)
        return f"`{name}`" if name else "its defaults"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list | dict):
        return f"`{list(value)}`" if value else "none"
    return f"`{value}`" if isinstance(value, str) else f"{value:,}" if isinstance(value, int) else str(value)


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip().rstrip(";").replace("``", "`").replace("|", "\\|")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", nargs="?", type=Path, default=OUT)
    target = parser.parse_args().file
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(reference(), encoding="utf-8")
