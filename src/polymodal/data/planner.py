"""Decides which samples each batch holds: mix -> order -> plan -> group, one step of all ranks at a time.

Every rank plans every sample (headers only) and keeps the groups that are its own, so that ranks agree without talking.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import Field, model_validator

from polymodal.core.config import Config
from polymodal.core.errors import DataError, MediaError, SampleError
from polymodal.data.mixing import InTurn, Mix, restore_counts
from polymodal.data.order import Permutation
from polymodal.data.packing import Entry, FixedGroups, Packer, Place
from polymodal.data.protocols import SampleProcessor, Source
from polymodal.data.quarantine import Failure

STATE_VERSION = 1

BAD_SAMPLE = (SampleError, MediaError, OSError)
"""Errors that send a sample to quarantine; any other error is a fault of the program and ends the run."""


class BatchSpec(Config):
    """How samples become batches: ``{tokens: 4096}`` packs them, ``{samples: 32}`` pads them.

    Args:
        tokens: the most tokens of a packed batch.
        samples: the samples of a padded batch; for a packed one the most samples (None: any number).
        one_source: padded only: every batch comes from one source of the mix, so that contrast has negatives of its own
            kind (task-homogeneous batches).
        buffer: packed only: how many planned samples are held for the choice of a pack.
        packed: follows from ``tokens`` and need not be given.
    """

    tokens: int | None = Field(default=None, ge=1)
    samples: int | None = Field(default=None, ge=1)
    buffer: int = Field(default=64, ge=1)
    packed: bool = False
    one_source: bool = False

    @model_validator(mode="before")
    @classmethod
    def _follow_tokens(cls, data: Any) -> Any:
        if isinstance(data, dict):
            return {"packed": data.get("tokens") is not None, **data}
        return data

    @model_validator(mode="after")
    def _agree(self) -> BatchSpec:
        if self.packed and self.tokens is None:
            raise ValueError("a packed batch needs 'tokens', the size of a pack")
        if not self.packed and (self.samples is None or self.tokens is not None):
            raise ValueError("a padded batch needs 'samples' and no 'tokens'; give 'tokens' alone for packed batches")
        if self.packed and self.one_source:
            raise ValueError("'one_source' is for padded batches, found it beside 'tokens'")
        return self

    def grouper(self) -> Packer | FixedGroups:
        """The empty packer or group that this spec stands for."""
        if self.tokens is not None:
            return Packer(self.tokens, self.buffer, self.samples)
        assert self.samples is not None
        return FixedGroups(self.samples, self.one_source)


@dataclass(slots=True)
class Step:
    """What one rank does in one step of all ranks.

    Args:
        entries: the samples of the rank's batch; empty if it has none.
        failures: the samples that could not be planned, as far as this rank counts them.
        state: the planner's state after the step.
        gives_up: nothing but failures for so long that the run must stop.
    """

    entries: list[Entry]
    failures: list[Failure]
    state: dict[str, Any]
    gives_up: bool = False


@dataclass(slots=True)
class _Group:
    entries: list[Entry]
    failures: list[Failure] = field(default_factory=list)
    gives_up: bool = False


def source_names(sources: Sequence[Source]) -> list[str]:
    """What records and messages call each source: its ``name``, or its number."""
    return [str(getattr(source, "name", f"source {i}")) for i, source in enumerate(sources)]


class Planner:
    """The sequence of batches, up to decoding.

    Args:
        sources: at least one; none is empty.
        mix: which source each sample comes from; an :class:`InTurn` means one pass in order, unshuffled.
        processor: plans samples.
        spec: how samples become batches.
        seed: of the shuffle.
        share: (rank, world): in each step of ``world`` batches, batch ``rank`` is this planner's.
        patience: failures in a row after which an endless mix gives up.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        mix: Mix | InTurn,
        processor: SampleProcessor,
        spec: BatchSpec,
        *,
        seed: int,
        share: tuple[int, int],
        patience: int,
    ) -> None:
        self.names = source_names(sources)
        self._sources = list(sources)
        self._fingerprints = [source.fingerprint for source in sources]
        self._mix = mix
        self._processor = processor
        self._spec = spec
        self._seed = seed
        self._share = share
        self._patience = patience
        self._grouper = spec.grouper()
        self._orders: dict[int, tuple[int, Permutation]] = {}
        self._batches = 0
        self._lost: list[Failure] = []

    def next_step(self) -> Step | None:
        """The rank's next step; None after the last one of a finite pass.

        Raises:
            Exception: whatever a source or the processor raises beyond :data:`BAD_SAMPLE`.
        """
        rank, world = self._share
        step = Step([], [], {})
        for turn in range(world):
            group = self._next_group()
            if not group.entries:
                if turn == 0 and not group.failures:
                    return None
                step.gives_up = group.gives_up
                step.failures += group.failures if rank == 0 or group.gives_up else []
                break
            self._batches += 1
            if turn == rank:
                step.entries = group.entries
                step.failures += group.failures
        step.state = self.state()
        return step

    def state(self) -> dict[str, Any]:
        """Where the planner stands, as small plain JSON data; the same on every rank."""
        return {
            "version": STATE_VERSION,
            "run": self._run(),
            "fingerprints": list(self._fingerprints),
            "counts": list(self._mix.counts),
            "held": [[*entry.place, entry.age] for entry in self._grouper.held()],
            "batches": self._batches,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue after the step that ``state`` was taken at, on any number of ranks.

        Raises:
            DataError: as :meth:`check` does; the planner is unchanged then.
        """
        self.check(state)
        restore_counts(self._mix, state["counts"])
        self._batches = int(state["batches"])
        self._grouper = self._spec.grouper()
        self._lost = []
        for source, position, age in state["held"]:
            failure = self._plan((source, position), age)
            if failure is not None:
                self._lost.append(failure)

    def check(self, state: dict[str, Any]) -> None:
        """Hold a saved state against this run.

        Raises:
            DataError: if the state belongs to other data or another configuration; says what differs.
        """
        if state.get("version") != STATE_VERSION:
            raise DataError(f"found loader state version {state.get('version')!r}, expected {STATE_VERSION}")
        for key, value in self._run().items():
            if state["run"].get(key) != value:
                raise DataError(
                    f"the saved loader state has {key} {state['run'].get(key)!r}, this run has {value!r}; a resumed "
                    "run must read as the first did: undo the change, or start a new run"
                )
        for name, saved, now in zip(self.names, state["fingerprints"], self._fingerprints, strict=True):
            if saved != now:
                raise DataError(
                    f"{name}: the data changed since the loader state was saved (fingerprint {saved!r}, now {now!r}); "
                    "positions no longer mean the same samples: bring the old data back, or start a new run"
                )

    def _run(self) -> dict[str, Any]:
        """What must not change between saving and resuming."""
        return {
            "sources": len(self._sources),
            "seed": self._seed,
            "batch": self._spec.to_data(),
            "weights": self._mix.shares(),
        }

    def _next_group(self) -> _Group:
        group = _Group([], self._lost)
        self._lost = []
        in_a_row = 0
        while not self._grouper.is_full:
            place = self._mix.draw()
            if place is None:
                break
            failure = self._plan(place)
            if failure is None:
                in_a_row = 0
                continue
            group.failures.append(failure)
            in_a_row += 1
            if in_a_row >= self._patience and isinstance(self._mix, Mix):
                group.gives_up = True
                return group
        group.entries = self._grouper.take()
        return group

    def _plan(self, place: Place, age: int = 0) -> Failure | None:
        source, position = place
        index = self._index(source, position)
        id = f"number {index}"
        try:
            sample = self._sources[source][index]
            id = sample.id
            self._grouper.add(Entry(place, self._processor.plan(sample), age))
        except BAD_SAMPLE as error:
            id = error.sample if isinstance(error, SampleError) else id
            return Failure(self.names[source], id, "plan", type(error).__name__, str(error))
        return None

    def _index(self, source: int, position: int) -> int:
        if isinstance(self._mix, InTurn):
            return position
        length = len(self._sources[source])
        epoch, position = divmod(position, length)
        if source not in self._orders or self._orders[source][0] != epoch:
            self._orders[source] = (epoch, Permutation(length, f"{self._seed}/{source}", epoch))
        return self._orders[source][1](position)
