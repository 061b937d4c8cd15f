"""What a figure was measured on: a digest of the files of a split, which anyone can compute again."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..files import sha256_of

THREADS = 8


def digest_of(samples: Any, root: str) -> dict[str, Any] | None:
    """`files`, `bytes` and `sha256` of the files of `Samples`; None where they are not files of their own.

    `sha256` is that of the lines 'SHA-256  PATH' that sha256sum prints for them, in the order of the paths, which are
    relative to `root`.
    """
    files = samples.files() if hasattr(samples, "files") else None
    if files is None:
        return None
    paths = sorted((os.path.relpath(file, root).replace(os.sep, "/"), Path(file)) for file in files)
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(lambda each: _digest(each[1]), paths))
    lines = "".join(f"{digest}  {name}\n" for (name, _), (_, digest) in zip(paths, found))
    whole = hashlib.sha256(lines.encode(errors="surrogateescape")).hexdigest()
    return {"files": len(paths), "bytes": sum(size for size, _ in found), "sha256": whole}


def _digest(path: Path) -> tuple[int, str]:
    try:
        return path.stat().st_size, sha256_of(path)
    except OSError:  # such as a link to nothing, which validation skips
        return 0, "unreadable"
