"""Every classifier by name, for programs, benchmarks and studies."""

from collections.abc import Mapping
from typing import Any

from flax import linen as nn

from train.models.basic_cnn import BasicCNN
from train.models.lenet5 import LeNet5
from train.models.mlp import MLP
from train.models.resnet import ResNet
from train.models.resnet_rs import ResNetRS
from train.models.vgg import VGG, VGG16
from train.models.vit import VisionTransformer

MODELS: Mapping[str, tuple[nn.Module, Mapping[str, Any]]] = {
    "basic-cnn": (BasicCNN(), {}),
    "lenet5": (LeNet5(), {}),
    "mlp": (MLP(hidden=(1024, 1024, 1024), classes=10), {"hidden": (16, 16)}),
    "resnet8": (ResNet((16, 32, 64), (1, 1, 1), classes=10), {"widths": (8, 16, 32)}),
    "vit-digits": (
        VisionTransformer(patch=2, depth=4, heads=4, width=64, classes=10),
        {"depth": 1, "width": 16},
    ),
    "mini-vit-digits": (
        VisionTransformer(
            patch=2, depth=6, heads=6, width=768, classes=10, qkv_bias=False
        ),
        {"depth": 1, "width": 24},
    ),
    "mini-vit": (
        VisionTransformer(
            patch=8, depth=6, heads=6, width=768, classes=10, qkv_bias=False
        ),
        {"depth": 1, "width": 24},
    ),
    "vit-b16": (
        VisionTransformer(patch=16, depth=12, heads=12, width=768, classes=1000),
        {"depth": 1, "width": 24},
    ),
    "resnet20": (
        ResNet((16, 32, 64), (3, 3, 3), classes=10),
        {"widths": (8, 16), "blocks": (1, 1)},
    ),
    "resnet18": (
        ResNet((64, 128, 256, 512), (2, 2, 2, 2), classes=10),
        {"widths": (8, 16), "blocks": (1, 1)},
    ),
    "resnet50": (
        ResNet(
            (64, 128, 256, 512),
            (3, 4, 6, 3),
            classes=1000,
            bottleneck=True,
            large_stem=True,
        ),
        {"widths": (4, 8), "blocks": (1, 1)},
    ),
    "resnet-rs101": (
        ResNetRS((3, 4, 23, 3), classes=1000, dropout=0.25),
        {"blocks": (1,)},
    ),
    "vgg7-bn": (
        VGG(((16,), (64, 64), (128, 128)), classes=10, hidden=(512,), batch_norm=True),
        {"groups": ((8,), (8, 8), (16, 16)), "hidden": (128,)},
    ),
    "vgg16-bn": (
        VGG(VGG16, classes=10, batch_norm=True),
        {"groups": ((8,), (16, 16))},
    ),
    "vgg16": (
        VGG(VGG16, classes=1000, hidden=(4096, 4096)),
        {"groups": ((8,), (16,)), "hidden": (16, 16)},
    ),
}
"""Each with what makes its small form."""
