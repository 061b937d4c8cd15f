"""The page in a real browser: a photo, a wrong file, two users at once, and the memory of a network."""

import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from iabn_hub.classification.predict import PHOTOS
from iabn_hub.cli import main

from ..paths import ROOT

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
in_browser = pytest.mark.skipif(
    not (CHROMIUM and importlib.util.find_spec("playwright")), reason="no chromium, or no playwright, on this machine"
)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def page_url():
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "iabn_hub", "demo", "--no-open", "--port", str(port)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    assert process.stdout.readline() == f"{url} (Ctrl-C ends it)\n"
    for _ in range(300):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.1)
    yield url
    process.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" not in process.communicate(timeout=30)[0]


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright  # noqa: PLC0415

    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


def opened(browser, url):
    page = browser.new_page(viewport={"width": 1000, "height": 800})
    page.goto(url)
    page.wait_for_selector("input[type=file]", state="attached", timeout=30_000)
    return page


@in_browser
def test_a_photo_gets_its_name_also_with_two_users_at_once(browser, page_url):
    pages = {name: opened(browser, page_url) for name in ("cat", "coffee")}
    for name, page in pages.items():
        page.set_input_files("input[type=file]", PHOTOS[1] / f"{name}.jpg")
    pages["cat"].get_by_text("Egyptian cat").first.wait_for(timeout=30_000)
    pages["coffee"].get_by_text("espresso").first.wait_for(timeout=30_000)
    assert pages["cat"].get_by_text("espresso").count() == 0


@in_browser
def test_a_file_that_is_no_photo(browser, page_url, tmp_path):
    wrong = tmp_path / "wrong.png"
    wrong.write_text("this is no picture")
    page = opened(browser, page_url)
    page.set_input_files("input[type=file]", wrong)
    page.get_by_text(re.compile("not an image|Cannot|cannot|Error")).first.wait_for(timeout=30_000)


@in_browser
def test_a_file_that_is_too_large(browser, page_url, tmp_path):
    (tmp_path / "large.png").write_bytes(bytes(21_000_000))
    page = opened(browser, page_url)
    page.set_input_files("input[type=file]", tmp_path / "large.png")
    page.get_by_text(re.compile("size|large|limit", re.I)).first.wait_for(timeout=30_000)
    assert page.get_by_text("%").count() == 0


@in_browser
def test_what_a_network_would_save(browser, page_url):
    page = opened(browser, page_url)
    page.get_by_role("tab", name="What would my network save?").click()
    page.get_by_label("Network").fill("torchvision.resnet18")
    page.get_by_label("Batch size").fill("2")
    page.get_by_label("Height and width, pixels").fill("64")
    page.get_by_role("button", name="Measure").click()
    page.get_by_text("kept for the backward pass").nth(0).wait_for(timeout=60_000)
    page.get_by_label("Network").fill("torchvision.resnet17")
    page.get_by_role("button", name="Measure").click()
    page.get_by_text("did you mean torchvision.resnet").first.wait_for(timeout=30_000)


def test_a_port_in_use(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["demo", "--no-open", "--port", str(taken.getsockname()[1])]) == 2
    assert "(Address already in use): pass another --port or --host" in capsys.readouterr().err


def test_without_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "iabn_hub.demo.app", raising=False)
    assert main(["demo", "--no-open"]) == 2
    assert "pip install 'iabn-hub[demo]'" in capsys.readouterr().err


def test_a_space(tmp_path):
    command = [sys.executable, ROOT / "tools" / "build_space.py", tmp_path / "space"]
    assert subprocess.run(command, check=False, capture_output=True).returncode == 0
    assert (tmp_path / "space" / "README.md").read_text().startswith("---\ntitle: ")
    assert "iabn-hub[demo] @ git+https://" in (tmp_path / "space" / "requirements.txt").read_text()
    assert subprocess.run(command, check=False, capture_output=True).returncode == 2
    code = "import runpy; app = runpy.run_path('app.py')['app']; print(type(app).__name__)"
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=tmp_path / "space",
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.stdout == "Blocks\n"
