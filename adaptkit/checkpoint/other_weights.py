"""Errors for weights in formats of other tools, pickles and GGUF, with hints that depend on the file's name."""

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
WITH_PEFT = "give an adapter of a language model as peft saves it, with its adapter_config.json"
_WITH_TRANSFORMERS = "give a language model as transformers saves it, with config.json and model*.safetensors"
OTHER_WRITERS = {
    "lit_model.pth.lora": (
        "LitGPT",
        "run litgpt merge_lora and then litgpt convert_from_litgpt, rename the model.pth that it writes to "
        "pytorch_model.bin, save that and the base with transformers in float32, and run adaptkit extract on both",
    ),
    "pytorch_lora_weights.safetensors": ("diffusers", WITH_PEFT),
    "pytorch_lora_weights.bin": ("diffusers", WITH_PEFT),
    "diffusion_pytorch_model.safetensors": ("diffusers", _WITH_TRANSFORMERS),
}
"""Maps a file name to the tool that writes it, and the hint for it."""


def refuse_other_weights(where: object, names: Iterable[str]) -> None:
    """Reject weights in a format that is not supported.

    Args:
        where: the folder or repository, for the error.
        names: of its files, without those of a checkpoint.

    Raises:
        CheckpointError: one of the files is a pickle, GGUF or another tool's.
    """
    names = sorted(name for name in names if not name.startswith(_STATES))
    if pickle := next((name for name in names if name.endswith(_PICKLES) and name not in OTHER_WRITERS), ""):
        raise CheckpointError(
            f"{where}: weights are pickles ({pickle}), which adaptkit does not load",
            hint=next((hint for start, hint in _HINTS.items() if pickle.startswith(start)), _OTHERWISE),
        )
    if other := next((name for name in names if name in OTHER_WRITERS), ""):
        writer, hint = OTHER_WRITERS[other]
        raise CheckpointError(f"{where}: {other} is in the format of {writer}, which adaptkit does not read", hint=hint)
    if gguf := next((name for name in names if name.endswith(".gguf")), ""):
        raise CheckpointError(
            f"{where}: weights are GGUF ({gguf}), which adaptkit does not read",
            hint="use the checkpoint that it was made from",
        )
