"""Architectures that transformers cannot compute in bfloat16: their code multiplies it with float32, as in xLSTM."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adaptkit.errors import UsageError
from adaptkit.networks import activations


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
        about_dtypes = any(word in str(error).lower() for word in ("dtype", "scalar type", compute_dtype))
        if compute_dtype == "float32" or not about_dtypes or not _is_from_transformers(error):
            raise
        raise UsageError(
            f"{base}: transformers cannot compute this architecture in {compute_dtype} ({str(error).splitlines()[0]})",
            hint="use --compute-dtype float32",
        ) from error


def _is_from_transformers(error: RuntimeError) -> bool:
    """Return whether the innermost code is transformers', apart from torch's and what only watches its operations."""
    modules = [str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    own = [name for name in modules if not name.startswith("torch.") and name != activations.__name__]
    return bool(own) and own[-1].startswith("transformers.")
