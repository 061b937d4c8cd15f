"""Small networks of each kind that people train, written as their libraries write them, and what they compute."""

import timm
import torch
import torchvision
from torch import nn
from torch.nn import functional as F


def resnet():
    """Bottlenecks with ReLU that overwrite, joins, max pooling."""
    return torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], num_classes=5)


def densenet():
    """Concatenations of all features so far, and norms of them."""
    return torchvision.models.DenseNet(4, (2, 2), 8, num_classes=5)


def mobilenet():
    """Hardswish, squeeze-and-excite, depthwise convolutions, residuals without an activation."""
    return nn.Sequential(nn.Upsample(scale_factor=3), timm.create_model("mobilenetv3_small_050", num_classes=5))


def efficientnet():
    """SiLU in timm's BatchNormAct2d."""
    return timm.create_model("test_efficientnet", num_classes=5)


def convnext():
    """LayerNorm over channels, GELU, layer scale."""
    return timm.create_model("test_convnext", num_classes=5)


class Split(nn.Module):
    """The block of YOLOv8: one part of the features passes through convolutions, and all parts are concatenated."""

    def __init__(self, width):
        super().__init__()
        self.first, self.last = conv_norm(width, width, nn.SiLU()), conv_norm(width * 3 // 2, width, nn.SiLU())
        self.part = nn.Sequential(*(conv_norm(width // 2, width // 2, nn.SiLU()) for _ in range(2)))

    def forward(self, x):
        parts = list(self.first(x).chunk(2, 1))
        parts.append(parts[-1] + self.part(parts[-1]))
        return self.last(torch.cat(parts, 1))


def conv_norm(channels, width, act, stride=1):
    return nn.Sequential(nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), act)


def yolo():
    return nn.Sequential(
        conv_norm(3, 16, nn.SiLU(inplace=True), 2), Split(16), Split(16), nn.Flatten(), nn.LazyLinear(5)
    )


class ResidualBlock3d(nn.Module):
    """As in nnU-Net: instance norm, leaky ReLU that overwrites, a sum before the last activation."""

    def __init__(self, channels, width, stride):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv3d(channels, width, 3, stride, 1), nn.InstanceNorm3d(width, affine=True)
        self.conv2, self.norm2 = nn.Conv3d(width, width, 3, 1, 1), nn.InstanceNorm3d(width, affine=True)
        self.skip = nn.Sequential(nn.Conv3d(channels, width, 1, stride), nn.InstanceNorm3d(width, affine=True))
        self.act1, self.act2 = nn.LeakyReLU(0.01, inplace=True), nn.LeakyReLU(0.01, inplace=True)

    def forward(self, x):
        y = self.norm2(self.conv2(self.act1(self.norm1(self.conv1(x)))))
        return self.act2(y + self.skip(x))


class UNet3d(nn.Module):
    def __init__(self):
        super().__init__()
        self.down1, self.down2 = ResidualBlock3d(3, 6, 1), ResidualBlock3d(6, 8, 2)
        self.up, self.last = nn.ConvTranspose3d(8, 6, 2, 2), ResidualBlock3d(12, 6, 1)
        self.head = nn.Conv3d(6, 5, 1)

    def forward(self, x):
        x = x.unsqueeze(2).expand(-1, -1, 4, -1, -1)[..., ::4, ::4]
        fine = self.down1(x)
        return self.head(self.last(torch.cat((self.up(self.down2(fine)), fine), 1))).mean((2, 3, 4))


def unet3d():
    return UNet3d()


def group_norm():
    layers = [nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3), nn.GroupNorm(1, 8)]
    return nn.Sequential(*layers, nn.Mish(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


def sequence():
    """BatchNorm of (N, C, L) and (N, C)."""
    return nn.Sequential(
        nn.Flatten(2), nn.Conv1d(3, 8, 5, 2), nn.BatchNorm1d(8), nn.GELU(), nn.Conv1d(8, 8, 5, 2), nn.BatchNorm1d(8),
        nn.ELU(), nn.AdaptiveAvgPool1d(2), nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(),
        nn.Linear(8, 5),
    )  # fmt: skip


class Unknown(nn.Module):
    """Written by hand: a branch by data, functions instead of modules, a norm used twice, one without affine."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2)
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, 1, 1) for _ in range(4))
        self.norm = nn.BatchNorm2d(8)  # of two convolutions
        self.bare = nn.BatchNorm2d(8, affine=False, track_running_stats=False)
        self.gate = nn.Parameter(torch.full((1, 8, 1, 1), 0.3))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.gate * torch.tanh(self.norm(self.convs[0](x))) if x.mean() > 0 else -x
        y = self.bare(self.convs[1](x))
        x = F.leaky_relu(y, 0.2) * y.sigmoid()  # the norm's output is used twice
        x = self.convs[3](F.pad(F.hardswish(x), (1, 1, 1, 1)))
        return self.head(F.relu_(x - 0.1).mean((2, 3)))


def unknown():
    return Unknown()


class PreActivation(nn.Module):
    """Norm and activation before each convolution: a sum is what the next norm, and the next sum, begin with."""

    def __init__(self, width, act):
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(2))
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.act = act

    def forward(self, x):
        y = x
        for norm, conv in zip(self.norms, self.convs):
            y = conv(self.act(norm(y)))
        return x + y


def preactivation():
    """Both poolings too: of a sum, and of a convolution's output."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), *(PreActivation(8, nn.ReLU()) for _ in range(3)), nn.MaxPool2d(3, 2, 1),
        *(PreActivation(8, nn.SiLU()) for _ in range(3)), nn.Conv2d(8, 8, 1), nn.AvgPool2d(2), nn.Flatten(),
        nn.LazyLinear(5),
    )  # fmt: skip


KINDS = {
    "resnet": resnet, "densenet": densenet, "mobilenet": mobilenet, "efficientnet": efficientnet, "convnext": convnext,
    "yolo": yolo, "unet3d": unet3d, "group_norm": group_norm, "sequence": sequence, "unknown": unknown,
    "preactivation": preactivation,
}  # fmt: skip


def make(kind, dtype=torch.float64):
    """The network, randomly initialised from a fixed seed, with norms whose weights differ from 1."""
    torch.manual_seed(0)
    model = KINDS[kind]().to(dtype)
    model(torch.randn(2, 3, 32, 32, dtype=dtype))  # lazy layers
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1 and name.endswith("weight"):
                p.uniform_(0.5, 1.5).mul_((torch.rand_like(p) > 0.2).to(dtype) * 2 - 1)
    return model


def images(count=4, dtype=torch.float64):
    return torch.randn(count, 3, 32, 32, dtype=dtype)


def gradients(model, x, loss=lambda y: (y.sin() * y).sum()):
    """The outputs, and the gradients of the input and of all parameters."""
    x = x.clone().requires_grad_()
    y = model(x)
    return [y.detach(), *torch.autograd.grad(loss(y), [x, *(p for p in model.parameters() if p.requires_grad)])]


def assert_equal(ours, theirs, tolerance=1e-9):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        if a.numel():
            assert (a.double() - b.double()).abs().max() <= tolerance * max(1, b.double().abs().max())
