"""Four rows of a product B A for a tile of columns, with all sums in registers.

For a plain loop the compiler would keep the sums in memory and spend as much time on them as on the products. So this
module emits the loop with LLVM vectors of 64 bytes, which LLVM maps to the processor's own. Every sum adds its terms in
ascending order of rank.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc"
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from adaptkit.numerics.kernels._cpu_product import ROWS, VECTORS


def repeated(builder, number, kind):
    """Broadcast a number to a vector."""
    lone = builder.insert_element(ir.Constant(kind, ir.Undefined), number, ir.Constant(ir.IntType(32), 0))
    mask = ir.Constant(ir.VectorType(ir.IntType(32), kind.count), None)
    return builder.shuffle_vector(lone, lone, mask)


class _Emitter:
    """Emits the loops for arrays that numba passes.

    Args:
        builder: LLVM's builder, positioned in the function.
        arrays: a, b and out, as numba's array structures.
        wide: whether the sums are float64; if not, float32.
    """

    def __init__(self, builder, arrays, wide):
        self.builder, self.wide = builder, wide
        self.a, self.b, self.out = arrays
        self.narrow = ir.VectorType(ir.FloatType(), 8 if wide else 16)
        self.sum = ir.VectorType(ir.DoubleType() if wide else ir.FloatType(), self.narrow.count)
        name = f"llvm.fmuladd.v{self.sum.count}f{64 if wide else 32}"
        self.fmuladd = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(self.sum, [self.sum, self.sum, self.sum]), name
        )

    def extent(self, array, axis):
        return self.builder.extract_value(array.shape, axis)

    def at(self, array, index, kind):
        return self.builder.bitcast(self.builder.gep(array.data, [index]), kind.as_pointer())

    def product(self, sums, row, base, k, column):
        """Add the products of rank k to the sums; ``base`` is the index of the tile's first element in ``a``."""
        builder = self.builder
        start = builder.add(base, builder.add(builder.mul(k, self.extent(self.a, 2)), column))
        vectors = []
        for n in range(VECTORS):
            place = builder.add(start, ir.Constant(start.type, n * self.narrow.count))
            vector = builder.load(self.at(self.a, place, self.narrow), align=4)
            vectors.append(builder.fpext(vector, self.sum) if self.wide else vector)
        for i in range(ROWS):
            line = builder.mul(builder.add(row, ir.Constant(row.type, i)), self.extent(self.b, 1))
            factor = builder.load(builder.gep(self.b.data, [builder.add(line, k)]))
            factor = repeated(builder, builder.fpext(factor, self.sum.element) if self.wide else factor, self.sum)
            for n in range(VECTORS):
                total = sums[i * VECTORS + n]
                builder.store(builder.call(self.fmuladd, [factor, vectors[n], builder.load(total)]), total)

    def write(self, sums, column):
        for i in range(ROWS):
            line = self.builder.mul(ir.Constant(column.type, i), self.extent(self.out, 1))
            for n in range(VECTORS):
                place = self.builder.add(line, self.builder.add(column, ir.Constant(column.type, n * self.sum.count)))
                self.builder.store(
                    self.builder.load(sums[i * VECTORS + n]),
                    self.at(self.out, place, self.sum),
                    align=8 if self.wide else 4,
                )


@intrinsic
def multiply(typingctx, a, b, row, tile, first, stop, count, out):
    """Write B A to ``out``, for ``ROWS`` rows from ``row`` on and the first columns of a tile.

    ``a`` is (tiles, K, columns) float32, columns being a multiple of ``STEP``; ``b`` is (rows, K) float32. The sums run
    over the ranks from ``first`` to ``stop`` - 1. ``out`` is (ROWS, columns) float32 or float64, of which ``count``
    columns are written, rounded up to a multiple of at most ``STEP``. A product of two float32 is exact in float64, so
    there it does not matter whether the processor fuses it with the addition.
    """

    def codegen(context, builder, signature, arguments):
        kinds = signature.args
        arrays = [context.make_array(kinds[n])(context, builder, arguments[n]) for n in (0, 1, 7)]
        emitter = _Emitter(builder, arrays, out.dtype == types.float64)
        row, tile, first, stop, count = arguments[2:7]
        step = ir.Constant(count.type, VECTORS * emitter.sum.count)
        sums = [cgutils.alloca_once(builder, emitter.sum) for _ in range(ROWS * VECTORS)]
        base = builder.mul(tile, builder.mul(emitter.extent(arrays[0], 1), emitter.extent(arrays[0], 2)))
        steps = builder.sdiv(builder.sub(builder.add(count, step), ir.Constant(count.type, 1)), step)
        with cgutils.for_range(builder, steps) as columns:
            column = builder.mul(columns.index, step)
            for total in sums:
                builder.store(ir.Constant(emitter.sum, None), total)
            with cgutils.for_range(builder, builder.sub(stop, first)) as ranks:
                emitter.product(sums, row, base, builder.add(first, ranks.index), column)
            emitter.write(sums, column)
        return context.get_dummy_value()

    whole = types.intp
    return types.void(a, b, whole, whole, whole, whole, whole, out), codegen
