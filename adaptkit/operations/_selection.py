"""Which tensors of a checkpoint are quantized, which stay as they are, and why.

The rules know no architecture: what is quantized are the matrices of the numbered layers (``….layers.7.….weight``),
except those that are known by name to be embeddings, norms, routers or experts.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from adaptkit.checkpoint.header import FLOATS, TensorSpec
from adaptkit.checkpoint.reader import Checkpoint

_NUMBERED = re.compile(r"(^|\.)\d+\.")
_ROUTER = re.compile(r"(^|\.)(router|gate|shared_expert_gate)(\.|$)")
_EXPERT = re.compile(r"(^|\.)experts\.")
_TABLE = re.compile(r"embed|relative_attention_bias|(^|\.)(wte|wpe)(\.|$)")
_NORM = re.compile(r"norm|(^|\.)ln_|layernorm", re.IGNORECASE)
_CONV1D = re.compile(r"\.(c_attn|c_proj|c_fc|q_attn)$")
_CONV1D_MODELS = {"gpt2", "openai-gpt"}


@dataclass(frozen=True)
class Choice:
    """What happens to one tensor.

    Attributes:
        spec: the tensor in the source.
        kept_because: why it stays as it is; empty if it is quantized.
        transposed: whether the module keeps its weight as (in, out), so that it is transposed before it is quantized.
    """

    spec: TensorSpec
    kept_because: str
    transposed: bool = False

    @property
    def module(self) -> str:
        """Dotted path of the module whose weight this is."""
        return self.spec.name.removesuffix(".weight")

    @property
    def is_kept_linear(self) -> bool:
        """Whether readers may take this for a linear layer, and must be told that it is not quantized."""
        looks = self.spec.name.endswith(".weight") and len(self.spec.shape) == 2
        return bool(self.kept_because) and looks and not _TABLE.search(self.module)


def select(checkpoint: Checkpoint, skip: Sequence[str]) -> list[Choice]:
    """Decide for every tensor of a checkpoint.

    Args:
        checkpoint: unquantized.
        skip: shell patterns of module paths that stay as they are.
    """
    specs = [located.spec for located in checkpoint.tensors.values()]
    return [
        Choice(spec, _kept_because(spec, skip), stores_transposed(checkpoint, spec.name.removesuffix(".weight")))
        for spec in specs
    ]


def stores_transposed(checkpoint: Checkpoint, module: str) -> bool:
    """Whether a module's weight is (in, out) in the plain checkpoint: the Conv1D of the GPT-2 family."""
    return str(checkpoint.config.get("model_type")) in _CONV1D_MODELS and bool(_CONV1D.search(module))


def _kept_because(spec: TensorSpec, skip: Sequence[str]) -> str:
    module = spec.name.removesuffix(".weight")
    rules = (
        (not spec.name.endswith(".weight"), "not a weight"),
        (spec.dtype not in FLOATS, f"of type {spec.dtype}"),
        (bool(_EXPERT.search(module)), "expert: bitsandbytes cannot load it quantized"),
        (bool(_NORM.search(module)), "norm"),
        (len(spec.shape) != 2, "not a matrix"),
        (bool(_TABLE.search(module)), "embedding"),
        (bool(_ROUTER.search(module)), "router"),
        (not _NUMBERED.search(module), "outside the layers"),
        (any(fnmatchcase(module, pattern) for pattern in skip), "asked to skip"),
    )
    return next((reason for applies, reason in rules if applies), "")
