"""Errors for folders without an adapter's configuration or weights, with hints that depend on the files found."""

from pathlib import Path

from adaptkit.checkpoint.adapter_config import KOHYA
from adaptkit.checkpoint.foreign import OF_IMAGES, is_of_diffusers
from adaptkit.checkpoint.header import read_header
from adaptkit.checkpoint.layout import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_WEIGHTS_NAME,
    INDEX_NAME,
    SINGLE_NAME,
    look_below,
)
from adaptkit.errors import AdapterError, AdaptkitError

_PICKLE_NAME = "adapter_model.bin"
_SHARDS = "adapter_model-*.safetensors"
_UNPICKLE = (  # not with peft: it would rewrite the configuration, which older releases interpreted differently
    'in that folder, run python -c "import torch, safetensors.torch as s; '
    f"t = torch.load('{_PICKLE_NAME}', 'cpu', weights_only=True); "
    f"s.save_file({{k: v.contiguous().clone() for k, v in t.items()}}, '{ADAPTER_WEIGHTS_NAME}')\""
)
_JOIN = (
    'in that folder, run python -c "import glob, safetensors.torch as s; '
    f"s.save_file({{k: t for f in glob.glob('{_SHARDS}') for k, t in s.load_file(f).items()}}, "
    f"'{ADAPTER_WEIGHTS_NAME}')\""
)


def no_configuration_error(root: Path) -> AdapterError:
    """Return the error for a folder without ``adapter_config.json``; names adapters below, or another tool's file."""
    missing = f"{root}: not an adapter: {ADAPTER_CONFIG_NAME} not found"
    for file in sorted(root.iterdir()):
        writer = "diffusers" if is_of_diffusers(file.name) else "kohya" if _is_kohya(file) else ""
        if writer:
            return AdapterError(f"{missing}, and {file.name} is in the format of {writer}", hint=OF_IMAGES)
    return AdapterError(missing, hint=look_below(root, "pass the folder that contains the adapter", models=False))


def _is_kohya(file: Path) -> bool:
    """Return whether a file has tensors named as kohya's trainers name them (mostly adapters of image models)."""
    try:
        return file.suffix == ".safetensors" and any(KOHYA.search(s.name) for s, _ in read_header(file).tensors)
    except AdaptkitError:  # not a safetensors file
        return False


def no_weights_error(root: Path) -> AdapterError:
    """Return the error for an adapter without the file that peft reads; it says how to convert a pickle or shards."""
    found, hint = "", "download or copy the whole adapter again"
    if (root / _PICKLE_NAME).is_file():
        found, hint = f" (the pickled {_PICKLE_NAME} is not loaded)", _UNPICKLE
    elif any(root.glob(_SHARDS)):
        found, hint = f", only shards ({_SHARDS}), which peft does not read either", _JOIN
    elif (root / SINGLE_NAME).exists() or (root / INDEX_NAME).exists():
        found = f" beside {ADAPTER_CONFIG_NAME}"
        hint = f"if the folder holds a checkpoint only, remove {ADAPTER_CONFIG_NAME}; otherwise {hint}"
    return AdapterError(f"{root}: {ADAPTER_WEIGHTS_NAME} not found{found}", hint=hint)
