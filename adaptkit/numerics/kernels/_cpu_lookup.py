"""Decoding by a permutation: sixteen look-ups in one instruction, where the processor has one.

``_llvm_lookup`` writes it. Without such an instruction ``_cpu_blocks`` decodes with selections.
"""

import platform

from adaptkit.compiled import processor_features, written

CHUNK = 32
"""Weights that are decoded at a time; a block is a multiple of it."""

decode_block = written("adaptkit.numerics.kernels._llvm_lookup", "decode_block")


def _permutation() -> str | None:
    """The name of the instruction, if the processor for which kernels are compiled is known to have it."""
    features = processor_features()
    if features is None:
        return None
    if platform.machine().lower() in ("aarch64", "arm64"):
        return "llvm.aarch64.neon.tbl1.v16i8"
    return "llvm.x86.ssse3.pshuf.b.128" if "ssse3" in features else None


PERMUTATION = _permutation()


def has_avx512(part: str) -> bool:
    """Whether the processor for which kernels are compiled is known to have a part of AVX-512."""
    return f"avx512{part}" in (processor_features() or ())


def _permutations_of_weights() -> dict[int, str]:
    """The instruction that permutes whole weights of so many bits, where there is one."""
    if has_avx512("bw"):
        return {16: "llvm.x86.avx512.permvar.hi.512", 32: "llvm.x86.avx512.permvar.si.512"}
    return {}


PERMUTATIONS_OF_WEIGHTS = _permutations_of_weights()
