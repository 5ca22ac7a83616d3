"""Where a checkpoint stores embedding and head, and whether they are tied, from names, shapes and configuration."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from adaptkit.checkpoint.layout import class_names, text_config
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.checkpoint.vocabulary import (
    is_in_layers,
    is_rare_embedding,
    is_tied_by_default,
    is_usual_embedding,
    is_usual_head,
    known_head,
    shares_more,
)
from adaptkit.errors import BaseMismatchError, install_hint
from adaptkit.models.architecture import find_head_path

_HEADLESS_CLASS = re.compile(
    r"(?<!LMHead)(?<!DoubleHeads)(?<!EncoderDecoder)(?<!MarianMT)Model$|For\w*Classification$|ForQuestionAnswering\w*$"
    r"|For(MultipleChoice|NextSentencePrediction)$|^(Electra|Funnel|Splinter)ForPreTraining$"
)
"""Names of transformers' classes that have no output layer for the vocabulary."""


@dataclass(frozen=True)
class Vocabulary:
    """The tensors of embedding and output layer.

    Attributes:
        embedding: name of the tensor; empty if none is known.
        head: name of the output layer's tensor, in the files or not; a guess unless ``is_known``.
        tied: whether the head is the embedding.
        tensors: names of all tensors in the files.
        is_known: whether ``head`` is certainly the head's name.
    """

    embedding: str
    head: str
    tied: bool
    tensors: Collection[str]
    is_known: bool

    def is_embedding(self, name: str) -> bool:
        """Whether a tensor of the files is the embedding."""
        return bool(name) and name == self.embedding

    def is_head(self, name: str) -> bool:
        """Whether a tensor, or a parameter of the model, is the output layer."""
        return name == self.head or is_usual_head(name.removesuffix(".weight"))

    @property
    def bias(self) -> tuple[str, str] | None:
        """The name of a tied head's bias, and of the tensor in the files that holds it; None unless these differ.

        BERT and similar models also register the bias in the module around the head, and tie the two biases if they tie
        the weights.
        """
        module = self.head.removesuffix(".weight")
        own, outer = f"{module}.bias", f"{module.rpartition('.')[0]}.bias"
        return (own, outer) if self.tied and outer in self.tensors and own not in self.tensors else None

    def stored(self, name: str) -> str:
        """Return the tensor of the files that holds a tensor's values: for a head that they lack, the embedding."""
        return self.embedding if name == self.head and name not in self.tensors else name

    def both(self, name: str) -> list[str]:
        """Return embedding and head if they are tied and the tensor is one of them, otherwise only the tensor."""
        return [self.embedding, self.head] if self.tied and name in (self.embedding, self.head) else [name]

    def outputs(self, name: str, together: bool) -> list[str]:
        """Return the tensors to which a change of a tensor applies.

        Args:
            name: of the tensor.
            together: whether embedding and head change together.
        """
        if not self.tied or name not in (self.embedding, self.head) or not together:
            return [name]
        return [self.embedding, *([self.head] if self.head in self.tensors else [])]


def find_vocabulary(checkpoint: Checkpoint) -> Vocabulary:
    """Find embedding and head from names, shapes and configuration."""
    weights = {name.removesuffix(".weight"): name for name in checkpoint.tensors if name.endswith(".weight")}
    shortest_first = sorted(weights, key=lambda module: (len(module), module))
    known = known_head(checkpoint.config)
    heads = [module for module in shortest_first if module == known or is_usual_head(module)]
    setting = tying_setting(checkpoint.config)
    setting = is_tied_by_default(checkpoint.config) if setting is None else setting
    tables = [module for module in shortest_first if is_usual_embedding(module)]
    tables = tables or [module for module in shortest_first if is_rare_embedding(module) and module not in heads]
    outside = {m: checkpoint.spec(name).shape for m, name in weights.items() if not is_in_layers(name)}
    if not tables and not heads:  # the only matrix with a row per token is embedding and head in one
        heights = [source.get("vocab_size") for source in (checkpoint.config, text_config(checkpoint.config))]
        tables = _only([module for module, shape in outside.items() if len(shape) == 2 and shape[0] in heights])
    if tables and not heads and setting is False:
        # Files may name the head differently than the model: DeepSeek-V4's head.weight is lm_head.weight there.
        shape = checkpoint.spec(weights[tables[0]]).shape
        heads = _only([module for module, other in outside.items() if module != tables[0] and other == shape])
    tied = bool(tables) and (setting is True if heads else not lacks_head(checkpoint))
    return Vocabulary(
        weights[tables[0]] if tables else "",
        weights[heads[0]] if heads else f"{known or 'lm_head'}.weight",
        tied,
        checkpoint.tensors,
        bool(heads or known),
    )


def require_head(checkpoint: Checkpoint, vocabulary: Vocabulary) -> Vocabulary:
    """Determine the head's name, which untying it requires; asks transformers if no table has the name.

    Raises:
        BaseMismatchError: the name is unknown; or untying the head in ``config.json`` would untie other tensors too.
    """
    if shares_more(checkpoint.config):
        raise BaseMismatchError(
            f"{checkpoint.root}: a {checkpoint.config['model_type']} model shares more than embedding and head; with "
            "these untied in config.json, readers would initialize the rest at random",
            hint="train the adapter without embedding and head",
        )
    if vocabulary.is_known:
        return vocabulary
    head = find_head_path(checkpoint)
    if not head:
        raise BaseMismatchError(
            f"{checkpoint.root}: the name of the tied head in models of type {checkpoint.config.get('model_type')!r} "
            "is not known, so it cannot be stored as a separate tensor",
            hint=f"if transformers supports them, {install_hint('train')}; otherwise train without embedding and head",
        )
    return replace(vocabulary, head=f"{head}.weight", is_known=True)


def lacks_head(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint is of a class without an output layer, by ``architectures`` in its configuration.

    Some language models wrongly name such a class there. Their tensor names have a common first component
    (``transformer.h.0.…``), which those of a bare ``GPT2Model`` do not have.
    """
    name = next(iter(class_names(checkpoint.config)), "")
    outer = {tensor.partition(".")[0] for tensor in checkpoint.tensors}
    return _HEADLESS_CLASS.search(name) is not None and not (name.endswith("Model") and len(outer) == 1)


def tying_setting(config: Mapping[str, Any]) -> Any:
    """Return ``tie_word_embeddings`` of a configuration; None if it is absent."""
    return config.get("tie_word_embeddings", text_config(config).get("tie_word_embeddings"))


def _only(found: list[str]) -> list[str]:
    return found if len(found) == 1 else []
