"""A server may send anything: nothing endless is awaited, nothing larger than the file is kept."""

import contextlib
import gzip
import hashlib
import http.server
import random
import resource
import threading
import time

import pytest

from iabn_hub.checkpoints import Checkpoint, CheckpointError, download, fetch_checkpoint, retries

DATA = random.Random(1).randbytes(300_000)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.server.requests.append(dict(self.headers))
        self.close_connection = True
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.server.answer(self)

    def send(self, code, body=b"", **headers):
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def server(monkeypatch, tmp_path):
    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.daemon_threads = True
    made.requests = []
    threading.Thread(target=made.serve_forever, daemon=True).start()
    monkeypatch.setattr(retries, "FIRST_PAUSE", 0.01)
    monkeypatch.setenv("IABN_HUB_MIRROR", f"http://127.0.0.1:{made.server_port}")
    monkeypatch.setenv("IABN_HUB_CACHE", str(tmp_path / "cache"))
    yield made
    made.shutdown()


def record(**facts):
    return Checkpoint("test_resnet_iabn", "t", hashlib.md5(DATA).hexdigest(), **facts)


def fetched(**facts):
    return fetch_checkpoint(record(**facts), progress=False).read_bytes() == DATA


def left(tmp_path):
    """The names in the cache, without locks."""
    return sorted(each.name for each in (tmp_path / "cache").iterdir() if each.suffix != ".lock")


def test_a_server_that_compresses_unasked(server, tmp_path):
    server.answer = lambda h: h.send(200, gzip.compress(DATA), Content_Encoding="gzip")
    assert fetched()
    assert len(server.requests) == 1
    assert left(tmp_path) == ["test_resnet_iabn.t.pth.tar", "test_resnet_iabn.t.pth.tar.md5"]


def test_a_bomb_of_gzip(server, tmp_path):
    server.answer = lambda h: h.send(200, gzip.compress(bytes(200 << 20)), Content_Encoding="gzip")
    with pytest.raises(CheckpointError, match="compressed transfer grows more than 20 times"):
        fetched()
    assert left(tmp_path) == []


def test_a_damaged_gzip(server, tmp_path):
    broken = bytearray(gzip.compress(DATA))
    broken[5000:6000] = bytes(1000)
    server.answer = lambda h: h.send(200, bytes(broken), Content_Encoding="gzip")
    with pytest.raises(CheckpointError, match=r"the compressed transfer is damaged|has md5"):
        fetched()
    assert left(tmp_path) == []


@pytest.mark.parametrize("chunked", [True, False])
def test_an_endless_body(server, tmp_path, chunked):
    def answer(handler):
        handler.send(200, **({"Transfer_Encoding": "chunked"} if chunked else {}))
        while True:
            handler.wfile.write((b"10000\r\n" if chunked else b"") + bytes(1 << 16) + (b"\r\n" if chunked else b""))

    server.answer = answer
    with pytest.raises(CheckpointError, match=r"the server sends more than 300,000 bytes, the file has 300,000"):
        fetched(bytes=len(DATA))
    assert left(tmp_path) == []


def test_a_body_larger_than_the_network_can_be(server, tmp_path):
    server.answer = lambda h: h.send(200, Content_Length=10**12)
    with pytest.raises(CheckpointError, match=r"sends 1,000,000,000,000 bytes, and 67,124,864 are accepted"):
        fetched(parameters=1000)
    assert left(tmp_path) == []


def test_another_size_than_the_file_has(server):
    server.answer = lambda h: h.send(200, DATA[:-1], Content_Length=len(DATA) - 1)
    with pytest.raises(CheckpointError, match=r"sends 299,999 bytes, the file has 300,000"):
        fetched(bytes=len(DATA))


def trickle(handler):
    for _ in range(600):
        handler.wfile.write(b"x")
        handler.wfile.flush()
        time.sleep(0.05)


@pytest.mark.parametrize("where", ["head", "body", "page"])
def test_bytes_that_trickle(server, monkeypatch, where):
    monkeypatch.setattr(download, "PACE_SECONDS", 0.5)
    monkeypatch.setattr(download, "HEADER_SECONDS", 0.5)
    monkeypatch.setattr(retries, "ATTEMPTS", 2)
    monkeypatch.setattr(download, "ATTEMPTS", 2)

    def answer(handler):
        if where == "head":
            handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
        elif where == "body":
            handler.send(200, Content_Length=len(DATA))
        else:
            handler.send(200, Content_Type="text/html")
        trickle(handler)

    server.answer = answer
    started = time.monotonic()
    message = "less than 1,024 bytes a second" if where == "body" else "did not answer in time"
    with pytest.raises(CheckpointError, match=message):
        fetched()
    assert time.monotonic() - started < 15


def test_a_file_that_changes_between_two_pieces(server, monkeypatch):
    """The server breaks off, and then has another version."""

    def answer(handler):
        start = int(handler.headers.get("Range", "bytes=0-")[6:-1])
        if len(server.requests) == 1:
            handler.send(200, bytes(100_000), Content_Length=len(DATA), ETag='"old"')
        elif start:
            place = f"bytes {start}-{len(DATA) - 1}/{len(DATA)}"
            handler.send(206, DATA[start:], Content_Length=len(DATA) - start, ETag='"new"', Content_Range=place)
        else:
            handler.send(200, DATA, Content_Length=len(DATA), ETag='"new"')

    server.answer = answer
    assert fetched()
    assert [each.get("If-Range") for each in server.requests] == [None, '"old"', None]


@pytest.mark.parametrize(
    "place",
    ["bytes 0-299999/300000", "bytes 99999-299999/300000", "bytes ²-299999/300000", "items 100000-299999/300000", ""],
)
def test_a_piece_from_another_place(server, place):
    """Such an answer is not appended: the file is fetched anew."""

    def answer(handler):
        if len(server.requests) == 1:
            handler.send(200, DATA[:100_000], Content_Length=len(DATA))
        elif "Range" in handler.headers:
            handler.send(206, DATA[100_000:], Content_Length=200_000, Content_Range=place.encode().decode("latin-1"))
        else:
            handler.send(200, DATA, Content_Length=len(DATA))

    server.answer = answer
    assert fetched()
    assert len(server.requests) == 3


def test_pieces_are_joined_within_one_version(server):
    def answer(handler):
        start = int(handler.headers.get("Range", "bytes=0-")[6:-1])
        end = min(start + 100_000, len(DATA))
        place = f"bytes {start}-{len(DATA) - 1}/{len(DATA)}"
        headers = {"Content_Range": place} if start else {}
        handler.send(206 if start else 200, DATA[start:end], Content_Length=len(DATA) - start, ETag='"one"', **headers)

    server.answer = answer
    assert fetched()
    assert [each.get("Range") for each in server.requests] == [None, "bytes=100000-", "bytes=200000-"]


@pytest.mark.parametrize(
    "text", ["<![foo[", "<!DOCTYPE [[[<!x", "<form id=download-form action='http://[bad'>", "<" * 70_000]
)
def test_a_page_that_is_hardly_html(server, text):
    server.answer = lambda h: h.send(200, text.encode(), Content_Type="text/html", Content_Length=len(text))
    with pytest.raises(CheckpointError, match="could not be fetched"):
        fetched()


@pytest.mark.parametrize(
    "mirror",
    [
        "http://user:SECRETPW@127.0.0.1:99999",
        "http://user:SECRETPW@",
        "http://user:SECRETPW@[",
        "http://user:SECRETPW@ho\u2100st",
    ],
)
def test_a_password_in_a_mirror_that_is_no_url(mirror, monkeypatch, tmp_path):
    monkeypatch.setenv("IABN_HUB_MIRROR", mirror)
    monkeypatch.setattr(retries, "FIRST_PAUSE", 0.01)
    with pytest.raises(CheckpointError) as failure:
        fetched()
    assert "SECRETPW" not in str(failure.value)
    assert "SECRETPW" not in str(failure.value.__cause__)


def test_a_password_is_sent_to_its_own_server_alone(server, monkeypatch):
    other = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    other.requests, other.answer = [], lambda h: h.send(200, DATA, Content_Length=len(DATA))
    threading.Thread(target=other.serve_forever, daemon=True).start()
    monkeypatch.setenv("IABN_HUB_MIRROR", f"http://user:p%2Fw@127.0.0.1:{server.server_port}/x")
    server.answer = lambda h: h.send(302, Location=f"http://127.0.0.1:{other.server_port}/y", Content_Length=0)
    assert fetched()
    other.shutdown()
    assert server.requests[0]["Authorization"] == "Basic dXNlcjpwL3c="
    assert "Authorization" not in other.requests[0]


def test_the_size_of_a_fetched_file_is_learnt(server, tmp_path):
    server.answer = lambda h: h.send(200, DATA, Content_Length=len(DATA))
    assert fetched()
    (tmp_path / "cache" / "test_resnet_iabn.t.pth.tar").unlink()
    server.answer = lambda h: h.send(200, DATA + b"x", Content_Length=len(DATA) + 1)
    with pytest.raises(CheckpointError, match=r"sends 300,001 bytes, the file has 300,000"):
        fetched()


def test_a_bomb_in_a_redirect(server):
    """The body of an answer that leads elsewhere is not read."""
    body = gzip.compress(bytes(100 << 20))

    def answer(handler):
        if handler.path.startswith("/there"):
            handler.send(200, DATA, Content_Length=len(DATA))
        else:
            handler.send(302, body, Location="/there", Content_Encoding="gzip", Content_Length=len(body))

    server.answer = answer
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert fetched()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 80_000  # kilobytes


def test_redirects_without_end(server):
    server.answer = lambda h: h.send(302, Location="/again", Content_Length=0)
    with pytest.raises(CheckpointError, match="leads on and on, more than 10 times"):
        fetched()


@pytest.mark.parametrize("kind", ["trailers", "file name in gzip", "size of a chunk"])
def test_bytes_without_content(server, monkeypatch, kind):
    """A single read that takes bytes for ever and gives none."""
    monkeypatch.setattr(download, "PACE_SECONDS", 0.3)
    monkeypatch.setattr(retries, "ATTEMPTS", 2)
    monkeypatch.setattr(download, "ATTEMPTS", 2)

    def answer(handler):
        if kind == "file name in gzip":
            handler.send(200, b"\x1f\x8b\x08\x08\0\0\0\0\0\x03", Content_Encoding="gzip")
        else:
            handler.send(200, b"0\r\n" if kind == "trailers" else b"0", Transfer_Encoding="chunked")
        for _ in range(400):
            handler.wfile.write(b"X: y\r\n" if kind == "trailers" else b"0")
            handler.wfile.flush()
            time.sleep(0.02)

    server.answer = answer
    started = time.monotonic()
    with pytest.raises(CheckpointError, match="did not answer in time"):
        fetched()
    assert time.monotonic() - started < 6  # not the 8 seconds for which the server goes on


def test_a_password_with_an_at_sign(server, monkeypatch):
    monkeypatch.setenv("IABN_HUB_MIRROR", f"http://user:p@ss@127.0.0.1:{server.server_port}/x")
    server.answer = lambda h: h.send(200, DATA, Content_Length=len(DATA))
    assert fetched()
    assert server.requests[0]["Authorization"] == "Basic dXNlcjpwQHNz"
