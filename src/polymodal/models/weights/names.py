"""Two-way tables between our parameter names and those of published checkpoints.

A table is a list of rules. A rule's two patterns hold the same placeholders: ``{i}`` and ``{j}`` stand for numbers,
``{p}`` and ``{q}`` for one piece of a dotted name (``weight``), ``{rest}`` for any rest of a name.

Worked example: ``Rule("blocks.{i}.attention.q_proj.{p}", "h.{i}.attn.c_attn.{p}", Slice(0, 3))`` says that our
``blocks.7.attention.q_proj.bias`` is the first third of the file's ``h.7.attn.c_attn.bias``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from polymodal.core.errors import CheckpointError

_PLACEHOLDERS = {"i": r"\d+", "j": r"\d+", "p": r"[^.]+", "q": r"[^.]+", "rest": r".+"}
_NAMED_AT_ONCE = 6
"""How many names an error lists."""


class Change(Protocol):
    """How a stored tensor becomes our parameter, and back."""

    def load(self, stored: Tensor) -> Tensor:
        """Our tensor; a view of the stored one wherever possible."""

    def save(self, ours: Sequence[Tensor]) -> Tensor:
        """The stored tensor from the tensors of all rules that name it, in the order of :attr:`order`."""

    @property
    def order(self) -> int:
        """Place among the rules that share a stored tensor."""

    @property
    def pieces(self) -> int:
        """How many rules share the stored tensor."""


@dataclass(frozen=True, slots=True)
class Same:
    """The stored tensor is the parameter."""

    order: int = 0
    pieces: int = 1

    def load(self, stored: Tensor) -> Tensor:
        """As it is."""
        return stored

    def save(self, ours: Sequence[Tensor]) -> Tensor:
        """As it is."""
        return ours[0]


@dataclass(frozen=True, slots=True)
class Transposed:
    """A matrix stored as ``[inputs, outputs]`` (GPT-2's layers)."""

    order: int = 0
    pieces: int = 1

    def load(self, stored: Tensor) -> Tensor:
        """Transposed; a vector stays as it is."""
        return stored.t()

    def save(self, ours: Sequence[Tensor]) -> Tensor:
        """Transposed back."""
        return ours[0].t().contiguous()


@dataclass(frozen=True, slots=True)
class Slice:
    """One of several equal parts of a stored tensor (fused queries, keys and values).

    Args:
        index: which part.
        of: how many parts.
        dim: along which axis.
        transposed: whether the stored matrix is ``[inputs, outputs]``; ``dim`` is then that of the transposed one.
    """

    index: int
    of: int
    dim: int = 0
    transposed: bool = False

    @property
    def order(self) -> int:
        """See :class:`Change`."""
        return self.index

    @property
    def pieces(self) -> int:
        """See :class:`Change`."""
        return self.of

    def load(self, stored: Tensor) -> Tensor:
        """The part, as a view.

        Raises:
            CheckpointError: if the axis cannot be parted.
        """
        whole = stored.t() if self.transposed else stored
        if whole.shape[self.dim] % self.of:
            raise CheckpointError(
                f"found shape {tuple(whole.shape)}, expected axis {self.dim} in {self.of} equal parts"
            )
        return whole.chunk(self.of, self.dim)[self.index]

    def save(self, ours: Sequence[Tensor]) -> Tensor:
        """All parts together."""
        whole = torch.cat(list(ours), self.dim)
        return whole.t().contiguous() if self.transposed else whole


@dataclass(frozen=True, slots=True)
class Reshape:
    """The same numbers in another shape (``[1, 1, D]`` for our ``[D]``).

    Args:
        ours: our shape; one axis may be -1.
        hub: the stored shape; one axis may be -1.
    """

    ours: tuple[int, ...]
    hub: tuple[int, ...]
    order: int = 0
    pieces: int = 1

    def load(self, stored: Tensor) -> Tensor:
        """In our shape."""
        return stored.reshape(self.ours)

    def save(self, ours: Sequence[Tensor]) -> Tensor:
        """In the stored shape."""
        return ours[0].reshape(self.hub)


SAME = Same()
TRANSPOSED = Transposed()


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of a table.

    Args:
        ours: pattern of our names.
        hub: pattern of stored names with the same placeholders.
        change: what happens to the tensor.
    """

    ours: str
    hub: str
    change: Change = SAME

    def to_hub(self, name: str) -> str | None:
        """The stored name of one of ours, or None where the rule does not speak of it."""
        found = _regex(self.ours).fullmatch(name)
        return None if found is None else self.hub.format_map(found.groupdict())


@lru_cache(maxsize=4096)
def _regex(pattern: str) -> re.Pattern[str]:
    pieces = re.split(r"\{(\w+)\}", pattern)
    text = "".join(
        re.escape(piece) if place % 2 == 0 else f"(?P<{piece}>{_PLACEHOLDERS[piece]})"
        for place, piece in enumerate(pieces)
    )
    return re.compile(text)


@dataclass(frozen=True)
class NameTable:
    """All rules of one architecture; the first rule that fits a name decides.

    Args:
        rules: in order of precedence.
        ignored: patterns of stored tensors that carry no weights of the model (position ids, rotary tables).
        optional: patterns of our parameters that a checkpoint may lack; they keep their initial values.
        unused: patterns of stored tensors that are weights of the published model and not needed by ours (the blocks
            after the one whose features are read). They are not read; an export takes them from the source.
    """

    rules: Sequence[Rule]
    ignored: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    _cache: dict[str, tuple[Rule, str] | None] = field(default_factory=dict, compare=False, repr=False)

    def find(self, name: str) -> tuple[Rule, str] | None:
        """The rule for one of our names, and the stored name."""
        if name not in self._cache:
            self._cache[name] = next(
                ((rule, hub) for rule in self.rules if (hub := rule.to_hub(name)) is not None), None
            )
        return self._cache[name]

    def prefixed(self, prefix: str) -> NameTable:
        """The same table for parameters that stand below ``prefix`` (``streams.image.encoder.``) in our model."""
        return NameTable(
            [Rule(prefix + rule.ours, rule.hub, rule.change) for rule in self.rules],
            self.ignored,
            tuple(prefix + name for name in self.optional),
            self.unused,
        )

    def below(self, prefix: str) -> NameTable:
        """The same table for stored names that begin with ``prefix`` (``vision_model.``)."""
        return NameTable(
            [Rule(rule.ours, prefix + rule.hub, rule.change) for rule in self.rules],
            tuple(prefix + name for name in self.ignored),
            self.optional,
            tuple(prefix + name for name in self.unused),
        )

    def __add__(self, other: NameTable) -> NameTable:
        """Both tables; rules of the first come first."""
        return NameTable(
            [*self.rules, *other.rules],
            (*self.ignored, *other.ignored),
            (*self.optional, *other.optional),
            (*self.unused, *other.unused),
        )

    def load(self, names: Iterable[str], stored: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
        """Our tensors from a checkpoint's.

        Args:
            names: our parameters and buffers that are wanted.
            stored: the checkpoint; tensors are read one by one as they are asked for.
            source: what to call the checkpoint in messages.

        Returns:
            A tensor for each wanted name that the checkpoint has; those of ``optional`` may be absent.

        Raises:
            CheckpointError: if a wanted tensor is not there, naming what is missing.
        """
        missing, found = [], {}
        for name in names:
            place = self.find(name)
            if place is None or place[1] not in stored:
                if not _fits(self.optional, name):
                    missing.append(name if place is None else f"{place[1]} (for {name})")
                continue
            rule, hub = place
            try:
                found[name] = rule.change.load(stored[hub])
            except (CheckpointError, RuntimeError) as error:
                raise CheckpointError(f"{source}: {hub}: {error}") from None
        if missing:
            raise CheckpointError(
                f"{source}: {len(missing)} tensor(s) missing: {_some(missing)}; found {len(stored)} tensors. "
                "Is the file complete, and of the architecture that config.json names?"
            )
        return found

    def unknown(self, names: Iterable[str], stored: Collection[str]) -> list[str]:
        """Stored tensors that no wanted name of ours takes and that are neither ignored nor known to be unused."""
        taken = {place[1] for name in names if (place := self.find(name)) is not None}
        known = (*self.ignored, *self.unused)
        return sorted(name for name in stored if name not in taken and not _fits(known, name))

    def is_unused(self, stored: str) -> bool:
        """Whether a stored tensor is one of :attr:`unused`."""
        return _fits(self.unused, stored)

    def save(self, ours: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
        """The checkpoint's tensors from ours: the inverse of :meth:`load`.

        Raises:
            CheckpointError: if a parameter of ours has no place in the checkpoint, or a part of a stored tensor is
                missing.
        """
        groups: dict[str, list[tuple[Change, Tensor]]] = {}
        homeless = []
        for name, tensor in ours.items():
            place = self.find(name)
            if place is None:
                homeless.append(name)
                continue
            groups.setdefault(place[1], []).append((place[0].change, tensor))
        if homeless:
            raise CheckpointError(
                f"{source}: the published layout has no place for {len(homeless)} tensor(s): {_some(homeless)}; "
                "merge adapters first, and export only what the architecture has"
            )
        result = {}
        for hub, pieces in groups.items():
            pieces.sort(key=lambda piece: piece[0].order)
            if len(pieces) != pieces[0][0].pieces:
                raise CheckpointError(f"{source}: {hub}: found {len(pieces)} of {pieces[0][0].pieces} parts")
            result[hub] = pieces[0][0].save([tensor for _, tensor in pieces])
        return result


def _fits(patterns: Sequence[str], name: str) -> bool:
    return any(_regex(pattern).fullmatch(name) for pattern in patterns)


def _some(names: Sequence[str]) -> str:
    more = len(names) - _NAMED_AT_ONCE
    return ", ".join(names[:_NAMED_AT_ONCE]) + (f" and {more} more" if more > 0 else "")
