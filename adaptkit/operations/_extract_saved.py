"""Whole tensors in an adapter: which, under which names, and what peft must be told of them.

modules_to_save        modules that are replaced, with all of their tensors: base_model.model.<module>.weight, .bias
bias: all              biases of modules that are not: <module>.bias, or <module>.base_layer.bias beside A and B
ensure_weight_tying    the embedding is replaced and the head is tied to it; peft ties no other names than embed_tokens

A head that is tied is written too, as peft does: it would stay what it was otherwise.
"""

import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from adaptkit.checkpoint.architecture import empty_network, why_unknown
from adaptkit.checkpoint.naming import places
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.errors import UsageError
from adaptkit.numerics.lora import LowRank
from adaptkit.operations._extract_plan import SAVED, Part, Plan, module_of
from adaptkit.operations._extract_tensors import Finding
from adaptkit.operations._tying import find_vocabulary

_TIED_BY_PEFT = "embed_tokens"


@dataclass(frozen=True)
class Saved:
    """Whole tensors of the adapter: by their name in the model, and what the configuration says of them."""

    parts: dict[str, Part]
    config: dict[str, Any]


def whole_tensors(plan: Plan, findings: Sequence[Finding]) -> Saved:
    """Choose them. peft replaces a module as a whole, with the bias that belongs to a weight."""
    differ = [finding.part for finding in findings if finding.differs and finding.part.fate == SAVED]
    whole = {part.module for part in differ if part.name.endswith(".weight")}
    parts = {part.name: part for part in differ}
    parts |= {part.name: part for part in plan.parts if part.module in whole}
    if not parts:
        return Saved({}, {})
    names = _names_in_model(plan.base, parts)
    named = {names[name]: part for name, part in parts.items()}
    saved = {module_of(names[name]) for name, part in parts.items() if part.module in whole}
    config: dict[str, Any] = {"bias": "all"} if any(part.module not in whole for part in differ) else {}
    vocabulary = find_vocabulary(plan.base)
    if vocabulary.tied and vocabulary.embedding in parts:
        named.setdefault(f"{plan.roles.head}.weight", parts[vocabulary.embedding])
        saved.add(plan.roles.head)
        if module_of(vocabulary.embedding).endswith(_TIED_BY_PEFT):
            config["ensure_weight_tying"] = True
    return Saved(dict(sorted(named.items())), config | {"modules_to_save": sorted(saved) or None})


def module_in_model(part: Part) -> str:
    return part.module if part.kind == "expert" else part.paths[-1]


def _names_in_model(base: Checkpoint, names: Iterable[str]) -> dict[str, str]:
    """What the running model calls tensors of the files; the same where transformers does not know the model.

    Raises:
        UsageError: a tensor has no place there by itself.
    """
    wanted = sorted(names)
    if importlib.util.find_spec("transformers") is None or why_unknown(base):
        return {name: name for name in wanted}
    found = places(empty_network(base), wanted)
    for name in wanted:
        if name in found and found[name].pattern:
            raise UsageError(
                f"{name} differs, but is only a piece of a parameter of the model, which an adapter cannot hold",
                hint="leave it out, and say so, with --only-linear",
            )
    return {name: found[name].parameters[0] if name in found else name for name in wanted}


def placeholder_part(plan: Plan) -> Part | None:
    """The linear layer that gets a change of nothing where no other has one: peft loads no adapter without."""
    return next((part for part in plan.parts if part.kind in ("linear", "conv1d")), None)


def nothing(part: Part) -> LowRank:
    """A change of rank 1 that is zero."""
    rows, columns = part.spec.shape[::-1] if part.kind == "conv1d" else part.spec.shape
    return LowRank(torch.zeros(1, columns), torch.zeros(rows, 1), 1.0)
