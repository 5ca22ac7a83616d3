"""A folder that lacks a file of an adapter's, and what to do about the files that are there instead."""

from pathlib import Path

from adaptkit.checkpoint._adapter_keys import KOHYA
from adaptkit.checkpoint.adapter_config import is_adapter
from adaptkit.checkpoint.header import read_header
from adaptkit.checkpoint.layout import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, look_below
from adaptkit.errors import AdapterError, AdaptkitError

_PICKLE_NAME = "adapter_model.bin"
_SHARDS = "adapter_model-*.safetensors"
_UNPICKLE = (  # and not with peft, which would write the configuration anew, by which older releases mean other things
    'in that folder, run python -c "import torch, safetensors.torch as s; '
    f"s.save_file(torch.load('{_PICKLE_NAME}', 'cpu', weights_only=True), '{ADAPTER_WEIGHTS_NAME}')\""
)
_JOIN = (
    'in that folder, run python -c "import glob, safetensors.torch as s; '
    f"s.save_file({{k: t for f in glob.glob('{_SHARDS}') for k, t in s.load_file(f).items()}}, "
    f"'{ADAPTER_WEIGHTS_NAME}')\""
)


_WITH_PEFT = "give an adapter of a language model as peft saves it, with its adapter_config.json"
_BY_FILE = {
    "lit_model.pth.lora": (
        "LitGPT",
        "merge it with litgpt merge_lora, convert that with litgpt convert_from_litgpt, save it with transformers, and "
        "make an adapter of it with adaptkit extract",
    ),
    "pytorch_lora_weights.safetensors": ("diffusers", _WITH_PEFT),
    "pytorch_lora_weights.bin": ("diffusers", _WITH_PEFT),
}
"""Who writes a file of this name, and what to do with it."""


def require_configured(root: Path) -> None:
    """Refuse a folder without an adapter's configuration.

    Raises:
        AdapterError: names adapters that lie inside it.
    """
    if is_adapter(root):
        return
    missing = f"{root}: not an adapter: {ADAPTER_CONFIG_NAME} not found"
    for file in sorted(root.iterdir()):
        writer, hint = _BY_FILE.get(file.name) or (("kohya", _WITH_PEFT) if _is_of_kohya(file) else ("", ""))
        if writer:
            raise AdapterError(f"{missing}, and {file.name} is in the format of {writer}", hint=hint)
    raise AdapterError(missing, hint=look_below(root, "pass the folder that contains the adapter", models=False))


def _is_of_kohya(file: Path) -> bool:
    """Whether a file has tensors of kohya's names; it holds a model of images in most cases."""
    if file.suffix != ".safetensors":
        return False
    try:
        return any(KOHYA.search(spec.name) for spec, _ in read_header(file).tensors)
    except AdaptkitError:  # it is none, and whatever it is, no adapter
        return False


def require_weights(root: Path) -> None:
    """Refuse an adapter without the one file of safetensors that peft reads.

    Raises:
        AdapterError: says how a pickle or shards become that.
    """
    if (root / ADAPTER_WEIGHTS_NAME).exists():
        return
    found, hint = "", "download or copy the whole adapter again"
    if (root / _PICKLE_NAME).is_file():
        found, hint = f" (the pickled {_PICKLE_NAME} is not loaded)", _UNPICKLE
    elif any(root.glob(_SHARDS)):
        found, hint = f", only shards ({_SHARDS}), which peft does not read either", _JOIN
    raise AdapterError(f"{root}: {ADAPTER_WEIGHTS_NAME} not found{found}", hint=hint)
