"""iabn-hub demo: a page in the browser."""

from __future__ import annotations

import os
import socket

import click

from .frame import OK, complete_names


@click.command("demo")
@click.option("--model", metavar="MODEL", shell_complete=complete_names, help="As of 'iabn-hub classify' or 'segment'.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0: on every one.")
@click.option("--port", type=click.IntRange(1, 65535), default=7860, show_default=True)
@click.option("--open/--no-open", "open_browser", default=True, help="Open the page in a browser.")
def command(model: str | None, host: str, port: int, open_browser: bool) -> int:
    """Open a page that classifies or segments photos, and shows what a network would save by iabn_hub.convert.

    It listens on this machine alone unless --host says otherwise. Uploads are limited to 20 MB and deleted after 10
    minutes. Needs "pip install 'iabn-hub[demo]'". Ctrl-C ends it.

    \b
    Examples:
      iabn-hub demo
      iabn-hub demo --model runs/birds --port 8000
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        from ..demo.app import LARGEST_MB, make_app  # noqa: PLC0415  (an extra)
    except ImportError as e:
        raise click.UsageError(f"the page needs {e.name}: pip install 'iabn-hub[demo]'") from e
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as e:
            raise click.UsageError(
                f"cannot listen on {host}:{port} ({e.strerror}): pass another --port or --host"
            ) from e
    app = make_app(model)
    print(f"http://{host}:{port} (Ctrl-C ends it)", flush=True)
    app.queue(default_concurrency_limit=2)
    app.launch(
        server_name=host, server_port=port, inbrowser=open_browser, quiet=True, max_file_size=f"{LARGEST_MB}mb",
        show_error=True,
    )  # fmt: skip
    return OK
