"""An adapter's files as other programs see them: names, shapes and configuration; no weights are read.

``checkpoint.adapter`` reads valid adapters only, and normalizes names. Here an invalid adapter is read too, so that it
can be judged, and names are those in the file.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
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

_PICKLES = ("adapter_model.bin", "adapter_model.pt")
_ROLES = (
    (re.compile(r"(.+)\.lora_A\.weight"), "A"),
    (re.compile(r"(.+)\.lora_B\.weight"), "B"),
    (re.compile(r"(.+)\.lora_embedding_A"), "embedding A"),
    (re.compile(r"(.+)\.lora_embedding_B"), "embedding B"),
    (re.compile(r"(.+)\.lora_B\.bias"), "bias of B"),
    (re.compile(r"(.+)\.lora_magnitude_vector(?:\.weight)?"), "magnitude"),
    (re.compile(r"(.+)\.token_adapter\.trainable_tokens_delta"), "token rows"),
    (re.compile(r"(.+)\.base_layer\.weight"), "wrapped weight"),
    (re.compile(r"(.+)\.base_layer\.bias"), "bias"),
    (re.compile(r"(?!.*\.lora_)(.+)\.weight"), "weight"),
    (re.compile(r"(?!.*\.lora_)(.+)\.bias"), "bias"),
)
_NAMED = re.compile(
    r"(\.lora_(?:[AB]|magnitude_vector))\.default(?=\.(?:weight|bias)$)|(\.lora_embedding_[AB])\.default$"
)
"""Names that still contain ``default``, the name that peft gives an adapter."""
_COPY = re.compile(r"(.+)\.(?:modules_to_save(?:\.default)?|original_module)\.(.+)")
_WRAPPED = re.compile(
    r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_model\.model)\.|^module\."
)
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


@dataclass(frozen=True)
class AdapterFiles:
    """Contents of an adapter's folder.

    Attributes:
        root: the folder.
        config: ``adapter_config.json``.
        keys: tensors sorted by name; empty if there is no safetensors file.
        pickle: name of a pickled weight file if there is no safetensors file; otherwise None.
        beside: names of other safetensors files in the folder.
        may_be_tied: whether the base's head may be its embedding.
    """

    root: Path
    config: Mapping[str, Any]
    keys: tuple[Key, ...] = ()
    pickle: str | None = None
    beside: tuple[str, ...] = ()
    may_be_tied: bool = True

    def named(self, *roles: str) -> list[str]:
        """Return the names of the tensors that have one of these roles."""
        return [key.name for key in self.keys if key.role in roles]

    def as_peft_reads(self) -> "AdapterFiles":
        """Return the files as peft reads them: it accepts ``lora_A.default.weight``, and redundant copies are dropped.

        Copies of modules that are saved whole are redundant if the file also has the tensors under their plain names:
        peft loads both into the same place. The pairs of a ``MultiheadAttention``, whose names no rule fits, are
        dropped, too: peft loads them.
        """
        names = {key.name for key in self.keys}
        copies = {name for name in names if (match := _COPY.fullmatch(name)) and f"{match[1]}.{match[2]}" in names}
        found = [match for key in self.keys if (match := ATTENTION.fullmatch(key.module))]
        attentions = {module for match in found for module in (match[0], match[1])}
        kept = (key for key in self.keys if key.name not in copies and key.module not in attentions)
        return replace(self, keys=tuple(_key(key.name, key.shape, _NAMED.sub(r"\1\2", key.name)) for key in kept))

    @property
    def wrapped(self) -> list[str]:
        """Names of tensors that contain the name of a module wrapper, such as ``_orig_mod``."""
        return [key.name for key in self.keys if _WRAPPED.search(key.name.removeprefix(PREFIX))]

    @cached_property
    def pairs(self) -> tuple[Pair, ...]:
        """Pairs of A and B, sorted by module."""
        found: dict[str, dict[str, Key]] = {}
        for key in self.keys:
            if key.role in ("A", "B", "embedding A", "embedding B"):
                found.setdefault(key.module, {})[key.role] = key
        return tuple(self._pair(module, halves) for module, halves in sorted(found.items()))

    @cached_property
    def is_flat(self) -> bool:
        """Whether all modules have the same rank and the same scaling."""
        return len({(pair.rank, pair.scaling) for pair in self.pairs}) == 1

    def merge(self) -> str:
        """Return the advice to merge the adapter; ``--untie`` has no effect if the head is not tied."""
        if not self._is_read:
            return self.merge_elsewhere()
        is_vocabulary = any(is_usual_head(key.module) or is_usual_embedding(key.module) for key in self.keys)
        untie = " --untie" if is_vocabulary and self.may_be_tied else ""
        return f"run adaptkit merge BASE {self.root} -o MERGED{untie}, and load MERGED instead"

    def merge_elsewhere(self) -> str:
        """Return the advice for adapters that adaptkit cannot read either."""
        return "use it with peft; or, if peft can merge_and_unload it, load the merged model instead"

    @cached_property
    def _is_read(self) -> bool:
        """Whether ``merge`` reads adapters of this kind."""
        try:
            check_config(self.root, self.config)
        except AdapterError:
            return False
        return not any(pair.is_convolution or pair.is_in_attention for pair in self.pairs)

    @property
    def saved(self) -> list[str]:
        """Names in ``modules_to_save``."""
        given = self.config.get("modules_to_save")
        return [str(name) for name in given] if isinstance(given, list) else []

    def _pair(self, module: str, halves: Mapping[str, Key]) -> Pair:
        embedding = any(role.startswith("embedding") for role in halves)
        a, b = (halves.get(f"embedding {half}" if embedding else half) for half in "AB")
        stacked, name = bool(_EXPERTS.search(module)) and not embedding, module
        if stacked:
            name = _parameter(module)
        elif self._names_weight(module):
            name = f"{module}.weight"
        rank, alpha, factor = self._numbers(name)
        if name == f"{module}.weight" and a and is_positive(rank):  # a stack of experts, as JetMoE's, has more rows
            stacked = len(a.shape) == 2 and a.shape[0] > rank
        return Pair(module, a, b, embedding, stacked, rank, alpha, factor)

    def _names_weight(self, module: str) -> bool:
        """Return whether ``target_parameters``, if it is a list as peft requires, names the weight of a module."""
        return isinstance(self.config.get("target_parameters"), list) and is_parameter(self.config, module)

    @cached_property
    def _ranks(self) -> FirstMatch:
        return FirstMatch(self.config.get("rank_pattern") or {})

    @cached_property
    def _alphas(self) -> FirstMatch:
        return FirstMatch(self.config.get("alpha_pattern") or {})

    def _numbers(self, module: str) -> tuple[Any, Any, float | None]:
        """Return rank, alpha and scaling by peft's rules: the first pattern matching the path's end, or the default."""
        rank, alpha = self.config.get("r"), self.config.get("lora_alpha")
        try:
            rank = self._ranks.value(module, rank)
            alpha = self._alphas.value(module, alpha)
        except (re.error, TypeError, AttributeError):
            return rank, None, None
        if not is_positive(rank) or not is_positive(alpha):
            return rank, alpha, None
        try:
            return rank, alpha, scaling(float(alpha), rank, bool(self.config.get("use_rslora")))
        except OverflowError:  # an integer too large for a float
            return rank, None, None


def read_adapter_files(root: Path) -> AdapterFiles:
    """Read the configuration and headers in an adapter's folder.

    Raises:
        CheckpointError: no configuration, or a file that is not valid JSON or safetensors.
    """
    config = read_json(root / ADAPTER_CONFIG_NAME)
    files = sorted(path.name for path in root.glob("*.safetensors"))
    keys: list[Key] = []
    if ADAPTER_WEIGHTS_NAME in files:
        keys = [_key(spec.name, spec.shape, spec.name) for spec, _ in read_header(root / ADAPTER_WEIGHTS_NAME).tensors]
    pickles = [] if ADAPTER_WEIGHTS_NAME in files else [name for name in _PICKLES if (root / name).is_file()]
    return AdapterFiles(
        root=root,
        config=config,
        keys=tuple(sorted(keys, key=lambda key: key.name)),
        pickle=pickles[0] if pickles else None,
        beside=tuple(name for name in files if name != ADAPTER_WEIGHTS_NAME),
    )


def _key(name: str, shape: tuple[int, ...], meant: str) -> Key:
    """Return the tensor ``name``, with module and role taken from ``meant``."""
    inner = meant.removeprefix(PREFIX)
    for pattern, role in _ROLES:
        match = pattern.fullmatch(inner)
        if match:
            return Key(name, match[1], role, shape)
    return Key(name, inner, "other", shape)


def _parameter(module: str) -> str:
    """Return the parameter that peft matches its patterns with: the outer wrapper of a stack has the last parameter."""
    inner = module.removesuffix(".base_layer")
    return f"{inner}.down_proj" if inner == module else f"{inner}.gate_up_proj"


def is_positive(value: Any) -> bool:
    """Return whether a value is a number above zero."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
