"""The initial value of an adapter that was initialized to compensate the quantization error of its base.

    adaptkit-compensation.safetensors    <module>.lora_A (r, in), <module>.lora_B (out, r) F32, <module>.scaling F64 [1]

On the quantized base, such an adapter adds s · B A like any other. The 16-bit base has no quantization error, so there
only the difference between the adapter and its initial value is added.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from adaptkit.checkpoint.journal import Output
from adaptkit.checkpoint.layout import COMPENSATION_NAME
from adaptkit.checkpoint.manifest import Manifest
from adaptkit.checkpoint.reader import TensorFiles
from adaptkit.errors import AdapterError, IntegrityError
from adaptkit.numerics.dtypes import cast
from adaptkit.numerics.finite import all_finite
from adaptkit.numerics.lora import LowRank

_AGAIN = "download or copy the whole adapter again"


def write_compensation(output: Output, modules: Mapping[str, LowRank]) -> None:
    """Write an adapter's initial value beside it, exactly."""
    tensors = {}
    for module, term in modules.items():
        tensors[f"{module}.lora_A"] = cast(term.a, np.float32)
        tensors[f"{module}.lora_B"] = cast(term.b, np.float32)
        tensors[f"{module}.scaling"] = np.array([term.scaling], np.float64)
    output.write_tensors(COMPENSATION_NAME, tensors, listed=False)


def read_compensation(root: Path, changes: Mapping[str, LowRank], manifest: Manifest | None) -> dict[str, LowRank]:
    """Read an adapter's initial value, by module; empty if it has no compensation file.

    Raises:
        AdapterError: the file is damaged, or does not belong to this adapter.
        IntegrityError: the manifest lists the file, but it is missing; a merge would then be wrong.
    """
    if not (root / COMPENSATION_NAME).exists():
        if manifest is not None and any(file.path == COMPENSATION_NAME for file in manifest.files):
            raise IntegrityError(f"{root}: {COMPENSATION_NAME} is missing", hint=_AGAIN)
        return {}
    files = TensorFiles(root, [COMPENSATION_NAME])
    found = {name: files.read(name) for name in files.tensors}
    modules = {name.rpartition(".")[0] for name in found}
    expected = {f"{module}.{part}" for module in modules for part in ("lora_A", "lora_B", "scaling")}
    if set(found) != expected or not all(all_finite(array) for array in found.values()):
        raise AdapterError(f"{root}: {COMPENSATION_NAME} is incomplete, or holds NaN or infinity", hint=_AGAIN)
    terms = {}
    for module in sorted(modules):
        lora_a, lora_b, scaling = (found[f"{module}.{part}"] for part in ("lora_A", "lora_B", "scaling"))
        fits = lora_a.ndim == lora_b.ndim == 2 and lora_a.shape[0] == lora_b.shape[1] and scaling.shape == (1,)
        if not fits or module not in changes or changes[module].shape != (lora_b.shape[0], lora_a.shape[1]):
            raise AdapterError(f"{root}: {COMPENSATION_NAME} does not fit the adapter at {module}", hint=_AGAIN)
        terms[module] = LowRank(lora_a, lora_b, float(scaling[0]))
    return terms
