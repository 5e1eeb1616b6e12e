"""An exact cosine index: a matrix of unit vectors, a key and a note per row, and the signature of who made them.

Shape legend: ``N`` entries, ``Q`` queries, ``D`` width of a vector.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from polymodal.core.config import Config
from polymodal.core.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_FORMAT = 1


class Signature(Config):
    """Who made the vectors. Vectors of different signatures do not live in one space and are never compared.

    ``model`` names the model; ``revision`` changes with its weights and preprocessing (a hash of both); ``dim`` is
    the width of a vector.
    """

    model: str
    revision: str
    dim: int


@dataclass(frozen=True, slots=True)
class Hit:
    """One result: the entry's key, its cosine similarity to the query in -1..1, and the note stored with it."""

    key: str
    score: float
    note: Mapping[str, Any] = field(default_factory=dict)


class FlatIndex:
    """Exact cosine search over float32 vectors in memory.

    A key stands for one entry: adding it again replaces the vector and the note. Equal scores are returned in the
    order in which their keys were first added.

    Args:
        signature: who makes the vectors.
    """

    def __init__(self, signature: Signature) -> None:
        self.signature = signature
        self._keys: list[str] = []
        self._notes: list[Mapping[str, Any]] = []
        self._row_of_key: dict[str, int] = {}
        self._vectors_ND: NDArray[np.float32] = np.empty((0, signature.dim), dtype=np.float32)

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: object) -> bool:
        return key in self._row_of_key

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys, in the order in which they were first added."""
        return tuple(self._keys)

    def add(
        self,
        keys: Sequence[str],
        vectors_ND: NDArray[np.float32],
        notes: Sequence[Mapping[str, Any]] | None = None,
        *,
        signature: Signature | None = None,
    ) -> None:
        """Add or replace entries.

        Args:
            keys: ``N`` names.
            vectors_ND: ``[N, D]`` finite, non-zero; scaled to unit length here.
            notes: ``N`` JSON objects to return with a hit (a path, a caption, a time range).
            signature: who made these vectors; checked against the index where given.

        Raises:
            DataError: if the signature or a shape does not match, or a vector has no direction.
        """
        self._require(signature)
        unit_ND = self._unit(vectors_ND, "vectors")
        notes = [{}] * len(keys) if notes is None else notes
        if not len(keys) == len(unit_ND) == len(notes):
            raise DataError(
                f"found {len(keys)} keys, {len(unit_ND)} vectors and {len(notes)} notes; expected one of each per entry"
            )
        latest = {key: row for row, key in enumerate(keys)}
        new = [key for key in latest if key not in self._row_of_key]
        for key in new:
            self._row_of_key[key] = len(self._keys)
            self._keys.append(key)
            self._notes.append({})
        grown_ND = np.empty((len(new), self.signature.dim), dtype=np.float32)
        self._vectors_ND = np.concatenate([self._vectors_ND, grown_ND])
        for key, row in latest.items():
            place = self._row_of_key[key]
            self._vectors_ND[place] = unit_ND[row]
            self._notes[place] = dict(notes[row])

    def remove(self, keys: Iterable[str]) -> int:
        """Remove the entries that are there; how many were."""
        gone = {key for key in keys if key in self._row_of_key}
        kept = [row for row, key in enumerate(self._keys) if key not in gone]
        self._vectors_ND = self._vectors_ND[kept]
        self._notes = [self._notes[row] for row in kept]
        self._keys = [self._keys[row] for row in kept]
        self._row_of_key = {key: row for row, key in enumerate(self._keys)}
        return len(gone)

    def search(
        self, queries_QD: NDArray[np.float32], k: int = 10, *, signature: Signature | None = None
    ) -> list[list[Hit]]:
        """The ``k`` nearest entries of each query (all of them, if there are fewer), best first.

        Args:
            queries_QD: ``[Q, D]`` finite, non-zero; a single ``[D]`` vector counts as one query.
            k: at least 1.
            signature: who made the queries; checked against the index where given.

        Raises:
            DataError: if the signature or the shape does not match, a query has no direction, or ``k`` is below 1.
        """
        self._require(signature)
        if k < 1:
            raise DataError(f"k: found {k}, expected at least 1")
        unit_QD = self._unit(np.atleast_2d(queries_QD), "queries")
        scores_QN = unit_QD @ self._vectors_ND.T
        return [self._best(scores_N, k) for scores_N in scores_QN]

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one file, whole or not at all; returns its path, which ends in ``.npz``."""
        path = Path(path)
        if path.suffix != ".npz":
            path = path.with_name(path.name + ".npz")
        path.parent.mkdir(parents=True, exist_ok=True)
        table = {
            "format": _FORMAT, "signature": self.signature.to_data(), "keys": self._keys,
            "notes": [dict(note) for note in self._notes],
        }  # fmt: skip
        encoded = np.frombuffer(json.dumps(table).encode(), dtype=np.uint8)
        partial = path.with_name(path.name + ".partial")
        with partial.open("wb") as file:
            np.savez(file, vectors=self._vectors_ND, table=encoded)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str], signature: Signature | None = None) -> FlatIndex:
        """Read a saved index.

        Args:
            path: the file that :meth:`save` wrote.
            signature: who will make the queries; checked against the file where given.

        Raises:
            DataError: if the file is missing, damaged, or made by another model.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                vectors_ND = file["vectors"]
                table = json.loads(file["table"].tobytes())
            index = cls(Signature.parse(table["signature"], f"{path}: signature"))
            keys, notes = table["keys"], table["notes"]
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
        except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(f"{path}: not a saved index, or damaged ({error}); build it again") from None
        if table.get("format") != _FORMAT:
            raise DataError(f"{path}: format {table.get('format')}, this version reads {_FORMAT}; build it again")
        index._require(signature)
        if vectors_ND.shape != (len(keys), index.signature.dim) or len(keys) != len(notes):
            raise DataError(
                f"{path}: vectors of shape {vectors_ND.shape} for {len(keys)} keys; the file is damaged, build it again"
            )
        index._vectors_ND = np.ascontiguousarray(vectors_ND, dtype=np.float32)
        index._keys, index._notes = list(keys), list(notes)
        index._row_of_key = {key: row for row, key in enumerate(index._keys)}
        return index

    def _best(self, scores_N: NDArray[np.float32], k: int) -> list[Hit]:
        if k < len(scores_N):
            # Every entry that ties with the k-th stays in, so that ties are broken by order and not by the partition.
            threshold = np.partition(scores_N, len(scores_N) - k)[len(scores_N) - k]
            candidates = np.flatnonzero(scores_N >= threshold)
        else:
            candidates = np.arange(len(scores_N))
        order = candidates[np.argsort(-scores_N[candidates], kind="stable")][:k]
        return [Hit(self._keys[row], float(scores_N[row]), self._notes[row]) for row in order]

    def _require(self, signature: Signature | None) -> None:
        if signature is None or signature == self.signature:
            return
        mine, other = self.signature.to_data(), signature.to_data()
        changed = "; ".join(
            f"{key}: index {mine[key]!r}, given {other[key]!r}" for key in mine if mine[key] != other[key]
        )
        raise DataError(
            f"the index was made by another model ({changed}); vectors of different models cannot be compared. "
            "Embed the documents again with this model, or query with the model of the index"
        )

    def _unit(self, vectors: NDArray[Any], what: str) -> NDArray[np.float32]:
        wide = np.asarray(vectors, dtype=np.float64)
        if wide.ndim != 2 or wide.shape[1] != self.signature.dim:
            raise DataError(f"{what}: found shape {wide.shape}, expected [N, {self.signature.dim}]")
        lengths = np.sqrt((wide**2).sum(axis=1, keepdims=True))
        bad = np.flatnonzero(~(np.isfinite(lengths[:, 0]) & (lengths[:, 0] > 0)))
        if bad.size:
            raise DataError(f"{what}: row {bad[0]} is zero, NaN or infinite and has no direction; {bad.size} such rows")
        unit: NDArray[np.float32] = (wide / lengths).astype(np.float32)
        return unit
