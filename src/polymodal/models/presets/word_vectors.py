"""Skip-gram word vectors as the embedding table of a text stream.

Vectors are published as bare files, without a config: :func:`word_vector_folder` makes the checkpoint folder that
everything else reads (``pm.load``, ``from:`` in recipes).
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from polymodal.core.errors import CheckpointError, ConfigError
from polymodal.models.compose.config import ModelConfig
from polymodal.models.encoders.embedding import EmbeddingConfig
from polymodal.models.presets.architecture import Architecture, Size, Vocabulary
from polymodal.models.weights import HubConfigs, NameTable, Rule

_UNKNOWN = "<unk>"
_TABLE = "vectors"
_MAX_TOKENS = 512


def read_word_vectors(
    path: str | os.PathLike[str], words: str | os.PathLike[str] | None = None
) -> tuple[list[str], NDArray[np.float32]]:
    """Words and their vectors ``[V, D]``.

    Args:
        path: a word2vec file, text (``.txt``, ``.vec``; the first line with both counts may be missing, as in GloVe's)
            or binary (``.bin``), or an ``.npy`` matrix.
        words: for ``.npy``: a text file with one word a line.

    Raises:
        CheckpointError: if it is damaged, or words and vectors do not agree.

    Source: the formats of the word2vec program (Mikolov 1310.4546 and its code).
    """
    path = Path(path)
    try:
        if path.suffix == ".npy":
            found = _read_npy(path, words)
        elif path.suffix == ".bin":
            with path.open("rb") as file:
                found = _read_binary(file)
        else:
            found = _read_text(path)
    except (OSError, ValueError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read as word vectors: {error}") from None
    if not found[0] or len(set(found[0])) != len(found[0]):
        raise CheckpointError(f"{path}: found {len(found[0])} words, expected at least one, each once")
    if not np.isfinite(found[1]).all():
        raise CheckpointError(f"{path}: holds vectors with values that are not finite")
    return found


def _read_npy(path: Path, words: str | os.PathLike[str] | None) -> tuple[list[str], NDArray[np.float32]]:
    if words is None:
        raise ValueError("an .npy file holds no words; give the file that has one a line")
    vectors = np.load(path, allow_pickle=False)
    lines = Path(words).read_text(encoding="utf-8").splitlines()
    if vectors.ndim != 2 or len(lines) != len(vectors):
        raise ValueError(f"found vectors of shape {vectors.shape} for {len(lines)} words, expected one row for each")
    return lines, vectors.astype(np.float32)


def _read_text(path: Path) -> tuple[list[str], NDArray[np.float32]]:
    words: list[str] = []
    rows: list[NDArray[np.float32]] = []
    stated = None
    with path.open(encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(file):
            pieces = line.rstrip().split(" ")
            if number == 0 and len(pieces) == 2:
                stated = int(pieces[0])
                continue
            words.append(pieces[0])
            rows.append(np.array(pieces[1:], dtype=np.float32))
            if len(rows[-1]) != len(rows[0]):
                raise ValueError(f"line {number + 1} holds {len(rows[-1])} numbers, the first {len(rows[0])}")
    if stated is not None and stated != len(words):
        raise ValueError(f"found {len(words)} words, the first line states {stated}")
    return words, np.stack(rows) if rows else np.zeros((0, 0), np.float32)


def _read_binary(file: BinaryIO) -> tuple[list[str], NDArray[np.float32]]:
    count, width = (int(number) for number in file.readline().split())
    size = os.fstat(file.fileno()).st_size
    if count < 1 or width < 1 or count * width * 4 > size:
        raise ValueError(f"{size:,} bytes cannot hold {count} vectors of width {width}")
    words, vectors = [], np.empty((count, width), np.float32)
    for row in range(count):
        words.append(b"".join(_until_space(file)).lstrip(b"\n").decode("utf-8"))
        data = file.read(4 * width)
        if len(data) < 4 * width:
            raise ValueError(f"it ends within vector {row + 1} of {count}")
        vectors[row] = np.frombuffer(data, "<f4")
    return words, vectors


def _until_space(file: BinaryIO) -> Iterator[bytes]:
    while (byte := file.read(1)) != b" ":
        if not byte:
            raise ValueError("it ends within a word")
        yield byte


def word_vector_folder(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    words: str | os.PathLike[str] | None = None,
    lowercase: bool = False,
) -> Path:
    """Write the checkpoint folder of word vectors.

    A text is split into words and marks; a word without a vector of its own gets ``<unk>``, whose vector is zero unless
    the file has one, so that it does not turn the mean of a text.

    Args:
        path: see :func:`read_word_vectors`.
        out: a new or empty folder.
        words: see :func:`read_word_vectors`.
        lowercase: whether texts are lowercased first, for vectors of lowercased words.

    Raises:
        CheckpointError: if the file is damaged, or ``out`` is not empty.
    """
    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise CheckpointError(f"{out}: is not empty; choose a new folder")
    found, vectors = read_word_vectors(path, words)
    if _UNKNOWN not in found:
        found = [*found, _UNKNOWN]
        vectors = np.concatenate([vectors, np.zeros((1, vectors.shape[1]), np.float32)])
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(found)}, unk_token=_UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if lowercase:
        tokenizer.normalizer = normalizers.Lowercase()
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "config.json").write_text(json.dumps(_config(*vectors.shape), indent=2) + "\n", encoding="utf-8")
    save_file({_TABLE: torch.from_numpy(vectors)}, out / "model.safetensors", metadata={"format": "pt"})
    return out


def _config(rows: int, width: int) -> dict[str, Any]:
    return {"model_type": "word_vectors", "vocab_size": rows, "hidden_size": width}


def to_model(configs: HubConfigs) -> dict[str, Any]:
    """A text stream whose features are the words' vectors, pooled by their mean."""
    config = configs.config
    encoder = {
        "use": "embedding",
        "vocab_size": config["vocab_size"],
        "width": config["hidden_size"],
        "max_tokens": _MAX_TOKENS,
        "positions": False,
    }
    reader: dict[str, Any] = {"use": "text", "max_tokens": _MAX_TOKENS}
    if configs.folder is not None:
        reader["tokenizer"] = str(configs.folder)
    return {
        "streams": {"text": {"modality": "text", "encoder": encoder, "reader": reader}},
        "backbone": "none",
        "heads": {},
        "tokenizer": {} if configs.folder else {"vocab_size": config["vocab_size"], "rows": config["vocab_size"]},
    }


def names(model: ModelConfig, stored: Collection[str]) -> NameTable:
    """The one table."""
    return NameTable([Rule("streams.text.encoder.token_embed.weight", _TABLE)])


def to_hub(model: ModelConfig, vocabulary: Vocabulary) -> dict[str, dict[str, Any]]:
    """``config.json`` of our own folder layout; no other library has one."""
    encoder = model.streams["text"].encoder if set(model.streams) == {"text"} else None
    if not isinstance(encoder, EmbeddingConfig) or model.heads:
        raise ConfigError("word_vectors: found a model of other parts, expected one text stream with 'embedding'")
    return {"config.json": _config(encoder.vocab_size, encoder.width)}


WORD_VECTORS = Architecture(
    "word_vectors",
    ("word_vectors",),
    "Skip-gram, arXiv 1310.4546, section 2",
    to_model=to_model,
    names=names,
    to_hub=to_hub,
    sizes={"word2vec-google-news-300": Size(_config(3_000_000, 300), 900_000_000)},
)
"""See the module."""
