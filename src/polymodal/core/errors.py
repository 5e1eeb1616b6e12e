"""Every error that Polymodal raises on purpose.

::

    PolymodalError (ValueError)
    +-- ConfigError            a recipe or an override is wrong
    +-- MediaError             one media item cannot be used; names the item
    |   +-- CorruptMediaError      truncated, damaged, empty or not what it claims to be
    |   +-- UnsupportedMediaError  a format, layout or source type that no reader takes
    |   +-- LimitError             larger than the limits in ``core.limits`` allow
    +-- SampleError            a sample is malformed or cannot be laid out; names the sample
    |   +-- TooLongError           longer than the model takes
    |   +-- NoTargetsError         without a token to learn from
    +-- DataError              a data source is missing or unreadable as a whole
    +-- CheckpointError        a run folder or weight file is missing, damaged or does not match
    +-- CheckFailed            a proof of ``polymodal check`` does not hold
    MissingExtraError (ImportError)  an optional dependency is absent; says what to install

A message says what was found, what was expected and what to do.
"""


class PolymodalError(ValueError):
    """Base of every error that a user's input can cause."""


class ConfigError(PolymodalError):
    """A recipe, a key or an override is wrong."""


class MediaError(PolymodalError):
    """One media item cannot be used.

    Args:
        item: what the user calls the item: a path, or ``bytes`` / ``array`` for in-memory input.
        problem: what was found, what was expected, what to do.
    """

    def __init__(self, item: str, problem: str) -> None:
        super().__init__(f"{item}: {problem}")
        self.item = item
        self.problem = problem

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        """Keep both arguments when a worker process sends the error back."""
        return type(self), (self.item, self.problem)


class CorruptMediaError(MediaError):
    """Truncated, damaged, empty, or not what it claims to be."""


class UnsupportedMediaError(MediaError):
    """A format, layout or source type that no reader takes."""


class LimitError(MediaError):
    """The item is larger than the stated limits allow."""


class SampleError(PolymodalError):
    """A sample is malformed or cannot be laid out.

    Args:
        sample: the sample's id.
        problem: what was found, what was expected, what to do.
    """

    def __init__(self, sample: str, problem: str) -> None:
        super().__init__(f"sample {sample}: {problem}")
        self.sample = sample
        self.problem = problem

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        """Keep both arguments when a worker process sends the error back."""
        return type(self), (self.sample, self.problem)


class TooLongError(SampleError):
    """A sample is longer than the model takes, and cutting it would cut what must stay whole."""


class NoTargetsError(SampleError):
    """No token of a sample is a target: nothing can be learned from it."""


class DataError(PolymodalError):
    """A data source is missing or unreadable as a whole."""


class CheckpointError(PolymodalError):
    """A run folder or weight file is missing, damaged or does not match the recipe."""


class CheckFailed(PolymodalError):
    """A proof of ``polymodal check`` does not hold."""


class MissingExtraError(ImportError):
    """An optional dependency is absent.

    Args:
        package: the import name that was not found.
        extra: the extra of ``polymodal`` that brings it.
        purpose: what it is needed for.
    """

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package '{package}', which is not installed; "
            f"install it with: pip install 'polymodal[{extra}]'"
        )
        self.extra = extra
