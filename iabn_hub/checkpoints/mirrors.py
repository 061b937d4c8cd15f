"""Mirrors: folders with checkpoints under the names of a cache, and an index of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .errors import CheckpointError
from .verify import md5_of

INDEX = "index.json"


def verify_mirror(folder: Path) -> list[dict[str, Any]]:
    """Read every file that the index lists; a row for each, as 'iabn-hub verify' prints them.

    Raises:
        CheckpointError: the folder has no index that can be read.
    """
    try:
        listed = json.loads((folder / INDEX).read_text())["checkpoints"]
        expected = [(str(row["name"]), str(row["file"]), str(row["md5"])) for row in listed]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise CheckpointError(
            f"{folder / INDEX}: is not the index of a mirror ({type(e).__name__}): tools/make_mirror.py writes it"
        ) from e
    rows = []
    for name, file, md5 in expected:
        path = folder / Path(file).name  # an index names nothing outside its folder
        found = md5_of(path) if path.is_file() else None
        status = "missing" if found is None else "ok" if found == md5 else "wrong"
        rows.append({"name": name, "status": status, "path": str(path), "expected_md5": md5, "md5": found})
    return rows
