#!/usr/bin/env python
"""Train a network on an image folder; writes model.safetensors and metrics.json.

DATA holds train/CLASS/* and val/CLASS/*. The bundled network was made with

    python tools/mnist_images.py data/mnist
    python tools/train.py test_resnet_iabn data/mnist --out runs/mnist --img-size 64 --crop-pct 1 \\
        --epochs 20 --learning-rate 0.1 --batch-size 64 --min-scale 0.6 --hflip 0
"""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

import timm.data
import torch

import iabn_hub
from iabn_hub.checkpoints.export import save_safetensors, write_atomically
from iabn_hub.training.data import Augmentation, open_folders
from iabn_hub.training.loop import Schedule, evaluate, train

LIMITS = (
    ("img_size", 32, 4096),
    ("crop_pct", 0.1, 1),
    ("epochs", 1, 10_000),
    ("batch_size", 2, 1_000_000),
    ("learning_rate", 1e-9, 1e3),
    ("weight_decay", 0, 1),
    ("min_scale", 0.01, 1),
    ("hflip", 0, 1),
    ("workers", 0, 256),
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a name from 'iabn-hub list'")
    parser.add_argument("data", type=Path, help="folder with train/CLASS/* and val/CLASS/*")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results; made if missing")
    parser.add_argument("--overwrite", action="store_true", help="replace results that are already in OUT")
    parser.add_argument("--norm-layer", default=None, help="iabn, iabn_sync or abn (default: the model's own)")
    parser.add_argument("--img-size", type=int, default=None, help="side of the input, pixels (default: the model's)")
    parser.add_argument("--crop-pct", type=float, default=None, help="part of a validation image that is looked at")
    parser.add_argument("--epochs", type=int, default=90)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=0.1)
    parser.add_argument("--weight-decay", type=float, default=1e-4)
    parser.add_argument("--min-scale", type=float, default=0.08, help="smallest random crop, as a part of the area")
    parser.add_argument("--hflip", type=float, default=0.5, help="probability of mirroring a training image")
    parser.add_argument("--workers", type=int, default=2, help="processes that read images")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for name, low, high in LIMITS:
        value = getattr(arguments, name)
        if value is not None and not low <= value <= high:
            parser.error(f"--{name.replace('_', '-')} is {value}: it must be {low:g} to {high:g}")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    weights, metrics = arguments.out / "model.safetensors", arguments.out / "metrics.json"
    for path in (weights, metrics):
        if path.exists() and not arguments.overwrite:
            raise FileExistsError(f"{path} exists already: name another --out, or pass --overwrite")
    arguments.out.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(arguments.seed)
    device = torch.zeros(1, device=arguments.device).device
    wanted = {} if arguments.crop_pct is None else {"crop_pct": arguments.crop_pct}
    if arguments.img_size is not None:
        wanted["input_size"] = (3, arguments.img_size, arguments.img_size)
    probe = iabn_hub.create_model(arguments.model, device="meta")
    cfg = timm.data.resolve_data_config(wanted, model=probe)
    cfg = {k: cfg[k] for k in ("input_size", "mean", "std", "interpolation", "crop_pct")}
    folders = open_folders(
        arguments.data,
        cfg,
        Augmentation(arguments.min_scale, arguments.hflip),
        arguments.batch_size,
        arguments.workers,
        arguments.seed,
    )
    if len(folders.train) == 0:
        raise ValueError(f"{arguments.data}/train has fewer images than one batch of {arguments.batch_size}")
    model = iabn_hub.create_model(
        arguments.model, num_classes=len(folders.classes), norm_layer=arguments.norm_layer
    ).to(device)

    schedule = Schedule(arguments.epochs, arguments.learning_rate, arguments.weight_decay)
    started = time.time()
    rows = []
    for row in train(model, folders.train, len(folders.train), schedule, device):
        score = evaluate(model, folders.val, device)
        rows.append(row | {"top1": score.top1, "top5": score.top5, "val_loss": score.loss})
        print(
            f"epoch {row['epoch']}/{arguments.epochs}  loss {row['loss']:.4f}  "
            f"top-1 {score.top1:.2f} %  {row['images_per_second']:.0f} images/s",
            flush=True,
        )
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    made_with = {k: str(v) for k, v in vars(arguments).items() if k not in ("out", "data", "overwrite")}
    save_safetensors(state, weights, {"arch": arguments.model, "iabn_hub": iabn_hub.__version__})
    report = {
        "model": arguments.model,
        "classes": folders.classes,
        "data_config": cfg,
        "arguments": made_with,
        "seconds": round(time.time() - started, 1),
        "result": dataclasses.asdict(score),
        "epochs": rows,
    }
    write_atomically(metrics, (json.dumps(report, indent=1) + "\n").encode())
    print(f"{weights}  {weights.stat().st_size:,} bytes  top-1 {score.top1:.2f} % of {score.images} images")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted; nothing was written")
    except (FloatingPointError, OSError, RuntimeError, ValueError) as error:
        sys.exit(f"train.py: {error}")
