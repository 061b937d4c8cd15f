"""The command that validates: `tools/validate.py MODEL DATA`."""

from __future__ import annotations

import argparse
import html
from pathlib import Path
from typing import Any

from ..checkpoints.catalogue import Checkpoint, Result
from ..checkpoints.errors import CheckpointError, UnknownNameError
from ..checkpoints.export import write_atomically
from ..commands import FAILED, INTERRUPTED, USAGE, check_least, complain
from ..images import open_rgb
from ..processes import Processes, processes
from ..segmentation.command import add_views
from .data import val_loader
from .evaluate import Score, evaluate
from .report import page, picture, table
from .scenes import IGNORED
from .sources import Source, load_source
from .splits import DataError, Location, classes_of, open_split
from .transforms import Normalize, val_transform
from .validate_scenes import print_head, validate_scenes

PROGRAM = "validate.py"
DESCRIPTION = """Measure what a network gets right over every image of a split, each counted once, on one device or,
under torchrun, on many: top-1, top-5 and loss of a classifier, intersection over union of each class and their mean
(mIoU) of a segmentation network.

MODEL is a name from 'iabn-hub list', the folder of a run, a snapshot (best.pt), or a file of weights (with --arch if
it does not say its network). DATA is a folder with val/CLASS/*, or what --dataset names; for segmentation as
train_segmentation.py --help says."""
EXAMPLES = """examples:
  python tools/validate.py test_resnet_iabn.mnist data/mnist --check
  python tools/validate.py resnext101_iabn /data/imagenet --ten-crop --check
  python tools/validate.py runs/digits data/mnist --report digits.html
  python tools/validate.py wider_resnet38_deeplab3_iabn.vistas /data/vistas --flip
  python tools/validate.py resnet50-0676ba61.pth /data/imagenet --arch resnet50_iabn --norm-layer abn --activation relu
"""
MANY_CLASSES = 20  # more of them are not all printed
WORST = 10
OF_SCENES = ("scales", "flip", "fusion", "longest", "tile", "ignore")


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    p = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("model", metavar="MODEL", help="name, name.tag, folder of a run, snapshot, or file of weights")
    p.add_argument("data", metavar="DATA", nargs="?", default="", help="a folder with val/CLASS/*")
    scenes = p.add_argument_group("protocol of segmentation")
    add_views(scenes)
    scenes.add_argument("--ignore", type=int, metavar="N", help="number in the label files that "
                        f"counts as nothing, besides {IGNORED} and what the dataset leaves out")  # fmt: skip
    how = p.add_argument_group("protocol of classification")
    how.add_argument("--crop", type=int, metavar="PIXELS", help="side of the crop (default: the network's)")
    how.add_argument(
        "--scale", type=int, metavar="PIXELS", help="shorter side before it (default: in proportion; −1: as it is)"
    )
    how.add_argument("--ten-crop", action="store_true", help="centre and corners, mirrored too: mean of the logits")
    p.add_argument("--check", action="store_true", help="compare with the catalogue's figures for this protocol")
    p.add_argument("--tolerance", type=float, default=0.1, metavar="POINTS", help="of the check (default: 0.1)")
    net = p.add_argument_group("another network for the same weights")
    net.add_argument("--arch", help="the architecture, for a file that does not say it")
    net.add_argument("--norm-layer", choices=("iabn", "abn"), help="in-place, or standard BatchNorm")
    net.add_argument("--activation", choices=("relu", "leaky_relu", "elu", "identity"))
    net.add_argument("--activation-param", type=float, metavar="X", help="slope of leaky_relu, alpha of elu")
    run = p.add_argument_group("how it runs")
    run.add_argument("--device", help="cpu, cuda, cuda:1 … (default: a GPU if there is one)")
    run.add_argument("--batch-size", type=int, default=64, help="images at once, per process (default: 64)")
    run.add_argument("--amp", choices=("off", "bf16", "fp16"), default="off", help="mixed precision")
    run.add_argument("--channels-last", action="store_true")
    run.add_argument("--workers", type=int, default=2, help="processes that read images, per process (default: 2)")
    out = p.add_argument_group("what comes out")
    out.add_argument("--json", action="store_true", help="print JSON for a program instead of text for a person")
    out.add_argument("--report", type=Path, metavar="FILE", help="also write a page: worst classes, mistaken images")
    data = p.add_argument_group("data other than folders")
    data.add_argument("--dataset", default="", help="timm's name: wds, hfds/NAME, hfids/NAME, torch/cifar10 …")
    data.add_argument("--split", default="val", help="its name, or shards (default: val)")
    data.add_argument("--samples", type=int, metavar="N", help="images in a stream that does not say it")
    data.add_argument("--download", action="store_true", help="let the dataset's package fetch it")
    return p


def main(argv: list[str] | None = None) -> int:
    """Validate; returns the exit code: 0 fine, 1 failed, or the check did, 2 wrong usage."""
    p = parser()
    arguments = p.parse_args(argv)
    if not arguments.data and not arguments.dataset:
        p.error("name the folder of the images: MODEL DATA")
    check_least(p, arguments, batch_size=1, workers=0, tolerance=0, crop=16, ignore=0)
    if arguments.ignore is not None and arguments.ignore > IGNORED:
        p.error(f"--ignore is {arguments.ignore}: it must be {IGNORED} or less")
    try:
        with processes(arguments.device) as everyone:
            return validate(arguments, everyone)
    except UnknownNameError as e:
        return complain(PROGRAM, e, USAGE)
    except (CheckpointError, DataError, ValueError, OSError) as e:
        return complain(PROGRAM, e, FAILED)
    except KeyboardInterrupt:
        return complain(PROGRAM, "interrupted", INTERRUPTED)


def validate(arguments: argparse.Namespace, everyone: Processes) -> int:
    """Measure, print, write, check; returns the exit code."""
    source = load_source(arguments.model, arguments.arch)
    options = {
        name: getattr(arguments, name)
        for name in ("norm_layer", "activation", "activation_param")
        if getattr(arguments, name) is not None
    }
    if options:
        source = source.rebuilt(**options)
    if source.task == "segmentation":
        return validate_scenes(arguments, source, everyone)
    usual = parser()
    for name in OF_SCENES:
        if getattr(arguments, name) != usual.get_default(name):
            raise ValueError(f"--{name} is for segmentation, {source.text} is a classifier")
    protocol = _protocol(arguments, source)
    listed = _listed(source.record, protocol) if arguments.check else None
    if arguments.report:
        arguments.report.parent.mkdir(parents=True, exist_ok=True)  # what is wrong with it is better known now
    where = Location(
        arguments.data, arguments.dataset, val_split=arguments.split, val_samples=arguments.samples,
        download=arguments.download,
    )  # fmt: skip
    split = open_split(where, arguments.split)
    classes = _check_classes(source, classes_of(split), arguments.data)
    loader = val_loader(split, val_transform(**protocol), arguments.batch_size, arguments.workers, everyone)
    normalize = Normalize(source.input).to(everyone.device)
    score = evaluate(
        source.model.to(everyone.device), loader, normalize, everyone, amp=arguments.amp,
        channels_last=arguments.channels_last, text="validation",
    )  # fmt: skip
    if score.images == 0:
        reason = f"none of its images can be read; the first: {score.broken[0]}" if score.broken else "it has no images"
        raise DataError(f"{arguments.data}: {reason}")
    facts = _facts(source, protocol, score, classes, arguments.device or str(everyone.device), everyone.count)
    failed = False
    if listed:
        facts["check"] = _compare(listed, score, arguments.tolerance)
        failed = not facts["check"]["passed"]
    if everyone.first:
        _print(facts, arguments.json)
        if arguments.report:
            write_atomically(arguments.report, _report(facts, score, classes, loader.dataset).encode())
    return int(failed)


def _protocol(arguments: argparse.Namespace, source: Source) -> dict[str, Any]:
    crop = arguments.crop or source.input.crop_val
    usual = source.input.scale_val
    scale = arguments.scale or (round(usual * crop / source.input.crop_val) if usual > 0 else usual)
    if 0 < scale < crop:
        raise ValueError(f"--scale {scale} is less than --crop {crop}: the crop would not fit")
    return {"scale": scale, "crop": crop, "ten_crop": arguments.ten_crop}


def _listed(record: Checkpoint | None, protocol: dict[str, Any]) -> Result:
    """The catalogue's figures for a protocol."""
    if record is None:
        raise ValueError("--check compares with the catalogue, so MODEL must be a name from 'iabn-hub list'")
    for result in record.results:
        same = (result.crop, result.ten_crop) == (protocol["crop"], protocol["ten_crop"])
        if same and result.top1 is not None and result.resize in (None, protocol["scale"]):
            return result
    known = "; ".join(
        f"--crop {r.crop}" + (f" --scale {r.resize}" if r.resize else "") + (" --ten-crop" if r.ten_crop else "")
        for r in record.results
    )
    raise ValueError(f"the catalogue has no figure of {record.name} for this protocol; there are: {known}")


def _compare(listed: Result, score: Score, tolerance: float) -> dict[str, Any]:
    pairs = [("top1", listed.top1, score.top1), ("top5", listed.top5, score.top5)]
    differences = {name: found - wanted for name, wanted, found in pairs if wanted is not None}
    images = listed.images in (None, score.images)
    return {
        "protocol": listed.protocol,
        "dataset": listed.dataset,
        "listed": {name: wanted for name, wanted, _ in pairs if wanted is not None},
        "difference": differences,
        "tolerance": tolerance,
        "images": listed.images,
        "passed": images and all(abs(difference) <= tolerance + 1e-9 for difference in differences.values()),
    }


def _check_classes(source: Source, found: tuple[str, ...] | None, data: str) -> tuple[str, ...]:
    """The names of the network's classes; refuses data that has others."""
    count = source.options["num_classes"]
    if found and len(found) != count:
        raise DataError(f"{data} has {len(found)} classes, {source.text} tells {count} apart")
    from_run = source.record is None and source.classes
    if found and from_run and found != source.classes:
        raise DataError(f"{data} has the classes {', '.join(found[:5])} …, {source.text} {', '.join(from_run[:5])} …")
    return source.classes or found or tuple(f"class {i}" for i in range(count))


def _facts(
    source: Source, protocol: dict[str, Any], score: Score, classes: tuple[str, ...], device: str, count: int
) -> dict[str, Any]:
    per_class = [
        {
            "class": i,
            "label": name,
            "images": score.per_class[i],
            "top1": 100 * score.right_per_class[i] / score.per_class[i],
        }
        for i, name in enumerate(classes)
        if score.per_class[i]
    ]
    return {
        "model": source.text,
        "network": source.arch,
        "changes": source.changes,
        "protocol": protocol,
        "images": score.images,
        "top1": score.top1,
        "top5": score.top5,
        "loss": score.loss,
        "images_per_second": score.images / score.seconds,
        "device": device,
        "processes": count,
        "per_class": per_class,
        "skipped": score.broken,
    }


def _print(facts: dict[str, Any], as_json: bool) -> None:
    if print_head(facts, as_json):
        return
    rows = sorted(facts["per_class"], key=lambda row: row["top1"])
    shown = rows if len(rows) <= MANY_CLASSES else rows[:WORST]
    print(f"{'class':<30} {'images':>7} {'top-1':>8}" + ("" if shown is rows else f"   (the worst {WORST})"))
    for row in facts["per_class"] if shown is rows else shown:
        print(f"{row['label'][:30]:<30} {row['images']:>7} {row['top1']:>7.2f}%")
    protocol = facts["protocol"]
    crops = "ten crops" if protocol["ten_crop"] else "centre crop"
    print(
        f"{facts['model']}: top-1 {facts['top1']:.2f} %, top-5 {facts['top5']:.2f} %, loss {facts['loss']:.4f} on "
        f"{facts['images']:,} images ({crops} of {protocol['crop']} from {protocol['scale']}); "
        f"{facts['images_per_second']:.0f} images/s on {facts['processes']} × {facts['device']}"
    )
    if "check" in facts:
        _print_check(facts["check"], facts["images"])


def _print_check(check: dict[str, Any], images: int) -> None:
    figures = ", ".join(
        f"{name} {check['listed'][name]:.2f} ({difference:+.2f})" for name, difference in check["difference"].items()
    )
    verdict = "passed" if check["passed"] else "FAILED"
    print(f"check {verdict}: the catalogue says {figures} on {check['dataset']}; tolerance {check['tolerance']:g}")
    if check["images"] not in (None, images):
        print(f"the catalogue's figure is of {check['images']:,} images, these are {images:,}")


def _report(facts: dict[str, Any], score: Score, classes: tuple[str, ...], images: Any) -> str:
    """The page: figures, the worst classes and what they are taken for, and the surest mistakes."""
    names = ("network", "images", "top1", "top5", "loss", "images_per_second", "processes", "device")
    worst = sorted(facts["per_class"], key=lambda row: row["top1"])[:MANY_CLASSES]
    confusion = []
    for row in worst:
        taken = sorted(((n, g) for (of, g), n in score.confusions.items() if of == row["class"]), reverse=True)
        text = ", ".join(f"{classes[guess]} ({count})" for count, guess in taken[:5])
        confusion.append((row["label"], row["images"], row["top1"], text or "nothing else"))
    figures = []
    for mistake in score.mistakes:
        name = images.name(mistake.index)
        shown = _thumbnail(name)
        caption = table((), [("is", classes[mistake.label]), ("taken for", classes[mistake.guess]),
                             ("probability", mistake.probability)])  # fmt: skip
        figures.append(f"<figure>{shown}<figcaption>{html.escape(Path(name).name)}{caption}</figcaption></figure>")
    return page(
        f"Validation of {facts['model']}",
        table(("", ""), [*((name, facts[name]) for name in names), *facts["protocol"].items()]),
        "".join(f"<p>{html.escape(change)}</p>" for change in facts["changes"]),
        "<h2>The worst classes</h2>",
        table(("class", "images", "top-1, %", "taken for"), confusion),
        "<h2>The surest mistakes</h2>" if figures else "",
        *figures,
    )


def _thumbnail(path: str) -> str:
    """The picture in a file, small; nothing where there is no such file (in an archive, a stream)."""
    if not Path(path).is_file():
        return ""
    image = open_rgb(path)
    image.thumbnail((160, 160))
    return picture(image)
