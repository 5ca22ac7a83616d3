"""Errors for weights in formats that are not read: pickles and GGUF, with hints that depend on the file's name."""

from collections.abc import Iterable

from adaptkit.errors import CheckpointError

_STATES = ("training_args", "optimizer", "scheduler", "scaler", "rng_state")
"""Prefixes of pickles with training state, which trainers save beside weights or checkpoint folders."""
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_TO_SAFETENSORS = (
    "convert it with transformers: from_pretrained(..., dtype='auto') and save_pretrained(..., "
    "safe_serialization=True); then copy the tokenizer's files"
)
_RENAME = "rename {what} to pytorch_model.bin, with config.json beside it, and "
_HINTS = {
    "pytorch_model": _TO_SAFETENSORS,
    "adapter_": "fetch it with `hf download` and pass that folder; the error then says how to convert it",
    "qmodel.pt": "it is quantized with HQQ: use the checkpoint that it was made from",
    "lit_model.pth": "run litgpt convert_from_litgpt on the folder, "
    f"{_RENAME.format(what='the model.pth that it writes')}{_TO_SAFETENSORS}",
}
"""Maps the start of a pickle's name to the hint for it. transformers finds only pickles named pytorch_model*.bin."""
_OTHERWISE = (
    f"if its tensors have the names of transformers, {_RENAME.format(what='it')}{_TO_SAFETENSORS}; otherwise convert "
    "it to the format of transformers with the tool that wrote it"
)


def refuse_other_weights(where: object, names: Iterable[str]) -> None:
    """Reject weights in a format that is not supported.

    Args:
        where: the folder or repository, for the error.
        names: of its files, without those of a checkpoint.

    Raises:
        CheckpointError: one of the files is a pickle or GGUF.
    """
    names = sorted(name for name in names if not name.startswith(_STATES))
    if pickle := next((name for name in names if name.endswith(_PICKLES)), ""):
        raise CheckpointError(
            f"{where}: weights are pickles ({pickle}), which adaptkit does not load",
            hint=next((hint for start, hint in _HINTS.items() if pickle.startswith(start)), _OTHERWISE),
        )
    if gguf := next((name for name in names if name.endswith(".gguf")), ""):
        raise CheckpointError(
            f"{where}: weights are GGUF ({gguf}), which adaptkit does not read",
            hint="use the checkpoint that it was made from",
        )
