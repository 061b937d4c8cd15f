"""The page: names of photos, or the classes of their pixels, and what a network would save by `convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio
import torch
from matplotlib.figure import Figure

from ..checkpoints.errors import CheckpointError
from ..classification.predict import PHOTOS, Classifier, default_model
from ..conversion.report import Report
from ..datasets.images import ImageError, open_rgb
from ..models.libraries import create_from_library, measure_conversion
from ..models.pretrained import Pretrained, load_pretrained
from ..segmentation.segmenter import overlay
from ..terminal import printable

LARGEST_MB = 20  # of an upload
KEPT_SECONDS = 600  # that an upload stays on this machine
LARGEST_BATCH, LARGEST_SIZE = 64, 512
SHOWN_LAYERS = 20
BEFORE, AFTER = "#9aa5b1", "#1f77b4"
NOTE = (
    f"Photos are processed on the machine that serves this page, and deleted after {KEPT_SECONDS // 60} minutes. "
    f"At most {LARGEST_MB} MB."
)


def make_app(model: str | None = None) -> gradio.Blocks:
    """The page for a network; by default that of `default_model`.

    Raises:
        UnknownNameError, CheckpointError: the network cannot be loaded.
    """
    name, samples = default_model()
    network = load_pretrained(model or name)
    is_segmentation = network.task == "segmentation"
    with gradio.Blocks(title="iabn_hub", delete_cache=(60, KEPT_SECONDS)) as app:
        gradio.Markdown(f"# iabn_hub\n\n`{printable(network.name)}`")
        with gradio.Tab("Segment" if is_segmentation else "Classify"):
            if is_segmentation:
                _segment_tab(network)
            else:
                _classify_tab(Classifier(network=network), samples if model is None else PHOTOS[1])
        with gradio.Tab("What would my network save?"):
            _memory_tab()
    return app


def _classify_tab(classifier: Classifier, samples: Path) -> None:
    def classify(path: str | None) -> dict[str, float] | None:
        if path is None:
            return None
        shown: dict[str, float] = {}
        for each in classifier.classify(_opened(path)):
            label = printable(each.label)  # ImageNet has two classes called 'crane'
            shown[f"{label} ({each.index})" if label in shown else label] = each.probability
        return shown

    with gradio.Row():
        photo = gradio.Image(type="filepath", label="Photo", height=380)
        answer = gradio.Label(num_top_classes=5, label="Most probable classes")
    gradio.Markdown(NOTE)
    files = sorted(str(path) for path in samples.iterdir() if path.suffix in (".jpg", ".png"))
    gradio.Examples(files, photo, label="Samples")
    photo.change(classify, photo, answer, api_name="classify")


def _segment_tab(network: Pretrained) -> None:
    def segment(path: str | None) -> Any:
        return None if path is None else overlay(network, _opened(path))

    photo = gradio.Image(type="filepath", label="Photo", height=380)
    answer = gradio.Image(label="Classes of the pixels", format="png")
    gradio.Markdown(NOTE)
    photo.change(segment, photo, answer, api_name="segment")


def _opened(path: str) -> Any:
    try:
        return open_rgb(path)
    except ImageError as e:
        raise gradio.Error(printable(str(e).replace(path, "this file")), print_exception=False) from e


def _memory_tab() -> None:
    gradio.Markdown(
        "Bytes that a network keeps for its backward pass, as it is and after `iabn_hub.convert`. The network is "
        "randomly initialised; a few training steps run on random images."
    )
    with gradio.Row():
        name = gradio.Textbox("torchvision.resnet50", label="Network", info="a name of timm, or torchvision.NAME")
        batch = gradio.Number(4, precision=0, minimum=1, maximum=LARGEST_BATCH, label="Batch size")
        size = gradio.Number(224, precision=0, minimum=32, maximum=LARGEST_SIZE, label="Height and width, pixels")
    button = gradio.Button("Measure", variant="primary")
    summary = gradio.Markdown()
    chart = gradio.Plot(label="Bytes kept by layer")
    button.click(savings, [name, batch, size], [summary, chart], api_name="memory")


def savings(name: str, batch: float, size: float) -> tuple[str, Figure]:
    """What a network would save: a text, and a chart of its layers.

    Raises:
        gradio.Error: there is no such network, or it cannot be measured so.
    """
    if not (1 <= batch <= LARGEST_BATCH and 32 <= size <= LARGEST_SIZE):
        raise gradio.Error(
            f"the batch size must be 1 to {LARGEST_BATCH}, the size 32 to {LARGEST_SIZE}", print_exception=False
        )
    try:
        network, usual = create_from_library(name.strip())
        report = measure_conversion(name, network, (int(batch), usual[0], int(size), int(size)))
    except (CheckpointError, ValueError, torch.OutOfMemoryError) as e:
        raise gradio.Error(printable(e), print_exception=False) from e
    assert report.kept is not None
    assert report.peak is not None
    text = "\n".join(
        f"| {what} | {b.before / 1e6:,.0f} MB | {b.after / 1e6:,.0f} MB | {b.ratio:.2f} |"
        for what, b in (("kept for the backward pass", report.kept), ("peak of a training step", report.peak))
    )
    return f"| | as it is | converted | ratio |\n|---|---|---|---|\n{text}", layer_chart(report)


def layer_chart(report: Report) -> Figure:
    """Bars of the bytes that the largest layers keep, before and after the conversion."""
    layers = [layer for layer in report.layers if layer.kept is not None]
    layers.sort(key=lambda layer: max(layer.kept.before, layer.kept.after) if layer.kept else 0)
    shown, rest = layers[-SHOWN_LAYERS:], layers[:-SHOWN_LAYERS]
    rows = [(f"{layer.name or '(network)'} ({layer.kind})", layer.kept) for layer in shown]
    names = ([f"{len(rest)} smaller layers"] if rest else []) + [name for name, _ in rows]
    before = ([sum(each.kept.before for each in rest if each.kept)] if rest else []) + [b.before for _, b in rows if b]
    after = ([sum(each.kept.after for each in rest if each.kept)] if rest else []) + [b.after for _, b in rows if b]
    figure = Figure(figsize=(9, 1 + 0.33 * len(names)), layout="constrained")
    axes = figure.subplots()
    places = range(len(names))
    axes.barh([y + 0.2 for y in places], [each / 1e6 for each in before], 0.4, color=BEFORE, label="as it is")
    axes.barh([y - 0.2 for y in places], [each / 1e6 for each in after], 0.4, color=AFTER, label="converted")
    axes.set_yticks(list(places), names)
    axes.set_xlabel("kept for the backward pass, MB")
    figure.legend(loc="outside upper right", ncols=2, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
