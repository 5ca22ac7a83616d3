"""4-bit NormalFloat (QLoRA, arXiv:2305.14314): sixteen levels at the quantiles of a normal distribution.

The parts of a weight X.weight of n elements in blocks of 64, as bitsandbytes reads and writes them:

    X.weight                                U8   [(n + 1) // 2, 1]      two codes a byte
    X.weight.absmax                         U8   [M]                    M = ceil(n / 64)
    X.weight.quant_state.bitsandbytes__nf4  U8   JSON: types, block sizes, shape, offset; drawn in ``_blockwise_state``
    X.weight.nested_absmax                  F32  [ceil(M / 256)]
    X.weight.nested_quant_map               F32  [256]                  the levels that codes of constants stand for
    X.weight.quant_map                      F32  [16]                   the levels that codes of weights stand for

    a byte of codes      7..4 element 2i, 3..0 element 2i + 1     in row-major order; an odd n is filled up with code 7
    a weight             quant_map[code] · constant               in float32, rounded once
    a constant           nested_quant_map[absmax] · nested_absmax + nested_offset

Without double quantization ``absmax`` is F32 and follows the state, and the nested parts are absent. A stack of
matrices (the experts of one layer) is one such weight with a shape of three dimensions; no block spans two matrices. In
other tools' files the tensor of codes may have a float type (``bnb_4bit_quant_storage``) with the same bytes. 4.127
bits a weight, and 1.26 KB a tensor.

The codes come first, so that they can be written before the rest is known. The JSON is padded with spaces so that every
tensor is aligned, and so that every size is known before any weight is read.
"""

from adaptkit.formats._blockwise import Blockwise
from adaptkit.numerics.kernels.codebook import NF4

FORMAT = Blockwise("nf4", NF4)
