"""The text of a calibration."""

from pathlib import Path

from torch import Tensor

from adaptkit.data.windows import read_tokens
from adaptkit.errors import DataError
from adaptkit.operations.options import Calibration


def read_calibration(source: Path, calibration: Calibration) -> Tensor:
    """Return the tokens of a calibration's files, (windows, window) int64, by the tokenizer of a checkpoint.

    Raises:
        DataError: a file cannot be read, or only once.
        UsageError: the checkpoint has no tokenizer, or the window is longer than its model allows.
    """
    for file in calibration.files:
        if file.is_fifo():  # it is read twice: for the tokens, and for the hash in the manifest
            raise DataError(f"{file}: is a pipe, which can be read only once", hint="save it in a file")
    return read_tokens(calibration.files, source, window=calibration.window, max_tokens=calibration.tokens)
