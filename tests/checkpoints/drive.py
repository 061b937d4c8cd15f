"""A local server that answers like Google Drive, or like a plain mirror: ranges, confirm and quota pages, faults."""

import re
import time
from dataclasses import dataclass

from requests.adapters import HTTPAdapter
from werkzeug import Response

from iabn_hub.checkpoints import download

CONFIRM = (
    "<html><head><title>Google Drive - Virus scan warning</title></head><body>"
    '<form id="download-form" action="{action}" method="get">'
    '<input type="hidden" name="id" value="{id}"><input type="hidden" name="confirm" value="t">'
    '<input type="hidden" name="uuid" value="made-up"></form></body></html>'
)
QUOTA = (
    "<html><head><title>Google Drive - Quota exceeded</title></head><body>"
    '<p class="uc-error-subcaption">Too many users have viewed or downloaded this file recently.</p></body></html>'
)


@dataclass
class Seen:
    """What one request asked for."""

    path: str
    range: str | None
    authorization: str | None


class FakeDrive:
    """Serves `files` by the request's `id` (None: any request without one)."""

    def __init__(self, files, confirm_over=100, always_confirm=False):
        self.files = files
        self.confirm_over = confirm_over
        self.always_confirm = always_confirm
        self.log = []
        self.answers = []  # given before anything else, in order
        self.quota = 0  # how many quota pages to give
        self.truncate = []  # cut the next bodies after so many bytes, having announced all of them
        self.stall_after = None  # bytes after which the server goes silent
        self.ranges = True
        self.seconds_per_answer = 0

    def __call__(self, request):
        self.log.append(Seen(request.path, request.headers.get("Range"), request.headers.get("Authorization")))
        time.sleep(self.seconds_per_answer)
        if self.answers:
            return self.answers.pop(0)
        if self.quota:
            self.quota -= 1
            return Response(QUOTA, 200, content_type="text/html; charset=utf-8")
        data = self.files.get(request.args.get("id"))
        if data is None:
            return Response("not here", 404, content_type="text/plain")
        unconfirmed = request.args.get("uuid" if self.always_confirm else "confirm") is None
        if self.confirm_over is not None and len(data) > self.confirm_over and unconfirmed:
            page = CONFIRM.format(id=request.args["id"], action="https://drive.usercontent.google.com/download")
            return Response(page, 200, content_type="text/html; charset=utf-8")
        return self._file(data, request.headers.get("Range", ""))

    def _file(self, data, wanted):
        start, status, headers = 0, 200, {"Content-Type": "application/octet-stream"}
        match = re.fullmatch(r"bytes=(\d+)-", wanted)
        if match and self.ranges:
            start, status = int(match[1]), 206
            if start >= len(data):
                return Response("", 416, {"Content-Range": f"bytes */{len(data)}"})
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        headers["Content-Length"] = str(len(data) - start)
        return Response(self._body(data[start:]), status, headers, direct_passthrough=True)

    def _body(self, data):
        if self.truncate:
            yield data[: self.truncate.pop(0)]
            raise ConnectionResetError("the test cuts the connection here")
        if self.stall_after is not None:
            yield data[: self.stall_after]
            for _ in range(100):
                time.sleep(0.1)
                if self.stall_after is None:
                    return
        yield data


class _ToLocalServer(HTTPAdapter):
    def __init__(self, base):
        super().__init__()
        self.base = base

    def send(self, request, **options):
        request.url = re.sub(r"^https://[^/]+", self.base, request.url)
        return super().send(request, **options)


def reach(drive, httpserver, monkeypatch):
    """Let requests to Google Drive arrive at `drive` on this machine."""
    httpserver.expect_request("/download").respond_with_handler(drive)
    plain = download.open_session

    def session():
        made = plain()
        made.mount("https://drive.usercontent.google.com", _ToLocalServer(httpserver.url_for("").rstrip("/")))
        return made

    monkeypatch.setattr(download, "open_session", session)
    return drive
