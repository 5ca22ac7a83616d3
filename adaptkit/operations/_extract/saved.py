"""Tensors that the adapter stores whole, names of modules in it, and the peft configuration that these need.

Names are those of the model class in ``architectures`` of the base's ``config.json``, which may have no head.

modules_to_save        modules that peft replaces with all their tensors: base_model.model.<module>.weight, .bias
bias: all              biases of other modules: <module>.bias, or <module>.base_layer.bias beside A and B
ensure_weight_tying    the embedding is replaced and the head is tied to it; peft ties only modules named embed_tokens

A tied head is written too, as peft does; otherwise it would keep the base's value.

peft applies ``modules_to_save`` to every module whose path ends with one of the names, and to everything inside it:
``norm`` also matches ``layers.0.input_layernorm``. So the tensors of all matching modules are written.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from adaptkit.checkpoint.adapter_config import is_saved
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.errors import UsageError, install_hint
from adaptkit.models.architecture import empty_network, has_no_head, head_path, named_network, why_unsupported
from adaptkit.models.naming import TensorPlace, places
from adaptkit.numerics.lora import LowRank
from adaptkit.operations._extract.plan import LOW_RANK, SAVED, ExtractPlan, Part, module_of
from adaptkit.operations._extract.tensors import ComparedTensor
from adaptkit.operations._vocabulary import Vocabulary, find_vocabulary

_TIED_BY_PEFT = "embed_tokens"


@dataclass(frozen=True)
class SavedTensors:
    """Tensors that the adapter stores whole.

    Attributes:
        parts: maps names in the model to tensors.
        config: keys of ``adapter_config.json`` that they need.
        matched: names in the files of tensors stored only because ``modules_to_save`` also matches their modules.
    """

    parts: dict[str, Part]
    config: dict[str, Any]
    matched: frozenset[str] = frozenset()

    def seen(self, finding: ComparedTensor) -> ComparedTensor:
        """Return the finding, without its low-rank change if the tensor is in ``matched`` and so stored whole."""
        if finding.part.name not in self.matched or finding.part.fate != LOW_RANK:
            return finding
        why = f"{finding.part.why}, matched by modules_to_save"
        return replace(finding, term=None, part=replace(finding.part, fate=SAVED, why=why))


@dataclass(frozen=True)
class RunningModel:
    """The model that the adapter is for.

    Attributes:
        network: transformers' model without weights; None if it is unknown, and then names are those of the files.
        places: maps the base's tensors to their places in ``network``.
        config: ``config.json``.
    """

    network: Any
    places: Mapping[str, TensorPlace]
    config: Mapping[str, Any]

    @property
    def has_vocabulary_head(self) -> bool:
        """Whether it has an output layer for the vocabulary; assumed if ``network`` is None."""
        return self.network is None or self.network.get_output_embeddings() is not None

    @property
    def task(self) -> str | None:
        """Return peft's ``task_type``; None if no type fits, with which peft loads any model."""
        config = self.config if self.network is None else self.network.config.to_dict()
        if config.get("is_encoder_decoder"):
            is_text = self.network is not None and self.network.main_input_name == "input_ids"
            return "SEQ_2_SEQ_LM" if is_text and self.has_vocabulary_head else None
        if self.network is None or hasattr(self.network, "prepare_inputs_for_generation"):
            return "CAUSAL_LM"
        return "FEATURE_EXTRACTION" if has_no_head(self.network) else None

    def module(self, part: Part) -> str:
        """Return the model's path of a linear layer.

        Raises:
            UsageError: transformers splits its weight or joins it with others.
        """
        if part.kind == "expert":
            return part.module
        return module_of(self.tensor(part.name)) if part.name in self.places else part.paths[-1]

    def has_module(self, part: Part) -> bool:
        """Return whether the model has a linear layer with just this weight, neither split nor joined with others."""
        return part.name not in self.places or not self.places[part.name].pattern

    def path(self, name: str) -> str:
        """Return the model's name of a tensor of the files; the first one if the tensor is split or joined."""
        place = self.places.get(name)
        return place.parameters[0] if place else name

    def aliases(self, name: str) -> list[str]:
        """Return all names of a parameter or buffer of the model: several if it is tied."""
        state = {} if self.network is None else self.network.state_dict(keep_vars=True)
        return [other for other, value in state.items() if name in state and value is state[name]] or [name]

    def tensor(self, name: str) -> str:
        """Return the model's name of a tensor of the files.

        Raises:
            UsageError: transformers splits it or joins it with others.
        """
        place = self.places.get(name)
        if place and place.pattern:
            raise UsageError(
                f"{name} differs, but transformers splits it or joins it with others on loading, so no adapter can "
                "store it",
                hint="leave it out with --target or --only-linear",
            )
        return self.path(name)


def running_model(base: Checkpoint) -> RunningModel:
    """Build the base's model without weights, if transformers is installed and knows the architecture."""
    if importlib.util.find_spec("transformers") is None:
        return RunningModel(None, {}, base.config)
    network = named_network(base)
    if network is None and not why_unsupported(base):
        network = empty_network(base)
    return RunningModel(network, places(network, base.tensors) if network is not None else {}, base.config)


def whole_tensors(plan: ExtractPlan, findings: Sequence[ComparedTensor], running: RunningModel) -> SavedTensors:
    """Choose the tensors to store whole. peft replaces whole modules, so a weight takes its module's bias along.

    Raises:
        UsageError: transformers splits one of them or joins it with others, or has no module for it; or the name of a
            tied head is unknown.
    """
    differ = [finding.part for finding in findings if finding.differs and finding.part.fate == SAVED]
    whole = {part.module for part in differ if part.name.endswith(".weight")}
    parts = {part.name: part for part in differ}
    parts |= {part.name: part for part in plan.parts if part.module in whole}
    if not parts:
        return SavedTensors({}, {})
    for name in parts:
        _require_module(running, name)
    saved = {module_of(running.tensor(name)) for name, part in parts.items() if part.module in whole}
    vocabulary = find_vocabulary(plan.base)
    config: dict[str, Any] = {}
    if vocabulary.tied and vocabulary.embedding in parts and running.has_vocabulary_head:
        saved.add(_head(plan, running, vocabulary))
        if module_of(vocabulary.embedding).endswith(_TIED_BY_PEFT):
            config["ensure_weight_tying"] = True
    saved = {
        name for name in saved if not any(name.startswith(f"{around}.") for around in saved)
    }  # peft saves the inner modules too
    asked = {"modules_to_save": sorted(saved)}
    inside = {part.name for part in plan.parts if is_saved(asked, running.path(part.name).rpartition(".")[0])}
    matched = {name for name in inside if name not in parts}
    parts |= {part.name: part for part in plan.parts if part.name in matched}
    if any(part.name not in inside for part in differ):
        config["bias"] = "all"
    named = {running.tensor(name): part for name, part in parts.items()}
    for module in sorted(saved):
        named |= _tied_parts(plan, running, vocabulary, module, named)
    return SavedTensors(
        dict(sorted(named.items())), config | {"modules_to_save": sorted(saved) or None}, frozenset(matched)
    )


def _require_module(running: RunningModel, name: str) -> None:
    """Check that a weight of the files is a module's weight in the model, too; Granite's stacks of experts are not.

    Raises:
        UsageError: it is a parameter of another name.
    """
    path = running.tensor(name)
    if name.endswith(".weight") and not path.endswith(".weight"):
        raise UsageError(
            f"{name} differs, but in transformers it is {path}, a parameter without a module of its own, so no adapter "
            "can store it",
            hint="leave it out with --target or --only-linear",
        )


def _head(plan: ExtractPlan, running: RunningModel, vocabulary: Vocabulary) -> str:
    """Return the path of the tied head.

    Raises:
        UsageError: the path is unknown.
    """
    head = head_path(running.network) if running.network is not None else ""
    if not head and not vocabulary.is_known:
        raise UsageError(
            f"{vocabulary.embedding} differs, and the name of the head that is tied to it in models of type "
            f"{plan.base.config.get('model_type')!r} is not known",
            hint=f"if transformers supports them, {install_hint('train')}; otherwise leave it out with --only-linear",
        )
    return head or module_of(vocabulary.head)


def _tied_parts(
    plan: ExtractPlan, running: RunningModel, vocabulary: Vocabulary, module: str, named: Mapping[str, Part]
) -> dict[str, Part]:
    """Return a saved module's tensors that the files store under another module's name, as a tied head's weight."""
    if running.network is None:
        other = {vocabulary.head: vocabulary.embedding} | dict([vocabulary.bias] if vocabulary.bias else [])
        pairs = {name: [held] for name, held in other.items() if module_of(name) == module}
    else:
        state = running.network.get_submodule(module).state_dict()
        pairs = {f"{module}.{leaf}": running.aliases(f"{module}.{leaf}") for leaf in state}
    by_name = {running.path(part.name): part for part in plan.parts}
    return {
        name: next(by_name[held] for held in others if held in by_name)
        for name, others in pairs.items()
        if name not in named and any(held in by_name for held in others)
    }


def placeholder_part(plan: ExtractPlan, saved: SavedTensors, running: RunningModel) -> Part | None:
    """Return a linear layer to give a zero change: peft cannot load an adapter without any low-rank change."""
    linear = (part for part in plan.parts if part.kind in ("linear", "conv1d") and part.name not in saved.matched)
    return next((part for part in linear if running.has_module(part)), None)


def zero_change(part: Part) -> LowRank:
    """Return a zero change of rank 1."""
    rows, columns = part.spec.shape[::-1] if part.kind == "conv1d" else part.spec.shape
    return LowRank(np.zeros((1, columns), np.float32), np.zeros((rows, 1), np.float32), 1.0)
