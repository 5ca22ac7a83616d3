"""Recognize norms and gates by what they compute, not by their names: run them on a probe, without side effects.

A module is recognized if its output equals the formula's bit for bit:

    norm       y = x / √(mean x² + eps) · w, or · (1 + w)
    gate       y = down(act(gate(x)) · up(x))
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from adaptkit.models.fakes import is_fake, real_tensors

_GATED = ("gate_proj", "up_proj", "down_proj", "act_fn")
_PROBE_ROWS = 8
"""Rows of the small random matrices that replace a gate's weights in a probe: decoding all weights of a model would
take longer than a training step."""
_WIDEST = 1 << 16
"""Inputs of the widest module that is probed, since probes allocate memory; those of real models have fewer."""


def forked_random(device: torch.device) -> Any:
    """Return a context that restores the random state of the host, and of a GPU, when it ends."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


@contextmanager
def exchanged(module: nn.Module, parts: Mapping[str, nn.Module]) -> Iterator[None]:
    """Replace submodules of a module while the block runs."""
    before = {name: module.get_submodule(name) for name in parts}
    for name, part in parts.items():
        module.add_module(name, part)
    try:
        yield
    finally:
        for name, part in before.items():
            module.add_module(name, part)


class InPlaceOf(nn.Module):
    """Base of a module that ``exchanged`` puts in the place of another; has the other's attributes."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.__dict__["original"] = original  # bypasses nn.Module, so that it is no submodule

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["original"], name)


def norm_parts(module: nn.Module) -> tuple[nn.Parameter | None, float]:
    """Return weight and epsilon of a module that may be an RMS norm; (None, 0.0) if it cannot be one."""
    parameters = dict(module.named_parameters())
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if list(parameters) != ["weight"] or parameters["weight"].dim() != 1 or not isinstance(eps, float):
        return None, 0.0
    if not _takes_one(module):  # a gated norm
        return None, 0.0
    return parameters["weight"], eps


@torch.no_grad()
def norm_has_offset(module: nn.Module, weight: Tensor, eps: float) -> bool | None:
    """Return True for an RMS norm with factor 1 + w, False for factor w, None for any other module."""
    if weight.dtype not in (torch.bfloat16, torch.float32) or len(weight) > _WIDEST:
        return None
    with real_tensors():
        return _has_offset(*_with_values(module, weight), eps)


def _with_values(module: nn.Module, weight: Tensor) -> tuple[nn.Module, Tensor]:
    """Return a norm and its weight; of a fake one, a real one of its kind."""
    if not is_fake(weight):
        return module, weight
    memo = {id(weight): nn.Parameter(torch.rand(len(weight), generator=_seeded(0)).to(weight.dtype), False)}
    return copy.deepcopy(module, memo), memo[id(weight)]


def _has_offset(module: nn.Module, weight: Tensor, eps: float) -> bool | None:
    x = _probe(len(weight), weight.dtype).to(weight.device)
    found, wide = _probe_output(module, x), x.float()
    if found is None:
        return None
    quotient = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if torch.equal(found, weight * quotient.to(x.dtype)):
        return False
    if torch.equal(found, (quotient * (1.0 + weight.float())).to(x.dtype)):
        return True
    return None


@torch.no_grad()
def is_gated(module: Any, size: int, device: torch.device, activation: Callable[[Tensor], Tensor]) -> bool:
    """Return whether a module computes down(act(gate(x)) · up(x)); probed with small random weights.

    Args:
        module: the module; its linear layers are replaced, so it need not have weights.
        size: length of x.
        device: device of the probe.
        activation: act.
    """
    if not all(isinstance(getattr(module, name, None), nn.Module) for name in _GATED) or not _takes_one(module):
        return False
    if size > _WIDEST:
        return False
    with real_tensors():
        return _is_gated(module, size, device, activation)


def _is_gated(module: Any, size: int, device: torch.device, activation: Callable[[Tensor], Tensor]) -> bool:
    x = _probe(size, torch.float32).to(device)
    shapes = ((size, _PROBE_ROWS), (size, _PROBE_ROWS), (_PROBE_ROWS, size))
    gate, up, down = (_random_linear(*shape, seed).to(device) for seed, shape in enumerate(shapes))
    expected = down(activation(gate(x)) * up(x))
    linears = dict(zip(_GATED, (gate, up, down), strict=False))
    was_training = module.training
    with exchanged(module, linears), forked_random(device):
        found = _probe_output(module.train(), x)  # some have dropout: no match
        module.train(was_training)
    return found is not None and torch.equal(found, expected)


def _takes_one(module: nn.Module) -> bool:
    """Return whether a module's forward takes one argument, so that it can be probed."""
    return len(inspect.signature(module.forward).parameters) == 1


def _probe_output(module: nn.Module, x: Tensor) -> Tensor | None:
    """Return a module's output for (rows, size); None if it needs another shape, as xLSTM's multi-head norms do."""
    try:
        result: Tensor = module(x)
    except (ValueError, IndexError, RuntimeError):
        return None
    return result


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _probe(size: int, dtype: torch.dtype) -> Tensor:
    """Return random rows of very different norms: (3, size)."""
    rows = torch.randn(3, size, generator=_seeded(0))
    return (rows * torch.tensor([[0.01], [1.0], [30.0]])).to(dtype)


def _random_linear(columns: int, rows: int, seed: int) -> nn.Linear:
    linear = nn.Linear(columns, rows, bias=False, device="meta")
    weight = torch.randn(rows, columns, generator=_seeded(seed))
    linear.weight = nn.Parameter(weight / columns**0.5, requires_grad=False)
    return linear
