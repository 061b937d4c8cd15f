#!/usr/bin/env python
"""What tools/train.py costs beside a bare loop: forward, backward and step on one batch in memory.

    python tools/benchmark_training.py resnet18_iabn.mnist data/mnist

Both train the recipe's network on the same machine in turn, some steps each round; printed are the medians over the
rounds and of the rounds' ratios. DATA is a folder as for tools/train.py.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from benchmark import machine
from torch.nn import functional as F

from iabn_hub.datasets.folders import Location, classes_of, open_split
from iabn_hub.datasets.loaders import TrainLoader
from iabn_hub.datasets.transforms import Normalize, train_transform
from iabn_hub.recipes.schema import find_recipe, read_recipe
from iabn_hub.training.network import build_network, build_optimizer
from iabn_hub.training.snapshots import Snapshots
from iabn_hub.training.task import task_of
from iabn_hub.training.trainer import Trainer
from iabn_hub.world import autocast, processes


class Silent:
    """A journal that writes nothing."""

    def progress(self, images, epoch, loss):
        pass

    def scalars(self, values, step):
        pass


def bare(recipe, device):
    """A function that makes one step of the recipe's network on one batch."""
    size, training = recipe.input.crop_train, recipe.training
    form = torch.channels_last if training.channels_last else torch.contiguous_format
    network = build_network(recipe).to(device, memory_format=form).train()
    optimizer = build_optimizer(recipe, network)
    images = torch.randn(recipe.optimizer.batch_size, 3, size, size, device=device).to(memory_format=form)
    labels = torch.randint(recipe.network.classes, (len(images),), device=device)

    def step():
        optimizer.zero_grad(set_to_none=True)
        with autocast(device, training.amp):
            logits = network(images)
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()

    return step


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a JSON file, or a name in recipes/")
    parser.add_argument("data", help="folder with train/CLASS/*")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a change to the recipe")
    parser.add_argument("--device", help="cpu or cuda")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20, help="in each round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    path = find_recipe(arguments.recipe, Path(__file__).parent / "recipes")
    source = open_split(Location(arguments.data), "train", True)
    classes = len(classes_of(source) or ())
    recipe = read_recipe(path, [*arguments.set, "training.accumulate=1", f"network.classes={classes}"])
    batch = recipe.optimizer.batch_size
    with processes(arguments.device) as alone:
        loader = TrainLoader(source, train_transform(recipe), batch, 1, 1, 0, arguments.workers, alone)
        loader.steps = min(loader.steps, arguments.steps)
        normalize = Normalize(recipe.input, recipe.input.lighting_train).to(alone.device)
        trainer = Trainer(
            recipe, task_of(recipe), build_network(recipe).to(alone.device), loader, normalize, None, alone,
            Snapshots(Path(), 1), 1e9, lambda: False, print,
        )  # fmt: skip
        step = bare(recipe, alone.device)

        def seconds_of_tool():
            trainer.epoch, trainer.step = 0, 0
            started = time.perf_counter()
            trainer.train_epoch(trainer.network, Silent())
            return time.perf_counter() - started

        def seconds_of_bare():
            started = time.perf_counter()
            for _ in range(loader.steps):
                step()
            if alone.device.type == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - started

        rounds = []
        for number in range(arguments.rounds + 1):
            pair = (
                [seconds_of_tool(), seconds_of_bare()] if number % 2 else [seconds_of_bare(), seconds_of_tool()][::-1]
            )
            if number:  # the first warms up
                rounds.append((*pair, trainer.clock.waited / pair[0]))
        tool, base = (batch * loader.steps / statistics.median(column) for column in list(zip(*rounds))[:2])
        result = {
            "machine": machine(alone.device.type), "recipe": path.stem, "network": recipe.model, "batch": batch,
            "crop": recipe.input.crop_train, "workers": arguments.workers, "steps": loader.steps,
            "rounds": arguments.rounds, "tool_images_per_second": tool, "bare_images_per_second": base,
            "tool_to_bare": statistics.median(b / t for t, b, _ in rounds),
            "waiting": statistics.median(waited for _, _, waited in rounds),
        }  # fmt: skip
    if arguments.json:
        print(json.dumps(result, indent=1))
    else:
        print(f"{result['machine']}, {arguments.workers} workers")
        print(
            f"{recipe.model} at {recipe.input.crop_train}, batch {batch}, {loader.steps} steps × {arguments.rounds}: "
            f"tool {tool:.1f}, bare loop {base:.1f} images/s; {100 * result['tool_to_bare']:.1f} % of the bare loop's, "
            f"{100 * result['waiting']:.1f} % of the time waiting for images"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
