"""The model card of a repository: figures, licence, usage, and where the weights come from."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import yaml
from huggingface_hub import EvalResult, ModelCardData

from ..checkpoints.catalogue import Result
from ..checkpoints.errors import CheckpointError
from ..models.factory import CONVERTED_MODELS
from ..terminal import printable
from .onnx import INT8, ONNX

if TYPE_CHECKING:
    from .export import Export

TASKS = {"classification": "image-classification", "segmentation": "image-segmentation"}
LICENSES = {"CC BY-NC-SA 4.0": "cc-by-nc-sa-4.0", "CC BY-SA 3.0": "cc-by-sa-3.0", "Apache-2.0": "apache-2.0"}
FIGURES = {"top1": ("accuracy", "top-1"), "top5": ("accuracy", "top-5"), "miou": ("mean_iou", "mIoU")}
SHOWN_CLASSES = 20
CURVES = "curves.png"
PICTURES = {CURVES: "Curves of the training", "confusion.png": "Confusion matrix of the held-out images"}
REPO = "ORG/NAME"  # where the repository is not known yet


def model_card(export: Export, repo: str | None, files: Collection[str] = ()) -> str:
    """The text of README.md: metadata that the Hub reads, then what people do.

    Args:
        repo: ORG/NAME of the repository.
        files: names of those that are written already.
    """
    return f"---\n{_data(export).to_yaml()}\n---\n\n{_body(export, repo or REPO, files)}"


def _data(export: Export) -> ModelCardData:
    page = _page(export.license_link)
    known = LICENSES.get(export.license)
    terms: dict[str, Any] = {"license": known or "other"}
    if not known and export.license:
        terms |= {"license_name": _slug(export.license), "license_link": page or None}
    results = [
        EvalResult(
            task_type=TASKS[export.network.task],
            dataset_type=export.dataset or "other",
            dataset_name=result.dataset,
            dataset_config=result.protocol,
            metric_type=FIGURES[name][0],
            metric_name=f"{FIGURES[name][1]}, {_protocol(result)}",
            metric_value=getattr(result, name),
        )
        for result in export.results
        for name in FIGURES
        if getattr(result, name) is not None
    ]
    return ModelCardData(
        library_name="timm",
        pipeline_tag=TASKS[export.network.task],
        tags=["timm", "in-place-abn", "iabn_hub", TASKS[export.network.task]],
        datasets=[export.dataset] if export.dataset else None,
        metrics=sorted({FIGURES[n][0] for r in export.results for n in FIGURES if getattr(r, n) is not None}) or None,
        model_name=export.name,
        eval_results=results or None,
        **terms,
    )


def eval_results(export: Export, benchmark: str) -> bytes:
    """The YAML of .eval_results, by which the Hub shows the main figure of each protocol under a benchmark.

    Args:
        benchmark: ORG/DATASET:TASK, as the Hub's dataset names it.

    Raises:
        CheckpointError: there are no figures, or the installed huggingface_hub does not know the format.
    """
    try:
        from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml  # noqa: PLC0415 - of later versions
    except ImportError as e:
        raise CheckpointError("--benchmark needs a later version: pip install -U huggingface_hub") from e
    dataset, _, task = benchmark.partition(":")
    entries = []
    for result in export.results:
        name = next(name for name in ("top1", "miou", "top5") if getattr(result, name) is not None)
        notes = f"{FIGURES[name][1]} in %, {_protocol(result)}, {result.dataset}"
        entries.append(EvalResultEntry(dataset, task, round(getattr(result, name), 4), notes=printable(notes)))
    if not entries:
        raise CheckpointError(f"{export.name}: has no figures for --benchmark")
    text: str = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True)
    return text.encode()


def _slug(text: str) -> str:
    return "-".join(text.lower().split())


def _protocol(result: Result) -> str:
    if result.crop is None:
        return result.note or result.protocol
    resized = f" from {result.resize}" if result.resize else ""
    return f"{'ten crops' if result.ten_crop else 'centre crop'} of {result.crop}{resized}"


def _body(export: Export, repo: str, files: Collection[str]) -> str:
    arch = export.name.partition(".")[0]
    parameters = sum(p.numel() for p in export.network.model.parameters())
    kind = "in-place activated BatchNorm (iABN), which keeps about half the memory for the backward pass"
    if export.network.options.get("norm_layer", "abn" if arch.endswith("_abn") else "iabn") == "abn":
        kind = "standard BatchNorm"
    if arch in CONVERTED_MODELS:
        kind = "converted layers, whose outputs are computed again in the backward pass instead of being kept"
    intro = f"`{arch}` with {kind}. {parameters:,} parameters, {export.network.options['num_classes']:,} classes"
    if export.dataset:
        intro += f", trained on {markdown(export.dataset)}"
    lines = [f"# {export.name}", "", f"{intro}."]
    if export.description:
        lines += ["", f"{markdown(export.description).rstrip('.')}."]
    if export.network.classes and export.network.record is None:
        lines += ["", _classes(export.network.classes)]
    lines += ["", "## Figures", "", *_figures(export)] if export.results else []
    lines += ["", "## Use", "", *_usage(export, arch, repo)]
    lines += _onnx(export, files)
    lines += ["", "## Training", "", *_training(export)]
    for name, title in PICTURES.items():
        if name in export.pictures:
            lines += ["", f"![{title}]({name})"]
    lines += ["", "## Origin", "", *_origin(export)]
    lines += ["", "## Licence", "", _license(export)]
    if export.citation:
        lines += ["", "## Citation", "", markdown(export.citation)]
    return "\n".join(lines) + "\n"


def markdown(text: object) -> str:
    """A foreign text as one line of Markdown that shows it: no HTML, links, code or cells of a table in it."""
    plain = html.escape(" ".join(printable(text).split()), quote=False)
    return re.sub(r"[\\`|\[\]]", r"\\\g<0>", plain)


def _classes(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN_CLASSES:,} more; `config.json` names all" if len(names) > SHOWN_CLASSES else ""
    return f"Classes: {', '.join(map(markdown, names[:SHOWN_CLASSES]))}{more}."


def _figures(export: Export) -> list[str]:
    names = [name for name in FIGURES if any(getattr(result, name) is not None for result in export.results)]
    rows = ["| protocol | data | " + " | ".join(f"{FIGURES[name][1]}, %" for name in names) + " |"]
    rows.append("|---|---|" + "---|" * len(names))
    for result in export.results:
        values = [getattr(result, name) for name in names]
        cells = " | ".join("" if value is None else f"{value:.2f}" for value in values)
        rows.append(f"| {markdown(_protocol(result))} | {markdown(result.dataset)} | {cells} |")
    return rows


def _usage(export: Export, arch: str, repo: str) -> list[str]:
    command = "classify photo.jpg" if export.network.task == "classification" else "segment street.jpg out"
    return [
        "```python",
        "import iabn_hub, timm, torch  # importing iabn_hub registers the architecture in timm",
        "",
        f'model = timm.create_model("hf-hub:{repo}", pretrained=True)',
        f'model = iabn_hub.create_model("{arch}", checkpoint="hf-hub:{repo}")',
        "```",
        "",
        "```sh",
        f"iabn-hub {command} --model hf-hub:{repo}",
        "```",
        "",
        f"`hf-hub:{repo}@COMMIT`, with all 40 digits of a commit, stays what it is, and needs no network once it is "
        "cached.",
    ]


def _onnx(export: Export, files: Collection[str]) -> list[str]:
    if ONNX not in files:
        return []
    config: Any = export.network.model.pretrained_cfg
    size = " × ".join(map(str, config["input_size"]))
    text = (
        f"`{ONNX}` has standard norms and computes the same logits in onnxruntime, up to rounding, from `images` "
        f"(N × {size}, float32, with mean {_numbers(config['mean'])} and standard deviation {_numbers(config['std'])})."
    )
    if INT8 in files:
        text += f" `{INT8}` computes in int8, with ranges measured on images; its logits differ."
    return ["", text]


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.6g}" for value in values)


def _training(export: Export) -> list[str]:
    lines = []
    if export.training:
        lines += ["| setting | value |", "|---|---|"]
        for name, value in export.training.items():
            shown = value if isinstance(value, str | int | float) else json.dumps(value)
            lines.append(f"| {markdown(name)} | {markdown(shown)} |")
    if export.recipe is not None:
        lines += ["", "`recipe.json` holds all of them: `iabn-hub train recipe.json DATA` trains the network again."]
    return lines or ["Its settings were not published."]


def _origin(export: Export) -> list[str]:
    origin = export.origin
    place = ""
    if "google_drive_id" in origin:
        there = quote(str(origin["google_drive_id"]), safe="")
        place = f", [Google Drive {there}](https://drive.google.com/file/d/{there})"
    return [
        f"Converted from a {origin['kind']}, `{markdown(origin['file'])}` ({origin['bytes']:,} bytes, "
        f"md5 `{origin['md5']}`{place}), by `{export.command}`. The values are unchanged, the names "
        "are those of `iabn_hub`. `provenance.json` has the digest of every file here and the versions that made them.",
    ]


def _license(export: Export) -> str:
    if not export.license:
        return "None was stated."
    name, page = markdown(export.license), _page(export.license_link)
    return f"[{name}]({page})." if page else f"{name}."


def _page(link: str) -> str:
    """The link if it leads to a web page, else ''."""
    return link if re.fullmatch(r"https?://[!-~]+", link) and not re.search(r"[()<>\\\"'`]", link) else ""
