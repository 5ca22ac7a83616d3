"""Decoding with a permutation instruction, which does sixteen look-ups at once, on processors that have one.

``_llvm_lookup`` emits the code. Without such an instruction ``_cpu_blocks`` decodes with selections.
"""

import platform

from adaptkit.compiled import lazy_intrinsic, processor_features

CHUNK = 32
"""Number of weights decoded at a time; the block size must be a multiple of it."""

decode_block = lazy_intrinsic("adaptkit.numerics.kernels._llvm_lookup", "decode_block")


def _permutation() -> str | None:
    """Return LLVM's name of the instruction; None if the target processor is not known to have one."""
    features = processor_features()
    if features is None:
        return None
    if platform.machine().lower() in ("aarch64", "arm64"):
        return "llvm.aarch64.neon.tbl1.v16i8"
    return "llvm.x86.ssse3.pshuf.b.128" if "ssse3" in features else None


PERMUTATION = _permutation()


def has_avx512(part: str) -> bool:
    """Return whether the target processor is known to have a subset of AVX-512, such as "bw"."""
    return f"avx512{part}" in (processor_features() or ())


def _permutations_of_weights() -> dict[int, str]:
    """Return, by bits per weight, the instructions that permute whole weights; empty if the processor has none."""
    if has_avx512("bw"):
        return {16: "llvm.x86.avx512.permvar.hi.512", 32: "llvm.x86.avx512.permvar.si.512"}
    return {}


PERMUTATIONS_OF_WEIGHTS = _permutations_of_weights()
