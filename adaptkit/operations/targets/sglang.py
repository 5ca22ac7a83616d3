"""SGLang: its LoRA code.

``sglang/srt/lora/lora_config.py`` and ``lora.py`` read the configuration and sort tensors by substrings of their names,
``lora_manager.py`` refuses adapters, ``mem_pool.py`` copies tensors into buffers that all have the configuration's
rank, and ``utils.py`` has the names of modules. Sources after that release also read ``rank_pattern`` and
``alpha_pattern``.
"""

import json
import re
from collections import defaultdict
from collections.abc import Collection, Iterator

from adaptkit.checkpoint.layout import read_small
from adaptkit.errors import CheckpointError
from adaptkit.models.peft_names import GATES, UPS
from adaptkit.operations.targets import _adapter_features as features
from adaptkit.operations.targets import _checkpoint_features as checkpoint
from adaptkit.operations.targets._adapter_features import ANOTHER_BASE, ONE_SAVE, PLAIN, REJECTS, variants
from adaptkit.operations.targets._adapter_files import AdapterFiles, is_rank
from adaptkit.operations.targets._target import Program, Sighting, error, seen, some, warning

_ADDED = "added_tokens.json"
_LAYER = re.compile(r"layers\.\d+\.")
_TABLES = ("embed_tokens", "lm_head")
_TOGETHER = dict.fromkeys(("q_proj", "k_proj", "v_proj", "qkv_proj"), "qkv") | dict.fromkeys(
    ("gate_proj", "up_proj", "gate_up_proj"), "gate_up"
)
"""Projections that SGLang fuses into one matrix, and the name of that matrix."""

ADAPTER = features.ALL_PROGRAMS | {
    "no LoRA": error("SGLang rejects every type but LORA", "{elsewhere}"),
    "targets not listed": error("SGLang accepts a list of names or 'all-linear', and fails on anything else", "{way}"),
    "not a target": error("SGLang fails at the first request", "add it to target_modules"),
    "invalid numbers": error("SGLang fails when it computes alpha / r, or uses the wrong scaling", "{valid}"),
    "use_dora": error(REJECTS),
    **variants(PLAIN, "use_qalora", "use_bdlora", "alora_invocation_tokens"),
    **variants(PLAIN, "layer_replication", "arrow_config", "kasa_config"),
    "changed base": error("SGLang ignores this, and applies the adapter to a base that it does not fit", "{unchanged}"),
    "LoRA-GA": error("SGLang ignores this, and applies the adapter to a base that it does not fit", "{unchanged}"),
    "other scaling": error("SGLang silently scales everything by lora_alpha / r = {used}", "{flat}"),
    "rank of its own": error("SGLang fails at the first request: its buffers have one rank for all modules"),
    "taken for B": error(
        "SGLang treats every tensor that is not lora_A as lora_B, and fails on the shape or computes wrong results"
    ),
    "replaced tensors": error(
        "SGLang does not support tensors that replace the base's: it silently drops those of embeddings and heads, and "
        "fails on others"
    ),
    "not looked for": error(
        "SGLang silently drops it: it looks for layers.N. in names, and for embed_tokens and lm_head if target_modules "
        "has them"
    ),
    "other names": error("SGLang sorts tensors by parts of their names, and cannot place this one"),
    "half a pair": error("SGLang fails, or silently leaves the module unchanged", ONE_SAVE),
    "other layers": features.LINEAR,
    "other rank": error("SGLang fails when it copies the tensors into buffers of the configuration's rank", ONE_SAVE),
    "not fused": error("SGLang stores them in one matrix, and fails when it joins them"),
    "stacks": error(
        "SGLang does not support such names: it needs one pair of matrices per expert, or three-dimensional tensors"
    ),
    "single experts": warning(
        "SGLang adapts experts only if both gate_up_proj and down_proj are among its target modules",
        "serve it with --lora-target-modules all",
    ),
    "files beside": error(
        "SGLang loads every *.safetensors file in the folder as part of the adapter",
        "load a copy of the folder without {beside}",
    ),
    "added tokens": error(
        "SGLang rejects adapters that add tokens to the vocabulary; tokens that the base already has are fine (--base)",
        f"remove {_ADDED} if the base has these tokens; otherwise {{merge}}",
    ),
    "absent": error("SGLang drops the tensors with a warning, or fails at the first request", features.OTHER_NAMES),
    "layers more": error(
        "SGLang drops the tensors with a warning, or fails at the first request", features.OTHER_NAMES
    ),
    "other shape": error("SGLang fails when it copies the tensors into its buffers", ANOTHER_BASE),
    "other vocabulary": error("SGLang fails when it copies the tensors into buffers of the base's size"),
}
CHECKPOINT = checkpoint.SERVERS | {
    "gptq order": warning("SGLang sorts the inputs while it runs, which is slower", "serve it as it is"),
    "odd bits": error("SGLang reads 4 and 8 bits", "quantize the original with --format w4a16"),
    "dense mxfp4": error("SGLang reads this format in experts only", "quantize the original with --format nvfp4"),
    "bitsandbytes": warning(
        "SGLang loads it with its bitsandbytes loader, on one GPU only: it rejects tensor parallelism",
        "serve it with --load-format bitsandbytes",
    ),
    "no tokenizer": warning("SGLang can load one from another folder", "serve it with --tokenizer-path FOLDER"),
}


def _in_adapter(files: AdapterFiles) -> Iterator[Sighting]:
    yield from features.of_adapter(files)
    yield from _targets(files)
    config, rank = files.config, files.config.get("r")
    other = [pair.module for pair in files.pairs if pair.rank and pair.rank == pair.asked and pair.rank != rank]
    if is_rank(rank) and isinstance(config.get("lora_alpha"), int | float):
        yield from seen(
            "rank of its own", other, f"rank_pattern in adapter_config.json gives {{}} a rank other than r = {rank}"
        )
    stray = files.named("bias", "bias of B", *(() if config.get("use_dora") else ("magnitude",)))
    yield from seen("taken for B", stray)
    yield from seen("replaced tensors", files.named("weight", "token rows"))
    yield from seen("other names", files.named("other"))
    for needed, *has in (("v_proj", "q_proj"), ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        yield from _without(files, needed, has)
    if files.keys:
        beside = some(files.beside) if files.beside else ""
        yield from seen("files beside", files.beside, "{} beside adapter_model.safetensors", beside=beside)
    yield from _added_tokens(files)


def _targets(files: AdapterFiles) -> Iterator[Sighting]:
    targets = files.config.get("target_modules")
    halves = {half.name: pair for pair in files.pairs for half in (pair.a, pair.b) if half}
    lost = [name for name in halves if not _LAYER.search(name) and not any(table in name for table in _TABLES)]
    if isinstance(targets, list):
        listed = {str(name).rpartition(".")[2] for name in targets}
        known = {_TOGETHER.get(name, name) for name in listed}
        pairs = [pair for pair in files.pairs if _LAYER.search(f"{pair.module}.") and not pair.stacked]
        pairs = [pair for pair in pairs if ".experts." not in pair.module]
        unnamed = [pair.module for pair in pairs if _TOGETHER.get(pair.leaf, pair.leaf) not in known]
        yield from seen("not a target", unnamed, "target_modules in adapter_config.json does not name {}")
        unlisted = [table for table in _TABLES if table not in listed]
        lost += [name for name, pair in halves.items() if any(table in pair.module for table in unlisted)]
    elif targets not in ("all", "all-linear"):
        modules = sorted({pair.leaf for pair in files.pairs})
        way = f"set it to {json.dumps(modules)}" if modules else files.ways["merge"]
        yield Sighting("targets not listed", f"target_modules is {targets!r} in adapter_config.json", {"way": way})
    yield from seen("not looked for", lost)


def _without(files: AdapterFiles, needed: str, has: Collection[str]) -> Iterator[Sighting]:
    """Find a projection that is adapted without another that SGLang fuses it with, if the model has that."""
    blocks: dict[str, set[str]] = defaultdict(set)
    for pair in files.pairs:
        if _LAYER.search(f"{pair.module}."):  # single experts too: SGLang renames their w1 and w3
            name = "gate_proj" if pair.leaf in GATES else "up_proj" if pair.leaf in UPS else pair.leaf
            blocks[pair.module.rpartition(".")[0]].add(name)
    base, names = files.base, GATES if needed == "gate_proj" else {needed}
    alone = [block for block, leaves in blocks.items() if leaves.intersection(has) and needed not in leaves]
    alone = [block for block in alone if base is None or any(base.shape(f"{block}.{name}") for name in names)]
    may_lack = needed == "gate_proj" and base is None
    what = f"{' or '.join(sorted(has))} without {needed}{', if the model has one' if may_lack else ''}"
    yield from seen("not fused", alone, what, doubtful=may_lack)


def _added_tokens(files: AdapterFiles) -> Iterator[Sighting]:
    try:
        tokens = json.loads(read_small(files.root / _ADDED))
    except (CheckpointError, OSError, ValueError, RecursionError):  # none, or one that SGLang ignores, too
        return
    numbers = {token: n for token, n in tokens.items() if isinstance(n, int)} if isinstance(tokens, dict) else {}
    size = files.base.vocabulary if files.base else None
    added = [token for token, number in numbers.items() if size is None or number >= size]
    yield from seen("added tokens", added, f"{_ADDED}: {{}}", doubtful=size is None)


TARGET = Program(
    program="SGLang",
    loader="SGLang",
    version="SGLang 0.5.23",
    tried_in="",
    adapter=ADAPTER,
    checkpoint=CHECKPOINT,
    in_adapter=_in_adapter,
    in_checkpoint=checkpoint.of_checkpoint,
)
