"""Fine-tune EfficientNet-Lite0 on a folder of photos, name one with it, and export it."""

import random
import tempfile
from pathlib import Path

from PIL import Image

import iabn_hub
from iabn_hub.classification.predict import PHOTOS, Classifier
from iabn_hub.cli import main

with tempfile.TemporaryDirectory() as folder:
    # Parts of the bundled photos stand for photos of your own: photos/CLASS/*.jpg
    photos, random_number = Path(folder) / "photos", random.Random(0)
    for path in PHOTOS[1].glob("*.jpg"):
        image = Image.open(path).convert("RGB")
        (photos / path.stem).mkdir(parents=True)
        for number in range(15):
            left, top = random_number.randint(0, image.width - 200), random_number.randint(0, image.height - 200)
            image.crop((left, top, left + 200, top + 200)).save(photos / path.stem / f"{number}.jpg")

    run = f"{folder}/run"
    main(["train", "finetune", str(photos), "--out", run, "--epochs", "1", "--workers", "0"])

    first = Classifier(run).classify(PHOTOS[1] / "coffee.jpg")[0]
    print(f"coffee.jpg: {first.label} ({100 * first.probability:.0f} %)")
    print(f"the network has {iabn_hub.create_model(run).num_classes} classes")
    main(["export", "efficientnet_lite0_iabn.samples", "--from", run, "--to-dir", f"{folder}/export", "--check"])
