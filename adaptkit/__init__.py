"""adaptkit: quantize, fine-tune, merge, unmerge and publish language-model adapters, on checkpoint files.

The public names below load on first use, so that ``import adaptkit`` does not import torch. Every operation is a
function that returns a report; its options are a frozen dataclass. Exceptions are defined in ``adaptkit.errors``.
"""

from importlib import import_module
from typing import Any

from adaptkit import errors as errors

__version__ = "0.1.0"

_PUBLIC = {
    "AdaptkitError": "adaptkit.errors",
    "AdoptOptions": "adaptkit.operations.options",
    "Calibration": "adaptkit.operations.options",
    "DequantizeOptions": "adaptkit.operations.options",
    "EvaluateOptions": "adaptkit.training.evaluation.options",
    "ExtractOptions": "adaptkit.operations.options",
    "MergeOptions": "adaptkit.operations.options",
    "PlanOptions": "adaptkit.training.plan_options",
    "PublishOptions": "adaptkit.hub.options",
    "PullOptions": "adaptkit.hub.options",
    "QuantizeOptions": "adaptkit.operations.options",
    "ResizeOptions": "adaptkit.operations.options",
    "RunOptions": "adaptkit.pipeline.options",
    "Signer": "adaptkit.checkpoint.signing",
    "StackOptions": "adaptkit.operations.options",
    "TrainConfig": "adaptkit.training.config",
    "Trust": "adaptkit.checkpoint.signing",
    "VerifyOptions": "adaptkit.operations.options",
    "adopt": "adaptkit.operations.adopt",
    "check": "adaptkit.operations.check",
    "compare": "adaptkit.training.evaluation.comparison",
    "dequantize": "adaptkit.operations.dequantize",
    "diff": "adaptkit.operations.diff",
    "evaluate": "adaptkit.training.evaluation.evaluate",
    "extract": "adaptkit.operations.extract",
    "inspect": "adaptkit.operations.inspect",
    "merge": "adaptkit.operations.merge",
    "plan": "adaptkit.training.plan",
    "publish": "adaptkit.hub.publish",
    "pull": "adaptkit.hub.pull",
    "quantize": "adaptkit.operations.quantize",
    "resize": "adaptkit.operations.resize",
    "resolve_source": "adaptkit.hub.sources",
    "run": "adaptkit.pipeline.run",
    "stack": "adaptkit.operations.stack",
    "train": "adaptkit.training.loop",
    "unmerge": "adaptkit.operations.unmerge",
    "verify": "adaptkit.operations.verify",
}

__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'adaptkit' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "errors"]
