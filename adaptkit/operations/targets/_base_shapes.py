"""What the base's headers say: which weights it has and of which shapes, decoded if they are quantized.

Adapters call modules as the running model does. Where the files have other names transformers is asked for the model's.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from adaptkit.checkpoint.foreign import quantization_found
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.errors import UsageError

_SUFFIX = ".weight"
_HEADS = ("lm_head", "embed_out", "model.lm_head", "language_model.lm_head")
_TRANSPOSED = {"gpt2", "openai-gpt"}
"""Models whose linear layers are Conv1D, which keep (in, out)."""


@dataclass(frozen=True)
class BaseShapes:
    """The base of an adapter.

    Attributes:
        checkpoint: its headers.
        quantization: by which method it is quantized; None if it is not.
        shapes: of weights, by module as the files call it.
    """

    checkpoint: Checkpoint
    quantization: str | None
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def root(self) -> Path:
        """The folder."""
        return self.checkpoint.root

    @property
    def config(self) -> Mapping[str, Any]:
        """``config.json``."""
        return self.checkpoint.config

    @property
    def is_composed(self) -> bool:
        """Whether it is a language model inside another one, where programs differ on the names of modules."""
        return any(key in self.config for key in ("text_config", "vision_config", "audio_config"))

    @property
    def is_transposed(self) -> bool:
        """Whether its linear layers keep (in, out)."""
        return self.config.get("model_type") in _TRANSPOSED

    @property
    def has_numbered_experts(self) -> bool:
        """Whether its files hold one matrix an expert."""
        return any(".experts.0." in f"{name}." for name in self.shapes)

    @property
    def is_tied(self) -> bool:
        """Whether its head is its embedding; where the configuration does not say, files without a head do."""
        said = self.config.get("tie_word_embeddings", self._text.get("tie_word_embeddings"))
        return bool(said) if said is not None else not any(head in self.shapes for head in _HEADS)

    @property
    def vocabulary(self) -> int | None:
        """Number of entries of the embedding, if the configuration has it."""
        size = self.config.get("vocab_size", self._text.get("vocab_size"))
        return size if isinstance(size, int) else None

    @property
    def _text(self) -> Mapping[str, Any]:
        inner = self.config.get("text_config")
        return inner if isinstance(inner, dict) else {}

    def shape(self, module: str) -> tuple[int, ...] | None:
        """The shape of a module's weight; None if nothing is called like it.

        Files may leave off what a model puts before all names: ``h.0.…`` of the Hub's GPT-2 is ``transformer.h.0.…``.
        """
        parts = module.split(".")
        ends = (".".join(parts[first:]) for first in range(len(parts)))
        found = next((self.shapes[end] for end in ends if end in self.shapes), None)
        return found if found is not None else self._model.get(module)

    @cached_property
    def _model(self) -> dict[str, tuple[int, ...]]:
        """The shapes of weights by the model's names of modules; empty if transformers does not know the model."""
        from adaptkit.checkpoint.architecture import empty_network, why_unknown  # here, since they wait for torch

        if why_unknown(self.checkpoint):
            return {}
        try:
            network = empty_network(self.checkpoint)
        except UsageError:
            return {}
        named = network.named_parameters(remove_duplicate=False)
        return {name.removesuffix(_SUFFIX): tuple(p.shape) for name, p in named if name.endswith(_SUFFIX)}


def read_base_shapes(root: Path) -> BaseShapes:
    """Read a checkpoint's headers.

    Raises:
        UsageError, CheckpointError: not a checkpoint, or a broken one.
    """
    checkpoint = Checkpoint(root)
    shapes = {
        name.removesuffix(_SUFFIX): located.spec.shape
        for name, located in checkpoint.tensors.items()
        if name.endswith(_SUFFIX)
    }
    quantization = quantization_found(checkpoint)
    return BaseShapes(checkpoint, quantization, {**shapes, **(_decoded(checkpoint) if quantization else {})})


def _decoded(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    from adaptkit.checkpoint.quantized import quantized_names, read_outline

    return {name.removesuffix(_SUFFIX): read_outline(checkpoint, name).shape for name in quantized_names(checkpoint)}
