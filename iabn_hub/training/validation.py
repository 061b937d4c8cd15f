"""Validate a network over every image of a split, and compare with the published figures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from ..checkpoints.catalogue import Checkpoint
from ..datasets.digest import digest_of
from ..datasets.folders import DataError, Location
from ..datasets.transforms import Normalize
from ..evaluation import Runtime, evaluate
from ..files import write_atomically
from ..models.pretrained import Pretrained, load_pretrained
from ..recipes.metrics import read_metrics
from ..world import World

METRICS = "metrics.json"
CHECKED = ("top1", "top5", "miou")


class ValidationProtocol(Protocol):
    """How a network of one task is validated; `settings` are printed with the results."""

    def settings(self) -> dict[str, Any]: ...

    def published(self, record: Checkpoint) -> dict[str, Any]:
        """The published figures for this protocol: `protocol`, `dataset`, `published` by metric, `images`.

        Raises:
            ValueError: there are none; the message lists the protocols that have some.
        """

    def open(self, location: Location, batch_size: int, workers: int, world: World) -> tuple[Any, Any]:
        """Batches of this rank's share of the images, and the names of the classes where the data states them."""

    def new_metrics(self, classes: tuple[str, ...], device: torch.device) -> Any:
        """Empty metrics."""

    def results(self, metrics: Any, classes: tuple[str, ...]) -> dict[str, Any]:
        """Metrics by name, and `per_class`."""

    def lines(self, facts: dict[str, Any]) -> list[str]:
        """The results for a terminal."""

    def report(self, facts: dict[str, Any], metrics: Any, classes: tuple[str, ...], dataset: Any) -> str:
        """The results as an HTML page."""


@dataclass(frozen=True)
class ValidateOptions:
    """What to validate, and how.

    Args:
        name, arch: of the network, see `load_pretrained`.
        location: of the images; its `val_split` is validated.
        network: options of a network that is built for the same weights, such as `norm_layer`.
        check: compare with the published figures, or those of the run; a difference of up to `tolerance` points passes.
        batch_size: images at once, per rank; for classification.
        workers: processes that read images, per rank.
        report: write an HTML page there.
    """

    name: str
    location: Location
    arch: str | None = None
    network: dict[str, Any] = field(default_factory=dict)
    check: bool = False
    tolerance: float = 0.1
    batch_size: int = 64
    workers: int = 2
    runtime: Runtime = field(default_factory=Runtime)
    report: Path | None = None


def validate(
    options: ValidateOptions, make_protocol: Callable[[Pretrained], ValidationProtocol], world: World
) -> tuple[dict[str, Any], list[str]]:
    """Validate a network.

    Args:
        make_protocol: makes the protocol of a loaded network.

    Returns:
        The results, ready for JSON, and the same as lines for a terminal. `check` holds the comparison.

    Raises:
        CheckpointError, DataError, ValueError: the network or the data cannot be used, or do not fit each other.
    """
    network = load_pretrained(options.name, options.arch)
    if options.network:
        network = network.rebuilt(**options.network)
    protocol = make_protocol(network)
    check = _stated(network, protocol, Path(options.name)) if options.check else None
    if options.report:
        options.report.parent.mkdir(parents=True, exist_ok=True)  # a wrong path is better known now
    loader, found = protocol.open(options.location, options.batch_size, options.workers, world)
    _check_classes(network, found, options.location.root)
    classes = network.classes or found or network.labels
    normalize = Normalize(network.evaluation.mean, network.evaluation.std).to(world.device)
    metrics = evaluate(
        network.model.to(world.device), loader, normalize, world, protocol.new_metrics(classes, world.device),
        options.runtime, "validation",
    )  # fmt: skip
    if metrics.images == 0:
        skipped = metrics.skipped
        reason = f"none of its images can be read; the first: {skipped[0]}" if skipped else "it has no images"
        raise DataError(f"{options.location.root}: {reason}")
    facts = {
        "model": network.name,
        "network": network.arch,
        "changes": network.changes,
        "protocol": protocol.settings(),
        "images": metrics.images,
        "data": digest_of(loader.dataset, options.location.root) if world.is_primary else None,
        **protocol.results(metrics, classes),
        "images_per_second": metrics.images / metrics.seconds,
        "device": str(world.device),
        "ranks": world.size,
        "skipped": metrics.skipped,
    }
    if check:
        facts["check"] = _compared(check, facts, options.tolerance)
    if world.is_primary and options.report:
        write_atomically(options.report, protocol.report(facts, metrics, classes, loader.dataset).encode())
    note = getattr(loader.dataset, "note", "")
    notes = [*network.changes, *([note] if note else []), *(f"skipped: {reason}" for reason in metrics.skipped)]
    return facts, [*notes, *protocol.lines(facts), *(_check_lines(facts["check"], facts) if check else [])]


def _stated(network: Pretrained, protocol: ValidationProtocol, run: Path) -> dict[str, Any]:
    """The published figures of a network, or those of its run."""
    if network.record is not None:
        return protocol.published(network.record)
    if not (run / METRICS).is_file():
        raise ValueError(
            "--check compares with published figures or those of a run, so MODEL must be a name from 'iabn-hub list', "
            f"or the folder of a run with {METRICS}"
        )
    metrics = read_metrics(run / METRICS)
    figures = {name: metrics.result[name] for name in CHECKED if isinstance(metrics.result.get(name), float)}
    dataset = "the images of its validation"
    data = dict(metrics.data) if metrics.data else None
    return {"protocol": "of the run", "dataset": dataset, "published": figures, "images": None, "data": data}


def _compared(check: dict[str, Any], facts: dict[str, Any], tolerance: float) -> dict[str, Any]:
    differences = {name: facts[name] - value for name, value in check["published"].items()}
    same_images = check["images"] in (None, facts["images"]) and not _other_data(check, facts)
    passed = same_images and all(abs(difference) <= tolerance + 1e-9 for difference in differences.values())
    return {**check, "difference": differences, "tolerance": tolerance, "passed": passed}


def _other_data(check: dict[str, Any], facts: dict[str, Any]) -> bool:
    """Whether both state what was measured, and it is not the same."""
    stated, found = check.get("data"), facts["data"]
    return bool(stated and found and stated.get("sha256") != found["sha256"])


def _check_lines(check: dict[str, Any], facts: dict[str, Any]) -> list[str]:
    figures = ", ".join(
        f"{name} {check['published'][name]:.2f} ({difference:+.2f})" for name, difference in check["difference"].items()
    )
    verdict = "passed" if check["passed"] else "FAILED"
    lines = [f"check {verdict}: published {figures} on {check['dataset']}; tolerance {check['tolerance']:g}"]
    if check["images"] not in (None, facts["images"]):
        lines.append(f"the published figure is of {check['images']:,} images, these are {facts['images']:,}")
    if _other_data(check, facts):
        stated, found = check["data"], facts["data"]
        lines.append(
            f"the figure is of {stated.get('files')} files with the digest {str(stated.get('sha256'))[:16]}, these are "
            f"{found['files']} with {found['sha256'][:16]}: other images or labels"
        )
    return lines


def _check_classes(network: Pretrained, found: tuple[str, ...] | None, data: str) -> None:
    """Refuse data whose classes are not those of the network."""
    count = network.options["num_classes"]
    if found and len(found) != count:
        raise DataError(f"{data} has {len(found)} classes, {network.name} has {count}")
    ours = network.classes if network.record is None else None  # published names may be spelt differently
    if found and ours and found != ours:
        raise DataError(f"{data} has the classes {', '.join(found[:5])} …, {network.name} has {', '.join(ours[:5])} …")
