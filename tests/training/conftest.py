"""Quantized tiny models for the trainer, and a fixture that runs Triton kernels.

They run on the GPU if there is one, otherwise in Triton's interpreter. Triton chooses when it is imported, and other
tests import it without the interpreter, so that has its own process.
"""

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from adapted import packed_in

from adaptkit.operations.quantize import quantize

WORKER = """
import pickle, sys
from adaptkit.training.fast import gpu_entropy, gpu_layers
from adaptkit.training.network import decode, decode_gpu
while True:
    try:
        name, arguments = pickle.load(sys.stdin.buffer)
    except EOFError:
        break
    if name == "cross_entropy":
        found = gpu_entropy.cross_entropy(*arguments), arguments[0]
    else:
        function = next(getattr(m, name) for m in (gpu_layers, decode_gpu, decode) if hasattr(m, name))
        found = function(*arguments)
    found = arguments[-1] if found is None else found
    pickle.dump(found, sys.stdout.buffer)
    sys.stdout.buffer.flush()
"""


def on(where: str, value: Any) -> Any:
    """Move tensors to a device, also inside tuples and value types; views stay views of a larger storage."""
    if isinstance(value, tuple):
        return tuple(on(where, item) for item in value)
    if is_dataclass(value):
        return replace(value, **{field.name: on(where, getattr(value, field.name)) for field in fields(value)})
    if not isinstance(value, torch.Tensor) or value.device.type == where:
        return value
    whole = value.as_strided((value.untyped_storage().nbytes() // value.itemsize,), (1,), 0)
    return whole.to(where).as_strided(value.shape, value.stride(), value.storage_offset())


@pytest.fixture(scope="session")
def triton_kernel() -> Iterator[Callable[..., Any]]:
    """Call a function that launches Triton kernels, with CPU tensors; returns its last argument if it returns None.

    cross_entropy also returns its logits afterwards.
    """
    pytest.importorskip("triton", reason="Triton is not installed")
    if torch.cuda.is_available():
        from adaptkit.training.fast import gpu_entropy, gpu_layers
        from adaptkit.training.network import decode, decode_gpu

        def on_device(name: str, *arguments: Any) -> Any:
            moved = on("cuda", arguments)
            if name == "cross_entropy":
                return on("cpu", (gpu_entropy.cross_entropy(*moved), moved[0]))
            function = next(getattr(m, name) for m in (gpu_layers, decode_gpu, decode) if hasattr(m, name))
            found = function(*moved)
            return on("cpu", moved[-1] if found is None else found)

        yield on_device
        return
    worker = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", WORKER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).resolve().parents[2],
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


@pytest.fixture(scope="session")
def deep_nf4(made):
    """Seven layers, so that segments differ in length."""
    quantize(tiny.write_llama(made / "deep", layers=7), made / "deep-nf4")
    return made / "deep-nf4"


@pytest.fixture
def prose(tmp_path):
    path = tmp_path / "prose.txt"
    path.write_text("the rivers in the north are quiet and the metals at night are not. There are nine whales. " * 12)
    return path


@pytest.fixture(scope="session")
def packed(made):
    """A quantized tiny model."""
    return packed_in(made, "llama")
