"""4-bit NormalFloat (QLoRA, arXiv:2305.14314): sixteen levels at the quantiles of a normal distribution."""

from adaptkit.formats._four_bit import four_bit
from adaptkit.numerics.kernels.codebook import NF4

FORMAT = four_bit("nf4", NF4)
