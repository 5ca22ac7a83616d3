"""Names and shapes of a base's weights from its headers; for quantized weights, the shapes after decoding.

Adapters name modules as in the running model, which transformers can build. For an architecture that transformers does
not know, the names of the files are used, which may lack the model's common prefix.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from adaptkit.checkpoint.layout import class_names, text_config
from adaptkit.checkpoint.quantization import quantization_found
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.errors import UsageError
from adaptkit.models.architecture import empty_network, named_network, why_unsupported
from adaptkit.operations._roles import CONV1D_MODELS
from adaptkit.operations._vocabulary import find_vocabulary

_SUFFIX = ".weight"
_OF_MODELS = {"backbone", "model", "transformer"}
"""Prefixes that models put before all names, and that files may omit."""
_ONE_EXPERT = re.compile(r"(^|\.)experts\.\d+\.")
_LOADED_BY = {
    "FEATURE_EXTRACTION": "AutoModel",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
}
"""Class that loads the base, by the adapter's task; for other tasks it is the base's own class."""


@dataclass(frozen=True)
class BaseShapes:
    """The base of an adapter.

    Attributes:
        checkpoint: its headers.
        quantization: quantization method; None if it is not quantized.
        shapes: maps module names in the files to weight shapes.
        classes: names of model classes; the adapter is for the first that transformers has, or for the base's own class
            if it has none.
        modules: modules that the adapter changes; if only the base's own language model class has them, the adapter is
            for that class.
    """

    checkpoint: Checkpoint
    quantization: str | None
    shapes: Mapping[str, tuple[int, ...]]
    classes: tuple[str, ...]
    modules: tuple[str, ...]

    @property
    def root(self) -> Path:
        """Folder of the base."""
        return self.checkpoint.root

    @property
    def config(self) -> Mapping[str, Any]:
        """``config.json``."""
        return self.checkpoint.config

    @property
    def model_type(self) -> str | None:
        """``model_type`` of the configuration; None if it is not a string."""
        kind = self.config.get("model_type")
        return kind if isinstance(kind, str) else None

    @property
    def is_composed(self) -> bool:
        """Whether it is a multimodal model around a language model, whose module names differ between programs."""
        return any(key in self.config for key in ("text_config", "vision_config", "audio_config"))

    @property
    def is_transposed(self) -> bool:
        """Whether its linear layers store weights as (in, out)."""
        return self.model_type in CONV1D_MODELS

    @property
    def has_numbered_experts(self) -> bool:
        """Whether its files hold one matrix per expert."""
        return any(".experts.0." in f"{name}." for name in self.shapes)

    @cached_property
    def is_tied(self) -> bool:
        """Whether its head is tied to its embedding."""
        return find_vocabulary(self.checkpoint).tied

    @property
    def vocabulary(self) -> int | None:
        """Number of entries of the embedding; None if the configuration does not say."""
        size = self.config.get("vocab_size", text_config(self.config).get("vocab_size"))
        return size if isinstance(size, int) else None

    @cached_property
    def network(self) -> Any:
        """The model that the adapter is for, without weights; None if transformers does not know it."""
        if find_spec("transformers") is None:
            return None
        named = named_network(self.checkpoint, self.classes)
        if (named is not None and self._has_modules(named)) or why_unsupported(self.checkpoint):
            return named
        try:
            model = empty_network(self.checkpoint)
        except UsageError:
            return named
        is_its_own = type(model).__name__ in class_names(self.config)
        return model if named is None or (is_its_own and self._has_modules(model)) else named

    def _has_modules(self, network: Any) -> bool:
        names = network.state_dict()
        return all(f"{module}{_SUFFIX}" in names for module in self.modules)

    @property
    def title(self) -> str:
        """Its folder, and the model class if that is known, for messages."""
        return f"{self.root}" if self.network is None else f"{self.root} ({type(self.network).__name__})"

    @cached_property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors in the model's state dict; empty if transformers does not know the model."""
        tensors = {} if self.network is None else self.network.state_dict()
        return {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    def may_have_stack(self, module: str) -> bool:
        """Return whether the model has a stack of experts, or is unknown; peft's ``.base_layer`` is ignored."""
        path = module.replace(".base_layer", "")
        return not self.tensors or any(name.startswith(f"{path}.") for name in self.tensors)

    def shape(self, module: str) -> tuple[int, ...] | None:
        """Return the shape of a module's weight, from the files if they have it; None if nothing has this name.

        Files may omit the model's prefix: ``h.0.…`` of the Hub's GPT-2 is ``transformer.h.0.…``. Names in the files are
        also accepted for single experts, which the model may store in one stack.
        """
        known = self.tensors.get(f"{module}{_SUFFIX}")
        if self.tensors and known is None and not self.is_composed and not is_single_expert(module):
            return None
        first, _, rest = module.partition(".")
        is_omitted = first in _OF_MODELS and not any(name.startswith(f"{first}.") for name in self.shapes)
        return self.shapes.get(rest if is_omitted and module not in self.shapes else module, known)


def is_single_expert(module: str) -> bool:
    """Return whether a module belongs to one of several experts, by its dotted path."""
    return bool(_ONE_EXPERT.search(module))


def read_base_shapes(root: Path, adapter: Mapping[str, Any], modules: tuple[str, ...]) -> BaseShapes:
    """Read a checkpoint's headers.

    Args:
        root: the checkpoint's folder.
        adapter: configuration of the adapter, which may name the model class that the base is loaded with.
        modules: modules that the adapter changes.

    Raises:
        UsageError, CheckpointError: not a checkpoint, or a broken one.
    """
    checkpoint = Checkpoint(root)
    quantization = quantization_found(checkpoint)
    shapes = {name: located.spec.shape for name, located in checkpoint.tensors.items() if name.endswith(_SUFFIX)}
    if quantization:
        from adaptkit.formats._find import quantized_names, read_outline  # imported here: loads numpy

        codes = {name for name in shapes if checkpoint.spec(name).dtype == "U8"}  # several codes per byte
        decoded = {name: read_outline(checkpoint, name).shape for name in quantized_names(checkpoint)}
        shapes = {name: shape for name, shape in shapes.items() if name not in codes} | decoded
    mapping, task = adapter.get("auto_mapping"), adapter.get("task_type")
    trained = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    loaded = _LOADED_BY.get(task) if isinstance(task, str) else None
    classes = tuple(name for name in (trained, loaded) if isinstance(name, str))
    shapes = {name.removesuffix(_SUFFIX): shape for name, shape in shapes.items()}
    return BaseShapes(checkpoint, quantization, shapes, classes, modules)
