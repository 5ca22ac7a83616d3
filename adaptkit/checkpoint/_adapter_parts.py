"""Read what an adapter's tensors change, from their names and its configuration; every tensor is used exactly once.

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

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np

from adaptkit.checkpoint import adapter_config
from adaptkit.checkpoint.adapter_config import ATTENTION, KOHYA, ONE_SAVE, PREFIX, RANK_ZERO
from adaptkit.checkpoint.manifest import TensorRecord
from adaptkit.checkpoint.reader import TensorFiles
from adaptkit.checkpoint.vocabulary import is_embedding_name, is_head
from adaptkit.errors import AdapterError
from adaptkit.numerics.dtypes import Array
from adaptkit.numerics.lora import LowRank, transposed
from adaptkit.wording import counted

_QUANTIZED = re.compile(r"(.+)\.base_layer\.(?:weight\.quant_state\..+|SCB)")
"""Quantization tensors of bitsandbytes, which peft saves with a quantized head."""
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_ROLES = (
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
_GATHER = "save it again with all weights gathered; DeepSpeed ZeRO-3 otherwise saves empty tensors"
_WITH_PEFT = "merge the adapter with peft"


@dataclass(frozen=True)
class TokenRows:
    """Rows of an embedding or head, (len(indices), dim), that replace those of the base with these indices."""

    indices: tuple[int, ...]
    rows: Array


@dataclass(frozen=True, eq=False)
class Changes:
    """What an adapter's tensors change. Names of modules and tensors are those of the running model.

    Attributes:
        modules: maps a module's dotted path to its weight's change: (out, in), or (entries, dim) for an embedding.
        embeddings: which of the modules are embeddings.
        magnitudes: maps a module to DoRA's (out,) norms of the rows of W + Δ.
        biases: maps a module to what is added to its bias: (out,) float64, scaling included.
        replaced: maps a base tensor's name to the adapter's tensor that replaces it.
        base_copies: maps a base tensor's name to the adapter's copy that a change is added to; usually both are equal.
        tokens: maps a module to the replaced rows of its weight.
        experts: maps a stacked parameter's path to the change of each expert's matrix, oriented as in the files.
    """

    modules: dict[str, LowRank] = field(default_factory=dict)
    embeddings: set[str] = field(default_factory=set)
    magnitudes: dict[str, Array] = field(default_factory=dict)
    biases: dict[str, Array] = field(default_factory=dict)
    replaced: dict[str, str] = field(default_factory=dict)
    base_copies: dict[str, str] = field(default_factory=dict)
    tokens: dict[str, TokenRows] = field(default_factory=dict)
    experts: dict[str, tuple[LowRank, ...]] = field(default_factory=dict)


class Parts:
    """Consumes the parts of an adapter, one kind after another; a part that is left over at the end is an error.

    A part is (module, role); the module of experts ends in one ``.base_layer`` per enclosing wrapper.

    Raises:
        AdapterError: a tensor's name is not recognized, or two names stand for the same part.
    """

    def __init__(self, config: Mapping[str, Any], files: TensorFiles) -> None:
        self._root, self._config, self._files = files.root, config, files
        self._left: dict[tuple[str, str], str] = {}
        for key in files.tensors:
            if KOHYA.search(key):
                self._refuse(
                    f"the tensor {key!r} is named as in the format of kohya, which is not read",
                    "rename lora_down to lora_A and lora_up to lora_B, and put alpha into lora_alpha of "
                    "adapter_config.json",
                )
            if copy := _QUANTIZED.fullmatch(key):
                self._refuse(
                    f"contains the quantized weights that {copy[1].removeprefix(PREFIX)} was trained on",
                    "save it with peft's save_embedding_layers=False, and merge it into the 16-bit checkpoint",
                )
            if (part := _part(key)) is None:
                self._refuse(
                    f"unknown tensor {key!r}",
                    "it may come from an unsupported kind of adapter, or not belong to this one",
                )
            if attention := ATTENTION.fullmatch(part[0]):
                self._refuse(
                    f"{attention[1]} is a torch.nn.MultiheadAttention, of which LoRA is not supported", _WITH_PEFT
                )
            if part in self._left:
                self._refuse(
                    f"{self._left[part]!r} and {key!r} both hold the same part of {part[0]}",
                    "save each adapter in a folder of its own",
                )
            self._left[part] = key

    def take_all(self, records: Sequence[TensorRecord], read: dict[str, Array]) -> Changes:
        """Consume all parts; ``read`` holds flat arrays of tensors that were already read, and loses those used.

        Raises:
            AdapterError: a part is missing, has a wrong shape, or is left over.
        """
        self._scalings, self._read, self._changes = adapter_config.Scalings(self._root, self._config), read, Changes()
        self._take_copies({record.name: record.content for record in records})
        halves = ("lora_A", "lora_B", "embedding_A", "embedding_B")
        names = sorted({module for module, role in self._left if role in halves})
        stacks = {name: self._stack_of(name) for name in names}
        for name in names:
            if not stacks[name][1]:
                self._take_module(name)
        for module, leaves in sorted({module: leaves for module, leaves in stacks.values() if leaves}.items()):
            self._take_experts(module, leaves)
        found = self._changes
        targets = tuple(f".{target}" for target in self._config.get("target_parameters") or ())
        changed = [f".{name}" for name in (*found.experts, *(f"{module}.weight" for module in found.modules))]
        if targets and not any(name.endswith(targets) for name in changed):
            self._refuse(
                f"target_parameters is {self._config['target_parameters']}, but the adapter has no tensor for it"
            )
        self._take_tokens()
        self._take_replaced()
        for (module, role), key in self._left.items():
            self._refuse(f"adapter_config.json does not account for the tensor {key!r} ({role} of {module})")
        if missing := adapter_config.unused_saved(self._config, [name.rpartition(".")[0] for name in found.replaced]):
            self._refuse(f"modules_to_save names {missing!r}, but the adapter has no tensor for it")
        return found

    def _refuse(self, why: str, hint: str = ONE_SAVE) -> NoReturn:
        raise AdapterError(f"{self._root}: {why}", hint=hint)

    def _take(self, module: str, role: str, dims: int) -> Array:
        key = self._left.pop((module, role))
        shape = self._files.spec(key).shape
        if len(shape) != dims or 0 in shape:
            of_rank_zero = len(shape) == dims and role.endswith(("_A", "_B"))
            self._refuse(
                f"{key} has shape {list(shape)}; expected {counted(dims, 'dimension')}, none of them 0",
                _GATHER if shape == (0,) else RANK_ZERO if of_rank_zero else ONE_SAVE,
            )
        read = self._read.pop(key, None)
        return self._files.read(key) if read is None else read.reshape(shape)

    def _take_halves(self, module: str, kind: str) -> tuple[Array, Array]:
        key_a, key_b = (self._left.get((module, f"{kind}_{half}")) for half in "AB")
        if key_a is None or key_b is None:
            beside = f" to go with {key_a or key_b!r}" if key_a or key_b else ""
            half = f"{'lora' if kind == 'lora' else 'lora_embedding'}_{'A' if key_a is None else 'B'}"
            self._refuse(f"{module} has no {half}{beside}")
        if all(3 <= len(self._files.spec(key).shape) <= 5 for key in (key_a, key_b)):
            self._refuse(f"{module} is a convolution; LoRA of convolutions is not supported", _WITH_PEFT)
        return self._take(module, f"{kind}_A", 2), self._take(module, f"{kind}_B", 2)

    def _take_module(self, module: str) -> None:
        config, found = self._config, self._changes
        is_embedding = (module, "embedding_A") in self._left or (module, "embedding_B") in self._left
        lora_a, lora_b = self._take_halves(module, "embedding" if is_embedding else "lora")
        rank, factor = self._scalings.of(f"{module}.weight" if adapter_config.is_parameter(config, module) else module)
        self._check_rank(module, rank, rank, lora_a, lora_b)
        term, rows = LowRank(lora_a, lora_b, factor), lora_b.shape[0]
        found.modules[module] = transposed(term) if is_embedding else term
        if is_embedding:
            found.embeddings.add(module)
        if (module, "magnitude") in self._left:
            magnitude = self._take(module, "magnitude", 1)
            if not config.get("use_dora"):
                self._refuse(
                    f"{module} has a lora_magnitude_vector, but use_dora is not set",
                    f"{ONE_SAVE}; torchtune omits use_dora and saves the magnitudes of q_proj and k_proj in another "
                    "order: use adaptkit extract on the model that torchtune merged",
                )
            if magnitude.shape[0] != rows:
                numbers = counted(magnitude.shape[0], "number")
                self._refuse(f"{module}.lora_magnitude_vector has {numbers}; expected {rows}, one for each row")
            found.magnitudes[module] = magnitude
        elif config.get("use_dora"):
            self._refuse(f"{module} has no lora_magnitude_vector, but use_dora is set")
        if (module, "lora_bias") in self._left:
            bias = self._take(module, "lora_bias", 1)
            if not config.get("lora_bias"):
                self._refuse(f"{module} has a lora_B.bias, but lora_bias is not set")
            if bias.shape[0] != rows:
                self._refuse(f"{module}: lora_B.bias has shape {list(bias.shape)}; expected [{rows}]")
            found.biases[module] = bias.astype(np.float64) * factor
        elif config.get("lora_bias") and not is_embedding:
            self._refuse(f"{module} has no lora_B.bias, but lora_bias is set")

    def _check_rank(self, module: str, rank: int, rows: int, lora_a: Array, lora_b: Array) -> None:
        if rank < 1 or lora_a.shape[0] != rows or lora_b.shape[1] != rows:
            self._refuse(
                f"{module}: adapter_config.json says rank {repr(rank or self._config.get('r'))[:40]}, but lora_A has "
                f"{counted(lora_a.shape[0], 'row')} and lora_B has {counted(lora_b.shape[1], 'column')}"
            )

    def _stack_of(self, name: str) -> tuple[str, list[str]]:
        """Return the module inside a wrapper and the names of its stacked parameters (none for an ordinary module)."""
        module = name
        while module.endswith(".base_layer"):
            module = module.removesuffix(".base_layer")
        rank, key = self._scalings.of(f"{module}.weight")[0], self._left.get((name, "lora_A"))
        rows = self._files.spec(key).shape[0] if key else 0
        return module, adapter_config.expert_parameters(self._root, self._config, module, is_stack=0 < rank < rows)

    def _take_experts(self, module: str, leaves: Sequence[str]) -> None:
        for depth, leaf in enumerate(reversed(leaves)):  # the outermost wrapper belongs to the last parameter
            lora_a, lora_b = self._take_halves(module + ".base_layer" * depth, "lora")
            parameter = f"{module}.{leaf}"
            rank, factor = self._scalings.of(parameter)
            count = lora_a.shape[0] // rank if rank else 0
            self._check_rank(parameter, rank, max(1, count) * rank, lora_a, lora_b)
            a = lora_a.reshape(count, rank, -1)
            b = lora_b.reshape(lora_b.shape[0], rank, count)  # the expert index varies fastest
            self._changes.experts[parameter] = tuple(
                LowRank(a[expert], np.ascontiguousarray(b[:, :, expert]), factor) for expert in range(count)
            )

    def _take_tokens(self) -> None:
        given, tokens = self._config.get("trainable_token_indices") or {}, self._changes.tokens
        for module, role in [part for part in self._left if part[1] == "trainable_tokens"]:
            indices = adapter_config.token_indices(self._config, module)
            fits = isinstance(indices, list) and all(type(index) is int and index >= 0 for index in indices)
            if not fits or not indices or len(set(indices)) != len(indices):
                self._refuse(f"trainable_token_indices does not say which rows {self._left[module, role]!r} replaces")
            rows = self._take(module, role, 2)
            if rows.shape[0] != len(indices):
                self._refuse(
                    f"{module} has {counted(rows.shape[0], 'trained row')}, but trainable_token_indices lists "
                    f"{counted(len(indices), 'token')}"
                )
            tokens[module] = TokenRows(tuple(indices), rows)
        missing = "" if tokens or not given else "an embedding"
        if isinstance(given, dict):  # a name may lack its module if one with the same indices has one: they are tied
            there = {name for name in given if any(f".{module}".endswith(f".{name}") for module in tokens)}
            known = [given[name] for name in there]
            missing = next((name for name, rows in given.items() if name not in there and rows not in known), "")
        if missing:
            self._refuse(f"trainable_token_indices names {missing}, but the adapter has no trained rows for it")

    def _take_replaced(self) -> None:
        found, trains_bias = self._changes, self._config.get("bias", "none") != "none"
        # peft saves embedding and head whole, without being asked, if the vocabulary was resized.
        resized = any(is_embedding_name(owner) for owner, role in self._left if role in ("weight", "base_weight"))
        for module, role in list(self._left):
            kind, wrapped = role.removeprefix("base_"), role.startswith("base_")
            name, is_usual, trained = f"{module}.{kind}", kind in ("weight", "bias"), kind == "bias" and trains_bias
            unasked = is_usual and resized and (is_embedding_name(module) or is_head(module))
            if is_usual and wrapped and not trained and (module in found.modules or module in found.tokens):
                found.base_copies[name] = self._left.pop((module, role))
            elif trained or unasked or (not wrapped and adapter_config.is_saved(self._config, module)):
                if name in found.replaced or (not wrapped and kind == "weight" and module in found.modules):
                    self._refuse(f"{self._left[module, role]!r} and another tensor both hold {name}")
                found.replaced[name] = self._left.pop((module, role))

    def _take_copies(self, digests: Mapping[str, Any]) -> None:
        """Keep one of the copies that peft writes (they must be identical), and drop base tensors that are replaced."""
        for (module, role), key in list(self._left.items()):
            kind, _, leaf = role.partition("_")
            plain = (module, leaf)
            if kind == "original" and (plain in self._left or (module, f"copy_{leaf}") in self._left):
                del self._left[module, role]
            elif kind == "copy":
                if plain in self._left and digests[key] != digests[self._left[plain]]:
                    self._refuse(f"{key!r} and {self._left[plain]!r} should be identical, but differ")
                self._left.setdefault(plain, self._left.pop((module, role)))


def _part(key: str) -> tuple[str, str] | None:
    kept: list[str] = []
    for segment in key.split("."):
        if segment not in _WRAPPERS and not (segment == "module" and (not kept or kept[-1].isdecimal())):
            kept.append(segment)
        if kept == ["base_model", "model"]:
            kept.clear()
    for pattern, role in _ROLES:
        if match := pattern.fullmatch(".".join(kept)):
            *module, what = match.groups()
            return ".".join(module), role.format(what)
    return None
