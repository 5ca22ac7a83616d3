"""Assemble an adapter's tensors into changes per module, using every tensor exactly once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from adaptkit.checkpoint._adapter_keys import Part
from adaptkit.checkpoint.adapter_config import (
    ONE_SAVE,
    RANK_ZERO,
    Scalings,
    expert_parameters,
    is_parameter,
    is_saved,
    token_indices,
    unused_saved,
)
from adaptkit.checkpoint.manifest import TensorRecord
from adaptkit.checkpoint.reader import TensorFiles
from adaptkit.checkpoint.vocabulary import is_embedding_name, is_head
from adaptkit.errors import AdapterError
from adaptkit.numerics.arrays import Array, as_tensor
from adaptkit.numerics.lora import LowRank, transposed
from adaptkit.wording import counted

if TYPE_CHECKING:
    from torch import Tensor

_GATHER = "save it again with all weights gathered; DeepSpeed ZeRO-3 otherwise saves empty tensors"


@dataclass(frozen=True)
class TokenRows:
    """Rows of an embedding or head that replace the base's rows.

    Attributes:
        indices: row (token) indices, in the order of ``rows``.
        rows: (len(indices), dim).
    """

    indices: tuple[int, ...]
    rows: Tensor


class Parts:
    """Consumes the parts of an adapter, one kind after another; a part that is left over at the end is an error.

    Args:
        root: the adapter's folder, for messages.
        config: ``adapter_config.json``, checked.
        files: the adapter's tensors.
        parts: maps each part to its tensor's name.
        records: the tensors' fingerprints.
        read: flat arrays of tensors that were already read for their fingerprints; entries are removed when used.

    Attributes:
        modules, embeddings, magnitudes, biases, replaced, base_copies, tokens, experts: see ``Adapter``.
    """

    def __init__(
        self,
        root: Path,
        config: Mapping[str, Any],
        files: TensorFiles,
        parts: Mapping[Part, str],
        records: Sequence[TensorRecord],
        read: dict[str, Array],
    ) -> None:
        self._root, self._config, self._files, self._read = root, config, files, read
        self._left, self._scalings = dict(parts), Scalings(root, config)
        self._digests = {record.name: record.content for record in records}
        self.modules: dict[str, LowRank] = {}
        self.embeddings: set[str] = set()
        self.magnitudes: dict[str, Tensor] = {}
        self.biases: dict[str, Tensor] = {}
        self.replaced: dict[str, str] = {}
        self.base_copies: dict[str, str] = {}
        self.tokens: dict[str, TokenRows] = {}
        self.experts: dict[str, tuple[LowRank, ...]] = {}

    def take_all(self) -> None:
        """Consume all parts and fill the attributes.

        Raises:
            AdapterError: a part is missing, has a wrong shape, or is left over.
        """
        self._take_copies()
        halves = ("lora_A", "lora_B", "embedding_A", "embedding_B")
        names = sorted({part.module for part in self._left if part.role in halves})
        stacks = {name: self._stack_of(name) for name in names}
        for name in names:
            if not stacks[name][1]:
                self._take_module(name)
        for module, leaves in sorted({module: leaves for module, leaves in stacks.values() if leaves}.items()):
            self._take_experts(module, leaves)
        targets = tuple(f".{target}" for target in self._config.get("target_parameters") or ())
        changed = [f".{name}" for name in (*self.experts, *(f"{module}.weight" for module in self.modules))]
        if targets and not any(name.endswith(targets) for name in changed):
            self._refuse(
                f"target_parameters is {self._config['target_parameters']}, but the adapter has no tensor for it"
            )
        self._take_tokens()
        self._take_replaced()
        for part, key in self._left.items():
            self._refuse(f"adapter_config.json does not account for the tensor {key!r} ({part.role} of {part.module})")
        missing = unused_saved(self._config, [name.rpartition(".")[0] for name in self.replaced])
        if missing:
            self._refuse(f"modules_to_save names {missing!r}, but the adapter has no tensor for it")

    def _refuse(self, why: str, hint: str = ONE_SAVE) -> NoReturn:
        raise AdapterError(f"{self._root}: {why}", hint=hint)

    def _take(self, module: str, role: str, dims: int) -> Array | None:
        key = self._left.pop(Part(module, role), None)
        if key is None:
            return None
        spec = self._files.spec(key)
        if len(spec.shape) != dims or 0 in spec.shape:
            of_rank_zero = len(spec.shape) == dims and role.endswith(("_A", "_B"))
            self._refuse(
                f"{key} has shape {list(spec.shape)}; expected {counted(dims, 'dimension')}, none of them 0",
                _GATHER if spec.shape == (0,) else RANK_ZERO if of_rank_zero else ONE_SAVE,
            )
        read = self._read.pop(key, None)
        return self._files.read_array(key) if read is None else read.reshape(spec.shape)

    def _take_halves(self, module: str, kind: str) -> tuple[Array, Array]:
        keys = {half: self._left.get(Part(module, f"{kind}_{half}")) for half in ("A", "B")}
        for half, key in keys.items():
            if key is None:
                other = keys["B" if half == "A" else "A"]
                beside = f" to go with {other!r}" if other else ""
                self._refuse(f"{module} has no {'lora' if kind == 'lora' else 'lora_embedding'}_{half}{beside}")
        if all(3 <= len(self._files.spec(str(key)).shape) <= 5 for key in keys.values()):
            raise AdapterError(
                f"{self._root}: {module} is a convolution; LoRA of convolutions is not supported",
                hint="merge the adapter with peft",
            )
        lora_a, lora_b = (self._take(module, f"{kind}_{half}", 2) for half in ("A", "B"))
        if lora_a is None or lora_b is None:
            raise ValueError("both halves are there")
        return lora_a, lora_b

    def _take_module(self, module: str) -> None:
        is_embedding = Part(module, "embedding_A") in self._left or Part(module, "embedding_B") in self._left
        lora_a, lora_b = self._take_halves(module, "embedding" if is_embedding else "lora")
        rank, factor = self._scalings.of(f"{module}.weight" if is_parameter(self._config, module) else module)
        self._check_rank(module, rank, rank, lora_a, lora_b)
        term = LowRank(lora_a, lora_b, factor)
        self.modules[module] = transposed(term) if is_embedding else term
        if is_embedding:
            self.embeddings.add(module)
        self._take_magnitude(module, lora_b.shape[0])
        bias = self._take(module, "lora_bias", 1)
        if bias is None and self._config.get("lora_bias") and not is_embedding:
            self._refuse(f"{module} has no lora_B.bias, but lora_bias is set")
        if bias is not None and not self._config.get("lora_bias"):
            self._refuse(f"{module} has a lora_B.bias, but lora_bias is not set")
        if bias is not None and bias.shape[0] != lora_b.shape[0]:
            self._refuse(f"{module}: lora_B.bias has shape {list(bias.shape)}; expected [{lora_b.shape[0]}]")
        if bias is not None:
            self.biases[module] = as_tensor(bias).double() * factor

    def _take_magnitude(self, module: str, count: int) -> None:
        magnitude = self._take(module, "magnitude", 1)
        wanted = bool(self._config.get("use_dora"))
        if wanted and magnitude is None:
            self._refuse(f"{module} has no lora_magnitude_vector, but use_dora is set")
        if magnitude is not None and not wanted:
            raise AdapterError(
                f"{self._root}: {module} has a lora_magnitude_vector, but use_dora is not set",
                hint=f"{ONE_SAVE}; torchtune omits use_dora and saves the magnitudes of q_proj and k_proj in another "
                "order: use adaptkit extract on the model that torchtune merged",
            )
        if magnitude is not None and magnitude.shape[0] != count:
            found = counted(magnitude.shape[0], "number")
            self._refuse(f"{module}.lora_magnitude_vector has {found}; expected {count}, one for each row")
        if magnitude is not None:
            self.magnitudes[module] = as_tensor(magnitude)

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
        rank, key = self._scalings.of(f"{module}.weight")[0], self._left.get(Part(name, "lora_A"))
        rows = self._files.spec(key).shape[0] if key else 0
        return module, expert_parameters(self._root, self._config, module, is_stack=0 < rank < rows)

    def _take_experts(self, module: str, leaves: Sequence[str]) -> None:
        for depth, leaf in enumerate(reversed(leaves)):  # the outermost wrapper belongs to the last parameter
            wrapper = module + ".base_layer" * depth
            lora_a, lora_b = self._take_halves(wrapper, "lora")
            parameter = f"{module}.{leaf}"
            rank, factor = self._scalings.of(parameter)
            count = lora_a.shape[0] // rank if rank else 0
            self._check_rank(parameter, rank, max(1, count) * rank, lora_a, lora_b)
            a = lora_a.reshape(count, rank, -1)
            b = lora_b.reshape(lora_b.shape[0], rank, count)  # the expert index varies fastest
            self.experts[parameter] = tuple(
                LowRank(a[expert], np.ascontiguousarray(b[:, :, expert]), factor) for expert in range(count)
            )

    def _take_tokens(self) -> None:
        for part in [part for part in self._left if part.role == "trainable_tokens"]:
            indices = _token_indices(self._root, self._config, part.module, self._left[part])
            rows = self._take(part.module, part.role, 2)
            if rows is None or rows.shape[0] != len(indices):
                found = 0 if rows is None else rows.shape[0]
                self._refuse(
                    f"{part.module} has {counted(found, 'trained row')}, but trainable_token_indices lists "
                    f"{counted(len(indices), 'token')}"
                )
            self.tokens[part.module] = TokenRows(indices, as_tensor(rows))
        missing = _untrained_tokens(self._config, list(self.tokens))
        if missing:
            self._refuse(f"trainable_token_indices names {missing}, but the adapter has no trained rows for it")

    def _take_replaced(self) -> None:
        whole = [part for part in self._left if part.role in ("weight", "base_weight")]
        # peft saves embedding and head whole, without being asked, if the vocabulary was resized.
        resized = any(is_embedding_name(part.module) for part in whole)
        for part in list(self._left):
            kind = part.role.removeprefix("base_")
            name = f"{part.module}.{kind}"
            wrapped = part.role.startswith("base_")
            unasked = resized and (is_embedding_name(part.module) or is_head(part.module))
            trained = kind == "bias" and self._config.get("bias", "none") != "none"
            copies = kind in ("weight", "bias") and wrapped and not trained
            if copies and (part.module in self.modules or part.module in self.tokens):
                self.base_copies[name] = self._left.pop(part)
            elif (
                trained
                or (not wrapped and is_saved(self._config, part.module))
                or (kind in ("weight", "bias") and unasked)
            ):
                if name in self.replaced or (not wrapped and kind == "weight" and part.module in self.modules):
                    self._refuse(f"{self._left[part]!r} and another tensor both hold {name}")
                self.replaced[name] = self._left.pop(part)

    def _take_copies(self) -> None:
        """Keep one of the copies that peft writes (they must be identical), and drop base tensors that are replaced."""
        for part, key in list(self._left.items()):
            kind, _, leaf = part.role.partition("_")
            plain = Part(part.module, leaf)
            if kind == "original" and (plain in self._left or Part(part.module, f"copy_{leaf}") in self._left):
                del self._left[part]
            elif kind == "copy" and plain not in self._left:
                self._left[plain] = self._left.pop(part)
            elif kind == "copy":
                if self._digests[key] != self._digests[self._left[plain]]:
                    self._refuse(f"{key!r} and {self._left[plain]!r} should be identical, but differ")
                del self._left[part]


def _untrained_tokens(config: Mapping[str, Any], modules: Sequence[str]) -> str:
    """Return a name in ``trainable_token_indices`` that matches none of the modules; empty if all match.

    A name may lack its module if a name with the same indices has one: the two modules are tied.
    """
    given = config.get("trainable_token_indices")
    if not given:
        return ""
    if not isinstance(given, dict):
        return "" if modules else "an embedding"
    there = {name for name in given if any(f".{module}".endswith(f".{name}") for module in modules)}
    return next((n for n, rows in given.items() if n not in there and rows not in [given[t] for t in there]), "")


def _token_indices(root: Path, config: Mapping[str, Any], module: str, key: str) -> tuple[int, ...]:
    """Return the rows of a module's weight that ``trainable_token_indices`` lists.

    Raises:
        AdapterError: it lists none, or is not a list of distinct non-negative integers.
    """
    given = token_indices(config, module)
    fits = isinstance(given, list) and all(type(index) is int and index >= 0 for index in given)
    if not fits or not given or len(set(given)) != len(given):
        raise AdapterError(f"{root}: trainable_token_indices does not say which rows {key!r} replaces", hint=ONE_SAVE)
    return tuple(given)
