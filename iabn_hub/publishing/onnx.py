"""ONNX files beside the weights of a checkpoint, each checked in onnxruntime before it is kept.

The network is exported with standard norms and in eval mode, from images (N, C, H, W) in float32, normalised, to its
logits. N is free, H and W are those of the evaluation.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..checkpoints.errors import CheckpointError
from ..classification.predict import Classifier
from ..conversion import to_batchnorm
from ..datasets.sources import open_named
from ..models.pretrained import Pretrained

ONNX, INT8 = "model.onnx", "model.int8.onnx"
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OPSET = 18
BATCH = 2
MOST_IMAGES = 128  # to calibrate with
TOLERANCE = 1e-4  # of float32: largest difference of the logits, relative to the largest of them
SIMILARITY = 0.9  # of int8: least mean cosine of the logits to those in float32


@dataclass
class Onnx:
    """What to write beside the weights.

    Args:
        images: a file, folder or pattern of images to calibrate int8 with; None: float32 alone.
        found: what the checks found, by file; filled by `contents`.
    """

    images: str | None = None
    found: dict[str, dict[str, Any]] = field(default_factory=dict)

    def contents(self, network: Pretrained) -> dict[str, bytes]:
        """The files by name. Raises `CheckpointError`."""
        images = None if self.images is None else calibration_images(network, self.images)
        made = {ONNX: onnx_of(network)}
        if images is not None:
            made[INT8] = int8_of(made[ONNX][0], images)
        self.found |= {name: found for name, (_, found) in made.items()}
        return {name: content for name, (content, _) in made.items()}


def onnx_of(network: Pretrained) -> tuple[bytes, dict[str, Any]]:
    """A network as ONNX, compared in onnxruntime with PyTorch on random images.

    The same weights and versions give the same bytes.

    Args:
        network: in eval mode afterwards.

    Returns:
        The file, and what was found: the input's shape, and `difference`: the largest of the logits, relative to the
        largest logit.

    Raises:
        CheckpointError: onnx, onnxscript or onnxruntime is not installed, the network cannot be exported, or the logits
            differ by more than 1e-4.
    """
    _require_packages()
    shape = tuple(network.model.pretrained_cfg["input_size"])  # type: ignore[index]
    images = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    standard = to_batchnorm(network.model.eval()).cpu().float()
    with torch.inference_mode():
        expected = standard(images)
    content = _exported(standard, images[:BATCH], network.name)
    found = torch.from_numpy(_session(content).run(None, {"images": images.numpy()})[0])
    difference = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
    if found.shape != expected.shape or not difference <= TOLERANCE:
        raise CheckpointError(
            f"{network.name}: in onnxruntime the logits of {ONNX} differ by {difference:.1e} of the largest one; at "
            f"most {TOLERANCE:.0e} is allowed"
        )
    return content, {"images": ["N", *shape], "difference": difference}


def int8_of(source: bytes, images: Sequence[Tensor]) -> tuple[bytes, dict[str, Any]]:
    """Weights and activations of an ONNX file quantised to int8, compared with it in onnxruntime.

    Weights have a scale for each channel, activations one for each tensor, from their ranges on the images.

    Args:
        source: as made by `onnx_of`.
        images: batches (N, C, H, W) like those of the training, normalised; see `calibration_images`.

    Returns:
        The file, and what was found: `images`: how many; `cosine`: mean cosine of the logits to those in float32;
        `agreement`: share of the images with the same first class.

    Raises:
        CheckpointError: a package is missing, or the mean cosine is below 0.9.
    """
    _require_packages()
    from onnxruntime.quantization import (  # type: ignore[import-untyped]  # noqa: PLC0415
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process  # type: ignore[import-untyped]  # noqa: PLC0415

    class Images(CalibrationDataReader):
        def __init__(self) -> None:
            self.rest = iter(images)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.rest, None)
            return None if batch is None else {"images": batch.numpy()}

    with tempfile.TemporaryDirectory(prefix="iabn_hub-onnx-") as folder, _quiet():
        given, prepared, quantised = (Path(folder) / name for name in ("given", "prepared", "quantised"))
        given.write_bytes(source)
        quant_pre_process(given, prepared, skip_symbolic_shape=True)  # folds norms into convolutions
        quantize_static(
            prepared, quantised, Images(), quant_format=QuantFormat.QDQ, per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        )  # fmt: skip
        content = _plain(quantised.read_bytes())
    before, after = _session(source), _session(content)
    exact, found = (
        torch.cat([torch.from_numpy(session.run(None, {"images": batch.numpy()})[0]) for batch in images])
        for session in (before, after)
    )
    cosine = float(torch.nn.functional.cosine_similarity(exact, found).mean())
    if not cosine >= SIMILARITY:
        raise CheckpointError(
            f"{INT8} was not written: the logits in int8 have a mean cosine of {cosine:.2f} to those in float32, less "
            f"than {SIMILARITY}: calibrate with more images, and such as the network was trained on"
        )
    agreement = float((exact.argmax(1) == found.argmax(1)).float().mean())
    return content, {"images": len(exact), "cosine": round(cosine, 6), "agreement": round(agreement, 6)}


def calibration_images(network: Pretrained, names: str) -> list[Tensor]:
    """Images of a file, folder or pattern as batches that the network takes, at most 128 of them.

    Raises:
        CheckpointError: the network does not classify, or none of the images can be read.
    """
    if network.task != "classification":
        raise CheckpointError(f"{network.name}: int8 is for networks that classify")
    transform = Classifier(network=network).transform
    found = (image for _, image in open_named(names) if isinstance(image, Image.Image))
    images: list[Tensor] = [transform(image) for image in itertools.islice(found, MOST_IMAGES)]
    if not images:
        raise CheckpointError(f"{names}: holds no image that can be read: name images to calibrate int8 with")
    return list(torch.stack(images).split(BATCH))


def _exported(standard: torch.nn.Module, images: Tensor, name: str) -> bytes:
    try:
        with _quiet(), tempfile.TemporaryDirectory(prefix="iabn_hub-onnx-") as folder:
            program = torch.onnx.export(
                standard, (images,), input_names=["images"], output_names=["logits"], opset_version=OPSET,
                dynamic_shapes=({0: torch.export.Dim("batch", min=1)},), dynamo=True, verbose=False,
            )  # fmt: skip
            assert program is not None
            program.save(Path(folder) / ONNX)
            return _plain((Path(folder) / ONNX).read_bytes())
    except Exception as e:  # whatever the exporter makes of a network it cannot express
        raise CheckpointError(f"{name} cannot be exported to ONNX: {(str(e).splitlines() or ['?'])[0]}") from e


def _plain(content: bytes) -> bytes:
    """Without notes of the exporter, which name files of this machine."""
    import onnx  # noqa: PLC0415

    model = onnx.load_from_string(content)
    graph, graphs = model.graph, [model.graph, *model.functions]
    values = (*graph.value_info, *graph.input, *graph.output, *graph.initializer)
    for each in (model, *graphs, *(node for part in graphs for node in part.node), *values):
        each.doc_string = ""
        del each.metadata_props[:]
    onnx.checker.check_model(model)
    return model.SerializeToString(deterministic=True)


def _session(content: bytes) -> Any:
    import onnxruntime  # type: ignore[import-untyped]  # noqa: PLC0415

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def _require_packages() -> None:
    for package in PACKAGES:
        try:
            importlib.import_module(package)
        except ImportError as e:
            raise CheckpointError(f"ONNX needs {package}: pip install 'iabn-hub[onnx]'") from e


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter reports its progress on stdout."""
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
