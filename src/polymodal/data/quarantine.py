"""Quarantine: samples that cannot be used are named, counted and recorded; too many of them stop the run."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from polymodal.core.errors import ConfigError, DataError


@dataclass(frozen=True, slots=True)
class Failure:
    """One sample that could not be used.

    Args:
        source: the name of its source.
        id: the sample's id.
        stage: ``plan`` (malformed, unreadable header, too long) or ``load`` (damaged content).
        error: the class of the error.
        reason: the message: what was found, what was expected.
    """

    source: str
    id: str
    stage: str
    error: str
    reason: str


class Quarantine:
    """Counts samples that were tried and that failed, and writes each failed sample to a JSON Lines file once.

    One line a sample, with the fields of :class:`Failure`. A sample that fails again in a later epoch, or again after
    a resume, is counted again but not written again. Every rank needs a file of its own.

    Args:
        path: the file to append to; None keeps the records in memory only.
        max_rate: the highest share of failed samples that is tolerated; 0 to below 1.
        min_samples: how many samples must have been tried before the rate is judged; at least 1.

    Raises:
        ConfigError: if a number is out of range.
        DataError: if the file exists and is not such a record. A last line without its end (a writer was killed) is
            dropped.
    """

    def __init__(
        self, path: str | os.PathLike[str] | None = None, max_rate: float = 0.05, min_samples: int = 200
    ) -> None:
        if not 0 <= max_rate < 1:
            raise ConfigError(f"max_rate: found {max_rate}, expected at least 0 and below 1")
        if min_samples < 1:
            raise ConfigError(f"min_samples: found {min_samples}, expected at least 1")
        self.path = None if path is None else Path(path)
        self.max_rate = max_rate
        self.min_samples = min_samples
        self.num_tried = 0
        self.reasons: Counter[str] = Counter()
        """Failures by class of error."""
        self._recorded: set[tuple[str, str]] = set()
        if self.path is not None and self.path.exists():
            self._read_records(self.path)

    @property
    def num_failed(self) -> int:
        """How many samples failed."""
        return self.reasons.total()

    @property
    def num_recorded(self) -> int:
        """How many different samples stand in the record."""
        return len(self._recorded)

    def count(self, num_tried: int, failures: list[Failure]) -> None:
        """Count ``num_tried`` samples, of which ``failures`` failed, and record those that are new.

        Raises:
            DataError: if the share of failed samples is above ``max_rate``; names the latest one.
        """
        self.num_tried += num_tried
        for failure in failures:
            self.reasons[failure.error] += 1
            if (failure.source, failure.id) not in self._recorded:
                self._recorded.add((failure.source, failure.id))
                self._write(failure)
        if failures and self.num_tried >= self.min_samples and self.num_failed > self.max_rate * self.num_tried:
            self.stop(failures[-1])

    def stop(self, latest: Failure) -> None:
        """Give up.

        Raises:
            DataError: always; names the rate and the latest failure.
        """
        record = f"; all are listed in {self.path}" if self.path is not None else ""
        raise DataError(
            f"{self.num_failed:,} of {self.num_tried:,} samples cannot be used, at most {self.max_rate:.1%} are "
            f"tolerated (max_bad_rate); the latest, from {latest.source}: {latest.reason}{record}. Repair the data or "
            "raise max_bad_rate"
        )

    def state(self) -> dict[str, Any]:
        """The counters, as plain JSON data."""
        return {"tried": self.num_tried, "reasons": dict(sorted(self.reasons.items()))}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue with the counters of :meth:`state`."""
        self.num_tried = int(state["tried"])
        self.reasons = Counter({str(name): int(count) for name, count in state["reasons"].items()})

    def _write(self, failure: Failure) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(failure)) + "\n")

    def _read_records(self, path: Path) -> None:
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.truncate(path, whole)
        for number, line in enumerate(data[:whole].splitlines(), start=1):
            try:
                record = json.loads(line)
                self._recorded.add((record["source"], record["id"]))
            except (ValueError, TypeError, KeyError):
                raise DataError(
                    f"{path}, line {number}: found {line[:60]!r}, expected a quarantine record with 'source' and 'id'; "
                    "move the file away or name another one"
                ) from None
