"""Errors for folders without an adapter's configuration or weights, with hints that depend on the files found."""

from pathlib import Path

from adaptkit.checkpoint._adapter_keys import KOHYA
from adaptkit.checkpoint.header import read_header
from adaptkit.checkpoint.layout import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_WEIGHTS_NAME,
    INDEX_NAME,
    SINGLE_NAME,
    is_adapter,
    look_below,
)
from adaptkit.checkpoint.other_weights import OF_IMAGES, other_writer
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


def require_configured(root: Path) -> None:
    """Reject a folder without ``adapter_config.json``.

    Raises:
        AdapterError: the hint names adapters in subfolders, or says what to do with another tool's file.
    """
    if is_adapter(root):
        return
    missing = f"{root}: not an adapter: {ADAPTER_CONFIG_NAME} not found"
    for file in sorted(root.iterdir()):
        writer, hint = other_writer(file.name) or (("kohya", OF_IMAGES) if _is_kohya(file) else ("", ""))
        if writer:
            raise AdapterError(f"{missing}, and {file.name} is in the format of {writer}", hint=hint)
    raise AdapterError(missing, hint=look_below(root, "pass the folder that contains the adapter", models=False))


def _is_kohya(file: Path) -> bool:
    """Return whether a file has tensors named as kohya's trainers name them (mostly adapters of image models)."""
    if file.suffix != ".safetensors":
        return False
    try:
        return any(KOHYA.search(spec.name) for spec, _ in read_header(file).tensors)
    except AdaptkitError:  # not a safetensors file
        return False


def require_weights(root: Path) -> None:
    """Reject an adapter without the single safetensors file that peft reads.

    Raises:
        AdapterError: the hint says how to convert a pickle or shards to it, or that the folder may be a checkpoint's.
    """
    if (root / ADAPTER_WEIGHTS_NAME).exists():
        return
    found, hint = "", "download or copy the whole adapter again"
    if (root / _PICKLE_NAME).is_file():
        found, hint = f" (the pickled {_PICKLE_NAME} is not loaded)", _UNPICKLE
    elif any(root.glob(_SHARDS)):
        found, hint = f", only shards ({_SHARDS}), which peft does not read either", _JOIN
    elif (root / SINGLE_NAME).exists() or (root / INDEX_NAME).exists():
        found = f" beside {ADAPTER_CONFIG_NAME}"
        hint = f"if the folder holds a checkpoint only, remove {ADAPTER_CONFIG_NAME}; otherwise {hint}"
    raise AdapterError(f"{root}: {ADAPTER_WEIGHTS_NAME} not found{found}", hint=hint)
