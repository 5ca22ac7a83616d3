"""An adapter's files as other programs see them: names, shapes and configuration, nothing refused and no weights read.

``checkpoint.adapter`` reads an adapter that is right, whatever its names look like; here even one that is not gets a
verdict, and a name is what is written in the file.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from adaptkit.checkpoint._adapter_keys import PREFIX
from adaptkit.checkpoint.header import read_header
from adaptkit.checkpoint.layout import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, read_json
from adaptkit.checkpoint.patterns import FirstMatch
from adaptkit.checkpoint.vocabulary import is_usual_head, is_usual_table
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
"""Where the name that peft gives an adapter by itself may be left in."""
_COPY = re.compile(r"(.+)\.(?:modules_to_save(?:\.default)?|original_module)\.(.+)")
_WRAPPED = re.compile(
    r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_model\.model)\.|^module\."
)
_EXPERTS = re.compile(r"(?:^|\.)experts(?:\.base_layer)*$")


@dataclass(frozen=True)
class Key:
    """A tensor of the file.

    Attributes:
        name: in the file.
        module: what it belongs to, without peft's prefix.
        role: A, B, embedding A, embedding B, bias of B, magnitude, token rows, wrapped weight, weight, bias, or other.
        shape: of the tensor.
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
        embedding: whether the module is looked up in.
        stacked: whether it is a stack of experts.
        asked: the rank that the configuration gives it, whatever that is.
        alpha: the same of its alpha; None if the configuration is none to find it by.
        scaling: what B A is multiplied by according to peft's rules; None if the configuration makes no sense.
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
        """What the shape of A says; None without A, and for stacks, where the number of experts is in it too."""
        return self.a.shape[0] if self.a and len(self.a.shape) == 2 and not self.stacked else None

    @property
    def is_convolution(self) -> bool:
        """Whether A and B have the shapes that peft gives those of a convolution in one to three dimensions."""
        return bool(self.a and self.b and 3 <= len(self.a.shape) == len(self.b.shape) <= 5)


@dataclass(frozen=True)
class AdapterFiles:
    """What an adapter's folder holds.

    Attributes:
        root: the folder.
        config: ``adapter_config.json``.
        keys: tensors, in the order of their names; none if there is no safetensors file.
        pickle: name of a pickled file of weights, if that is all there is.
        beside: names of other safetensors files in the folder.
    """

    root: Path
    config: Mapping[str, Any]
    keys: tuple[Key, ...] = ()
    pickle: str | None = None
    beside: tuple[str, ...] = ()

    def named(self, *roles: str) -> list[str]:
        """The names of the tensors that have one of these roles."""
        return [key.name for key in self.keys if key.role in roles]

    def as_peft_reads(self) -> "AdapterFiles":
        """The same for a reader that takes ``lora_A.default.weight``, and knows which copies are of no account.

        Those are of modules that are saved whole: peft puts them where the tensors themselves go, if these are there.
        """
        names = {key.name for key in self.keys}
        copies = {name for name in names if (match := _COPY.fullmatch(name)) and f"{match[1]}.{match[2]}" in names}
        kept = (key for key in self.keys if key.name not in copies)
        return replace(self, keys=tuple(_key(key.name, key.shape, _NAMED.sub(r"\1\2", key.name)) for key in kept))

    @property
    def wrapped(self) -> list[str]:
        """The names of tensors in which wrappers of modules have left theirs."""
        return [key.name for key in self.keys if _WRAPPED.search(key.name.removeprefix(PREFIX))]

    @cached_property
    def pairs(self) -> tuple[Pair, ...]:
        """What is changed by a product of two matrices, by module."""
        found: dict[str, dict[str, Key]] = {}
        for key in self.keys:
            if key.role in ("A", "B", "embedding A", "embedding B"):
                found.setdefault(key.module, {})[key.role] = key
        return tuple(self._pair(module, halves) for module, halves in sorted(found.items()))

    @cached_property
    def is_flat(self) -> bool:
        """Whether all modules have one rank and one scaling."""
        return len({(pair.rank, pair.scaling) for pair in self.pairs}) == 1

    def merge(self) -> str:
        """The command that makes a model that needs no adapter of it; ``--untie`` does nothing to what is not tied."""
        is_vocabulary = any(is_usual_head(key.module) or is_usual_table(key.module) for key in self.keys)
        untie = " --untie" if is_vocabulary else ""
        return f"run adaptkit merge BASE {self.root} -o MERGED{untie}, and load MERGED instead"

    def merge_elsewhere(self) -> str:
        """What to do with what adaptkit does not read either."""
        return "use it with peft; or, if peft can merge_and_unload it, load the merged model instead"

    @property
    def saved(self) -> list[str]:
        """What ``modules_to_save`` names."""
        given = self.config.get("modules_to_save")
        return [str(name) for name in given] if isinstance(given, list) else []

    def _pair(self, module: str, halves: Mapping[str, Key]) -> Pair:
        embedding = any(role.startswith("embedding") for role in halves)
        a, b = (halves.get(f"embedding {half}" if embedding else half) for half in "AB")
        stacked, parameter = bool(_EXPERTS.search(module)) and not embedding, _parameter(module)
        if not stacked and self._has_stack_of_weights(module, a):
            stacked, parameter = True, f"{module}.weight"
        rank, alpha, factor = self._numbers(parameter if stacked else module)
        return Pair(module, a, b, embedding, stacked, rank, alpha, factor)

    def _has_stack_of_weights(self, module: str, a: Key | None) -> bool:
        """Whether the parameter ``weight`` is a stack of experts, as JetMoE's are: A is longer than a matrix has it."""
        targets, rank = self.config.get("target_parameters"), self._numbers(f"{module}.weight")[0]
        named = isinstance(targets, list) and any(f".{module}.weight".endswith(f".{name}") for name in targets)
        return bool(named and a and is_positive(rank) and len(a.shape) == 2 and a.shape[0] > rank)

    @cached_property
    def _ranks(self) -> FirstMatch:
        return FirstMatch(self.config.get("rank_pattern") or {})

    @cached_property
    def _alphas(self) -> FirstMatch:
        return FirstMatch(self.config.get("alpha_pattern") or {})

    def _numbers(self, module: str) -> tuple[Any, Any, float | None]:
        """Rank, alpha and scaling by peft's rules: the first pattern that matches the path's end, else the default."""
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
        except OverflowError:  # a whole number that no float holds
            return rank, None, None


def read_adapter_files(root: Path) -> AdapterFiles:
    """Look into an adapter's folder.

    Raises:
        CheckpointError: no configuration, or a file that is no JSON or no safetensors file.
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
    """A tensor called ``name``, which is what one called ``meant`` would be."""
    inner = meant.removeprefix(PREFIX)
    for pattern, role in _ROLES:
        match = pattern.fullmatch(inner)
        if match:
            return Key(name, match[1], role, shape)
    return Key(name, inner, "other", shape)


def _parameter(module: str) -> str:
    """What peft matches its patterns with: its outer wrapper of a stack is the last parameter, the inner the first."""
    inner = module.removesuffix(".base_layer")
    return f"{inner}.down_proj" if inner == module else f"{inner}.gate_up_proj"


def is_positive(value: Any) -> bool:
    """Whether it is a number above zero."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
