"""HTML and SVG by construction: text is escaped unless it was built here."""

from __future__ import annotations

import html
from collections.abc import Iterable


class Markup(str):
    """A piece of finished HTML; any other string is text and gets escaped."""

    __slots__ = ()


_EMPTY_TAGS = frozenset(("br", "img", "path", "line", "rect", "circle", "polyline", "polygon"))
Child = str | Iterable["Child"] | None
"""Text, finished markup, nothing, or several of them."""


def element(name: str, *children: Child, **attributes: object) -> Markup:
    """One element.

    Args:
        name: its tag.
        children: what it holds.
        attributes: ``class_`` stands for ``class``, ``stroke_width`` for ``stroke-width``; None and False leave an
            attribute out, True gives it no value.
    """
    parts = [name]
    for key, value in attributes.items():
        attribute = key.rstrip("_").replace("_", "-") if key != "viewBox" else key
        if value is True:
            parts.append(attribute)
        elif value is not None and value is not False:
            parts.append(f'{attribute}="{html.escape(_plain(value), quote=True)}"')
    head = " ".join(parts)
    if name in _EMPTY_TAGS and not children:
        return Markup(f"<{head}/>")
    return Markup(f"<{head}>{join(children)}</{name}>")


def join(children: Child) -> Markup:
    """The children one after the other, text escaped."""
    if children is None:
        return Markup("")
    if isinstance(children, Markup):
        return children
    if isinstance(children, str):
        return Markup(html.escape(children, quote=True))
    return Markup("".join(join(child) for child in children))


def _plain(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
