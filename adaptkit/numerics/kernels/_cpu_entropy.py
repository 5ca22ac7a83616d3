"""The loops of ``numerics.residual``, compiled: symbols and raw bits, and the range coder with four interleaved states.

No loop reads or writes beyond the end of its arrays, whatever bytes it decodes.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,assignment"
import numpy as np

from adaptkit.compiled import inlined, jit
from adaptkit.numerics.kernels._cpu_instructions import leading_zeros
from adaptkit.numerics.kernels._entropy import EXACT, LEAST, PRECISION, STATES


@inlined
def _zigzag(value):
    return np.uint64((value << 1) ^ (value >> 63))


@jit
def split(values, symbols, counts):
    """Write the symbol of every value, and count each symbol's occurrences in ``counts``, (STATES, 256).

    Row i of ``counts`` has those at positions i modulo STATES.

    Returns:
        The number of raw bits.
    """
    raw = np.uint64(0)
    for i in range(values.size):
        code = _zigzag(values[i])
        if code >= np.uint64(EXACT):
            length = np.uint64(64) - leading_zeros(code)
            raw += length - np.uint64(1)
            code = np.uint64(EXACT - 8) + length
        symbols[i] = code
        counts[i & (STATES - 1), code] += 1
    return raw


@jit
def put_raw(values, symbols, out):
    """Write the raw bits of every value whose symbol gives only its length: the bits below its leading one.

    Args:
        values: int64.
        symbols: uint8, from ``split``.
        out: uint64 zeros, one more than the bits require; filled from the lowest bit up.
    """
    position = np.uint64(0)
    for i in range(values.size):
        if symbols[i] >= EXACT:
            count = np.uint64(symbols[i]) - np.uint64(EXACT - 7)
            bits = _zigzag(values[i]) ^ (np.uint64(1) << count)
            word, shift = position >> np.uint64(6), position & np.uint64(63)
            out[word] |= bits << shift
            out[word + np.uint64(1)] |= (bits >> np.uint64(1)) >> (np.uint64(63) - shift)
            position += count


@jit
def raw_bits(symbols):
    """Return how many raw bits belong to the symbols."""
    total = 0
    for i in range(symbols.size):
        if symbols[i] >= EXACT:
            total += np.int64(symbols[i]) - (EXACT - 7)
    return total


@jit
def join(symbols, raw, values):
    """Undo ``split`` and ``put_raw``; ``raw`` has one element more than the bits require."""
    position = np.uint64(0)
    for i in range(symbols.size):
        code = np.uint64(symbols[i])
        if code >= np.uint64(EXACT):
            count = code - np.uint64(EXACT - 7)
            word, shift = position >> np.uint64(6), position & np.uint64(63)
            high = (raw[word + np.uint64(1)] << np.uint64(1)) << (np.uint64(63) - shift)
            first = np.uint64(1) << count
            code = first | (((raw[word] >> shift) | high) & (first - np.uint64(1)))
            position += count
        values[i] = np.int64(code >> np.uint64(1)) ^ -np.int64(code & np.uint64(1))


@inlined
def _push(state, symbol, table, words, position):
    """Encode one symbol: emit a word if the state is full, then return ⌊state / f⌋ · 2^12 + state mod f + start."""
    symbol = np.uint64(symbol)
    words[position - np.uint64(1)] = state & np.uint64(0xFFFF)  # kept only if the state is full; avoids a branch
    full = np.uint64(state >= table[symbol, 3])
    position -= full
    state >>= full << np.uint64(4)
    quotient = (state * table[symbol, 0]) >> np.uint64(32 + PRECISION)  # exactly state / f
    return state + table[symbol, 2] + quotient * table[symbol, 1], position


@jit
def push(symbols, table, states, words):
    """Encode the symbols from last to first, filling the words from the end; return the index of the first word.

    Args:
        symbols: uint8.
        table: (SYMBOLS, 4) uint64: 2^44 / f rounded up, 2^12 - f, the first slot, and f · 2^20, the least state from
            which a word is emitted first. For a smaller state, its product with the first column, shifted right by 44,
            is exactly ⌊state / f⌋: rounding up adds less than 2^20 · f <= 2^44 / f to the product, which is below 2^64.
        states: STATES uint64, changed; finally the states from which decoding starts.
        words: uint16, one more than there are symbols.
    """
    position, count = np.uint64(words.size), symbols.size
    whole = count & ~(STATES - 1)
    for lane in range(count - whole - 1, -1, -1):
        states[lane], position = _push(states[lane], symbols[whole + lane], table, words, position)
    s0, s1, s2, s3 = states[0], states[1], states[2], states[3]
    for i in range(whole - STATES, -1, -STATES):
        s3, position = _push(s3, symbols[i + 3], table, words, position)
        s2, position = _push(s2, symbols[i + 2], table, words, position)
        s1, position = _push(s1, symbols[i + 1], table, words, position)
        s0, position = _push(s0, symbols[i], table, words, position)
    states[0], states[1], states[2], states[3] = s0, s1, s2, s3
    return np.int64(position)


@inlined
def _pop(state, slots, words, position):
    """Decode one symbol and refill the state; a slot packs frequency - 1, offset and symbol at bits 20, 8 and 0."""
    slot = np.uint64(slots[state & np.uint64((1 << PRECISION) - 1)])
    state = ((slot >> np.uint64(20)) + np.uint64(1)) * (state >> np.uint64(PRECISION))
    state += (slot >> np.uint64(8)) & np.uint64((1 << PRECISION) - 1)
    empty = np.uint64(state < np.uint64(LEAST))
    state = (state << (empty << np.uint64(4))) | (np.uint64(words[position]) & (np.uint64(0) - empty))
    return state, slot, position + empty


@jit
def pop(states, slots, words, symbols):
    """Undo ``push``; return how many words were used.

    Args:
        states: STATES uint64, changed to the final states.
        slots: 2^12 uint32, see ``_pop``.
        words: uint16, padded with STATES elements that must not be used.
        symbols: uint8, written.
    """
    position, usable = np.uint64(0), np.uint64(words.size - STATES)
    s0, s1, s2, s3 = states[0], states[1], states[2], states[3]
    count = symbols.size
    whole = count & ~(STATES - 1)
    for i in range(0, whole, STATES):
        s0, slot0, position = _pop(s0, slots, words, position)
        s1, slot1, position = _pop(s1, slots, words, position)
        s2, slot2, position = _pop(s2, slots, words, position)
        s3, slot3, position = _pop(s3, slots, words, position)
        symbols[i], symbols[i + 1], symbols[i + 2], symbols[i + 3] = slot0, slot1, slot2, slot3
        if position > usable:
            return np.int64(position)
    states[0], states[1], states[2], states[3] = s0, s1, s2, s3
    for lane in range(count - whole):
        states[lane], slot, position = _pop(states[lane], slots, words, position)
        symbols[whole + lane] = slot
    return np.int64(position)
