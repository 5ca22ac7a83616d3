"""Plan what adapters do to the tensors of a checkpoint; every part of every adapter finds its tensor or is refused.

Compensation, the change that an adapter was initialized with to offset its base's quantization error, is subtracted:
the base of a merge is not quantized.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from adaptkit.checkpoint.adapter import Adapter, TokenRows
from adaptkit.checkpoint.adapter_config import is_parameter, is_saved
from adaptkit.checkpoint.reader import Checkpoint, TensorFiles
from adaptkit.errors import AdapterError, BaseMismatchError, UsageError
from adaptkit.networks.addressing import OTHER_MODEL, Slice
from adaptkit.numerics import lora
from adaptkit.numerics.lora import LowRank
from adaptkit.numerics.spec import FLOATS, TensorSpec
from adaptkit.operations._merge.edit_checks import check_shape, check_sums
from adaptkit.operations._merge.edits import Edit, Edits, Step, Stored
from adaptkit.operations._merge.expert_panels import Experts
from adaptkit.operations._merge.unlike_peft import trained_differently
from adaptkit.operations._roles import stores_transposed
from adaptkit.operations._terms import training_of
from adaptkit.operations._tying import VocabularyChange, vocabulary_changes
from adaptkit.operations._vocabulary import Vocabulary, find_vocabulary, require_head

UsesCopy = Callable[[str, TensorFiles, str], bool]
"""Called with the tensor's name, the adapter's files and the key of its copy; returns whether to use the copy."""


def plan_edits(
    checkpoint: Checkpoint, adapters: Sequence[Adapter], weights: Sequence[float], uses_copy: UsesCopy, untie: bool
) -> Edits:
    """Plan what adapters do to each tensor of a checkpoint.

    Args:
        checkpoint: the base.
        adapters: the adapters, in order.
        weights: weight of each adapter.
        uses_copy: decides whether an adapter's own copy of a base tensor replaces it.
        untie: store a tied head as a separate tensor if it would differ from the embedding.

    Raises:
        BaseMismatchError: an adapter changes a tensor that the checkpoint lacks or has in another shape; or a tied head
            would differ from the embedding and ``untie`` is not set.
        UsageError: an adapter only compensates for quantization, resizes the vocabulary with a weight other than 1, or
            makes changes that cannot be summed with another's.
        AdapterError: parts of an adapter contradict each other.
    """
    edits = Edits()
    vocabulary = find_vocabulary(checkpoint)
    changes = [vocabulary_changes(checkpoint, vocabulary, adapter, untie) for adapter in adapters]
    edits.addresses = [change.addresses for change in changes]
    separate = any(change.separate for change in changes)
    if separate:
        vocabulary = require_head(checkpoint, vocabulary)
        edits.config["tie_word_embeddings"] = False
        edits.notes.append(f"untied: {vocabulary.head} is now a separate tensor")
    for number, (adapter, weight, change) in enumerate(zip(adapters, weights, changes, strict=True)):
        if adapter.only_compensates:
            raise UsageError(
                f"{adapter.root}: an untrained companion adapter only offsets what quantization loses, which "
                f"{checkpoint.root} has not lost",
                hint=f"train it first: {training_of(adapter)}",
            )
        edits.notes += [f"{adapter.root}: {change.mapping_note}"] if change.mapping_note else []
        _Planner(checkpoint, vocabulary, edits, change, adapter, number, weight, uses_copy).plan()
    if separate and vocabulary.head not in edits.of:  # it keeps the embedding's values
        spec = checkpoint.spec(vocabulary.stored(vocabulary.head))
        edits.of[vocabulary.head] = Edit(replace(spec, name=vocabulary.head), spec.name, spec.shape)
    if separate and vocabulary.bias is not None:  # the bias was tied along with the weight
        own, outer = vocabulary.bias
        spec = checkpoint.spec(outer)
        edit = edits.of.get(outer, Edit(spec, outer, spec.shape))
        edits.of[own] = replace(edit, spec=replace(edit.spec, name=own))
    edits.added = [name for name in edits.of if name not in checkpoint.tensors]
    check_sums(checkpoint, edits)
    return edits


class _Planner:
    """Adds the changes of one adapter to the edits."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        vocabulary: Vocabulary,
        edits: Edits,
        change: VocabularyChange,
        adapter: Adapter,
        number: int,
        weight: float,
        uses_copy: UsesCopy,
    ) -> None:
        self._uses_copy = uses_copy
        self._checkpoint, self._vocabulary, self._edits = checkpoint, vocabulary, edits
        self._change, self._adapter, self._number, self._weight = change, adapter, number, weight
        self._separate = "tie_word_embeddings" in edits.config
        self._experts = Experts(checkpoint, adapter, self._spec)

    def plan(self) -> None:
        """Plan all parts of the adapter."""
        adapter, addresses, repeated = self._adapter, self._change.addresses, self._change.repeated
        for module, term in adapter.modules.items():
            if f"{module}.weight" not in repeated:
                self._plan_module(module, term, addresses[f"{module}.weight"][0])
        for module, bias in adapter.biases.items():
            name = addresses[f"{module}.bias"][0].name
            self._check(name, (bias.shape[0],))
            self._extend(name, bias=bias)
        for parameter in adapter.experts:
            for name, panels in self._experts.of_stack(parameter, addresses[parameter]):
                self._extend(name, panels=panels)
        for module, tokens in adapter.tokens.items():
            if f"{module}.weight" not in repeated:
                self._plan_tokens(module, tokens, addresses[f"{module}.weight"][0].name)
        for parameter, key in adapter.replaced.items():
            if parameter not in repeated:
                self._plan_replaced(parameter, key, addresses[parameter])
        self._check_saved()
        self._edits.notes += trained_differently(self._checkpoint, adapter, addresses)

    def _check_saved(self) -> None:
        """Refuse an adapter that lacks a tensor of a module in ``modules_to_save``."""
        for name in self._checkpoint.tensors:
            if is_saved(self._adapter.config, name.rpartition(".")[0]):
                steps = self._edits.of[name].steps if name in self._edits.of else ()
                if not any(step.adapter == self._number and step.whole for step in steps):
                    raise BaseMismatchError(
                        f"{self._adapter.root}: modules_to_save is {self._adapter.config['modules_to_save']}, but the "
                        f"adapter has no tensor for {name}",
                        hint="download or save the complete adapter again, or give the base that it was trained on",
                    )

    def _plan_module(self, module: str, term: LowRank, place: Slice) -> None:
        adapter, name = self._adapter, place.name
        if place.of_tensor:
            self._extend(name, panels=self._experts.of_one(module, term, place))
            return
        self._plan_copies(module, name)
        is_table = module in adapter.embeddings
        flip = not is_table and self._is_transposed(module, term, self._spec(name))
        terms = [term]
        if module in adapter.compensation:
            terms.append(adapter.compensation[module].weighted(-1.0))
        terms = [lora.transposed(t) if flip else t for t in terms]
        self._check(name, terms[0].shape)
        self._extend(name, panels=(tuple(terms),))
        if module in adapter.magnitudes:
            self._extend(name, magnitude=adapter.magnitudes[module], per_column=flip or is_table)

    def _plan_tokens(self, module: str, tokens: TokenRows, name: str) -> None:
        self._plan_copies(module, name)
        spec = self._spec(name)
        if len(spec.shape) != 2 or tokens.rows.shape[1] != spec.shape[1] or max(tokens.indices) >= spec.shape[0]:
            raise BaseMismatchError(
                f"{self._adapter.root}: trained rows of width {tokens.rows.shape[1]} up to index "
                f"{max(tokens.indices)} do not fit {name} of shape {list(spec.shape)}",
                hint=OTHER_MODEL,
            )
        for output in self._outputs_of_tokens(name):
            self._put(output, tokens=tokens)

    def _is_transposed(self, module: str, term: LowRank, spec: TensorSpec) -> bool:
        """Return whether the base stores this weight as (in, out).

        Shapes decide, unless the matrix is square. ``fan_in_fan_out`` alone does not decide, since peft sets it by
        whichever layer came last. A transposed shape in a model without transposed layers belongs to another model.
        """
        kind = self._checkpoint.config.get("model_type")
        turned = stores_transposed(self._checkpoint, module)
        if term.shape[0] == term.shape[1]:
            return turned and not is_parameter(self._adapter.config, module)
        may_be = turned or self._adapter.fan_in_fan_out or not isinstance(kind, str)
        return may_be and spec.shape == term.shape[::-1]

    def _plan_copies(self, module: str, name: str) -> None:
        """Plan the adapter's own copies of the module's base tensors; usually they equal the base's."""
        self._plan_copy(f"{module}.weight", name)
        if f"{module}.bias" in self._adapter.base_copies:
            self._plan_copy(f"{module}.bias", self._change.addresses[f"{module}.bias"][0].name)

    def _plan_copy(self, parameter: str, name: str) -> None:
        """Use the adapter's copy of a base tensor if it differs, for a tied head or embedding too.

        The running model had the copy as its base weight.
        """
        key = self._adapter.base_copies.get(parameter)
        source = self._vocabulary.stored(name)
        if key is None or not self._uses_copy(source, self._adapter.files, key):
            return
        if self._adapter.files.spec(key).shape == self._checkpoint.spec(source).shape:
            self._edits.copies.append(source)
        vocabulary = self._vocabulary
        for output in vocabulary.both(name) if self._separate else vocabulary.outputs(name, together=True):
            self._replace(output, key, 0)

    def _plan_replaced(self, parameter: str, key: str, slices: tuple[Slice, ...]) -> None:
        if slices[0].expert is None:
            for output in self._outputs(slices[0].name):
                self._replace(output, key, 0)
            return
        found = self._adapter.files.spec(key)
        for name, first_row in self._experts.rows_of(parameter, found.shape, slices):
            self._put(name, whole=Stored(self._adapter.files, key, first_row))

    def _replace(self, output: str, key: str, first_row: int) -> None:
        """Replace a tensor of the result by one of the adapter."""
        files, spec = self._adapter.files, self._edit(output).spec
        if files.spec(key).shape != spec.shape:
            self._resize(output, files.spec(key), spec)
        self._put(output, whole=Stored(files, key, first_row))

    def _resize(self, output: str, found: TensorSpec, spec: TensorSpec) -> None:
        """Change the number of rows of an embedding or head, or of its bias."""
        vocabulary, module = self._vocabulary, output.rpartition(".")[0]
        is_table = vocabulary.is_head(f"{module}.weight") or vocabulary.is_embedding(f"{module}.weight")
        if not is_table or len(found.shape) != len(spec.shape) or found.shape[1:] != spec.shape[1:]:
            check_shape(str(self._adapter.root), self._checkpoint.root, spec, output, found.shape)  # raises
        if self._weight != 1:
            raise UsageError(
                f"{self._adapter.root}: resizes the vocabulary to {found.shape[0]}, which needs a weight of 1",
                hint="leave out its --weight, or give 1",
            )
        self._edits.config["vocab_size"] = found.shape[0]
        self._edits.of[output] = replace(self._edit(output), spec=replace(spec, shape=found.shape))

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        check_shape(str(self._adapter.root), self._checkpoint.root, self._spec(name), name, shape)

    def _spec(self, name: str) -> TensorSpec:
        edit = self._edits.of.get(self._outputs(name)[0])
        return edit.spec if edit is not None else self._checkpoint.spec(self._vocabulary.stored(name))

    def _outputs(self, name: str) -> list[str]:
        """Return the tensors of the result that a change applies to: embedding and head, if tied.

        If the merge unties them, only if this adapter changes both alike.
        """
        vocabulary = self._vocabulary
        if self._separate and self._change.together and name == vocabulary.embedding:
            return [vocabulary.embedding, vocabulary.head]
        return vocabulary.outputs(name, together=not self._separate)

    def _outputs_of_tokens(self, name: str) -> list[str]:
        """Return the tensors whose rows trained tokens replace.

        In peft a tied head follows its embedding unless it has trained tokens of its own, even if the merge unties
        them; the embedding never follows the head.
        """
        vocabulary, addresses = self._vocabulary, self._change.addresses
        changed = [addresses[f"{module}.weight"][0].name for module in self._adapter.tokens]
        if name == vocabulary.embedding and vocabulary.head not in changed:
            return vocabulary.both(name) if self._separate else self._outputs(name)
        return self._outputs(name)

    def _edit(self, output: str) -> Edit:
        if output not in self._edits.of:
            source = self._vocabulary.stored(output)
            spec = self._checkpoint.spec(source)
            self._edits.of[output] = Edit(replace(spec, name=output), source, spec.shape)
        return self._edits.of[output]

    def _extend(self, name: str, **what: Any) -> None:
        """Add a change to every tensor of the result that it applies to."""
        for output in self._outputs(name):
            self._put(output, **what)

    def _put(self, output: str, **what: Any) -> None:
        """Add a change to one tensor of the result."""
        edit = self._edit(output)
        if edit.spec.dtype not in FLOATS:
            raise BaseMismatchError(
                f"{self._adapter.root}: changes {output}, whose dtype in {self._checkpoint.root} is {edit.spec.dtype}",
                hint="save the base in float32 or bfloat16 first, and merge into that"
                if edit.spec.dtype == "F64"
                else "merge into the 16-bit checkpoint that it was quantized from",
            )
        steps = list(edit.steps)
        if not steps or steps[-1].adapter != self._number:
            steps.append(Step(self._number, self._weight))
        if steps[-1].panels and "panels" in what:
            both = zip(steps[-1].panels, what["panels"], strict=True)
            what["panels"] = tuple(one + other for one, other in both)
        before, now = steps[-1].whole, what.get("whole")
        if before is not None and now is not None and not self._is_alike(before, now):
            raise AdapterError(
                f"{self._adapter.root}: {before.key!r} and {now.key!r} both replace {output}, but differ",
                hint="save the adapter again with peft",
            )
        steps[-1] = replace(steps[-1], **what)
        self._edits.of[output] = replace(edit, steps=tuple(steps))

    def _is_alike(self, one: Stored, other: Stored) -> bool:
        """Return whether two tensors of the adapter are the same, such as a bias that two modules share."""
        digests = self._adapter.digests
        return one.first_row == other.first_row and digests[one.key] == digests[other.key]
