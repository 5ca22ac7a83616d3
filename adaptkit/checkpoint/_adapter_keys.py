"""Parse the names of an adapter's tensors: the module that each belongs to, and its role in that module.

base_model.model.<module>.lora_A.weight            as peft writes it
base_model.model.<module>.lora_A.default.weight    with the adapter's name left in
<module>.lora_A.weight                             without the wrapper's prefix
_orig_mod. module. _fsdp_wrapped_module.           segments that torch.compile, DDP and FSDP insert anywhere

<module>.lora_A.weight  .lora_B.weight             Δ = s · B A
<module>.lora_B.bias                               added to the module's bias
<module>.lora_embedding_A  .lora_embedding_B       of an embedding: Δ = s · (B A)ᵀ
<module>.lora_magnitude_vector                     DoRA; for an embedding whose vocabulary was resized, peft writes a
                                                   second copy that ends in .weight
<module>.base_layer.weight  .base_layer.bias       what Δ is added to, if that differs from the base's tensor
<module>.token_adapter.trainable_tokens_delta      rows that replace the base's rows
<module>.weight, <module>.bias                     replace the base's tensors
<module>.modules_to_save.default.<inside>.bias     second copy of the bias of a module inside a saved module, if all
                                                   biases are saved
<module>.original_module.<inside>.bias             the base's bias in the same case
<experts>.base_layer.lora_A.weight ...             the inner of two stacked parameters; see ``expert_parameters``
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from adaptkit.errors import AdapterError

PREFIX = "base_model.model."
KOHYA = re.compile(r"\.lora_(?:down|up)\.weight$")
"""kohya's trainers name A and B like this; they store one scalar ``alpha`` per module beside them."""
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_PARTS = (
    (re.compile(r"(.+)\.lora_([AB])(?:\.[^.]+)?\.weight"), "lora_{}"),
    (re.compile(r"(.+)\.lora_B(?:\.[^.]+)?\.(bias)"), "lora_{}"),
    (re.compile(r"(.+)\.lora_embedding_([AB])(?:\.[^.]+)?"), "embedding_{}"),
    (re.compile(r"(.+)\.lora_(magnitude)_vector\.weight"), "copy_{}"),
    (re.compile(r"(.+)\.lora_(magnitude)_vector(?:\.[^.]+)?(?:\.weight)?"), "{}"),
    (re.compile(r"(.+)\.token_adapter\.(trainable_tokens)_delta(?:\.[^.]+)?"), "{}"),
    (re.compile(r"(.+?)(?:\.token_adapter)?\.base_layer\.(weight|bias)"), "base_{}"),
    (re.compile(r"(.+)\.modules_to_save\.[^.]+\.(.+)\.([^.]+)"), "copy_{}"),
    (re.compile(r"(.+)\.original_module\.(.+)\.([^.]+)"), "original_{}"),
    (re.compile(r"(.+)\.modules_to_save(?:\.[^.]+)?\.([^.]+)"), "copy_{}"),
    (re.compile(r"(.+)\.original_module\.([^.]+)"), "original_{}"),
    (re.compile(r"(.+)\.([^.]+)"), "{}"),
)

ATTENTION = re.compile(r"(.+)\.base_layer\.out_proj")
"""The module of the second of two pairs that peft makes for one ``torch.nn.MultiheadAttention``."""
_QUANTIZED = re.compile(r"(.+)\.base_layer\.(?:weight\.quant_state\..+|SCB)")
"""Quantization tensors of bitsandbytes, which peft saves with a quantized head."""


@dataclass(frozen=True)
class Part:
    """The module and role of one tensor in the file.

    Attributes:
        module: dotted path in the model; for experts it ends in one ``.base_layer`` per enclosing wrapper.
        role: lora_A, lora_B, lora_bias, embedding_A, embedding_B, magnitude, trainable_tokens; a parameter's name,
            optionally prefixed with base_, copy_ or original_.
    """

    module: str
    role: str


def name_parts(root: Path, keys: Iterable[str]) -> dict[Part, str]:
    """Parse the names of all tensors of a file.

    Returns:
        Maps each part to its tensor's name.

    Raises:
        AdapterError: a name is not recognized, or two names stand for the same part.
    """
    parts: dict[Part, str] = {}
    for key in keys:
        if KOHYA.search(key):
            raise AdapterError(
                f"{root}: the tensor {key!r} is named as in the format of kohya, which is not read",
                hint="rename lora_down to lora_A and lora_up to lora_B, and put alpha into lora_alpha of "
                "adapter_config.json",
            )
        if copy := _QUANTIZED.fullmatch(key):
            raise AdapterError(
                f"{root}: contains the quantized weights that {copy[1].removeprefix(PREFIX)} was trained on",
                hint="save it with peft's save_embedding_layers=False, and merge it into the 16-bit checkpoint",
            )
        part = _part(key)
        if part is None:
            raise AdapterError(
                f"{root}: unknown tensor {key!r}",
                hint="it may come from an unsupported kind of adapter, or not belong to this one",
            )
        if attention := ATTENTION.fullmatch(part.module):
            raise AdapterError(
                f"{root}: {attention[1]} is a torch.nn.MultiheadAttention, of which LoRA is not supported",
                hint="merge it with peft",
            )
        if part in parts:
            raise AdapterError(
                f"{root}: {parts[part]!r} and {key!r} both hold the same part of {part.module}",
                hint="save each adapter in a folder of its own",
            )
        parts[part] = key
    return parts


def _part(key: str) -> Part | None:
    name = _without_wrappers(key)
    while name.startswith(PREFIX):
        name = _without_wrappers(name[len(PREFIX) :])
    for pattern, role in _PARTS:
        match = pattern.fullmatch(name)
        if match:
            *module, what = match.groups()
            return Part(".".join(module), role.format(what))
    return None


def _without_wrappers(name: str) -> str:
    """Remove the segments that module wrappers insert; ``module`` only at the start or after a number."""
    kept: list[str] = []
    for segment in name.split("."):
        inside = not kept or kept[-1].isdecimal()
        if segment not in _WRAPPERS and not (segment == "module" and inside):
            kept.append(segment)
    return ".".join(kept)
