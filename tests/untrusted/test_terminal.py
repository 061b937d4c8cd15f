"""What is printed and logged has no control characters and no secrets, and model cards show foreign texts as texts."""

import io
import logging
import re
import sys

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tqdm import tqdm

from iabn_hub.checkpoints.errors import CheckpointError
from iabn_hub.publishing.card import markdown
from iabn_hub.terminal import Formatter, printable, safe_streams, without_secrets

HARMFUL = "".join(map(chr, (*range(9), *range(11, 32), *range(127, 160), 0x61C, 0x200E, 0x200F)))
HARMFUL += "".join(map(chr, (*range(0x2028, 0x202F), *range(0x2066, 0x206A), 0xFEFF, 0xD800, 0xDFFF, 0xE0041)))
texts = st.text(st.characters(exclude_categories=()) | st.sampled_from(HARMFUL + "hf_/:@ =&"))


@settings(max_examples=500, deadline=None, derandomize=True)
@given(texts)
@example("\x1b]0;title\x07 \u202egnp.exe \x9b31m \x7f\r")
def test_printed_text_has_no_control_characters(text):
    shown = printable(text)
    assert not set(shown) & set(HARMFUL)
    shown.encode()
    stream = io.StringIO()
    before, sys.stdout = sys.stdout, stream
    try:
        with safe_streams():
            print(text)
            assert sys.stdout is not stream
        assert sys.stdout is stream
    finally:
        sys.stdout = before
    assert stream.getvalue() == shown + "\n"


def test_ordinary_text_stays_as_it_is():
    text = "Größe 7×7 \t 東京 नमस्ते ‌می‌خواهم‌ 👩‍👩‍👧 naïve – “…”\nnext line"
    assert printable(text) == text
    for url in ("http://127.0.0.1:8080/a@b", "https://hf.co/org/name@main", "file:///srv/mirror", "//host:80/x"):
        assert printable(url) == url


passwords = st.text(st.sampled_from("abcXYZ0189%:/?#!-._~"), min_size=6, max_size=12)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(passwords)
def test_the_password_of_the_mirror_is_never_shown(password):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IABN_HUB_MIRROR", f"https://user:{password}@mirror.example.org/weights")
        texts = (
            f"cannot reach https://user:{password}@mirror.example.org/weights/x.pth",
            f"netloc 'user:{password}@mirror.example.org' is invalid",
            f"the password is {password}.",
        )
        for text in texts:
            assert password not in without_secrets(text)
            assert password not in str(CheckpointError(text))
            record = logging.LogRecord("x", logging.INFO, "x.py", 1, "%s", (text,), None)
            assert password not in Formatter("%(message)s").format(record)


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("http://user:se/cret@host/x", "se/cret"),
        ("https://host/x?X-Amz-Signature=0123abcdef&a=1", "0123abcdef"),
        ("https://host/x?a=1&access_token=abc.def-ghi", "abc.def-ghi"),
        ("{'Authorization': 'Bearer abcdefgh123'}", "abcdefgh123"),
        ("authorization: Basic dXNlcjpwdw==", "dXNlcjpwdw=="),
        ("Invalid token hf_" + 17 * "Ab", 17 * "Ab"),
        ("the token of a server of ours: s3cret-own-token", "s3cret-own-token"),
    ],
)
def test_secrets_are_removed(text, secret, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "s3cret-own-token")
    assert secret in text
    assert secret not in printable(text)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(st.text(st.sampled_from("ab <>&|[]()`\\\n\"'!#*javascript:")))
@example("<img src=x onerror=alert(1)>")
@example("[click](javascript:alert(1))")
@example("a | b\n# heading")
@example("`code` \\| \\")
def test_foreign_text_in_a_card_is_text(text):
    shown = markdown(text)
    assert not set(shown) & set("<>\n")
    unescaped = re.sub(r"\\\\", "", shown)  # a backslash that is itself escaped escapes nothing
    assert not re.search(r"(?<!\\)[|\[\]`]", unescaped)


@pytest.mark.parametrize("text", ["//a:" * 16_000, "//" * 60_000, "//a:b/" * 10_000, "authorization: " * 4000])
def test_a_long_text_of_a_server_takes_no_time(text):
    """The patterns do not backtrack; with the first ones this never ended."""
    assert len(printable(text)) <= len(text)


def test_names_that_only_begin_as_tokens_do_stay():
    assert printable("cache/hf_checkpoints/x.pth") == "cache/hf_checkpoints/x.pth"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_bars_of_other_libraries_still_move_the_cursor(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    with safe_streams():
        for _ in tqdm(range(3), "weights", mininterval=0):
            pass
        sys.stderr.write("\x1b[A\x1b[A")
        sys.stderr.write("a name\r\x1b[31m")
    assert "\rweights: 100%" in stream.getvalue()
    assert "\\r" not in stream.getvalue().partition("a name")[0]
    assert stream.getvalue().endswith("\x1b[A\x1b[Aa name\\r\\x1b[31m")


def test_handlers_that_a_library_has_made_before(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    handler = logging.StreamHandler()
    logger = logging.getLogger("another_library")
    logger.addHandler(handler)
    try:
        with safe_streams():
            logger.warning("red \x1b[31m and token=abcdef")
        assert handler.stream is stream
    finally:
        logger.removeHandler(handler)
    assert stream.getvalue() == "red \\x1b[31m and token=abcdef\n"
