"""The public names of ``adaptkit/__init__.py``, for editors and type checkers."""

from adaptkit import errors as errors
from adaptkit.checkpoint.signing import Signer as Signer
from adaptkit.checkpoint.signing import Trust as Trust
from adaptkit.errors import AdaptkitError as AdaptkitError
from adaptkit.hub.options import PublishOptions as PublishOptions
from adaptkit.hub.options import PullOptions as PullOptions
from adaptkit.hub.publish import publish as publish
from adaptkit.hub.pull import pull as pull
from adaptkit.hub.sources import resolve_source as resolve_source
from adaptkit.operations.adopt import adopt as adopt
from adaptkit.operations.check import check as check
from adaptkit.operations.dequantize import dequantize as dequantize
from adaptkit.operations.diff import diff as diff
from adaptkit.operations.extract import extract as extract
from adaptkit.operations.inspect import inspect as inspect
from adaptkit.operations.merge import merge as merge
from adaptkit.operations.options import AdoptOptions as AdoptOptions
from adaptkit.operations.options import Calibration as Calibration
from adaptkit.operations.options import DequantizeOptions as DequantizeOptions
from adaptkit.operations.options import ExtractOptions as ExtractOptions
from adaptkit.operations.options import MergeOptions as MergeOptions
from adaptkit.operations.options import QuantizeOptions as QuantizeOptions
from adaptkit.operations.options import ResizeOptions as ResizeOptions
from adaptkit.operations.options import StackOptions as StackOptions
from adaptkit.operations.options import VerifyOptions as VerifyOptions
from adaptkit.operations.quantize import quantize as quantize
from adaptkit.operations.resize import resize as resize
from adaptkit.operations.stack import stack as stack
from adaptkit.operations.unmerge import unmerge as unmerge
from adaptkit.operations.verify import verify as verify
from adaptkit.pipeline.options import RunOptions as RunOptions
from adaptkit.pipeline.run import run as run
from adaptkit.training.config import TrainConfig as TrainConfig
from adaptkit.training.evaluation.comparison import compare as compare
from adaptkit.training.evaluation.evaluate import evaluate as evaluate
from adaptkit.training.evaluation.options import EvaluateOptions as EvaluateOptions
from adaptkit.training.loop import train as train
from adaptkit.training.plan import plan as plan
from adaptkit.training.plan_options import PlanOptions as PlanOptions

__version__: str
__all__: list[str]
