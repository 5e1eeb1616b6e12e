"""Reading the one JSON file that an annotation set is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from polymodal.core.errors import DataError


def read_json(path: Path) -> Any:
    """The parsed file.

    Raises:
        DataError: if it is missing or not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        hint = "; found several values, one a line? Expected one JSON value" if "Extra data" in str(error) else ""
        raise DataError(f"{path}: is not valid JSON ({str(error)[:120]}){hint}") from None


def objects(data: Any, key: str, path: Path) -> list[dict[str, Any]]:
    """The list of objects under ``key`` of a mapping.

    Raises:
        DataError: if it is not there.
    """
    found = data.get(key) if isinstance(data, dict) else None
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        keys = sorted(data)[:10] if isinstance(data, dict) else type(data).__name__
        raise DataError(f"{path}: expected a list of objects under {key!r}; found {keys}")
    return found
