"""A file reaches its final name only with the published bytes, from whichever source and after whatever mishap."""

import dataclasses
import hashlib
import multiprocessing
import os
import re
import subprocess
import sys
import time

import pytest
from werkzeug import Response

from iabn_hub.checkpoints import (
    CacheError,
    Checkpoint,
    ChecksumError,
    DownloadError,
    OfflineError,
    cache_folder,
    fetch_checkpoint,
    retries,
)

from ..legacy_files import flip_a_byte, md5
from .drive import FakeDrive, reach

CONTENT = os.urandom(3_000_000)


@pytest.fixture
def published(tmp_path):
    path = tmp_path / "published" / "test_resnet_iabn.made.pth.tar"
    path.parent.mkdir()
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def record(published):
    return Checkpoint(model="test_resnet_iabn", tag="made", md5=md5(published))


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(retries, "FIRST_PAUSE", 0.01)


@pytest.fixture
def server(httpserver, monkeypatch):
    """A mirror that serves CONTENT, honours Range, and can be told to misbehave."""
    monkeypatch.setenv("IABN_HUB_MIRROR", httpserver.url_for("/weights"))
    mirror = FakeDrive({None: CONTENT}, confirm_over=None)
    httpserver.expect_request(re.compile("/weights/.*")).respond_with_handler(mirror)
    return mirror


def files_in_cache():
    """Everything in the cache but the locks and the notes of what was checked."""
    return sorted(p.name for p in cache_folder().iterdir() if p.suffix not in (".lock", ".md5"))


def test_mirror_file_is_verified_and_cached(record, server):
    path = fetch_checkpoint(record)
    assert path == cache_folder() / "test_resnet_iabn.made.pth.tar"
    assert path.read_bytes() == CONTENT
    assert fetch_checkpoint(record) == path
    assert len(server.log) == 1


def test_folder_can_be_a_mirror(record, published, monkeypatch):
    monkeypatch.setenv("IABN_HUB_MIRROR", published.parent.as_uri())
    assert fetch_checkpoint(record).read_bytes() == CONTENT


def test_one_flipped_byte_is_refused_with_both_digests(record, published, server):
    flip_a_byte(published)
    server.files[None] = published.read_bytes()
    with pytest.raises(ChecksumError) as caught:
        fetch_checkpoint(record)
    message = str(caught.value)
    assert record.md5 in message
    assert md5(published) in message
    assert "mirror http://" in message
    assert files_in_cache() == []


def test_damaged_cached_file_is_removed_and_fetched_again(record, server, capsys):
    path = fetch_checkpoint(record)
    flip_a_byte(path)
    assert fetch_checkpoint(record).read_bytes() == CONTENT
    assert "removing it and fetching it again" in capsys.readouterr().err


def test_cut_connection_is_resumed(record, server):
    server.truncate = [1_000_000]
    assert fetch_checkpoint(record).read_bytes() == CONTENT
    first, second = server.log
    assert first.range is None
    assert re.fullmatch(r"bytes=[1-9]\d*-", second.range)


def test_server_without_ranges_starts_over(record, server):
    server.truncate = [1_000_000]
    server.ranges = False
    assert fetch_checkpoint(record).read_bytes() == CONTENT


def test_leftover_longer_than_the_file_is_dropped(record, server):
    cache_folder().mkdir()
    (cache_folder() / f"{record.filename}.{record.md5[:8]}.partial").write_bytes(CONTENT + b"more")
    assert fetch_checkpoint(record).read_bytes() == CONTENT


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_temporary_refusal_is_tried_again(record, server, status):
    server.answers = [Response("busy", status, {"Retry-After": "0"})] * 2
    assert fetch_checkpoint(record).read_bytes() == CONTENT
    assert len(server.log) == 3


def test_lasting_refusal_says_what_each_source_answered(record, server):
    server.answers = [Response("busy", 503)] * 10
    with pytest.raises(DownloadError, match=r"mirror http://.*HTTP 503 \(tried 5 times\)"):
        fetch_checkpoint(record)
    assert files_in_cache() == []


def test_page_instead_of_a_file_is_refused(record, server):
    server.answers = [Response("<title>Sign in to the Wi-Fi</title>", 200, content_type="text/html")]
    with pytest.raises(DownloadError, match="a page instead of the file: Sign in to the Wi-Fi"):
        fetch_checkpoint(record)


def test_drive_serves_what_the_mirror_lacks(record, server, httpserver, monkeypatch):
    server.files.clear()
    drive = reach(FakeDrive({"an-id": CONTENT}), httpserver, monkeypatch)
    in_drive = Checkpoint(model=record.model, tag=record.tag, md5=record.md5, google_drive_id="an-id")
    assert fetch_checkpoint(in_drive).read_bytes() == CONTENT
    assert [r.path for r in drive.log] == ["/download"]


def test_drive_confirm_page_is_walked_through(record, httpserver, monkeypatch):
    drive = reach(FakeDrive({"an-id": CONTENT}, always_confirm=True), httpserver, monkeypatch)
    in_drive = Checkpoint(model=record.model, tag=record.tag, md5=record.md5, google_drive_id="an-id")
    assert fetch_checkpoint(in_drive).read_bytes() == CONTENT
    assert len(drive.log) == 2


def test_drive_quota_page_is_told_apart(record, httpserver, monkeypatch):
    drive = reach(FakeDrive({"an-id": CONTENT}), httpserver, monkeypatch)
    drive.quota = 1
    in_drive = Checkpoint(model=record.model, tag=record.tag, md5=record.md5, google_drive_id="an-id")
    with pytest.raises(DownloadError, match="Too many users have viewed or downloaded this file recently"):
        fetch_checkpoint(in_drive)


def test_unreachable_server_is_a_sentence(record, monkeypatch):
    monkeypatch.setenv("IABN_HUB_MIRROR", "http://127.0.0.1:9")
    with pytest.raises(DownloadError, match="the server cannot be reached"):
        fetch_checkpoint(record)


def test_mirror_without_a_scheme_is_explained(record, monkeypatch):
    monkeypatch.setenv("IABN_HUB_MIRROR", "/srv/weights")
    with pytest.raises(DownloadError, match=r"IABN_HUB_MIRROR must start with http://, https:// or file://"):
        fetch_checkpoint(record)


def test_damaged_local_file_is_refused_with_the_way_out(record, published):
    beside = dataclasses.replace(record, file=published.name, catalogue=str(published.parent / "more.json"))
    assert fetch_checkpoint(beside) == published
    flip_a_byte(published)
    with pytest.raises(ChecksumError, match=r"put the right file there .* or correct .*more\.json"):
        fetch_checkpoint(beside)
    assert published.exists()


def test_record_without_a_source_says_where_to_put_the_file(record):
    with pytest.raises(DownloadError, match=r"Set IABN_HUB_MIRROR .* test_resnet_iabn\.made\.pth\.tar"):
        fetch_checkpoint(record)


@pytest.mark.parametrize("setting", ["IABN_HUB_OFFLINE=1", "IABN_HUB_OFFLINE=y", "HF_HUB_OFFLINE=1"])
def test_offline_never_asks_the_server(record, server, monkeypatch, setting):
    monkeypatch.setenv(*setting.split("="))
    with pytest.raises(OfflineError, match="downloads are off"):
        fetch_checkpoint(record)
    assert server.log == []


def test_offline_uses_the_cache(record, server, monkeypatch):
    path = fetch_checkpoint(record)
    monkeypatch.setenv("IABN_HUB_OFFLINE", "1")
    assert fetch_checkpoint(record) == path


def test_full_disk_is_a_sentence_and_leaves_nothing(record, server):
    cache_folder().mkdir()
    part = cache_folder() / f"{record.filename}.{record.md5[:8]}.partial"
    part.symlink_to("/dev/full")
    with pytest.raises(CacheError, match=r"No space left on device.*set IABN_HUB_CACHE"):
        fetch_checkpoint(record)
    assert files_in_cache() == []


def test_unwritable_cache_is_a_sentence(record, server, tmp_path, monkeypatch):
    (tmp_path / "a_file").write_text("")
    monkeypatch.setenv("IABN_HUB_CACHE", str(tmp_path / "a_file" / "cache"))
    with pytest.raises(CacheError, match=r"cannot write to the cache folder .*a_file.*set IABN_HUB_CACHE"):
        fetch_checkpoint(record)


def _fetch(record):
    fetch_checkpoint(record)


def test_processes_share_one_download(record, server):
    server.seconds_per_answer = 0.5
    processes = [multiprocessing.get_context("fork").Process(target=_fetch, args=(record,)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [p.exitcode for p in processes] == [0] * 4
    assert len(server.log) == 1


def test_interrupted_download_resumes_in_the_next_process(record, server):
    server.stall_after = 1_500_000
    process = multiprocessing.get_context("fork").Process(target=_fetch, args=(record,))
    process.start()
    part = cache_folder() / f"{record.filename}.{record.md5[:8]}.partial"
    deadline = time.monotonic() + 30
    while not (part.exists() and part.stat().st_size >= 1_000_000) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.join()
    assert files_in_cache() == [part.name]
    server.stall_after = None
    assert fetch_checkpoint(record).read_bytes() == CONTENT
    assert re.fullmatch(r"bytes=[1-9]\d{6}-", server.log[-1].range)


@pytest.mark.parametrize("password", ["s3cret", "s3cret/with", "s3cret:/"])
def test_password_that_is_not_quoted_is_not_shown(record, monkeypatch, password):
    monkeypatch.setenv("IABN_HUB_MIRROR", f"http://me:{password}@127.0.0.1:1/weights")
    with pytest.raises(DownloadError) as caught:
        fetch_checkpoint(record)
    assert "s3cret" not in str(caught.value)


def test_password_of_a_mirror_is_used_and_not_shown(record, server, httpserver, monkeypatch):
    monkeypatch.setenv("IABN_HUB_MIRROR", httpserver.url_for("/weights").replace("//", "//me:s3cret@"))
    server.answers = [Response("no", 403)]
    with pytest.raises(DownloadError) as caught:
        fetch_checkpoint(record)
    assert server.log[0].authorization.startswith("Basic ")
    assert "s3cret" not in str(caught.value)


def test_retry_after_is_obeyed(record, server, monkeypatch):
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    server.answers = [Response("busy", 429, {"Retry-After": "7"}), Response("busy", 503, {"Retry-After": "99999"})]
    fetch_checkpoint(record)
    assert [pause for pause in pauses if pause] == [7, retries.LONGEST_PAUSE]


@pytest.mark.parametrize(
    "answer",
    [
        Response("", 302, {"Location": "http://["}),
        Response("<form id='download-form' action='http://['></form>", 200, content_type="text/html"),
        Response("busy", 503, {"Retry-After": "\u00b2"}),
        Response("", 416),
    ],
    ids=["redirect", "form", "retry", "range"],
)
def test_nonsense_from_a_server_is_a_sentence(record, server, answer):
    server.answers = [answer] * 6
    with pytest.raises(DownloadError, match="mirror http://"):
        fetch_checkpoint(record)


def test_mirror_that_is_no_url_is_a_sentence(record, monkeypatch):
    monkeypatch.setenv("IABN_HUB_MIRROR", "http://[")
    with pytest.raises(DownloadError, match="mirror http"):
        fetch_checkpoint(record)


def test_wrong_beginning_left_by_another_source_is_dropped(record, server):
    cache_folder().mkdir()
    part = cache_folder() / f"{record.filename}.{record.md5[:8]}.partial"
    part.write_bytes(b"from elsewhere")
    assert fetch_checkpoint(record).read_bytes() == CONTENT
    assert [r.range for r in server.log] == ["bytes=14-", None]


def test_default_cache_is_the_one_of_torch_hub(monkeypatch, tmp_path):
    monkeypatch.delenv("IABN_HUB_CACHE")
    assert cache_folder() == tmp_path / "torch" / "hub" / "checkpoints"


HUB = """
import json, sys
from iabn_hub.checkpoints import Checkpoint, HubFile, fetch_checkpoint
hub = HubFile("org/name", sys.argv[1])
record = Checkpoint(model="test_resnet_iabn", tag="hub", md5="0" * 32, hub=hub)
path = fetch_checkpoint(record)
assert fetch_checkpoint(record) == path
print(path)
"""


def test_hub_repository_is_a_source(httpserver, tmp_path):
    requests_seen = []

    def answer(request):
        requests_seen.append((request.method, request.path))
        headers = {"ETag": '"an-etag"', "X-Repo-Commit": "0" * 40, "Content-Length": str(len(CONTENT))}
        return Response(CONTENT, 200, headers)

    httpserver.expect_request("/org/name/resolve/main/model.safetensors").respond_with_handler(answer)
    endpoint = {"HF_ENDPOINT": httpserver.url_for("").rstrip("/"), "HF_HUB_DISABLE_XET": "1"}

    def fetch(digest):
        command = [sys.executable, "-c", HUB, digest]
        return subprocess.run(command, check=False, capture_output=True, text=True, env=os.environ | endpoint)

    refused = fetch("1" * 32)
    assert refused.returncode == 1
    assert re.search(
        rf"has md5 {hashlib.md5(CONTENT).hexdigest()}, expected 1{{32}} \(source: Hub org/name", refused.stderr
    )
    assert files_in_cache() == []
    fetched = fetch(hashlib.md5(CONTENT).hexdigest())
    assert fetched.returncode == 0, fetched.stderr
    assert files_in_cache() == ["test_resnet_iabn.hub.hub.safetensors"]
    assert (cache_folder() / files_in_cache()[0]).read_bytes() == CONTENT
