"""Use a network as a backbone: feature maps at several strides, and a segmentation head on the last one."""

import timm
import torch

import iabn_hub  # noqa: F401  (importing it registers the models in timm)
from iabn_hub.models.iabn_deeplab import DeepLabV3
from iabn_hub.models.network import norm_factory

images = torch.randn(2, 3, 128, 128)

backbone = timm.create_model("resnet18_iabn", features_only=True)
for channels, features in zip(backbone.feature_info.channels(), backbone(images)):
    print(f"{channels:>4} channels at {features.shape[2]} × {features.shape[3]}")

dilated = timm.create_model("resnet18_iabn", features_only=True, output_stride=8)
network = DeepLabV3(dilated, dilated.feature_info.channels()[-1], num_classes=19, norm=norm_factory())
print("logits:", tuple(network(images).shape))
