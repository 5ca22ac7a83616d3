"""What a run trains, and its initial values: new matrices, an existing adapter, or the base itself."""

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from adaptkit.checkpoint.adapter import Adapter, read_adapter
from adaptkit.checkpoint.manifest import Manifest
from adaptkit.checkpoint.quantization import is_released, packed_weights, quantization_found
from adaptkit.checkpoint.reader import Checkpoint
from adaptkit.errors import BaseMismatchError, UsageError
from adaptkit.models.addressing import find_addresses, unsupported_steps
from adaptkit.models.architecture import path_of
from adaptkit.models.base_weights import Weights, check_base
from adaptkit.models.kinds import (
    is_expert,
    is_indexer,
    is_never_called,
    is_read_by_kernels,
    is_router,
    is_shared_by_layers,
)
from adaptkit.models.matching import EVERYTHING, matching
from adaptkit.models.peft_names import mistaken_for_experts, renamed_in_peft
from adaptkit.settings import refuse
from adaptkit.training.config import INITS, TrainConfig
from adaptkit.training.network.adapt import (
    bias_names,
    parameter_places,
    saved_names,
    stack_changes,
    train_rows,
    train_whole,
)
from adaptkit.training.network.loading import load_adapter
from adaptkit.training.network.model import Model
from adaptkit.training.network.new_adapters import AdapterShape, new_adapter, new_stack_adapters
from adaptkit.training.network.whole import TrainedWeight
from adaptkit.wording import counted


def resolve_method(config: TrainConfig, checkpoint: Checkpoint) -> TrainConfig:
    """Set a run's method: ``full`` if requested, else ``qlora`` on a quantized base and ``lora`` on any other.

    Raises:
        UsageError: the base is quantized in another tool's format, or the requested method does not support the base.
    """
    ours, root = bool(packed_weights(checkpoint)), checkpoint.root
    found = quantization_found(checkpoint)
    if found and not ours:
        raise UsageError(
            f"{root}: is quantized with {found}, which cannot be trained",
            hint=f"run: adaptkit quantize {shlex.quote(str(root))} -o NF4; then train on NF4"
            if is_released(found)
            else "use the 16-bit checkpoint, or quantize that: adaptkit quantize ORIGINAL -o NF4",
        )
    if ours and config.method == "full":
        raise UsageError(
            f"{root}: is quantized; method full needs a 16-bit checkpoint",
            hint=f"give the 16-bit checkpoint, or run: adaptkit dequantize {shlex.quote(str(root))} -o PLAIN",
        )
    if not ours and config.method == "qlora":
        raise UsageError(
            f"{root}: is not quantized, which method qlora requires",
            hint=f"run: adaptkit quantize {shlex.quote(str(root))} -o NF4; or use --method lora",
        )
    return config if config.method == "full" else replace(config, method="qlora" if ours else "lora")


def read_start(config: TrainConfig, base: Manifest | None) -> Adapter | None:
    """Read the adapter that a run starts from; None if ``init`` names an initialization instead.

    Args:
        config: options of the run.
        base: manifest of the base, if it has one.

    Raises:
        BaseMismatchError: the adapter belongs to another base.
        AdapterError: it cannot be read.
        UsageError: it cannot be combined with what the run adds.
    """
    if config.init in INITS:
        return None
    if not Path(config.init).is_dir():
        refuse(config, "init", "must be kaiming, normal, or the folder of an adapter")
    adapter = read_adapter(Path(config.init))
    check_base(adapter, Weights(Path(config.base)))
    _check_additions(adapter, config)
    targets = adapter.manifest.targets if adapter.manifest else ()
    if adapter.compensation and (base is None or not any(target.quantized_root for target in targets)):
        silent = config.base if base is None else adapter.root
        raise BaseMismatchError(
            f"{adapter.root}: compensates for the error of one quantized base, but {silent} has no manifest that says "
            "which",
            hint="use the folders that quantize made together; if only the adapter's manifest is lost, run: adaptkit "
            "adopt ADAPTER -o OUT --base BASE",
        )
    return adapter


def _check_additions(adapter: Adapter, config: TrainConfig) -> None:
    """Refuse options that cannot be combined with the given adapter; ``TrainConfig`` checks this for new adapters."""
    for name, other, there in (
        ("dora", "lora_bias", adapter.config.get("lora_bias")),
        ("lora_bias", "dora", adapter.magnitudes),
    ):
        if getattr(config, name) and there:
            raise UsageError(f"{name}: cannot be combined with the {other} of {adapter.root}", hint=f"leave out {name}")
    added = next((name for name in ("dora", "dropout", "lora_bias") if adapter.experts and getattr(config, name)), None)
    if added:
        raise UsageError(
            f"{added}: cannot be combined with the expert matrices of {adapter.root}, as in peft",
            hint=f"leave out {added}",
        )


def add_trainable(model: Model, config: TrainConfig, start: Adapter | None, tokenizer: Any) -> None:
    """Add everything that a run trains to a model, with initial values.

    Args:
        model: the model as it was loaded; modified in place.
        config: options of the run, with the method resolved.
        start: the adapter to start from; None for new matrices.
        tokenizer: tokenizer of the base, to look up ``trainable_tokens``.

    Raises:
        UsageError: a pattern matches nothing, a token is unknown, or a parameter to be trained in full is quantized.
        BaseMismatchError: ``start`` does not fit the model, or a trained parameter cannot be stored in the base's
            files.
    """
    if config.method == "full":
        train_whole(model, set(parameter_places(model)))
        find_addresses(model.checkpoint, model.whole, "training")  # fail now, rather than when the result is saved
        return
    saved = saved_names(model, config.modules_to_save)
    if start is not None:
        load_adapter(model, start, config.dropout)
    else:
        _begin_fresh(model, config, saved)
    for layer in model.adapted().values():
        if config.dora and layer.magnitude is None:
            layer.attach_magnitude()
        if config.lora_bias and layer.lora_bias is None:
            layer.attach_bias()
    if config.bias != "none":
        saved |= bias_names(model, config.bias)
    train_whole(model, saved)
    if config.trainable_tokens:
        path = path_of(model.network, model.network.get_input_embeddings())
        train_rows(model, path, list(dict.fromkeys(_token(text, tokenizer) for text in config.trainable_tokens)))


def left_out(model: Model, config: TrainConfig) -> str:
    """Return a line on what new adapters for all linear layers omit (see ``matching_targets``); empty if nothing."""
    if config.method == "full" or config.init not in INITS or EVERYTHING not in config.targets:
        return ""
    excluded = matching("exclude pattern", config.exclude, model.linears, "linear layer")
    left = [
        name
        for name, layer in model.linears.items()
        if layer.lora_a is None and name not in excluded and not isinstance(layer.base, TrainedWeight)
    ]
    notes = _layers_left(model, left), _stacks_left(model) if not config.target_parameters else ""
    return "; ".join(filter(None, notes))


def _layers_left(model: Model, left: Sequence[str]) -> str:
    if not left:
        return ""
    kind = model.network.config.model_type
    found = [
        (sum(map(is_router, left)), "router", ""),
        (sum(map(is_indexer, left)), "layer", " of indexers (no gradient reaches them)"),
        (sum(is_read_by_kernels(kind, name) for name in left), "layer", " that peft rejects"),
        (sum(is_never_called(kind, name) for name in left), "layer", " whose adapter peft ignores"),
    ]
    found.append((len(left) - sum(count for count, *_ in found), "layer", " outside the language model"))
    kinds = " and ".join(f"{counted(count, noun)}{which}" for count, noun, which in found if count)
    return f"no adapter, unless targeted by name, for {kinds}: {first_names(left)}"


def _stacks_left(model: Model) -> str:
    """Return a line on expert stacks without an adapter, which are most of an MoE model's weights; empty if none."""
    left = [name for name, module in model.stacks().items() if name not in model.whole and is_expert(name, module)]
    if not left:
        return ""
    stacks = counted(len(left), "stack")
    return f"no adapter, without target_parameters, for {stacks} of expert matrices: {first_names(left)}"


def cannot_be_merged(model: Model, config: TrainConfig) -> str:
    """Return a line on why the adapter cannot be merged into the base; empty if it can.

    A bias of B is merged into the layer's own bias, which the checkpoint may lack. A weight that several layers share
    cannot take a different update for each of them. A parameter that transformers splits off a tensor of the files, or
    joins from several, cannot be changed in the files, unless it is a stack of experts.
    """
    if config.method == "full":
        return ""
    no_bias = [name for name, layer in model.linears.items() if layer.lora_bias is not None and layer.bias is None]
    trained = [*model.adapted(), *(name.rpartition(".")[0] for name in model.whole)]
    shared = [name for name in trained if is_shared_by_layers(model.network.config.model_type, f"{name}.")]
    changed = [*(f"{name}.weight" for name in (*model.adapted(), *model.rows)), *model.whole, *stack_changes(model)]
    assembled = [name.removesuffix(".weight") for name in changed if unsupported_steps(model.assembly, name)]
    notes = [
        f"{len(names)} of its layers {one if len(names) == 1 else some}: {first_names(names)}"
        for names, one, some in (
            (no_bias, "has no bias to add B's to", "have no bias to add B's to"),
            (shared, "shares a weight with other layers", "share weights with other layers"),
            (assembled, "has a weight that the files store otherwise", "have weights that the files store otherwise"),
        )
        if names
    ]
    return f"the adapter cannot be merged: {'; '.join(notes)}" if notes else ""


def peft_drops(model: Model) -> str:
    """Return a line on which layers' adapters peft will not load; empty if it loads all."""
    kind, adapted = model.network.config.model_type, model.adapted()
    others = {*renamed_in_peft(model.network, adapted), *mistaken_for_experts(kind, adapted)}
    if not others:
        return ""
    named = f"peft drops {counted(len(others), 'adapter')}, mistaking them for other modules'; merge does not"
    return f"{named}: {first_names(sorted(others))}"


def first_names(names: Sequence[str]) -> str:
    """Return the first two names, with an ellipsis if there are more."""
    return ", ".join(names[:2]) + (", ..." if len(names) > 2 else "")


def _begin_fresh(model: Model, config: TrainConfig, saved: set[str]) -> None:
    shape = AdapterShape(
        config.rank, config.alpha, config.rslora, config.rank_pattern or {}, config.alpha_pattern or {}
    )
    whole = sorted(path for path in model.linears if f"{path}.weight" in saved)
    if config.targets:
        exclude = (*config.exclude, *whole)
        new_adapter(model, config.targets, shape, config.init, config.dropout, config.seed, exclude)
    if config.target_parameters:
        new_stack_adapters(model, config.target_parameters, shape, config.seed)
    adapted = [*model.adapted(), *(name for name in model.stacks() if config.target_parameters)]
    for what in ("rank_pattern", "alpha_pattern"):
        shape.require_use(what, adapted)


def _token(text: str, tokenizer: Any) -> int:
    """Return the ID of a token that is given by its text, or as a number.

    Raises:
        UsageError: the vocabulary lacks the token, or the number is the ID of one token and the text of another.
    """
    found = tokenizer.get_vocab().get(text)
    if text.isdecimal():
        if found is None or found == int(text):
            return int(text)
        raise UsageError(
            f"trainable_tokens: {text} is the text of token {found} and the ID of another",
            hint=f"use {found} for the one, {tokenizer.convert_ids_to_tokens(int(text))!r} for the other",
        )
    if found is None:
        raise UsageError(
            f"trainable_tokens: {text!r} is not in the vocabulary", hint="give a token's exact text, or its ID"
        )
    return int(found)
