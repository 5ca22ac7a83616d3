"""Where a checkpoint keeps embedding and head, and whether they are one, from names, shapes and configuration."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from adaptkit.checkpoint.layout import class_names, text_config
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.checkpoint.vocabulary import (
    is_in_layers,
    is_rare_table,
    is_tied_by_default,
    is_usual_head,
    is_usual_table,
    known_head,
    shares_more,
)
from adaptkit.errors import BaseMismatchError
from adaptkit.networks.architecture import asked_head

_TELLS_NO_WORDS = re.compile(
    r"(?<!LMHead)(?<!DoubleHeads)(?<!EncoderDecoder)(?<!MarianMT)Model$|For\w*Classification$|ForQuestionAnswering\w*$"
    r"|For(MultipleChoice|NextSentencePrediction)$|^(Electra|Funnel|Splinter)ForPreTraining$"
)
"""Names of transformers' classes that have no output layer for the vocabulary."""


@dataclass(frozen=True)
class Vocabulary:
    """Where a checkpoint keeps what depends on its vocabulary.

    Attributes:
        embedding: name of the tensor; empty if none is known.
        head: name of the output layer's tensor, in the files or not; a guess if not ``is_known``.
        tied: whether the head is the embedding.
        tensors: names in the files.
        is_known: whether that is the head's name.
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
        """The head's bias, and the tensor of the files that it is while embedding and head are one; None if it is none.

        BERT and its kin give the bias to what is around the head, too, and tie the two if they tie the weights.
        """
        module = self.head.removesuffix(".weight")
        own, outer = f"{module}.bias", f"{module.rpartition('.')[0]}.bias"
        return (own, outer) if self.tied and outer in self.tensors and own not in self.tensors else None

    def stored(self, name: str) -> str:
        """The tensor of the files that a tensor of the result begins as."""
        return self.embedding if name == self.head and name not in self.tensors else name

    def both(self, name: str) -> list[str]:
        """Embedding and head if they are one and a tensor is that; else only the tensor."""
        return [self.embedding, self.head] if self.tied and name in (self.embedding, self.head) else [name]

    def outputs(self, name: str, together: bool) -> list[str]:
        """The tensors that a change of one goes to.

        Args:
            name: of the tensor.
            together: whether embedding and head change together.
        """
        if not self.tied or name not in (self.embedding, self.head) or not together:
            return [name]
        return [self.embedding, *([self.head] if self.head in self.tensors else [])]


def find_vocabulary(checkpoint: Checkpoint) -> Vocabulary:
    """Find embedding and head, from names, shapes and configuration."""
    weights = {name.removesuffix(".weight"): name for name in checkpoint.tensors if name.endswith(".weight")}
    shortest_first = sorted(weights, key=lambda module: (len(module), module))
    known = known_head(checkpoint.config)
    heads = [module for module in shortest_first if module == known or is_usual_head(module)]
    says = says_tied(checkpoint.config)
    says = is_tied_by_default(checkpoint.config) if says is None else says
    tables = [module for module in shortest_first if is_usual_table(module)]
    tables = tables or [module for module in shortest_first if is_rare_table(module) and module not in heads]
    if not tables and not heads:
        tables = _only_of_its_height(checkpoint)
    if tables and not heads and says is False:
        heads = _only_of_its_shape(checkpoint, weights[tables[0]])
    tied = bool(tables) and (says is True if heads else not tells_no_words(checkpoint))
    return Vocabulary(
        weights[tables[0]] if tables else "",
        weights[heads[0]] if heads else f"{known or 'lm_head'}.weight",
        tied,
        checkpoint.tensors,
        bool(heads or known),
    )


def require_head(checkpoint: Checkpoint, vocabulary: Vocabulary) -> Vocabulary:
    """Make sure of the head's name, where it is to be a tensor of its own; may have to ask transformers.

    Raises:
        BaseMismatchError: it cannot be known; or it is not all that the setting which unties it would part.
    """
    if shares_more(checkpoint.config):
        raise BaseMismatchError(
            f"{checkpoint.root}: a {checkpoint.config['model_type']} model shares more than embedding and head; with "
            "these untied in config.json, readers would initialize the rest at random",
            hint="train the adapter without embedding and head",
        )
    if vocabulary.is_known:
        return vocabulary
    head = asked_head(checkpoint)
    if not head:
        raise BaseMismatchError(
            f"{checkpoint.root}: the name of the tied head in models of type {checkpoint.config.get('model_type')!r} "
            "is not known, so it cannot be stored as a separate tensor",
            hint="pip install 'adaptkit[train]' if transformers supports them, or train without embedding and head",
        )
    return replace(vocabulary, head=f"{head}.weight", is_known=True)


def tells_no_words(checkpoint: Checkpoint) -> bool:
    """Whether files are of a class without an output layer, which some say they are whose names are a language model's.

    Those have one word before all names (``transformer.h.0.…``), which ``GPT2Model`` by itself does not have.
    """
    name = next(iter(class_names(checkpoint.config)), "")
    outer = {tensor.partition(".")[0] for tensor in checkpoint.tensors}
    return _TELLS_NO_WORDS.search(name) is not None and not (name.endswith("Model") and len(outer) == 1)


def says_tied(config: Mapping[str, Any]) -> Any:
    """Whether head and embedding are one, in the words of a configuration; None if it does not say."""
    return config.get("tie_word_embeddings", text_config(config).get("tie_word_embeddings"))


def _only_of_its_shape(checkpoint: Checkpoint, table: str) -> list[str]:
    """The module of the only other tensor outside the layers that is like the embedding: a head that is not tied to it.

    Files may call it otherwise than the model does: DeepSeek-V4's ``head.weight`` is ``lm_head.weight`` there.
    """
    shape = checkpoint.spec(table).shape
    found = [
        name.removesuffix(".weight")
        for name, located in checkpoint.tensors.items()
        if name.endswith(".weight") and name != table and not is_in_layers(name) and located.spec.shape == shape
    ]
    return found if len(found) == 1 else []


def _only_of_its_height(checkpoint: Checkpoint) -> list[str]:
    """The module of the only matrix outside the layers with a row for every word, which must be embedding and head."""
    values = [source.get("vocab_size") for source in (checkpoint.config, text_config(checkpoint.config))]
    found = [
        name.removesuffix(".weight")
        for name, located in checkpoint.tensors.items()
        if name.endswith(".weight") and not is_in_layers(name)
        if len(located.spec.shape) == 2 and located.spec.shape[0] in values
    ]
    return found if len(found) == 1 else []
