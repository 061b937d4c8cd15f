"""HTML pages in one file each, with their pictures embedded."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from typing import Any

from PIL import Image

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
.table { overflow-x: auto } table { border-collapse: collapse; margin: 1rem 0; font-size: 14px }
td, th { padding: .2rem .5rem; text-align: right }
th { border-bottom: 1px solid #999 } td:first-child, th:first-child { text-align: left } img { max-width: 100% }
figure { display: inline-block; width: 9rem; margin: .4rem; vertical-align: top; font-size: 13px }
figure img { width: 100% }
"""


def page(title: str, *parts: str) -> str:
    """An HTML page of these parts."""
    body = "\n".join(parts)
    return (
        f"<!DOCTYPE html>\n<html lang='en'><meta charset='utf-8'><title>{html.escape(title)}</title>"
        f"<style>{STYLE}</style>\n<h1>{html.escape(title)}</h1>\n{body}\n</html>\n"
    )


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """An HTML table; floats have two decimals, or four significant digits."""

    def cell(kind: str, value: Any) -> str:
        text = str(value)
        if isinstance(value, float):
            text = f"{value:.2f}" if abs(value) >= 1 else f"{value:.4g}"
        elif isinstance(value, int):
            text = f"{value:,}"
        return f"<{kind}>{html.escape(text)}</{kind}>"

    lines = ["".join(cell("th", name) for name in header)]
    lines += ["".join(cell("td", value) for value in row) for row in rows]
    return "<div class='table'><table>" + "\n".join(f"<tr>{line}</tr>" for line in lines) + "</table></div>"


def picture(image: Image.Image) -> str:
    """An <img> that holds its picture."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return embed(file.getvalue())


def embed(png: bytes) -> str:
    """An <img> that holds a PNG."""
    return f"<img src='data:image/png;base64,{base64.b64encode(png).decode()}' alt=''>"
