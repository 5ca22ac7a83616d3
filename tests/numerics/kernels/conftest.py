"""A fixture that runs Triton kernels: on the GPU if there is one, otherwise in Triton's interpreter.

Triton chooses when it is imported, and other tests import it without the interpreter, so that has its own process.
"""

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

WORKER = """
import pickle, sys
from adaptkit.numerics.kernels import _gpu_entropy, _gpu_layers, gpu
while True:
    try:
        name, arguments = pickle.load(sys.stdin.buffer)
    except EOFError:
        break
    if name == "cross_entropy":
        found = _gpu_entropy.cross_entropy(*arguments), arguments[0]
    else:
        found = getattr(_gpu_layers if hasattr(_gpu_layers, name) else gpu, name)(*arguments)
    pickle.dump(found, sys.stdout.buffer)
    sys.stdout.buffer.flush()
"""


def on(where: str, value: Any) -> Any:
    """Move the tensors of arguments or results to a device; views stay views of a larger storage."""
    if isinstance(value, tuple):
        return tuple(on(where, item) for item in value)
    if not isinstance(value, torch.Tensor) or value.device.type == where:
        return value
    whole = value.as_strided((value.untyped_storage().nbytes() // value.itemsize,), (1,), 0)
    return whole.to(where).as_strided(value.shape, value.stride(), value.storage_offset())


@pytest.fixture(scope="session")
def triton_kernel() -> Iterator[Callable[..., Any]]:
    """Call ``gpu.NAME(*arguments)`` with tensors on the CPU; cross_entropy also returns its logits afterwards."""
    pytest.importorskip("triton", reason="Triton is not installed")
    if torch.cuda.is_available():
        from adaptkit.numerics.kernels import _gpu_entropy, _gpu_layers, gpu

        def on_device(name: str, *arguments: Any) -> Any:
            moved = on("cuda", arguments)
            if name == "cross_entropy":
                return on("cpu", (_gpu_entropy.cross_entropy(*moved), moved[0]))
            return on("cpu", getattr(_gpu_layers if hasattr(_gpu_layers, name) else gpu, name)(*moved))

        yield on_device
        return
    worker = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", WORKER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).resolve().parents[3],
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )

    def call(name: str, *arguments: Any) -> Any:
        pickle.dump((name, arguments), worker.stdin)
        worker.stdin.flush()
        return pickle.load(worker.stdout)

    yield call
    worker.stdin.close()
    worker.wait(timeout=60)
    worker.stdout.close()
