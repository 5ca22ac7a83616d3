"""Attention of transformers' models: replacing its function, and calls that ask it for more than masked products."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any


def replace_attention(network: Any, name: str, attend: Callable[..., Any], mask: Callable[..., Any]) -> None:
    """Make a network call another attention function.

    Args:
        network: transformers model; left unchanged if its attention is not sdpa, or if its layers depend on that name.
        name: name of the function in transformers' registry.
        attend: the function.
        mask: makes its masks, as transformers' ``sdpa_mask`` does.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    if network.config._attn_implementation == "sdpa" and not any(map(_asks_for_sdpa, network.modules())):
        AttentionInterface.register(name, attend)
        AttentionMaskInterface.register(name, mask)
        network.set_attn_implementation(name)


def asks_for_more(options: Mapping[str, Any]) -> bool:
    """Return whether the options of a call ask for dropout, or for a change of scores that some architectures have."""
    changes = ("softcap", "position_bias", "s_aux")
    return bool(options.get("dropout")) or any(options.get(name) is not None for name in changes)


def _asks_for_sdpa(module: Any) -> bool:
    """Return whether a module's code compares the attention's name with ``sdpa``.

    DeepSeek V3.2 masks the keys that its indexer leaves out only under that name.
    """
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    if code is None or "_attn_implementation" not in code.co_names:
        return False
    return any("sdpa" in known if isinstance(known, tuple) else known == "sdpa" for known in code.co_consts)
