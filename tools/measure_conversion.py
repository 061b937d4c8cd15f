#!/usr/bin/env python
"""Measure what iabn_hub.convert does to networks that people train, one row of a table each.

    pip install '.[train]' segmentation-models-pytorch ultralytics dynamic-network-architectures monai
    python tools/measure_conversion.py                                  all networks, about an hour on two cores
    python tools/measure_conversion.py torchvision.resnet50 timm.dla34  these
    python tools/measure_conversion.py --table results.jsonl            the table, in Markdown

Each network is randomly initialised and measured in a process of its own, by training steps in float32 on random
images: norms recomputed, inverted and left; bytes kept for the backward pass and the peak of a step beyond parameters
and gradients, before and after; the time of a step, as the median ratio of paired steps; and in float64 the largest
difference of outputs and of gradients, relative to the largest value of each tensor. Results are appended to
results.jsonl as they come; networks that are in it already are skipped. --only time, memory or float64 measures one of
them, for instance the time when nothing else runs, and the table joins what was measured of each network.
"""

import argparse
import copy
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn

import iabn_hub
from iabn_hub.benchmarks.machine import describe_machine
from iabn_hub.conversion.measure import caller
from iabn_hub.models.libraries import create_from_library, images_of

BATCH, SIZE = 4, 224
ROUNDS = 7
SECONDS = 1200  # for one network
PARTS = {"float64": "outputs", "memory": "kept", "time": "step"}  # what is measured, and a key of its results

TORCHVISION = (
    "resnet18 resnet50 resnext50_32x4d wide_resnet50_2 densenet121 googlenet inception_v3 mobilenet_v2 "
    "mobilenet_v3_large mnasnet1_0 efficientnet_b0 efficientnet_v2_s regnet_y_1_6gf shufflenet_v2_x1_0 vgg16_bn "
    "convnext_tiny swin_t"
).split()
DETECTION = (
    "fasterrcnn_resnet50_fpn fasterrcnn_resnet50_fpn_v2 retinanet_resnet50_fpn_v2 ssdlite320_mobilenet_v3_large".split()
)
SEGMENTATION = "fcn_resnet50 deeplabv3_resnet50 lraspp_mobilenet_v3_large".split()
TIMM = (
    "resnet50d regnety_016 efficientnet_b0 tf_efficientnetv2_s mobilenetv2_100 mobilenetv3_large_100 darknet53 "
    "cspdarknet53 cspresnet50 tresnet_m dla34 hrnet_w18 repvgg_a2 seresnet50 ecaresnet50d resnest50d res2net50_26w_4s "
    "skresnet34 dpn68 ese_vovnet19b_dw inception_v4 xception41 ghostnet_100 fbnetc_100 selecsls42b rexnet_100 mixnet_s "
    "gernet_s resnetv2_50 mobilevit_s mobileone_s1 fastvit_t8 coatnet_0_rw_224 resnetv2_50x1_bit dm_nfnet_f0 "
    "convnext_tiny vit_small_patch16_224"
).split()
OTHERS = (
    "smp.Unet smp.DeepLabV3Plus ultralytics.yolov8n ultralytics.yolo11n nnunet.PlainConvUNet "
    "nnunet.ResidualEncoderUNet monai.DynUNet monai.SegResNet pix2pix.discriminator"
).split()
NETWORKS = (
    *(f"torchvision.{name}" for name in (*TORCHVISION, *DETECTION, *SEGMENTATION)),
    *(f"timm.{name}" for name in TIMM),
    *OTHERS,
)


def images(*shape):
    return torch.randn(*shape)


def create(name):
    """The network of that name, and a sample for it."""
    library, _, model = name.partition(".")
    if library in ("smp", "nnunet", "monai"):
        model, shape = create_from_library(name)
        return model, images(*images_of(shape, BATCH if len(shape) == 3 else 1))
    return globals()[f"from_{library}"](model)


def from_torchvision(name):
    import torchvision

    options = {"weights": None, "weights_backbone": None} if name in (*DETECTION, *SEGMENTATION) else {"weights": None}
    if name in ("googlenet", "inception_v3"):
        options |= {"aux_logits": False, "init_weights": True}
    side = 320  # of images for detection, which are scaled to 800 otherwise
    if "rcnn" in name or "retinanet" in name:
        options |= {"min_size": side, "max_size": side}
    model = torchvision.models.get_model(name, **options)
    if name in DETECTION:
        target = {"boxes": torch.tensor([[20.0, 30.0, 200.0, 220.0]]), "labels": torch.tensor([1])}
        return model, ([torch.rand(3, side, side) for _ in range(2)], [dict(target) for _ in range(2)])
    return model, images(BATCH, 3, *[299 if name == "inception_v3" else SIZE] * 2)


def from_timm(name):
    import timm

    model = timm.create_model(name)
    return model, images(BATCH, *model.pretrained_cfg["input_size"])


def from_ultralytics(name):
    from ultralytics.nn.tasks import DetectionModel

    return DetectionModel(f"{name}.yaml", verbose=False), images(2, 3, 640, 640)


def from_pix2pix(_):
    """The discriminator of Isola et al. (CVPR 2017), which sees patches of 70 × 70."""
    layers = [nn.Conv2d(6, 64, 4, 2, 1), nn.LeakyReLU(0.2, True)]
    for inputs, outputs, stride in ((64, 128, 2), (128, 256, 2), (256, 512, 1)):
        conv = nn.Conv2d(inputs, outputs, 4, stride, 1, bias=False)
        layers += [conv, nn.BatchNorm2d(outputs), nn.LeakyReLU(0.2, True)]
    return nn.Sequential(*layers, nn.Conv2d(512, 1, 4, 1, 1)), images(BATCH, 6, 256, 256)


# ---- measurement -----------------------------------------------------------------------------------------------------


def tensors_of(output):
    return [t for t in torch.utils._pytree.tree_leaves(output) if isinstance(t, torch.Tensor) and t.requires_grad]


def step(model, sample):
    """Outputs and gradients of a training step; random numbers are the same each time."""
    torch.manual_seed(2)
    outputs = tensors_of(caller(model, sample)())
    torch.stack([(t.sin() * t).mean() for t in outputs]).sum().backward()
    return outputs


def moved(sample, dtype):
    def move(t):
        return t.to(dtype) if isinstance(t, torch.Tensor) and t.is_floating_point() else t

    return torch.utils._pytree.tree_map(move, sample)


def differences(model, sample):
    """Largest relative difference in float64 of outputs and of gradients, converted to not converted."""
    if isinstance(sample, torch.Tensor) and sample.dim() == 4:  # float64 takes long: less of each image, if that does
        small = sample[:2, :, :128, :128]
        try:
            copy.deepcopy(model)(small)
            sample = small
        except (RuntimeError, AssertionError, ValueError):
            sample = sample[:2]
    results = []
    for convert in (False, True):
        network = copy.deepcopy(model).double().train()
        if convert:
            iabn_hub.convert(network)
        outputs = step(network, moved(sample, torch.float64))
        results.append(([t.detach() for t in outputs], [p.grad for p in network.parameters() if p.grad is not None]))
    largest = [max(float(t.abs().max()) for t in part if t.numel()) for part in results[0]]
    return [
        max(float((a - b).abs().max()) for a, b in zip(*parts) if a.numel()) / size
        for parts, size in zip(zip(*results), largest)
    ]


def step_ratio(model, sample, rounds):
    """Median over rounds of the time of a converted step, over that of a plain one beside it."""
    converted = copy.deepcopy(model)
    iabn_hub.convert(converted)
    ratios, plain = [], []
    for network in (model, converted):
        step(network, sample)
    for i in range(rounds):
        times = {}
        for network in (model, converted) if i % 2 else (converted, model):
            network.zero_grad(set_to_none=False)
            started = time.perf_counter()
            step(network, sample)
            times[network] = time.perf_counter() - started
        ratios.append(times[converted] / times[model])
        plain.append(times[model])
    return statistics.median(ratios), statistics.median(plain)


def measure(name, parts, rounds):
    torch.manual_seed(1)
    model, sample = create(name)
    model.train()
    row = {"network": name, "machine": describe_machine("cpu")}
    if "float64" in parts:
        row["outputs"], row["gradients"] = differences(model, sample)
    if "memory" in parts:
        report = iabn_hub.convert(copy.deepcopy(model), sample)
        reasons = [layer.reason for layer in report.norms if layer.action == "leave"]
        row |= {
            "recomputed": report.count("recompute"), "inverted": report.count("invert"), "left": len(reasons),
            "reasons": {reason: reasons.count(reason) for reason in dict.fromkeys(reasons)},
            "kept": [report.kept.before, report.kept.after], "peak": [report.peak.before, report.peak.after],
        }  # fmt: skip
    if "time" in parts:
        row["step"], row["seconds"] = step_ratio(model, sample, rounds)
    return row


# ---- the table -------------------------------------------------------------------------------------------------------


def table(rows):
    yield "| network | norms | kept, MB | peak, MB | step | outputs, gradients |"
    yield "|---|---|---|---|---|---|"
    for row in rows:
        if "error" in row:
            yield f"| {row['network']} | not measured: {row['error']} | | | | |"
            continue
        counts = [f"{row[key]} {key}" for key in ("recomputed", "inverted", "left") if row.get(key)]
        sizes = [
            f"{a / 1e6:.0f} → {b / 1e6:.0f} ({b / a:.2f})" for a, b in (row.get(k, (1, 0)) for k in ("kept", "peak"))
        ]
        ratio = f"{row['step']:.2f}" if "step" in row else ""
        same = f"{row['outputs']:.0e}, {row['gradients']:.0e}" if "outputs" in row else ""
        cells = (row["network"], ", ".join(counts) or "none", *sizes, ratio, same)
        yield f"| {' | '.join(cells)} |"


def read(path):
    """One row for each network, of all that was measured of it."""
    rows = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        row = json.loads(line)
        before = rows.setdefault(row["network"], {})
        before.pop("error", None)
        before.update(row)
    return list(rows.values())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=f"default: all {len(NETWORKS)}")
    parser.add_argument("--results", type=Path, default=Path("results.jsonl"), help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="paired steps to time (default: %(default)s)")
    parser.add_argument("--only", choices=sorted(PARTS), help="measure this alone")
    parser.add_argument("--table", type=Path, metavar="RESULTS", help="print the table of these results, and stop")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.table:
        print("\n".join(table(read(given.table))))
        return
    parts = [given.only] if given.only else list(PARTS)
    if given.one:
        print(json.dumps(measure(given.networks[0], parts, given.rounds)))
        return
    unknown = [name for name in given.networks if name not in NETWORKS]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; networks are {', '.join(NETWORKS)}")
    done = {row["network"] for row in read(given.results) if all(PARTS[part] in row for part in parts)}
    names = [name for name in given.networks or NETWORKS if name not in done]
    for number, name in enumerate(names, 1):
        line = [sys.executable, __file__, name, "--one", "--rounds", str(given.rounds)]
        line += ["--only", given.only] if given.only else []
        try:
            run = subprocess.run(line, capture_output=True, text=True, timeout=SECONDS, check=False)
            error = (run.stderr.strip().splitlines() or [f"exit code {run.returncode}"])[-1]
        except subprocess.TimeoutExpired:
            run, error = None, f"more than {SECONDS} s"
        done_well = run is not None and run.returncode == 0
        row = json.loads(run.stdout.splitlines()[-1]) if done_well else {"network": name, "error": error}
        with given.results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"[{number}/{len(names)}]", list(table([row]))[-1], flush=True)


if __name__ == "__main__":
    main()
