"""An adapter's files as other programs see them: names, shapes and configuration; no weights are read.

``checkpoint.adapter`` reads valid adapters only, and normalizes names. Here an invalid adapter is read too, so that it
can be judged, and names are those in the file.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from adaptkit.checkpoint.adapter_config import ATTENTION, PREFIX, check_config, is_parameter
from adaptkit.checkpoint.header import read_header
from adaptkit.checkpoint.layout import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, read_json
from adaptkit.checkpoint.patterns import FirstMatch
from adaptkit.checkpoint.vocabulary import is_usual_embedding, is_usual_head
from adaptkit.errors import AdapterError
from adaptkit.numerics.scaling import scaling
from adaptkit.operations.targets._base_shapes import BaseShapes

_PICKLES = ("adapter_model.bin", "adapter_model.pt")
_ROLES = {
    r"(.+)\.lora_A\.weight": "A",
    r"(.+)\.lora_B\.weight": "B",
    r"(.+)\.lora_embedding_A": "embedding A",
    r"(.+)\.lora_embedding_B": "embedding B",
    r"(.+)\.lora_B\.bias": "bias of B",
    r"(.+)\.lora_magnitude_vector(?:\.weight)?": "magnitude",
    r"(.+)\.token_adapter\.trainable_tokens_delta": "token rows",
    r"(.+)\.base_layer\.weight": "wrapped weight",
    r"(.+)\.base_layer\.bias": "bias",
    r"(?!.*\.lora_)(.+)\.weight": "weight",
    r"(?!.*\.lora_)(.+)\.bias": "bias",
}
_HALVES = ("A", "B", "embedding A", "embedding B")
_EXPERTS = re.compile(r"(?:^|\.)experts(?:\.base_layer)*$")


@dataclass(frozen=True)
class Key:
    """A tensor of the file.

    Attributes:
        name: its name in the file.
        module: path of its module, without peft's prefix.
        role: A, B, embedding A, embedding B, bias of B, magnitude, token rows, wrapped weight, weight, bias, or other.
        shape: its shape.
    """

    name: str
    module: str
    role: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Pair:
    """A and B of a module, either of which may be missing.

    Attributes:
        module: dotted path.
        a: (rank, in); of an embedding (rank, entries); of stacked experts (experts · rank, in).
        b: (out, rank); of an embedding (dim, rank); of stacked experts (out, rank · experts).
        embedding: whether the module is an embedding.
        stacked: whether it is a stack of experts.
        asked: the rank that the configuration gives it, valid or not.
        alpha: the alpha that the configuration gives it, valid or not; None if the patterns or the number are unusable.
        scaling: factor of B A by peft's rules; None if the configuration is invalid.
    """

    module: str
    a: Key | None
    b: Key | None
    embedding: bool
    stacked: bool
    asked: Any
    alpha: Any
    scaling: float | None

    @property
    def rank(self) -> int | None:
        """Rank from the shape of A; None without A, and for stacks, whose A has a multiple of the rank."""
        return self.a.shape[0] if self.a and len(self.a.shape) == 2 and not self.stacked else None

    @property
    def is_convolution(self) -> bool:
        """Whether A and B have the shapes of peft's LoRA for a convolution in one to three dimensions."""
        return bool(self.a and self.b and 3 <= len(self.a.shape) == len(self.b.shape) <= 5)

    @property
    def is_in_attention(self) -> bool:
        """Whether it is the second pair that peft makes for one ``torch.nn.MultiheadAttention``."""
        return ATTENTION.fullmatch(self.module) is not None

    @property
    def is_head(self) -> bool:
        """Whether the module has the name of an output layer."""
        return is_usual_head(self.module) and not self.embedding

    @property
    def leaf(self) -> str:
        """The last part of the module's path."""
        return self.module.rpartition(".")[2]


@dataclass(frozen=True)
class AdapterFiles:
    """Contents of an adapter's folder, and the base to compare them with.

    Attributes:
        root: the folder.
        config: ``adapter_config.json``.
        keys: tensors sorted by name; empty if there is no safetensors file.
        pickle: name of a pickled weight file if there is no safetensors file; otherwise None.
        beside: names of other safetensors files in the folder.
        base: the base; None if none is given.
    """

    root: Path
    config: Mapping[str, Any]
    keys: tuple[Key, ...] = ()
    pickle: str | None = None
    beside: tuple[str, ...] = ()
    base: BaseShapes | None = None

    @property
    def is_lora(self) -> bool:
        """Whether ``peft_type`` is LoRA, in upper or lower case."""
        return str(self.config.get("peft_type", "")).upper() == "LORA"

    @property
    def saved(self) -> list[str]:
        """Names in ``modules_to_save``."""
        given = self.config.get("modules_to_save")
        return [str(name) for name in given] if isinstance(given, list) else []

    def named(self, *roles: str) -> list[str]:
        """Return the names of the tensors that have one of these roles."""
        return [key.name for key in self.keys if key.role in roles]

    @cached_property
    def pairs(self) -> tuple[Pair, ...]:
        """Pairs of A and B, sorted by module."""
        modules: dict[str, dict[str, Key]] = {}
        for key in self.keys:
            if key.role in _HALVES:
                modules.setdefault(key.module, {})[key.role] = key
        return tuple(self._pair(module, halves) for module, halves in sorted(modules.items()))

    @cached_property
    def ways(self) -> dict[str, object]:
        """Ways around what a program does not support, by their names in answers.

        ``merge``: ``--untie`` has no effect if the head is not tied. ``flat``: without rsLoRA and patterns, by changing
        alpha if one value suffices.
        """
        merge = elsewhere = "use it with peft; or, if peft can merge_and_unload it, load the merged model instead"
        if self._is_mergeable:
            is_vocabulary = any(is_usual_head(key.module) or is_usual_embedding(key.module) for key in self.keys)
            untie = " --untie" if is_vocabulary and (self.base is None or self.base.is_tied) else ""
            merge = f"run adaptkit merge BASE {self.root} -o MERGED{untie}, and load MERGED instead"
        flat, has_one = merge, len({(pair.rank, pair.scaling) for pair in self.pairs}) == 1
        if has_one and self.pairs[0].rank and all(key.role in (*_HALVES, "wrapped weight") for key in self.keys):
            change = "which changes only lora_alpha"
            flat = f"run adaptkit resize {self.root} -o OUT --rank {self.pairs[0].rank}, {change}"
        return {"root": self.root, "merge": merge, "elsewhere": elsewhere, "flat": flat}

    @property
    def _is_mergeable(self) -> bool:
        try:
            check_config(self.root, self.config)
        except AdapterError:
            return False
        return not any(pair.is_convolution or pair.is_in_attention for pair in self.pairs)

    def _pair(self, module: str, halves: Mapping[str, Key]) -> Pair:
        embedding = any(role.startswith("embedding") for role in halves)
        a, b = (halves.get(f"embedding {half}" if embedding else half) for half in "AB")
        stacked, name = bool(_EXPERTS.search(module)) and not embedding, module
        if stacked:  # patterns match parameters; the outer wrapper of a stack has the last one
            inner = module.removesuffix(".base_layer")
            name = f"{inner}.down_proj" if inner == module else f"{inner}.gate_up_proj"
        elif isinstance(self.config.get("target_parameters"), list) and is_parameter(self.config, module):
            name = f"{module}.weight"
        rank, alpha, factor = self._numbers(name)
        if name == f"{module}.weight" and a and is_positive(rank):  # a stack of experts, as JetMoE's, has more rows
            stacked = len(a.shape) == 2 and a.shape[0] > rank
        return Pair(module, a, b, embedding, stacked, rank, alpha, factor)

    @cached_property
    def _patterns(self) -> tuple[FirstMatch, FirstMatch]:
        rank, alpha = (FirstMatch(self.config.get(f"{key}_pattern") or {}) for key in ("rank", "alpha"))
        return rank, alpha

    def _numbers(self, module: str) -> tuple[Any, Any, float | None]:
        """Return rank, alpha and scaling by peft's rules: the first pattern matching the path's end, or the default."""
        rank, alpha = self.config.get("r"), self.config.get("lora_alpha")
        try:
            ranks, alphas = self._patterns
            rank = ranks.value(module, rank)
            alpha = alphas.value(module, alpha)
        except (re.error, TypeError, AttributeError):
            return rank, None, None
        factor = factor_of(alpha, rank, bool(self.config.get("use_rslora")))
        return rank, alpha if factor is not None or not (is_positive(rank) and is_positive(alpha)) else None, factor


def read_adapter_files(root: Path) -> AdapterFiles:
    """Read the configuration and headers in an adapter's folder.

    Raises:
        CheckpointError: no configuration, or a file that is not valid JSON or safetensors.
    """
    config = read_json(root / ADAPTER_CONFIG_NAME)
    files = sorted(path.name for path in root.glob("*.safetensors"))
    if ADAPTER_WEIGHTS_NAME not in files:
        pickles = [name for name in _PICKLES if (root / name).is_file()]
        return AdapterFiles(root, config, pickle=pickles[0] if pickles else None, beside=tuple(files))
    tensors = read_header(root / ADAPTER_WEIGHTS_NAME).tensors
    keys = sorted((key_of(spec.name, spec.shape) for spec, _ in tensors), key=lambda key: key.name)
    return AdapterFiles(root, config, tuple(keys), beside=tuple(name for name in files if name != ADAPTER_WEIGHTS_NAME))


def key_of(name: str, shape: tuple[int, ...], meant: str = "") -> Key:
    """Return the tensor ``name``, with module and role taken from ``meant`` if that is given."""
    inner = (meant or name).removeprefix(PREFIX)
    for pattern, role in _ROLES.items():
        match = re.fullmatch(pattern, inner)
        if match:
            return Key(name, match[1], role, shape)
    return Key(name, inner, "other", shape)


def factor_of(alpha: Any, rank: Any, rslora: bool) -> float | None:
    """Return the scaling of a rank and an alpha; None if they are no positive numbers, or too large for a float."""
    try:
        return scaling(float(alpha), rank, rslora) if is_positive(rank) and is_positive(alpha) else None
    except OverflowError:
        return None


def is_positive(value: Any) -> bool:
    """Return whether a value is a number above zero."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def is_rank(value: Any) -> bool:
    """Return whether a value is an integer above zero."""
    return isinstance(value, int) and is_positive(value)
