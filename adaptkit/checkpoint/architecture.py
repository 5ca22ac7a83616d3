"""What transformers says of a checkpoint's architecture, asked without weights and without memory.

transformers is optional: it comes with the extra ``train``.
"""

import contextlib
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.errors import UsageError


@contextlib.contextmanager
def quiet_transformers() -> Iterator[Any]:
    """transformers, without its advice on stderr.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise UsageError("this needs transformers", hint="pip install 'adaptkit[train]'") from error
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield transformers
    finally:
        transformers.logging.set_verbosity(before)


def empty_network(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """Build a checkpoint's causal language model on the meta device.

    Raises:
        UsageError: transformers does not know the architecture, or is not installed.
    """
    with quiet_transformers() as transformers:
        values = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
        kind = values.pop("model_type", None)
        try:
            config = transformers.AutoConfig.for_model(kind, **values)
            with torch.device("meta"):
                return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
            reason = textwrap.shorten(str(error), 200, placeholder=" …")  # may list every architecture there is
            raise UsageError(f"{checkpoint.root}: transformers cannot build a {kind!r} model ({reason})") from error


def load_tokenizer(root: Path) -> Any:
    """Load a checkpoint's tokenizer; never runs code from the folder.

    Raises:
        UsageError: there is none.
    """
    with quiet_transformers() as transformers:
        try:
            return transformers.AutoTokenizer.from_pretrained(str(root), trust_remote_code=False, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise UsageError(f"{root}: has no tokenizer that transformers can load") from error


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, in either of transformers' two kinds."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
