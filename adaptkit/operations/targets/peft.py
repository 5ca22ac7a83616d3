"""peft 0.21.2 with transformers 5; the rules come from their sources and from trying them.

``peft/peft_model.py`` and ``utils/save_and_load.py`` build the modules that ``adapter_config.json`` asks for, and then
load tensors with ``load_state_dict(strict=False)``: unexpected tensors are dropped silently, and missing ones keep
their initial value, after one warning. A checkpoint is read by transformers: ``model.safetensors`` or the files that
the index names, and no others.
"""

from collections.abc import Iterator

from adaptkit.checkpoint.adapter_config import PREFIX
from adaptkit.checkpoint.layout import INDEX_NAME
from adaptkit.models.kinds import is_never_called, is_read_by_kernels
from adaptkit.models.linears import is_linear
from adaptkit.models.peft_names import renamed_in_peft
from adaptkit.operations.targets import _checkpoint_rules, _peft_config, _peft_experts, _peft_tensors, _rules, _scalings
from adaptkit.operations.targets._adapter_files import AdapterFiles
from adaptkit.operations.targets._base_shapes import BaseShapes
from adaptkit.operations.targets._checkpoint_files import CheckpointFiles
from adaptkit.operations.targets._peft_tensors import DROPS
from adaptkit.operations.targets._target import Finding, Target, error_about, some

_TYPES = {
    "ADALORA", "ADAMSS", "ADAPTION_PROMPT", "BEFT", "BOFT", "C3A", "CARTRIDGE", "CPT", "DEFT", "DELORA", "FOURIERFT",
    "FROD", "GLORA", "GRALORA", "HIRA", "HRA", "IA3", "LILY", "LN_TUNING", "LOHA", "LOKR", "LORA", "MISS",
    "MULTITASK_PROMPT_TUNING", "OFT", "OSF", "PEANUT", "POLY", "PREFIX_TUNING", "PROMPT_TUNING", "PSOFT", "PVERA",
    "P_TUNING", "RANDLORA", "ROAD", "SHADOW", "SHIRA", "SUPERTUNING", "TINYLORA", "TRAINABLE_TOKENS", "UNILORA",
    "VBLORA", "VERA", "WAVEFT", "XLORA",
}  # fmt: skip
_MORE_TENSORS = ("kasa_config", "velora_config", "monteclora_config")
"""Keys of variants that have further tensors, with ``.lora_`` in their names."""
_BY_DEFAULT = {"c_attn", "q", "q_proj", "query", "query_key_value", "v", "v_proj", "value"}
"""Modules that peft targets for most model types if ``target_modules`` is not set."""


def _adapter(files: AdapterFiles, base: BaseShapes | None) -> Iterator[Finding]:
    files = files.as_peft_reads()
    yield from _rules.weights(files, "peft")
    kind = files.config.get("peft_type")
    if not isinstance(kind, str) or kind not in _TYPES:
        yield Finding(
            "error",
            f"peft_type is {kind!r} in adapter_config.json",
            "peft fails on unknown types",
            "if it is a new type, pip install -U peft",
        )
    if kind != "LORA":
        return
    yield from _peft_config.values(files)
    yield from _peft_config.numbers(files)
    yield from _scalings.reinterpreted_patterns(files, "peft")
    yield from _rules.unknown_keys(files, "peft ignores unknown keys, with a warning")
    yield from _names(files)
    yield from _rules.halves(files, "peft keeps the initial value of the other half, which is random or zero")
    yield from _rules.ranks(files, "peft fails: size mismatch")
    yield from _targeted(files)
    yield from _missing(files)
    yield from _peft_tensors.parameters(files, base)
    yield from _peft_tensors.saved_modules(files, base)
    yield from _peft_tensors.trained_rows(files, base)
    yield from _peft_tensors.generates(files, base)
    yield from _rules.on_base(files, base, DROPS, "peft fails: size mismatch")
    yield from _peft_tensors.strays(files, base)
    if base is None:
        yield from _rules.wrapped(files, f"{DROPS}, unless the model has that wrapper too")
    yield from _rules.tables(
        files,
        base,
        "warning",
        "peft fails (size mismatch) unless the model's vocabulary is resized first",
        "call model.resize_token_embeddings({entries}) before the adapter is loaded",
    )
    yield from _kernels(files, base)
    yield from _unsupported(files, base)
    yield from _renamed(files, base)
    yield from _tied(files, base)
    yield from _peft_experts.swapped(files, base)
    yield from _peft_experts.single(files, base)
    yield from _peft_experts.beside(files, base)


def _names(files: AdapterFiles) -> Iterator[Finding]:
    foreign = [key.name for key in files.keys if not key.name.startswith(PREFIX)]
    yield from error_about(
        foreign,
        f"the name does not begin with {PREFIX}",
        f"{DROPS} (if all names are like this, peft warns once and loads no tensors)",
        f"run adaptkit resize {files.root} -o OUT --rank R, which writes peft's names if it recognizes these",
    )
    has_more = any(files.config.get(key) for key in _MORE_TENSORS)
    unread = [key for key in files.keys if key.role == "other" and key.name not in foreign]
    unread = [key for key in unread if not (has_more and ".lora_" in key.name)]
    other = [key.name for key in unread if not any(_peft_tensors.within(name, key.module) for name in files.saved)]
    other += [
        key.name
        for key in files.keys
        if key.role in ("weight", "bias") and _peft_tensors.SAVED_WRAPPER.search(key.name)
    ]
    yield from error_about(other, "", DROPS, "remove it, or load it with the program that wrote it")
    for role, key, what in (
        ("magnitude", "use_dora", "magnitudes of DoRA"),
        ("bias of B", "lora_bias", "biases of lora_B"),
        ("token rows", "trainable_token_indices", "trained rows"),
    ):
        names = [] if files.config.get(key) else files.named(role)
        yield from error_about(
            names, "", f"without {key}, peft has no {what}; {DROPS}", f"set {key} in adapter_config.json"
        )


def _targeted(files: AdapterFiles) -> Iterator[Finding]:
    config = files.config
    targets = config.get("target_modules")
    ends = {pair.module.rpartition(".")[2] for pair in files.pairs if not pair.stacked}
    if targets is None and ends:
        yield Finding(
            "warning" if ends <= _BY_DEFAULT else "error",
            "target_modules is not set in adapter_config.json",
            "peft uses its default modules for this model type, and silently drops all others",
            f"set target_modules to {sorted(ends)}",
        )
    twice = [p.module for p in files.pairs if _peft_config.is_parameter(config, p.module)]
    twice = [module for module in twice if _peft_config.is_module(config, module)]
    if twice:
        yield Finding(
            "error",
            f"target_modules and target_parameters in adapter_config.json both name {some(twice)}",
            "peft fails with ValueError",
            "remove it from one of them",
        )
    if targets in (None, _peft_config.SHORTHAND) or config.get("ensure_weight_tying"):
        return  # peft then selects by architecture, or adds tied modules
    unmatched = _peft_config.untargeted(config, [p.module for p in files.pairs if not p.stacked])
    if unmatched:
        yield Finding(
            "error",
            f"target_modules in adapter_config.json does not match {some(unmatched)}, or exclude_modules, "
            "modules_to_save or layers_to_transform excludes it",
            "peft creates no LoRA there, and silently drops its tensors",
            "add it to target_modules, and its layer to layers_to_transform if that is set",
        )


def _missing(files: AdapterFiles) -> Iterator[Finding]:
    """Find tensors that the configuration asks for and the file lacks."""
    plain = [pair.module for pair in files.pairs if not pair.embedding and not pair.stacked]
    for key, role, initial in (
        ("use_dora", "magnitude", "the norms of the base's rows"),
        ("lora_bias", "bias of B", "zero"),
    ):
        there = {found.module for found in files.keys if found.role == role}
        missing = [module for module in plain if module not in there]
        if files.config.get(key) and missing:
            yield Finding(
                "error",
                f"{key} is set, but the file has no {role} of {some(missing)}",
                f"peft keeps the initial value, {initial}, after one warning",
                "save the adapter again with peft",
            )


def _kernels(files: AdapterFiles, base: BaseShapes | None) -> Iterator[Finding]:
    kind = (base.model_type if base else None) or ""
    refused = [pair.module for pair in files.pairs if is_read_by_kernels(kind, pair.module)]
    yield from error_about(
        refused, "", f"peft rejects an adapter there, since kernels of {kind} read the weight directly", files.merge()
    )
    passed = [pair.module for pair in files.pairs if is_never_called(kind, pair.module)]
    yield from error_about(
        passed,
        "",
        f"peft's adapter there has no effect, since {kind} reads the weight directly and never calls the module",
        files.merge(),
    )


def _unsupported(files: AdapterFiles, base: BaseShapes | None) -> Iterator[Finding]:
    """Find modules of types that peft has no LoRA layer for, such as the routers of transformers 5."""
    if base is None or base.network is None:
        return
    from torch import nn  # here, since it takes long to load, and a check builds few networks

    kinds = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)
    named = [pair.module for pair in files.pairs if not pair.stacked and f"{pair.module}.weight" in base.tensors]
    by_modules = [module for module in named if not _peft_config.is_parameter(files.config, module)]
    there = {module: base.network.get_submodule(module) for module in by_modules}
    others = {m: type(at).__name__ for m, at in there.items() if not isinstance(at, kinds) and not is_linear(at)}
    if others:
        yield Finding(
            "error",
            some(list(others)),
            f"peft fails: Target module {next(iter(others.values()))} is not supported",
            files.merge(),
        )


def _renamed(files: AdapterFiles, base: BaseShapes | None) -> Iterator[Finding]:
    if base is None or base.network is None:
        return
    there = [pair.module for pair in files.pairs if f"{pair.module}.weight" in base.tensors]
    others = renamed_in_peft(base.network, there)
    if others:
        yield Finding(
            "error",
            some(list(others)),
            f"peft renames it to {next(iter(others.values()))} by transformers' rules for older names; {DROPS}",
            files.merge(),
        )


def _tied(files: AdapterFiles, base: BaseShapes | None) -> Iterator[Finding]:
    head = _rules.tied_head(files, base)
    if head is not None and not files.config.get("ensure_weight_tying"):
        yield Finding(
            "warning",
            f"{head} is changed, but the base ties it to the embedding",
            "peft changes only the head while the adapter is loaded, but merge_and_unload changes the embedding, too",
            f"do not merge it with peft; {files.merge()}",
        )


def _checkpoint(files: CheckpointFiles) -> Iterator[Finding]:
    yield from _checkpoint_rules.quantization(files, "transformers")
    if files.quantization == "bitsandbytes":
        yield Finding(
            "warning",
            "quant_method is bitsandbytes in config.json",
            "transformers needs bitsandbytes to load it",
            "pip install bitsandbytes",
        )
    if files.lacks_metadata:
        yield Finding(
            "error",
            f"{INDEX_NAME} has no metadata",
            "transformers fails: KeyError: 'metadata'",
            'add "metadata": {} to it',
        )
    four_bit = [packed for packed in files.packed if not packed.is_ours and not packed.is_stack]
    uneven = [packed.name for packed in four_bit if packed.shape[-1] % packed.block_size]
    if uneven:
        yield Finding(
            "warning",
            f"{some(uneven)}: row length is not a multiple of the block size",
            "bitsandbytes 0.50 decodes wrong values on a CPU",
            "quantize with a --block-size that divides the row length, or exclude these modules with --skip",
        )
    experts = [packed.name for packed in files.packed if packed.is_expert]
    yield from error_about(
        experts,
        "quantized expert",
        "transformers 5 keeps experts in 16-bit stacks and fails on packed ones",
        f"quantize the original with --moe keep, or run adaptkit dequantize {files.root} -o OUT",
    )
    yield from _checkpoint_rules.model(
        files, "transformers initializes it at random, with a warning", "transformers fails: the shapes differ"
    )
    yield from _checkpoint_rules.tokenizer(files, "AutoTokenizer finds none here", "load the base's tokenizer")


TARGET = Target("peft 0.21.2 with transformers 5", _adapter, _checkpoint)
