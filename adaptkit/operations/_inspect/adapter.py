"""What an adapter does, told in counts: every kind of change, ranks, scalings, and where the changes are."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from adaptkit.checkpoint.adapter import Adapter


def describe_adapter(adapter: Adapter) -> dict[str, Any]:
    """Facts of an adapter, in the order in which people read them; None for what it does not have."""
    terms = [*adapter.modules.values(), *(term for stack in adapter.experts.values() for term in stack)]
    config = adapter.config
    return {
        "modules": len(adapter.modules),
        "ranks": counts(term.rank for term in terms),
        "scalings": counts(str(term.scaling) for term in terms),
        "rslora": bool(config.get("use_rslora")),
        "targets": counts(_last(module) for module in (*adapter.modules, *adapter.experts)),
        "embeddings": len(adapter.embeddings) or None,
        "dora_magnitudes": len(adapter.magnitudes) or None,
        "added_biases": len(adapter.biases) or None,
        "replaced_tensors": counts(_ending(name) for name in adapter.replaced) or None,
        "replaced_rows": {module: len(rows.indices) for module, rows in sorted(adapter.tokens.items())} or None,
        "expert_stacks": counts(len(stack) for stack in adapter.experts.values()) or None,
        "own_copies_of_the_base": len(adapter.begins) or None,
        "compensated_modules": len(adapter.compensation) or None,
        "base_model_name_or_path": config.get("base_model_name_or_path"),
        "task_type": config.get("task_type"),
        "peft_version": config.get("peft_version"),
    }


def counts(values: Iterable[str | int]) -> dict[str, int]:
    """How often each is there; the keys are strings, as JSON has them."""
    return {str(value): count for value, count in sorted(Counter(values).items())}


def _last(path: str) -> str:
    """What kind of module it is: the last part of its path."""
    return path.rpartition(".")[2]


def _ending(name: str) -> str:
    """A tensor's module and its own last part: ``norm.weight``."""
    return ".".join(name.split(".")[-2:])
