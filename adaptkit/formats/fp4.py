"""4-bit floating point: a sign, two exponent bits and one fraction bit; small positive weights get the second zero."""

from adaptkit.formats._four_bit import four_bit
from adaptkit.numerics.kernels.codebook import FP4

FORMAT = four_bit("fp4", FP4)
