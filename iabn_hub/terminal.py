"""What reaches a terminal or a log: no control characters of foreign texts, no secrets; and progress bars."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
import re
import sys
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

import huggingface_hub
from tqdm import tqdm

# C0 and C1 controls but tab and line feed; bidirectional controls; line separators; invisible tags; lone surrogates.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff\U000e0000-\U000e007f]"
)
# user:password@ of a URL where the password holds an unquoted '/'; a port is none. Repetitions are bounded, since texts
# of servers are searched.
UNQUOTED_PASSWORD = re.compile(r"//[^\s/@:]{0,128}:(?!\d+/)[^\s@]{0,256}@")
_SECRETS = (
    (re.compile(r"//[^\s/]{1,256}@"), "//"),
    (UNQUOTED_PASSWORD, "//"),
    (re.compile(r"\bhf_[A-Za-z0-9]{30,}"), "hf_…"),
    (re.compile(r"(?i)([?&](?:[\w-]*(?:token|signature|password|secret|credential)|sig|key)=)[^&\s'\"]+"), r"\1…"),
    (re.compile(r"(?i)(\bauthorization['\"]?\s*[:=]\s*['\"]?(?:\w+\s+)?)[^\s'\"]+"), r"\1…"),
)
SHORTEST_SECRET = 6  # characters; a shorter one could be a part of any word


def printable(text: object) -> str:
    """The text with control characters as escapes such as '\\x1b', and without secrets.

    Tabs and line feeds stay. Removed are passwords in URLs, tokens of the Hub, and what stands behind words such as
    'token=' and 'Authorization:'.
    """
    return _UNPRINTABLE.sub(_escape, without_secrets(str(text)))


def _escape(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape", "surrogatepass").decode()


def without_secrets(text: str) -> str:
    """The text without passwords and tokens."""
    for secret in _known_secrets(*map(os.environ.get, ("IABN_HUB_MIRROR", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"))):
        text = text.replace(secret, "…")
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


@functools.lru_cache(maxsize=4)
def _known_secrets(mirror: str | None, *tokens: str | None) -> list[str]:
    """The password of the mirror and the tokens of the Hub on this machine, longest first."""
    userinfo = (mirror or "").partition("://")[2].rpartition("@")[0]
    password = userinfo.partition(":")[2]
    found = {password, unquote(password), *(token or "" for token in tokens)}
    with contextlib.suppress(OSError, ValueError):
        found.add(huggingface_hub.get_token() or "")
    return sorted((each for each in found if len(each) >= SHORTEST_SECRET), key=len, reverse=True)


# What progress bars of other libraries begin with: to the start of the line, and lines up.
_CURSOR = re.compile(r"\r|(\x1b\[A)+$")


class _Stream:
    """A text stream that writes `printable` text into another one."""

    def __init__(self, wrapped: Any) -> None:
        self._wrapped = wrapped  # tqdm recognises streams by this name

    def write(self, text: str) -> int:
        if not isinstance(text, str):  # click tries what a stream takes
            raise TypeError(f"text is needed, not {type(text).__name__}")
        moves = _CURSOR.match(text) if self._wrapped.isatty() else None
        start = moves.end() if moves else 0
        self._wrapped.write(text[:start] + printable(text[start:]))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)


@contextlib.contextmanager
def safe_streams() -> Iterator[None]:
    """Inside, all that is printed or logged to stdout and stderr is `printable`, whatever prints it."""
    before = sys.stdout, sys.stderr
    for stream in before:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # for what the terminal's encoding lacks
    opened = (stream or open(os.devnull, "w") for stream in before)  # noqa: SIM115  (None: closed, as by '>&-')
    safe = tuple(map(_Stream, opened))
    sys.stdout, sys.stderr = safe
    moved = [(each, stream) for each in _stream_handlers() for stream in safe if each.stream is stream._wrapped]
    for handler, stream in moved:
        handler.setStream(stream)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for handler, stream in moved:
            handler.setStream(stream._wrapped)


def _stream_handlers() -> list[Any]:
    """The handlers of every logger that write to a stream; libraries add some when they are imported."""
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    handlers = [handler for logger in loggers for handler in getattr(logger, "handlers", ())]
    return [each for each in handlers if isinstance(each, logging.StreamHandler) and each is not logging.lastResort]


def raw(stream: Any) -> Any:
    """The stream behind one of `safe_streams`, for output that moves the cursor; its texts must be safe."""
    return stream._wrapped if isinstance(stream, _Stream) else stream


def progress_bar(iterable: Any = None, description: str = "", shown: bool = True, **options: Any) -> tqdm[Any]:
    """A progress bar on stderr, if that is a terminal and `shown` is true."""
    options = {"file": raw(sys.stderr), "disable": None if shown else True, "dynamic_ncols": True, **options}
    return tqdm(iterable, printable(description), **options)


class Formatter(logging.Formatter):
    """Log records as `printable` text."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))
