"""Errors in transformers' own code for an architecture, as one line: dtypes that it mixes, answers that it cannot give.

xLSTM has both: it multiplies float32 with bfloat16, and keeps a state of another shape for the next token.
"""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adaptkit.errors import UsageError
from adaptkit.models import activations
from adaptkit.training.out_of_memory import is_out_of_memory


@contextmanager
def reports_unsupported_dtype(base: Path, compute_dtype: str) -> Iterator[None]:
    """Turn an error of the block about dtypes into a one-line UsageError, if code of transformers caused it.

    Args:
        base: the model's folder.
        compute_dtype: dtype of its activations; errors in float32 are left alone.

    Raises:
        UsageError: transformers mixes the dtype with others, or uses an operation that torch does not have for it.
    """
    try:
        yield
    except RuntimeError as error:
        if not _is_unsupported_dtype(error, compute_dtype):
            raise
        raise UsageError(
            f"{base}: transformers cannot compute this architecture in {compute_dtype} ({_first_line(error)})",
            hint="use --compute-dtype float32",
        ) from error


@contextmanager
def reports_failed_answers(base: Path, compute_dtype: str) -> Iterator[None]:
    """Turn an error while answers are generated into a one-line UsageError, if it is in an architecture's own code.

    Args:
        base: the model's folder.
        compute_dtype: dtype of its activations.

    Raises:
        UsageError: names the module of transformers.
    """
    try:
        yield
    except RuntimeError as error:
        module = _innermost(error)
        in_model = module.startswith("transformers.models.")
        if not in_model or is_out_of_memory(error) or _is_unsupported_dtype(error, compute_dtype):
            raise
        raise UsageError(
            f"{base}: {module}, the architecture's own code, cannot generate answers ({_first_line(error)})",
            hint="measure losses only: leave out --generate, --prompt and --sample-prompts",
        ) from error


def _is_unsupported_dtype(error: RuntimeError, compute_dtype: str) -> bool:
    """Return whether an error is about dtypes, and raised by transformers' code, or by torch in its backward pass."""
    about_dtypes = any(word in str(error).lower() for word in ("dtype", "scalar type", compute_dtype))
    if compute_dtype == "float32" or not about_dtypes:
        return False
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    in_backward = str(frame.f_globals.get("__name__")).startswith("torch.autograd.")
    return in_backward or _innermost(error).startswith("transformers.")


def _innermost(error: RuntimeError) -> str:
    """Return the module of the innermost code, apart from torch's and what only watches its operations."""
    modules = [str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    own = [name for name in modules if not name.startswith("torch.") and name != activations.__name__]
    return own[-1] if own else ""


def _first_line(error: RuntimeError) -> str:
    return str(error).partition("\n")[0]
