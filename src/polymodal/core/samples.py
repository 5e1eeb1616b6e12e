"""Samples: a conversation, or a set of views of one thing; and their JSON form.

One JSON object a line. A conversation holds OpenAI-style messages; paths are relative to the file's folder::

    {"id": "7", "messages": [
      {"role": "user", "content": [{"type": "image", "path": "a.jpg"}, {"type": "text", "text": "What is it?"}]},
      {"role": "assistant", "content": "A cat."}]}

A view set names the modalities of one thing; ``label`` is its class, where it has one::

    {"id": "8", "views": {"image": "a.jpg", "text": "a cat", "audio": {"path": "a.wav"}}, "label": "cat"}

A view of a name of its own says its modality; streams that name this view read it, and no others::

    {"id": "9", "views": {"image": "a.jpg", "depth": {"modality": "image", "path": "a_depth.png"}}}
"""

from __future__ import annotations

import base64
import binascii
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from polymodal.core.config import unknown
from polymodal.core.errors import PolymodalError, SampleError
from polymodal.core.parts import MODALITIES, Media, Part, Text, media_part

ROLES = ("system", "user", "assistant")
_MAX_ID_CHARS = 1000
"""Ids stand in messages, reports and caches; a longer one is a field in the wrong place."""
_DETAILS = {"audio": {"rate_hz"}, "video": {"fps"}, "sensor": {"rate_hz", "channels"}}


@dataclass(frozen=True, slots=True)
class Message:
    """One turn: who speaks, and the parts in order."""

    role: str
    parts: tuple[Part, ...]

    @property
    def text(self) -> str:
        """The text parts, joined."""
        return "".join(part.text for part in self.parts if isinstance(part, Text))


@dataclass(frozen=True, slots=True)
class Sample:
    """What one example is: ``messages`` (a conversation) or ``views`` (one thing in several modalities).

    Args:
        id: its name in errors, reports and caches; unique within a source.
        messages: the turns, oldest first; empty for a view set.
        views: one part per modality name, or per name of its own that a stream asks for; empty for a conversation.
        label: the class, for class heads and class-level retrieval.
        meta: anything else, such as ``family`` and ``split``; kept, never interpreted by a model.
        tokens: the most tokens that all of its media may take in a sequence; None: what the recipe says.
    """

    id: str
    messages: tuple[Message, ...] = ()
    views: Mapping[str, Part] = field(default_factory=dict)
    label: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)
    tokens: int | None = None

    def media(self) -> tuple[Media, ...]:
        """Every media part, in reading order."""
        parts = [part for message in self.messages for part in message.parts]
        return tuple(part for part in (*parts, *self.views.values()) if isinstance(part, Media))

    def without(self, *modalities: str) -> Sample:
        """A copy that lacks every part of the given modalities (text inside messages always stays)."""
        drop = set(modalities)
        messages = tuple(
            Message(m.role, tuple(p for p in m.parts if isinstance(p, Text) or p.modality not in drop))
            for m in self.messages
        )
        views = {name: part for name, part in self.views.items() if name not in drop}
        return Sample(self.id, messages, views, self.label, self.meta, self.tokens)


def conversation(*parts: Part | str, answer: str | None = None, id: str = "request") -> Sample:
    """One user turn made of ``parts`` (a string is text), and the assistant's ``answer`` if there is one."""
    turn = tuple(Text(part) if isinstance(part, str) else part for part in parts)
    messages = [Message("user", turn)]
    if answer is not None:
        messages.append(Message("assistant", (Text(answer),)))
    return Sample(id, tuple(messages))


def sample_from_json(data: Any, root: str | os.PathLike[str], id: str) -> Sample:
    """Read one sample.

    Args:
        data: the parsed JSON object.
        root: the folder that relative paths start from.
        id: the name to use when the object has no ``id``.

    Raises:
        SampleError: if the object is not a sample; says which part and what was expected.
    """
    if not isinstance(data, dict):
        raise SampleError(id, f"found {type(data).__name__}, expected an object with 'messages' or 'views'")
    id = _id(data.get("id", id), id)
    extra = set(data) - {"id", "messages", "views", "label", "meta"}
    if extra:
        raise SampleError(id, unknown("key", sorted(extra)[0], ("id", "messages", "views", "label", "meta")))
    if ("messages" in data) == ("views" in data):
        raise SampleError(id, f"found keys {sorted(data)!r:.200}, expected exactly one of 'messages' and 'views'")
    label = data.get("label")
    if isinstance(label, dict | list):
        raise SampleError(id, f"label: found {type(label).__name__}, expected a string or a number")
    label = None if label is None else str(label)
    meta = data.get("meta", {})
    if not isinstance(meta, dict):
        raise SampleError(id, f"meta: found {type(meta).__name__}, expected an object")
    root = Path(root)
    if "views" in data:
        return Sample(id, views=_views(data["views"], root, id), label=label, meta=meta)
    turns = data["messages"]
    if not isinstance(turns, list) or not turns:
        raise SampleError(id, "messages: expected a list with at least one message")
    messages = tuple(_message(turn, root, id, i) for i, turn in enumerate(turns))
    return Sample(id, messages, label=label, meta=meta)


def sample_to_json(sample: Sample, root: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """The JSON object of a sample whose media are files; paths below ``root`` become relative to it.

    Raises:
        SampleError: if a media part is in memory.
    """
    data: dict[str, Any] = {"id": sample.id}
    if sample.messages:
        data["messages"] = [_message_to_json(message, sample.id, root) for message in sample.messages]
    else:
        data["views"] = {
            name: part.text
            if isinstance(part, Text)
            else ({} if name in MODALITIES else {"modality": part.modality})
            | _part_to_json(part, sample.id, root, typed=False)
            for name, part in sample.views.items()
        }
    if sample.label is not None:
        data["label"] = sample.label
    if sample.meta:
        data["meta"] = dict(sample.meta)
    return data


def _id(value: Any, default: str) -> str:
    if not isinstance(value, str | int | float) or len(str(value)) > _MAX_ID_CHARS:
        found = type(value).__name__ if not isinstance(value, str) else f"{len(value):,} characters"
        raise SampleError(default, f"id: found {found}, expected a string of at most {_MAX_ID_CHARS} or a number")
    return str(value)


def _message(data: Any, root: Path, id: str, index: int) -> Message:
    where = f"messages[{index}]"
    if not isinstance(data, dict) or "role" not in data or "content" not in data:
        raise SampleError(id, f"{where}: expected an object with 'role' and 'content'")
    if data["role"] not in ROLES:
        raise SampleError(id, f"{where}: {unknown('role', data['role'], ROLES)}")
    content = data["content"]
    if isinstance(content, str):
        return Message(data["role"], (Text(_string(data, "content", id, where)),))
    if not isinstance(content, list):
        raise SampleError(id, f"{where}.content: found {type(content).__name__}, expected a string or a list of parts")
    return Message(data["role"], tuple(_part(p, root, id, f"{where}.content[{i}]") for i, p in enumerate(content)))


def _part(data: Any, root: Path, id: str, where: str) -> Part:
    if not isinstance(data, dict) or "type" not in data:
        raise SampleError(id, f"{where}: expected an object with 'type'")
    kind = data["type"]
    if kind == "text":
        return Text(_string(data, "text", id, where))
    if kind in ("image_url", "audio_url", "video_url"):
        modality = kind.removesuffix("_url")
        url = data.get(kind)
        return _media(modality, {"url": url.get("url") if isinstance(url, dict) else url}, root, id, where)
    if kind == "input_audio":
        inner = data.get("input_audio")
        encoded = inner.get("data") if isinstance(inner, dict) else None
        return _media("audio", {"data": encoded}, root, id, where)
    if kind in MODALITIES:
        return _media(kind, {key: value for key, value in data.items() if key != "type"}, root, id, where)
    valid = (*MODALITIES, "image_url", "audio_url", "video_url", "input_audio")
    raise SampleError(id, f"{where}: {unknown('part type', kind, valid)}")


def _media(modality: str, data: dict[str, Any], root: Path, id: str, where: str) -> Media:
    allowed = {"path", "data", "url"} | _DETAILS.get(modality, set())
    extra = set(data) - allowed
    if extra:
        raise SampleError(id, f"{where}: {unknown('key', sorted(extra)[0], sorted(allowed))}")
    given = [key for key in ("path", "data", "url") if data.get(key) is not None]
    if len(given) != 1:
        raise SampleError(id, f"{where}: found {given or 'no source'}, expected exactly one of path, data, url")
    value = _string(data, given[0], id, where)
    source: Any
    if given[0] == "data":
        source = _base64(value, id, where)
    elif given[0] == "url":
        source = _from_url(value, id, where)
    else:
        source = root / value
    given_details = [key for key in sorted(_DETAILS.get(modality, ())) if data.get(key) is not None]
    return media_part(modality, source, **{key: _detail(key, data[key], id, where) for key in given_details})


def _detail(key: str, value: Any, id: str, where: str) -> Any:
    """A rate as a positive number, or channel names as a tuple of strings."""
    if key == "channels":
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise SampleError(id, f"{where}.channels: found {value!r:.80}, expected a list of names")
        return tuple(value)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value < math.inf:
        raise SampleError(id, f"{where}.{key}: found {value!r:.80}, expected a number above 0")
    return int(value) if value == int(value) else value


def _from_url(url: str, id: str, where: str) -> Any:
    if url.startswith("data:"):
        header, comma, body = url.partition(",")
        if not comma or not header.endswith(";base64"):
            raise SampleError(id, f"{where}: a data URL must read data:<type>;base64,<data>")
        return _base64(body, id, where)
    if url.startswith("file://"):
        return Path(url.removeprefix("file://"))
    raise SampleError(id, f"{where}: found the URL {url[:60]!r}; samples take data: and file: URLs, fetch others first")


def _base64(text: str, id: str, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise SampleError(id, f"{where}: the data is not valid base64") from None


def _string(data: dict[str, Any], key: str, id: str, where: str) -> str:
    value = data.get(key)
    if not isinstance(value, str):
        raise SampleError(id, f"{where}.{key}: found {type(value).__name__}, expected a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise SampleError(id, f"{where}.{key}: holds half of a surrogate pair; expected valid Unicode") from None
    return value


def _views(data: Any, root: Path, id: str) -> dict[str, Part]:
    if not isinstance(data, dict) or not data:
        raise SampleError(id, "views: expected an object from modality to path or text, with at least one entry")
    views: dict[str, Part] = {}
    for name, value in data.items():
        where = f"views.{name}"
        if name not in MODALITIES and not (isinstance(value, dict) and "modality" in value):
            hint = 'a view of another name says its modality: {"modality": "image", "path": ...}'
            raise SampleError(id, f"{where}: {unknown('modality', name, MODALITIES)}; {hint}")
        if name not in MODALITIES:
            views[name] = _named_view(value, root, id, where)
        elif name == "text":
            views[name] = Text(_string(data, "text", id, "views"))
        elif isinstance(value, str):
            views[name] = _media(name, {"path": value}, root, id, where)
        elif isinstance(value, dict):
            views[name] = _media(name, value, root, id, where)
        else:
            raise SampleError(id, f"{where}: found {type(value).__name__}, expected a path or an object")
    return views


def _named_view(data: dict[str, Any], root: Path, id: str, where: str) -> Media:
    modality = data["modality"]
    if modality not in MODALITIES or modality == "text":
        raise SampleError(id, f"{where}.modality: {unknown('modality', modality, MODALITIES[1:])}")
    return _media(modality, {key: value for key, value in data.items() if key != "modality"}, root, id, where)


def _message_to_json(message: Message, id: str, root: str | os.PathLike[str] | None) -> dict[str, Any]:
    if len(message.parts) == 1 and isinstance(message.parts[0], Text):
        return {"role": message.role, "content": message.parts[0].text}
    return {"role": message.role, "content": [_part_to_json(part, id, root) for part in message.parts]}


def _part_to_json(part: Part, id: str, root: str | os.PathLike[str] | None, *, typed: bool = True) -> dict[str, Any]:
    data: dict[str, Any] = {"type": part.modality} if typed else {}
    if isinstance(part, Text):
        return {**data, "text": part.text}
    if not isinstance(part, Media) or part.path is None:
        raise SampleError(
            id, f"{part.modality}: the part is in memory and cannot be written as JSON; save it to a file"
        )
    path = part.path
    if root is not None and path.is_relative_to(root):
        path = path.relative_to(root)
    data["path"] = path.as_posix()
    for key in sorted(_DETAILS.get(part.modality, ())):
        value = getattr(part, key)
        if value is not None:
            data[key] = list(value) if isinstance(value, tuple) else value
    return data


def named(sample: Sample, error: PolymodalError) -> SampleError:
    """``error`` as one that names the sample it happened in."""
    return error if isinstance(error, SampleError) else SampleError(sample.id, str(error))
