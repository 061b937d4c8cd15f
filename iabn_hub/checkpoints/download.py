"""One file over HTTP: resumed, retried, and with the pages of Google Drive distinguished from files."""

from __future__ import annotations

import html.parser
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urljoin

import requests
from tqdm import tqdm

from .errors import DownloadError
from .retries import ATTEMPTS, TEMPORARY_STATUS, with_retries

TIMEOUT = (10, 60)  # seconds to connect, and between two chunks
LONGEST_PAGE = 1 << 20  # bytes of an HTML answer that are looked at
CHUNK = 1 << 16  # bytes; what a broken connection loses at most


class _TemporaryError(Exception):
    """Another attempt may succeed; `after` is the server's Retry-After in seconds, if it gave one."""

    def __init__(self, message: str, after: float | None = None) -> None:
        super().__init__(message)
        self.after = after


class _Page(html.parser.HTMLParser):
    """What an HTML answer is: its title, Google Drive's error text, and the form behind 'Download anyway'."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.action = ""
        self.fields: dict[str, str] = {}
        self.error = self.title = self._reading = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if tag == "form" and values.get("id") == "download-form":
            self.action = values.get("action", "")
        elif tag == "input" and self.action and values.get("type") == "hidden":
            self.fields[values.get("name", "")] = values.get("value", "")
        elif tag == "title":
            self._reading = "title"
        elif values.get("class") == "uc-error-subcaption":
            self._reading = "error"

    def handle_data(self, data: str) -> None:
        if self._reading:
            setattr(self, self._reading, getattr(self, self._reading) + data.strip())

    def handle_endtag(self, tag: str) -> None:
        self._reading = ""


def open_session() -> requests.Session:
    return requests.Session()


def download(url: str, part: Path, bar: tqdm[Any]) -> None:
    """Write the whole of `url` to `part`, continuing what an earlier attempt left there.

    Args:
        part: appended to if the server can continue, else written anew; kept when this fails, for a later resume.
        bar: set to the total size and moved by each byte.

    Raises:
        DownloadError: the server refused, sent a page instead of a file, or kept failing.
        OSError: `part` cannot be written.
    """

    def report(error: BaseException, pause: float) -> None:
        bar.write(f"{_reason(error)}; next attempt in {pause:.1f} s", file=sys.stderr)

    with open_session() as session:
        try:
            with_retries(lambda: _attempt(session, url, part, bar), _is_temporary, _retry_after, report)
        except (_TemporaryError, requests.RequestException, ValueError) as e:  # ValueError: not a URL
            tried = f" (tried {ATTEMPTS} times)" if _is_temporary(e) else ""
            raise DownloadError(_reason(e) + tried) from e


def _is_temporary(error: BaseException) -> bool:
    # Failures of the connection may pass; those of the request itself will not.
    return isinstance(
        error,
        _TemporaryError | requests.ConnectionError | requests.Timeout
        | requests.exceptions.ChunkedEncodingError | requests.exceptions.ContentDecodingError,
    )  # fmt: skip


def _retry_after(error: BaseException) -> float | None:
    return error.after if isinstance(error, _TemporaryError) else None


def _reason(e: BaseException) -> str:
    if isinstance(e, requests.Timeout):
        return "the server did not answer in time"
    if isinstance(e, requests.exceptions.ChunkedEncodingError):
        return "the connection broke off"
    if isinstance(e, requests.ConnectionError):
        return "the server cannot be reached"
    return str(e)


def _attempt(session: requests.Session, url: str, part: Path, bar: tqdm[Any]) -> None:
    have = part.stat().st_size if part.exists() else 0
    with _request(session, url, have) as response:
        if response.status_code == 416:  # what is there is longer than the file: not a part of it
            part.unlink(missing_ok=True)
            raise _TemporaryError("the server could not continue the download")
        continues = response.status_code == 206 and _range_start(response) == have
        if response.status_code == 206 and not continues:
            part.unlink(missing_ok=True)
            raise _TemporaryError("the server continued the download at the wrong place")
        start = have if continues else 0
        length = _whole_number(response.headers.get("Content-Length", ""))
        total = None if length is None else start + length
        bar.reset(total)
        bar.update(start)
        received = start
        with part.open("ab" if continues else "wb") as out:
            for chunk in response.iter_content(CHUNK):
                out.write(chunk)
                received += len(chunk)
                bar.update(len(chunk))
    if total is not None and received != total:
        raise _TemporaryError(f"the connection ended after {received:,} of {total:,} bytes")


def _range_start(response: requests.Response) -> int | None:
    start = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("-")[0]
    return _whole_number(start)


def _whole_number(text: str) -> int | None:
    """The number that a header holds, or None for anything else that a server may send."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None


def _request(session: requests.Session, url: str, have: int) -> requests.Response:
    """GET from byte `have` on, through Drive's confirm page if it shows one."""
    # Compressed transfer would make byte positions meaningless.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    for _ in range(3):
        response = session.get(url, headers=headers, stream=True, timeout=TIMEOUT)
        if response.status_code in TEMPORARY_STATUS:
            raise _TemporaryError(
                f"HTTP {response.status_code}", _whole_number(response.headers.get("Retry-After", ""))
            )
        if response.status_code == 416:
            return response
        is_page = response.headers.get("Content-Type", "").startswith("text/html")
        if response.status_code >= 400 and not is_page:
            raise DownloadError(f"HTTP {response.status_code} {response.reason}")
        if not is_page:
            return response
        page = _Page(next(response.iter_content(LONGEST_PAGE), b"").decode(errors="replace"))
        if not page.action:
            what = page.error or page.title or "no title"
            raise DownloadError(f"HTTP {response.status_code} with a page instead of the file: {what}")
        url = urljoin(url, page.action) + "?" + urlencode(page.fields)
    raise DownloadError("the confirm page leads to itself")
