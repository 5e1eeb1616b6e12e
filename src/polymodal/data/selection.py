"""A part of a source, or another view of it: the samples whose media a model can take, conversations as view sets."""

from __future__ import annotations

from collections.abc import Iterable

from polymodal.core.config import unknown
from polymodal.core.errors import DataError, SampleError
from polymodal.core.parts import MODALITIES, Text
from polymodal.core.samples import Sample
from polymodal.data.sources import JsonlSource


class ModalitySource:
    """The samples of a source all of whose media are of the given modalities, in their order; text always may be there.

    Every sample is looked at once, when the source is opened. Malformed ones stay in, so that the loader names and
    counts them.

    Args:
        source: the whole source.
        modalities: the media modalities that may be there; empty: samples of text alone.

    Raises:
        DataError: if a modality is unknown, or no sample is left.
    """

    def __init__(self, source: JsonlSource, modalities: Iterable[str]) -> None:
        self._source = source
        self._allowed = frozenset(modalities)
        for name in sorted(self._allowed):
            if name not in MODALITIES:
                raise DataError(f"{source.name}: {unknown('modality', name, MODALITIES)}")
        self._indices = [index for index in range(len(source)) if self._is_in(index)]
        if not self._indices:
            raise DataError(
                f"{source.name}: none of its {len(source):,} samples has media of {sorted(self._allowed)} alone; "
                "name other modalities, or leave 'modalities' out to take all"
            )

    def _is_in(self, index: int) -> bool:
        try:
            return {part.modality for part in self._source[index].media()} <= self._allowed
        except SampleError:
            return True

    @property
    def name(self) -> str:
        """What records call this source."""
        return self._source.name

    @property
    def fingerprint(self) -> str:
        """Changes whenever the samples, their order or the selection change."""
        return f"{self._source.fingerprint}:{','.join(sorted(self._allowed))}"

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Sample:
        return self._source[self._indices[index]]


class DescribedSource:
    """The conversations of a source as view sets: the one medium, and what the assistant says of it.

    So one file of pictures and their names or captions serves decoders and joint encoders alike. The answer is the
    label as well: media of which the same is said belong to each other's texts. View sets stay as they are.

    Args:
        source: the whole source.
    """

    def __init__(self, source: JsonlSource | ModalitySource) -> None:
        self._source = source

    @property
    def name(self) -> str:
        """What records call this source."""
        return self._source.name

    @property
    def fingerprint(self) -> str:
        """Changes whenever the samples or their order change."""
        return f"{self._source.fingerprint}:described"

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Sample:
        """One view set.

        Raises:
            SampleError: if the sample is malformed, or a conversation of another form.
        """
        return described(self._source[index])


def described(sample: Sample) -> Sample:
    """The view set of a conversation of one question about one medium and its answer; a view set as it is.

    Raises:
        SampleError: if the conversation holds other than one medium, or more than one exchange.
    """
    if sample.views:
        return sample
    media, roles = sample.media(), [message.role for message in sample.messages]
    if len(media) != 1 or roles != ["user", "assistant"] or not sample.messages[1].text.strip():
        raise SampleError(
            sample.id,
            f"found the turns {roles} and {len(media)} media, expected a question about one medium and its answer, "
            "which are read as a view set",
        )
    answer = sample.messages[1].text
    views = {media[0].modality: media[0], "text": Text(answer)}
    return Sample(sample.id, views=views, label=sample.label or answer, meta=sample.meta, tokens=sample.tokens)
