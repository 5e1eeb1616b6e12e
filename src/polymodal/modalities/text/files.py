"""Tokenizer files of published checkpoints, in every layout that model hubs hold.

``tokenizer.json`` is taken as it is. Older layouts are translated: a SentencePiece model, ``vocab.json`` with
``merges.txt`` (byte-level BPE), ``vocab.txt`` (WordPiece). What the translation depends on beyond the files is the
``tokenizer_class``; an unknown one is an error, not a guess.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from polymodal.core.config import unknown
from polymodal.core.errors import CheckpointError
from polymodal.modalities.text.sentencepiece_file import backend_of, read_sentencepiece

CONFIG = "tokenizer_config.json"
_SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_NAMED = ("pad", "bos", "eos", "unk", "cls", "sep", "mask")
_CLASS_OF = {
    "llama": "Llama",
    "mistral": "Llama",
    "t5": "T5",
    "mt5": "T5",
    "gpt2": "GPT2",
    "opt": "GPT2",
    "qwen2": "Qwen2",
    "qwen3": "Qwen2",
    "clip": "CLIP",
    "siglip": "Siglip",
    "roberta": "Roberta",
    "bart": "Roberta",
    "bert": "Bert",
    "vilt": "Bert",
    "blip": "Bert",
    "flava": "Bert",
    "albef": "Bert",
}
"""The tokenizer class of a ``model_type``, for folders that do not name it."""
_SPLIT_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLIT_CLIP = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def read_backend(path: Path) -> tokenizers.Tokenizer:
    """The backend of a ``tokenizer.json``, or of a folder's tokenizer files.

    Raises:
        CheckpointError: if there are none, they are damaged, or their layout depends on an unknown class.
    """
    folder = path if path.is_dir() else path.parent
    config = json_object(folder / CONFIG)
    if not path.is_dir() and path.suffix == ".model":
        backend = _sentencepiece(path, config)
    elif not path.is_dir() or (path / "tokenizer.json").is_file():
        backend = _tokenizer_json(path if not path.is_dir() else path / "tokenizer.json")
    else:
        backend = _translated(path, config)
    _add_listed(backend, folder, config)
    _frame_as_told(backend, config)
    return backend


def read_names(path: Path, backend: tokenizers.Tokenizer) -> dict[str, str | None]:
    """What the folder calls its ``pad``, ``media``, ``bos`` and ``eos`` token, as far as the backend holds them."""
    folder = path if path.is_dir() else path.parent
    config = {**json_object(folder / "special_tokens_map.json"), **json_object(folder / CONFIG)}
    names = {role: _content(config.get(f"{role}_token")) for role in ("pad", "media", "bos", "eos")}
    # A tokenizer of our own says so by its tokens, wherever the file lies.
    for role, own in (("pad", "<|pad|>"), ("media", "<|media|>")):
        names[role] = names[role] or own
    return {role: name if name and backend.token_to_id(name) is not None else None for role, name in names.items()}


def json_object(path: Path) -> dict[str, Any]:
    """A JSON file of a checkpoint; empty if there is none.

    Raises:
        CheckpointError: if it is damaged or no object.
    """
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: is not readable JSON: {error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: found {type(data).__name__}, expected a JSON object")
    return data


def _content(token: Any) -> str | None:
    """The text of a token that a config writes as a string or as a mapping."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _tokenizer_json(path: Path) -> tokenizers.Tokenizer:
    try:
        text = path.read_text(encoding="utf-8")
        json.loads(text)
        return tokenizers.Tokenizer.from_str(text)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    except Exception as error:  # noqa: BLE001  (the backend raises bare Exception on a bad file)
        raise CheckpointError(f"{path}: is not a tokenizer.json: {error}") from None


def _translated(folder: Path, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    for name in _SENTENCEPIECE:
        if (folder / name).is_file():
            return _sentencepiece(folder / name, config)
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return _byte_level(folder, config)
    if (folder / "vocab.txt").is_file():
        return _word_pieces(folder / "vocab.txt", config)
    raise CheckpointError(
        f"{folder}: holds no tokenizer; expected tokenizer.json, {', '.join(_SENTENCEPIECE)}, vocab.json with "
        "merges.txt, or vocab.txt"
    )


def _kind(folder: Path, config: Mapping[str, Any], known: Mapping[str, Any]) -> str:
    """The tokenizer's class without the endings that do not matter here."""
    name = str(config.get("tokenizer_class") or "").removesuffix("Fast").removesuffix("Tokenizer")
    name = name or _CLASS_OF.get(str(json_object(folder / "config.json").get("model_type", "")), "")
    if name not in known:
        raise CheckpointError(
            f"{folder}: {unknown('tokenizer_class', name, known)}. Save the tokenizer as tokenizer.json, which needs "
            "no class"
        )
    return name


def _sentencepiece(path: Path, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    kind = _kind(path.parent, config, {"Llama": 0, "T5": 0, "Siglip": 0})
    backend = backend_of(read_sentencepiece(path), every_chunk=bool(config.get("legacy", kind == "T5")))
    if kind == "T5":
        # The sentinels of span corruption, highest number first (1910.10683 section 3.1.4).
        count = int(config.get("extra_ids", 100))
        sentinels = [f"<extra_id_{number}>" for number in reversed(range(count))]
        backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in sentinels])
        _frame(backend, None, "</s>")
    elif kind == "Siglip":
        _canonicalise(backend, lowercase=bool(config.get("do_lower_case", True)))
        _frame(backend, None, _content(config.get("eos_token")) or "</s>")
    else:
        _frame(backend, _content(config.get("bos_token")) or "<s>", None)
    return backend


def _canonicalise(backend: tokenizers.Tokenizer, *, lowercase: bool) -> None:
    """Drop ASCII punctuation and superfluous space before anything else (arXiv 2303.15343, section 3)."""
    steps: list[Any] = [normalizers.Lowercase()] if lowercase else []
    steps += [
        normalizers.Replace(Regex(r"[!-/:-@\[-`{-~]"), ""),
        normalizers.Replace(Regex(r"\s+"), " "),
        normalizers.Strip(left=True, right=True),
    ]
    backend.normalizer = normalizers.Sequence([*steps, *([backend.normalizer] if backend.normalizer else [])])


def _byte_level(folder: Path, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    builders: dict[str, Callable[[Any, Mapping[str, Any]], tokenizers.Tokenizer]] = {
        "GPT2": _gpt2,
        "Qwen2": _qwen2,
        "CLIP": _clip,
        "Roberta": _roberta,
        "Bart": _roberta,
    }
    kind = _kind(folder, config, builders)
    try:
        parts = models.BPE.read_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
        return builders[kind](parts, config)
    except Exception as error:  # noqa: BLE001  (the backend raises bare Exception on a bad file)
        raise CheckpointError(f"{folder}: vocab.json and merges.txt are not a vocabulary: {error}") from None


def _gpt2(parts: Any, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE(*parts))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(config.get("add_prefix_space", False)))
    backend.decoder = decoders.ByteLevel()
    return backend


def _roberta(parts: Any, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    backend = _gpt2(parts, config)
    _frame(backend, _content(config.get("bos_token")) or "<s>", _content(config.get("eos_token")) or "</s>")
    return backend


def _qwen2(parts: Any, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE(*parts))
    backend.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(_SPLIT_QWEN2), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _clip(parts: Any, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    unk = _content(config.get("unk_token")) or "<|endoftext|>"
    backend = tokenizers.Tokenizer(models.BPE(*parts, end_of_word_suffix="</w>", unk_token=unk))
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    split = pre_tokenizers.Split(Regex(_SPLIT_CLIP), "removed", invert=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.ByteLevel()
    start = _content(config.get("bos_token")) or "<|startoftext|>"
    _frame(backend, start, _content(config.get("eos_token")) or "<|endoftext|>")
    return backend


def _word_pieces(path: Path, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    vocabulary = {line: place for place, line in enumerate(lines)}
    unk = _content(config.get("unk_token")) or "[UNK]"
    if unk not in vocabulary:
        raise CheckpointError(f"{path}: has no {unk}; expected a WordPiece vocabulary, one token a line")
    backend = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token=unk))
    backend.normalizer = normalizers.BertNormalizer(
        handle_chinese_chars=bool(config.get("tokenize_chinese_chars", True)),
        strip_accents=config.get("strip_accents"),
        lowercase=bool(config.get("do_lower_case", True)),
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece("##")
    _frame(backend, _content(config.get("cls_token")) or "[CLS]", _content(config.get("sep_token")) or "[SEP]")
    present = [name for name in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if name in vocabulary]
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in present])
    return backend


def _frame(backend: tokenizers.Tokenizer, first: str | None, last: str | None) -> None:
    """Put tokens before and behind every text."""
    held = [(name, backend.token_to_id(name)) for name in (first, last) if name is not None]
    absent = [name for name, id in held if id is None]
    if absent:
        raise CheckpointError(f"the tokenizer puts {absent[0]!r} around texts, which its vocabulary does not hold")
    single = " ".join(name for name in (first, "$A", last) if name is not None)
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=held)


def _frame_as_told(backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
    """Follow ``add_bos_token`` and ``add_eos_token`` where a config has them, whatever the file's template does."""
    told = [key for key in ("add_bos_token", "add_eos_token") if isinstance(config.get(key), bool)]
    if not told:
        return
    names = {role: _content(config.get(f"{role}_token")) for role in ("bos", "eos")}
    framed = backend.encode("a", add_special_tokens=True)
    own = [place for place, is_special in enumerate(framed.special_tokens_mask) if not is_special]
    bounds = (own[0], own[-1] + 1) if own else (0, len(framed.ids))
    parts = [framed.tokens[: bounds[0]], framed.tokens[bounds[1] :]]
    wanted = [list(part) for part in parts]
    for place, role in enumerate(("bos", "eos")):
        if f"add_{role}_token" in told:
            name = names[role]
            wanted[place] = [name] if config[f"add_{role}_token"] and name is not None else []
    if wanted != parts:
        _frame(backend, *(part[0] if part else None for part in wanted))


def _add_listed(backend: tokenizers.Tokenizer, folder: Path, config: Mapping[str, Any]) -> None:
    """Take in the tokens that stand in ``added_tokens_decoder`` or ``added_tokens.json`` with ids of their own.

    Raises:
        CheckpointError: if one would get another id than the folder says.
    """
    for id, token, is_special in sorted(_listed(folder, config), key=lambda entry: entry[0]):
        held = backend.token_to_id(token.content)
        (backend.add_special_tokens if is_special else backend.add_tokens)([token])
        found = backend.token_to_id(token.content)
        if held is None and found != id:
            raise CheckpointError(f"{folder}: {token.content!r} got the id {found}, the folder says {id}")
    named = {**json_object(folder / "special_tokens_map.json"), **config}
    names = [name for role in _NAMED if (name := _content(named.get(f"{role}_token"))) is not None]
    # Names of control tokens that the vocabulary holds become special; what it does not hold is not added.
    present = [
        AddedToken(name, special=True, normalized=False) for name in names if backend.token_to_id(name) is not None
    ]
    added = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    backend.add_special_tokens([token for token in present if token.content not in added])


def _listed(folder: Path, config: Mapping[str, Any]) -> Iterator[tuple[int, AddedToken, bool]]:
    described = config.get("added_tokens_decoder")
    described = described if isinstance(described, dict) else {}
    for id, entry in described.items():
        text = _content(entry)
        if text is not None and str(id).isdigit():
            flags = {key: bool(entry.get(key, False)) for key in ("lstrip", "rstrip", "single_word", "normalized")}
            is_special = bool(entry.get("special", False))
            yield int(id), AddedToken(text, special=is_special, **flags), is_special
    known = {_content(entry) for entry in described.values()}
    for text, id in json_object(folder / "added_tokens.json").items():
        if text not in known and isinstance(id, int):
            yield id, AddedToken(text, special=True, normalized=False), True
