"""One file over HTTP: resumed, retried, limited in bytes and time, with Google Drive's pages told from files."""

from __future__ import annotations

import functools
import hashlib
import html.parser
import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlencode, urljoin

import requests
import urllib3
from tqdm import tqdm

from ..files import write_atomically
from .errors import DownloadError
from .retries import ATTEMPTS, TEMPORARY_STATUS, with_retries

T = TypeVar("T")
TIMEOUT = (10, 60)  # seconds to connect, and between two chunks
HEADER_SECONDS = 60.0  # for the whole head of an answer
SLOWEST = 1024  # bytes a second, over PACE_SECONDS; a server that sends less is given up
PACE_SECONDS = 20.0
LONGEST = 24 * 3600.0  # seconds for one attempt
MOST_REDIRECTS = 10
REDIRECTS = {301, 302, 303, 307, 308}
LONGEST_TITLE = 200  # characters of a page's title or error that a message shows
LONGEST_PAGE = 1 << 16  # bytes of an HTML answer that are looked at
CHUNK = 1 << 16  # bytes; what a broken connection loses at most
MOST_EXPANSION = 20  # bytes of the file for each byte of a compressed transfer; weights hardly shrink


class _TemporaryError(Exception):
    """Another attempt may succeed; `after` is the server's Retry-After in seconds, if it gave one."""

    def __init__(self, message: str, after: float | None = None) -> None:
        super().__init__(message)
        self.after = after


class _StalledError(_TemporaryError):
    """A call that waits for the server was left behind in its thread."""


class _Page(html.parser.HTMLParser):
    """What an HTML answer is: its title, Google Drive's error text, and the form behind 'Download anyway'."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.action = ""
        self.fields: dict[str, str] = {}
        self.error = self.title = self._reading = ""
        try:
            self.feed(text)
        except (AssertionError, ValueError):  # how the parser refuses a declaration such as <![foo[
            self.error = self.error or "it is not HTML"

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
            setattr(self, self._reading, getattr(self, self._reading) + " ".join(data.split()))

    def handle_endtag(self, tag: str) -> None:
        self._reading = ""


class _Session(requests.Session):
    """A session that follows no redirects: requests reads the whole body of each, even with allow_redirects=False."""

    def get_redirect_target(self, resp: requests.Response) -> None:
        return None


def open_session() -> requests.Session:
    return _Session()


def download(url: str, part: Path, bar: tqdm[Any], limit: int, size: int | None = None) -> None:
    """Write the whole of `url` to `part`, continuing what an earlier attempt left there.

    Args:
        url: its user and password, if any, are sent to its own host alone.
        part: appended to if the server can continue, else written anew; kept when this fails, for a later resume. A
            file `<part>.source` beside it notes the version of the file on the server.
        bar: set to the total size and moved by each byte.
        limit: the most bytes to accept.
        size: of the file in bytes, where it is known.

    Raises:
        DownloadError: the server refused, sent a page or something else instead of the file, or kept failing.
        OSError: `part` cannot be written.
    """

    def report(error: BaseException, pause: float) -> None:
        if pause:
            bar.write(f"{_reason(error)}; next attempt in {pause:.1f} s", file=sys.stderr)

    plain, userinfo = _split(url)
    file = _File(plain, userinfo, part, size or limit, size)
    with open_session() as session:
        try:
            with_retries(lambda: file.attempt(session, bar), _is_temporary, _retry_after, report)
        except (_TemporaryError, requests.RequestException, urllib3.exceptions.HTTPError, ValueError) as e:
            tried = f" (tried {ATTEMPTS} times)" if _is_temporary(e) else ""
            raise DownloadError(_reason(e) + tried) from e  # ValueError: not a URL


def _split(url: str) -> tuple[str, tuple[bytes, bytes] | None]:
    """A URL without its user and password, and these: other libraries show URLs in their messages."""
    match = re.match(r"(\w+://)([^/?#]*)@", url)
    if not match:
        return url, None
    user, _, password = match[2].partition(":")
    return match[1] + url[match.end() :], (unquote(user).encode(), unquote(password).encode())


def _is_temporary(error: BaseException) -> bool:
    # Failures of the connection may pass; those of the request itself will not.
    return isinstance(
        error,
        _TemporaryError | requests.ConnectionError | requests.Timeout | urllib3.exceptions.HTTPError
        | requests.exceptions.ChunkedEncodingError | requests.exceptions.ContentDecodingError,
    )  # fmt: skip


def _retry_after(error: BaseException) -> float | None:
    return error.after if isinstance(error, _TemporaryError) else None


def _reason(e: BaseException) -> str:
    if isinstance(e, requests.Timeout | urllib3.exceptions.TimeoutError):
        return "the server did not answer in time"
    if isinstance(e, requests.exceptions.ContentDecodingError | urllib3.exceptions.DecodeError):
        return "the compressed transfer is damaged"
    if isinstance(e, requests.exceptions.ChunkedEncodingError | urllib3.exceptions.HTTPError):
        return "the connection broke off"
    if isinstance(e, requests.ConnectionError):
        return "the server cannot be reached"
    return str(e)


class _File:
    """One file of a server and the part of it that is here."""

    def __init__(
        self, url: str, userinfo: tuple[bytes, bytes] | None, part: Path, limit: int, size: int | None
    ) -> None:
        self.url, self.userinfo, self.part, self.limit, self.size = url, userinfo, part, limit, size
        self.note = note_of(part)
        self.source = hashlib.sha256(url.encode()).hexdigest()

    def attempt(self, session: requests.Session, bar: tqdm[Any]) -> None:
        """Receive what is missing."""
        have = self.part.stat().st_size if self.part.exists() else 0
        version = self._noted_version() if have else ""
        response = self._request(session, have, version)
        try:
            self._answer(response, have, version, bar)
        except _StalledError:
            raise  # closing would wait for the read that is still going on
        except BaseException:
            response.close()
            raise
        response.close()
        self.note.unlink(missing_ok=True)

    def _answer(self, response: requests.Response, have: int, version: str, bar: tqdm[Any]) -> None:
        """Write what the server answers behind what is here, or anew."""
        encoded = response.headers.get("Content-Encoding", "identity").lower() != "identity"
        start = self._start(response, have, version, encoded)
        length = None if encoded else _whole_number(response.headers.get("Content-Length", ""))
        total = None if length is None else start + length
        if total is not None and (total > self.limit or (self.size and total != self.size)):
            raise DownloadError(f"the server sends {total:,} bytes, {self._expected()}")
        bar.reset(total)
        bar.update(start)
        if not start:
            self._note_version(_version(response))
        try:
            received = self._receive(response, start, bar, encoded)
        except BaseException:
            if encoded:  # no position in it can be asked for
                self.forget()
            raise
        if total is not None and received != total:
            raise _TemporaryError(f"the connection ended after {received:,} of {total:,} bytes")

    def _receive(self, response: requests.Response, start: int, bar: tqdm[Any], encoded: bool) -> int:
        """Write the body behind the first `start` bytes; returns the bytes that are there then."""
        raw: Any = response.raw
        read = functools.partial(raw.read1, CHUNK, decode_content=True)
        if encoded or "chunked" in response.headers.get("Transfer-Encoding", "").lower():
            # Such a read may take any number of bytes of the server without giving one.
            read = functools.partial(_within, 2 * PACE_SECONDS, read)
        received = paced = start
        began = pace_began = time.monotonic()
        with self.part.open("ab" if start else "wb") as out:
            while chunk := read():
                received += len(chunk)
                if received > self.limit:
                    out.close()
                    self.forget()
                    raise DownloadError(f"the server sends more than {self.limit:,} bytes, {self._expected()}")
                if encoded and received > (1 << 20) and received > MOST_EXPANSION * raw.tell():
                    raise DownloadError(f"its compressed transfer grows more than {MOST_EXPANSION} times")
                out.write(chunk)
                bar.update(len(chunk))
                now = time.monotonic()
                if now - began > LONGEST:
                    raise DownloadError(f"it takes longer than {LONGEST / 3600:.0f} hours")
                if now - pace_began > PACE_SECONDS:
                    if received - paced < SLOWEST * PACE_SECONDS:
                        raise _TemporaryError(f"the server sends less than {SLOWEST:,} bytes a second")
                    paced, pace_began = received, now
        return received

    def _expected(self) -> str:
        return f"the file has {self.size:,}" if self.size else f"and {self.limit:,} are accepted"

    def _start(self, response: requests.Response, have: int, version: str, encoded: bool) -> int:
        """The position where the body of this answer begins: `have`, or 0.

        Raises:
            _TemporaryError: the server continues at another place, or another version of the file: start again.
        """
        if response.status_code == 416:  # what is there is longer than the file: not a part of it
            raise self._again("the server could not continue the download")
        if response.status_code != 206:
            return 0
        place = re.fullmatch(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)", response.headers.get("Content-Range", ""))
        if not place or int(place[1]) != have or encoded:
            raise self._again("the server continued the download at the wrong place")
        if version and _version(response) not in ("", version):
            raise self._again("the file has changed on the server")
        if place[3] != "*" and self.size and int(place[3]) != self.size:
            raise DownloadError(f"the server's file has {int(place[3]):,} bytes, {self._expected()}")
        return have

    def _again(self, why: str) -> _TemporaryError:
        self.forget()
        return _TemporaryError(why, after=0.0)

    def forget(self) -> None:
        """Remove what is here of the file."""
        self.part.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)

    def _noted_version(self) -> str:
        """The version of the file that the part here is of; '' if it is of another source, or not known."""
        try:
            source, _, version = self.note.read_text(encoding="utf-8").partition(" ")
        except (OSError, ValueError):
            return ""
        return version if source == self.source else ""

    def _note_version(self, version: str) -> None:
        if version:
            write_atomically(self.note, f"{self.source} {version}".encode())
        else:
            self.note.unlink(missing_ok=True)

    def _request(self, session: requests.Session, have: int, version: str) -> requests.Response:
        """GET from byte `have` on, through Drive's confirm page if it shows one."""
        headers = {"Accept-Encoding": "identity"}  # compressed transfer would make byte positions meaningless
        if have:
            headers["Range"] = f"bytes={have}-"
            if version and not version.startswith("W/"):
                headers["If-Range"] = version
        url, host = self.url, _host(self.url)
        for _ in range(MOST_REDIRECTS):
            userinfo: Any = self.userinfo if _host(url) == host else None
            response = _within(HEADER_SECONDS, functools.partial(_get, session, url, headers, userinfo))
            if response.status_code in REDIRECTS and "Location" in response.headers:
                response.close()
                url = urljoin(url, response.headers["Location"])
                continue
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
            body = _within(HEADER_SECONDS, functools.partial(next, response.iter_content(LONGEST_PAGE), b""))
            page = _Page(body.decode(errors="replace"))
            if not page.action:
                what = (page.error or page.title or "no title")[:LONGEST_TITLE]
                raise DownloadError(f"HTTP {response.status_code} with a page instead of the file: {what}")
            url = urljoin(url, page.action) + "?" + urlencode(page.fields)
        raise DownloadError(f"it leads on and on, more than {MOST_REDIRECTS} times")


def _get(session: requests.Session, url: str, headers: dict[str, str], userinfo: Any) -> requests.Response:
    return session.get(url, headers=headers, auth=userinfo, stream=True, timeout=TIMEOUT)


def note_of(part: Path) -> Path:
    """The file that notes which version of a file `part` is of."""
    return part.with_name(part.name + ".source")


def _host(url: str) -> str:
    return "/".join(url.split("/")[:3])


def _version(response: requests.Response) -> str:
    """What names the version of a file: its ETag, or when it was changed."""
    return response.headers.get("ETag") or response.headers.get("Last-Modified", "")


def _whole_number(text: str) -> int | None:
    """The number that a header holds, or None for anything else that a server may send."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None


def _within(seconds: float, call: Callable[[], T]) -> T:
    """The result of `call`, which a server may hold up by sending a byte now and then.

    Raises:
        _StalledError: it takes longer; it goes on in its thread.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as e:
            errors.append(e)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise _StalledError("the server did not answer in time")
    return results[0]
