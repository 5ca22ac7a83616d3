"""adaptkit: quantize, fine-tune, merge, unmerge and publish language-model adapters, on checkpoint files.

The public names below load on first use, so that ``import adaptkit`` does not import torch.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "quantize": "adaptkit.operations.quantize",
    "dequantize": "adaptkit.operations.dequantize",
    "merge": "adaptkit.operations.merge",
    "unmerge": "adaptkit.operations.unmerge",
    "stack": "adaptkit.operations.stack",
    "diff": "adaptkit.operations.diff",
    "verify": "adaptkit.operations.verify",
    "train": "adaptkit.training.loop",
    "evaluate": "adaptkit.training.evaluate",
    "publish": "adaptkit.hub.publish",
    "pull": "adaptkit.hub.download",
}

__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'adaptkit' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
