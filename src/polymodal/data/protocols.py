"""What the loader asks of its parts: a source of samples, a processor, a feature cache; and a source in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Protocol

from polymodal.core.batch import Batch, Example, Plan
from polymodal.core.samples import Sample


class Source(Protocol):
    """Samples that can be read by index. A ``name`` attribute, where there is one, is what records call it."""

    @property
    def fingerprint(self) -> str:
        """Changes whenever the samples or their order change."""

    def __len__(self) -> int:
        """How many samples there are."""

    def __getitem__(self, index: int) -> Sample:
        """One sample.

        Raises:
            SampleError: if it is malformed.
        """


class SampleProcessor(Protocol):
    """Makes batches of samples; its methods are called from several threads at once."""

    def plan(self, sample: Sample) -> Plan:
        """Lay a sample out from headers alone.

        Raises:
            SampleError: if it cannot be laid out.
        """

    def reserve(self, plans: Sequence[Plan]) -> None:
        """Get ready for loading plans that will be one batch, if none of them is damaged."""

    def load(self, plan: Plan, has_features: Callable[[str], bool] | None = None) -> Example:
        """Decode the media of a plan, except items whose features are cached.

        Raises:
            SampleError: if a media item is damaged.
        """

    def collate(self, examples: Sequence[Example], packed: bool) -> Batch:
        """Join examples into a batch."""


class FeatureStore(Protocol):
    """A cache of encoder features, as far as loading needs it. What it holds, it must keep."""

    def __contains__(self, key: str) -> bool:
        """Whether features are stored under the key."""


class ListSource:
    """Samples in memory: for examples, tests and small tasks.

    Args:
        samples: the samples.
        name: what records and messages call it.
    """

    def __init__(self, samples: Sequence[Sample], name: str = "list") -> None:
        self.samples = list(samples)
        self.name = name

    @property
    def fingerprint(self) -> str:
        """Changes with the number, the order and the ids of the samples; their content is not read."""
        ids = "\n".join(sample.id for sample in self.samples)
        return hashlib.blake2b(ids.encode(), digest_size=16).hexdigest()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]
