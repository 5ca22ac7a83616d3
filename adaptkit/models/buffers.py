"""Computing the buffers of a network on the meta device, such as rotary frequencies."""

from collections.abc import Container
from typing import Any

import torch

from adaptkit.errors import CheckpointError

GET_AGAIN = "download the checkpoint again, with its own config.json"
"""Hint of error messages."""


def compute_buffers(network: Any, held: Container[str]) -> None:
    """Compute the buffers on the meta device that no file holds. Parameters must still be on the meta device.

    Initialization runs twice, on buffers filled with 0 and with 1. A buffer whose two results differ was not set.

    Raises:
        CheckpointError: initialization does not set a buffer, so that its value is unknown.
    """
    initializers: dict[str, Any] = {}  # by module path, of the innermost model around it, which has its configuration
    for path, module in network.named_modules():
        initializers[path] = getattr(module, "_init_weights", initializers.get(path.rpartition(".")[0]))
        empty = {
            name: buffer
            for name, buffer in module.named_buffers(path, recurse=False)
            if buffer.is_meta and name not in held
        }
        unknown = list(empty)
        around = path.split(".") if path else []
        above = [".".join(around[:end]) for end in reversed(range(len(around)))]
        for owners in ((path,), (path, *above)):  # in Falcon H1, the model sets a buffer of its layers
            if not unknown:
                break
            seen = []
            for fill in (0, 1):
                for name, buffer in empty.items():
                    module._buffers[name.rpartition(".")[2]] = torch.full_like(buffer, fill, device="cpu")
                for owner in owners:
                    initializers[owner](network.get_submodule(owner))
                seen.append({name: module._buffers[name.rpartition(".")[2]] for name in empty})
            unknown = [name for name in empty if not torch.equal(seen[0][name], seen[1][name])]
        for name in unknown:
            raise CheckpointError(
                f"{name}: missing in the files, and {type(network).__name__} does not compute it", hint=GET_AGAIN
            )
