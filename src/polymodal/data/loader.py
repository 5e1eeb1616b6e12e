"""The loader: batches in a fixed order, prepared ahead by threads, resumable to the sample.

One thread plans ahead, some decode, one joins the examples. Nothing about threads or timing changes what a
batch holds: every decision is taken by position, and results are awaited in order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from polymodal.core.batch import Batch, Example
from polymodal.core.errors import ConfigError, DataError
from polymodal.data.mixing import InTurn, Mix
from polymodal.data.packing import Entry
from polymodal.data.planner import BAD_SAMPLE, BatchSpec, Planner, Step, source_names
from polymodal.data.protocols import FeatureStore, ListSource, SampleProcessor, Source
from polymodal.data.quarantine import Failure, Quarantine

__all__ = ["BatchSpec", "FeatureStore", "ListSource", "Loader", "SampleProcessor", "Source"]

PREFETCH = 2
"""How many batches are prepared ahead of the one handed out."""


class Loader:
    """An iterator of batches over a weighted mix of sources.

    The samples of each source come in a shuffled order that is new in every epoch (``order``); sources take turns by
    exact weights (``mixing``); samples are planned from headers, grouped (``packing``), decoded and joined. A sample
    that fails is counted and recorded (``quarantine``): if its plan fails, the next sample of the order follows; if its
    content turns out to be damaged, its batch is one sample smaller, because groups are fixed before anything is
    decoded. A batch of which nothing is left is passed over.

    Ranks: batches are numbered from 0, and rank ``r`` of ``world`` takes batches ``r, r + world, ...``; no two ranks
    see the same sample of an epoch, and an endless mix gives every rank the same number of batches. In one pass
    (``once``) the last ranks may get one batch less.

    Args:
        sources: where samples come from.
        weights: one per source; None for their numbers of samples, so that every sample comes equally often.
        processor: plans, decodes and joins samples; called from several threads.
        batch: how samples become batches.
        seed: of the shuffle.
        quarantine: counts and records bad samples; None for one that records in memory, with its default limits.
        cache: features in this cache need not be decoded; it must keep what it holds.
        threads: decoding threads; the content of the batches does not depend on it.
        share: (rank, world).
        once: one pass over the sources in turn, in order, unshuffled, the last partial batch kept: for evaluation.

    Raises:
        ConfigError: if an argument is out of range, or ``weights`` are given for one pass.
        DataError: if a source is empty. While iterating: if too many samples are bad.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        weights: Sequence[float] | None,
        processor: SampleProcessor,
        batch: BatchSpec,
        *,
        seed: int = 0,
        quarantine: Quarantine | None = None,
        cache: FeatureStore | None = None,
        threads: int = 2,
        share: tuple[int, int] = (0, 1),
        once: bool = False,
    ) -> None:
        if threads < 1:
            raise ConfigError(f"threads: found {threads}, expected at least 1")
        if not 0 <= share[0] < share[1]:
            raise ConfigError(f"share: found rank {share[0]} of world {share[1]}, expected 0 <= rank < world")
        self.quarantine = Quarantine() if quarantine is None else quarantine
        self._sources, self._shares = list(sources), _mix(sources, weights, once).shares()
        self._processor, self._batch, self._seed = processor, batch, seed
        self._has_features: Callable[[str], bool] | None = None if cache is None else cache.__contains__
        self._planner = Planner(
            sources,
            _mix(sources, weights, once),
            processor,
            batch,
            seed=seed,
            share=share,
            patience=max(200, self.quarantine.min_samples),
        )
        self._threads = threads
        self._workers: _Workers | None = None
        self._pending: deque[Future[_Prepared | None]] = deque()
        self._ended: BaseException | None = None
        self._position = self._planner.state()

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Batch:
        """The next batch of this rank.

        Raises:
            DataError: if more samples are bad than the quarantine tolerates.
            StopIteration: after one pass, with ``once``.
        """
        if self._ended is not None:
            raise self._ended
        try:
            while True:
                prepared = self._next_prepared()
                if prepared is None:
                    raise StopIteration
                self._position = prepared.state
                self.quarantine.count(prepared.num_tried, prepared.failures)
                if prepared.gives_up:
                    self.quarantine.stop(prepared.failures[-1])
                if prepared.batch is not None:
                    return prepared.batch
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            self._ended = error
            self._stop_workers()
            raise

    def state(self) -> dict[str, Any]:
        """Where the loader stands after the last batch that was handed out, as plain JSON data of about 1 KB.

        Batches that were only prepared do not count. The position is the same on every rank after the same number of
        batches and can be restored on any number of ranks; the quarantine's counters are this rank's own.
        """
        return {**self._position, "quarantine": self.quarantine.state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue after the batch at which ``state`` was taken: the same batches follow as in an unbroken run.

        Raises:
            DataError: if the state belongs to other data or another configuration; the loader keeps its place then.
        """
        self._planner.check(state)
        self._stop_workers()
        self._planner.restore(state)
        self._position = {key: value for key, value in state.items() if key != "quarantine"}
        self.quarantine.restore(state["quarantine"])
        self._ended = None

    def kinds(self) -> Iterator[tuple[float, Batch]]:
        """A batch of each kind, and the share of such batches: where batches are of one source each, one per source.

        Reads apart from the order of the batches, which stays as it is; bad samples are passed over and not counted.
        Ends without a batch where batches hold a mix of the sources: any batch says what the others are like.
        """
        for source, share in zip(self._sources, self._shares, strict=True) if self._batch.one_source else ():
            planner = Planner(
                [source], Mix([1]), self._processor, self._batch, seed=self._seed, share=(0, 1), patience=200
            )
            step = planner.next_step()
            loaded = [self._load(entry) for entry in (step.entries if step is not None else ())]
            examples = [one for one in loaded if not isinstance(one, Failure)]
            if examples:
                yield share / sum(self._shares), self._processor.collate(examples, packed=False)

    def close(self) -> None:
        """End the threads; the state stays readable, and iterating on continues where the last batch was handed out."""
        self._stop_workers()
        self._planner.restore(self._position)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _next_prepared(self) -> _Prepared | None:
        if self._workers is None:
            self._workers = _Workers(self._threads)
        while len(self._pending) <= PREFETCH:
            planned = self._workers.plan.submit(self._plan_step)
            self._pending.append(self._workers.join.submit(self._prepare, planned))
        prepared = self._pending[0].result()
        self._pending.popleft()
        return prepared

    def _plan_step(self) -> tuple[Step, _Loads] | None:
        """Runs in the planning thread, one at a time and in order."""
        step, workers = self._planner.next_step(), self._workers
        if step is None or workers is None:
            return None
        self._processor.reserve([entry.plan for entry in step.entries])
        loads = _Loads(step.entries)
        for _ in range(min(self._threads, len(step.entries))):
            loads.jobs.append(workers.decode.submit(loads.run, self._load, workers))
        return step, loads

    def _load(self, entry: Entry) -> Example | Failure:
        """Runs in the decoding threads, in any order."""
        try:
            return self._processor.load(entry.plan, self._has_features)
        except BAD_SAMPLE as error:
            name = self._planner.names[entry.place[0]]
            return Failure(name, entry.plan.id, "load", type(error).__name__, str(error))

    def _prepare(self, planned: Future[tuple[Step, _Loads] | None]) -> _Prepared | None:
        """Runs in the joining thread, one at a time and in order."""
        result = planned.result()
        if result is None:
            return None
        step, loads = result
        loaded = loads.result()
        examples = [one for one in loaded if not isinstance(one, Failure)]
        failures = step.failures + [one for one in loaded if isinstance(one, Failure)]
        batch = self._processor.collate(examples, self._batch.packed) if examples else None
        num_tried = len(step.entries) + len(step.failures)
        return _Prepared(batch, num_tried, failures, step.state, step.gives_up)

    def _stop_workers(self) -> None:
        if self._workers is not None:
            self._workers.stop()
        self._workers = None
        self._pending.clear()


@dataclass(slots=True)
class _Prepared:
    """A finished step; ``batch`` is None if none of its samples could be used."""

    batch: Batch | None
    num_tried: int
    failures: list[Failure]
    state: dict[str, Any]
    gives_up: bool


class _Loads:
    """The samples of a step, for the decoding threads to take one by one.

    Every thread gets one job a step. A job for each sample would wake two threads for each: 0.3 ms of processor time.
    """

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.jobs: list[Future[None]] = []
        self._waiting = deque(enumerate(entries))
        self._loaded: dict[int, Example | Failure] = {}
        self._faults: dict[int, BaseException] = {}

    def run(self, load: Callable[[Entry], Example | Failure], workers: _Workers) -> None:
        """Load samples until none waits; runs in several threads."""
        while not workers.is_stopping:
            try:
                row, entry = self._waiting.popleft()
            except IndexError:
                return
            try:
                self._loaded[row] = load(entry)
            except BaseException as error:
                self._faults[row] = error
                self._waiting.clear()
                raise
        raise CancelledError

    def result(self) -> list[Example | Failure]:
        """What became of each sample, in order, once all are done.

        Raises:
            Exception: what the first sample met that provoked a fault of the program.
        """
        errors = [error for job in self.jobs if (error := job.exception()) is not None]
        if errors:
            # Samples are taken in order and each is seen through: which fault is the first does not depend on timing.
            raise self._faults[min(self._faults)] if self._faults else errors[0]
        return [self._loaded[row] for row in range(len(self._loaded))]


class _Workers:
    """The threads of a running loader: one plans, some decode, one joins."""

    def __init__(self, threads: int) -> None:
        self.is_stopping = False
        self.plan = ThreadPoolExecutor(1, "plan")
        self.decode = ThreadPoolExecutor(threads, "decode")
        self.join = ThreadPoolExecutor(1, "join")

    def stop(self) -> None:
        """Drop what has not begun, and wait for the rest; planning ends first, because it feeds the others."""
        self.is_stopping = True
        for pool in (self.plan, self.decode, self.join):
            pool.shutdown(wait=True, cancel_futures=True)


def _mix(sources: Sequence[Source], weights: Sequence[float] | None, once: bool) -> Mix | InTurn:
    for name, source in zip(source_names(sources), sources, strict=True):
        if len(source) == 0:
            raise DataError(f"{name}: has no samples, expected at least one")
    lengths = [len(source) for source in sources]
    if once:
        if weights is not None:
            raise ConfigError("found weights for one pass, which takes every sample once; leave the weights out")
        return InTurn(lengths)
    if weights is not None and len(weights) != len(sources):
        raise ConfigError(f"found {len(weights)} weights for {len(sources)} sources, expected one weight per source")
    return Mix(lengths if weights is None else weights)
