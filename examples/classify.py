"""Load a pretrained network through timm, and classify the bundled images."""

import timm
import torch

import iabn_hub  # noqa: F401  (importing it registers the models in timm)
from iabn_hub.classification.predict import DIGITS
from iabn_hub.datasets.images import open_rgb

model = timm.create_model("test_resnet_iabn.mnist", pretrained=True).eval()
config = timm.data.resolve_model_data_config(model)
transform = timm.data.create_transform(**config, is_training=False)

for path in sorted(DIGITS[1].glob("*.png")):
    with torch.inference_mode():
        probabilities = model(transform(open_rgb(path))[None]).softmax(1)[0]
    probability, label = probabilities.max(0)
    print(f"{path.name}: {label.item()} ({100 * probability.item():.1f} %)")
