"""4-bit floating point: a sign, two exponent bits and one fraction bit; small positive weights get the second zero.

Parts and bits are those of ``nf4``, but for the state's name, X.weight.quant_state.bitsandbytes__fp4, and the levels:

    code     s mmm     0 1/192 2/3 1 1/3 1/2 1/6 1/4, of the magnitude mmm
"""

from adaptkit.formats._blockwise import Blockwise
from adaptkit.numerics.kernels.codebook import FP4

FORMAT = Blockwise("fp4", FP4)
