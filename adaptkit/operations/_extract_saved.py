"""Names in an adapter, whole tensors in it, and what peft must be told of them.

Names are those of the model that ``architectures`` in the base's ``config.json`` says, which may be one without a head.

modules_to_save        modules that are replaced, with all of their tensors: base_model.model.<module>.weight, .bias
bias: all              biases of modules that are not: <module>.bias, or <module>.base_layer.bias beside A and B
ensure_weight_tying    the embedding is replaced and the head is tied to it; peft ties no other names than embed_tokens

A head that is tied is written too, as peft does: it would stay what it was otherwise.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from adaptkit.checkpoint.architecture import empty_network, has_no_head, named_network, why_unknown
from adaptkit.checkpoint.naming import Place, places
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


@dataclass(frozen=True)
class Running:
    """The model that an adapter is for.

    Attributes:
        network: without weights; None if transformers does not know it, whose names are then the files'.
        places: of the base's tensors in it.
    """

    network: Any
    places: Mapping[str, Place]

    @property
    def has_vocabulary_head(self) -> bool:
        """Whether it tells words, as far as is known."""
        return self.network is None or self.network.get_output_embeddings() is not None

    @property
    def task(self) -> str | None:
        """What peft calls what it is for; None loads anything."""
        if self.network is None or hasattr(self.network, "prepare_inputs_for_generation"):
            return "CAUSAL_LM"
        return "FEATURE_EXTRACTION" if has_no_head(self.network) else None

    def module(self, part: Part) -> str:
        """What the model calls a linear layer."""
        place = self.places.get(part.name)
        if part.kind == "expert":
            return part.module
        return module_of(place.parameters[0]) if place and not place.pattern else part.paths[-1]

    def tensor(self, name: str) -> str:
        """What the model calls a tensor of the files.

        Raises:
            UsageError: it has no place there by itself.
        """
        place = self.places.get(name)
        if place and place.pattern:
            raise UsageError(
                f"{name} differs, but is only a piece of a parameter of the model, which an adapter cannot hold",
                hint="leave it out, and say so, with --only-linear",
            )
        return place.parameters[0] if place else name


def running_model(base: Checkpoint) -> Running:
    """Ask transformers for it, if it is installed and knows the architecture."""
    if importlib.util.find_spec("transformers") is None:
        return Running(None, {})
    network = named_network(base)
    if network is None and not why_unknown(base):
        network = empty_network(base)
    return Running(network, places(network, base.tensors) if network is not None else {})


def whole_tensors(plan: Plan, findings: Sequence[Finding], running: Running) -> Saved:
    """Choose them. peft replaces a module as a whole, with the bias that belongs to a weight.

    Raises:
        UsageError: one of them has no place in the model by itself.
    """
    differ = [finding.part for finding in findings if finding.differs and finding.part.fate == SAVED]
    whole = {part.module for part in differ if part.name.endswith(".weight")}
    parts = {part.name: part for part in differ}
    parts |= {part.name: part for part in plan.parts if part.module in whole}
    if not parts:
        return Saved({}, {})
    names = {name: running.tensor(name) for name in sorted(parts)}
    named = {names[name]: part for name, part in parts.items()}
    saved = {module_of(names[name]) for name, part in parts.items() if part.module in whole}
    config: dict[str, Any] = {"bias": "all"} if any(part.module not in whole for part in differ) else {}
    vocabulary = find_vocabulary(plan.base)
    if vocabulary.tied and vocabulary.embedding in parts and running.has_vocabulary_head:
        named.setdefault(f"{plan.roles.head}.weight", parts[vocabulary.embedding])
        saved.add(plan.roles.head)
        if module_of(vocabulary.embedding).endswith(_TIED_BY_PEFT):
            config["ensure_weight_tying"] = True
    return Saved(dict(sorted(named.items())), config | {"modules_to_save": sorted(saved) or None})


def placeholder_part(plan: Plan) -> Part | None:
    """The linear layer that gets a change of nothing where no other has one: peft loads no adapter without."""
    return next((part for part in plan.parts if part.kind in ("linear", "conv1d")), None)


def nothing(part: Part) -> LowRank:
    """A change of rank 1 that is zero."""
    rows, columns = part.spec.shape[::-1] if part.kind == "conv1d" else part.spec.shape
    return LowRank(torch.zeros(1, columns), torch.zeros(rows, 1), 1.0)
