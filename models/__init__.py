"""Networks and reference models that pyrobc compresses, one per file; installed as ``pyrobc.models``."""

if __name__ != "pyrobc.models":
    raise ImportError(
        f"models/: got `import {__name__}`; allowed: `import pyrobc.models`, so that each module is loaded once; "
        "fix: write pyrobc.models"
    )

from pyrobc.models.lenet import lenet_5, lenet_5_caffe
from pyrobc.models.mlp import lenet_300_100
from pyrobc.models.resnet import resnet_20, resnet_32, resnet_50
from pyrobc.models.vgg import vgg_16
from pyrobc.models.vit import vit_tiny

__all__ = [
    "lenet_300_100", "lenet_5", "lenet_5_caffe", "resnet_20", "resnet_32", "resnet_50", "vgg_16", "vit_tiny",
]  # fmt: skip
