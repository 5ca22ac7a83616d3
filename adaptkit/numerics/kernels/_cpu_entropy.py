"""The loops of ``numerics.residual``, compiled: symbols and raw bits, and the range coder with four states in turn.

Each loop is told how long its arrays are and never goes beyond, whatever bytes it is given.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call"
import numpy as np

from adaptkit.numerics.kernels._cpu_memory import inlined, jit

EXACT = 192
"""Zigzag values below this are symbols of their own."""

SYMBOLS = EXACT + 57
"""The others are told by their number of bits, 8 to 64."""

PRECISION = 12
"""Frequencies add up to two to this power."""

LEAST = 1 << 16
"""A state is at least this, and less than 2^32."""

STATES = 4


@inlined
def _bit_length(number):
    length = np.uint64(0)
    for step in (32, 16, 8, 4, 2, 1):
        if number >> np.uint64(step):
            number >>= np.uint64(step)
            length += np.uint64(step)
    return length + np.uint64(1)


@inlined
def _zigzag(value):
    return np.uint64((value << 1) ^ (value >> 63))


@jit
def split(values, symbols, counts):
    """The symbol of every value; ``counts``, (STATES, 256), takes how often each occurs. Returns the number of raw bits."""
    raw = np.uint64(0)
    for i in range(values.size):
        code = _zigzag(values[i])
        if code >= np.uint64(EXACT):
            length = _bit_length(code)
            raw += length - np.uint64(1)
            code = np.uint64(EXACT - 8) + length
        symbols[i] = code
        counts[i & (STATES - 1), code] += 1
    return raw


@inlined
def _put(out, position, bits, count):
    """Write up to 64 bits; ``out`` is zero from there on."""
    while count:
        free = min(np.uint64(8) - (position & np.uint64(7)), count)
        low = bits & ((np.uint64(1) << free) - np.uint64(1))
        out[position >> np.uint64(3)] |= np.uint8(low << (position & np.uint64(7)))
        bits >>= free
        count -= free
        position += free
    return position


@inlined
def _get(source, position, count):
    """Read up to 63 bits."""
    bits, done = np.uint64(0), np.uint64(0)
    while done < count:
        some = min(np.uint64(8) - (position & np.uint64(7)), count - done)
        byte = np.uint64(source[position >> np.uint64(3)]) >> (position & np.uint64(7))
        bits |= (byte & ((np.uint64(1) << some) - np.uint64(1))) << done
        done += some
        position += some
    return bits


@jit
def put_raw(values, symbols, out):
    """Write the bits below the first one of every value that is no symbol of its own."""
    position = np.uint64(0)
    for i in range(values.size):
        if symbols[i] >= EXACT:
            position = _put(out, position, _zigzag(values[i]), np.uint64(symbols[i]) - np.uint64(EXACT - 7))
    return position


@jit
def raw_bits(symbols):
    """How many raw bits the symbols call for."""
    total = 0
    for i in range(symbols.size):
        if symbols[i] >= EXACT:
            total += np.int64(symbols[i]) - (EXACT - 7)
    return total


@jit
def join(symbols, raw, values):
    """Undo ``split`` and ``put_raw``; ``raw`` holds as many bits as ``raw_bits`` says."""
    position = np.uint64(0)
    for i in range(symbols.size):
        code = np.uint64(symbols[i])
        if code >= np.uint64(EXACT):
            count = code - np.uint64(EXACT - 7)
            code = (np.uint64(1) << count) | _get(raw, position, count)
            position += count
        values[i] = np.int64(code >> np.uint64(1)) ^ -np.int64(code & np.uint64(1))


@inlined
def _push(state, symbol, inverse, room, start, limit, words, position):
    """Put one symbol into a state: (state / f) 2^12 + state mod f + start, after making room for it."""
    if state >= limit[symbol]:
        position -= 1
        words[position] = state & np.uint64(0xFFFF)
        state >>= np.uint64(16)
    quotient = (state * inverse[symbol]) >> np.uint64(32 + PRECISION)  # exactly state / f, see ``encoding_tables``
    return state + start[symbol] + quotient * room[symbol], position


@jit
def push(symbols, inverse, room, start, limit, states, words):
    """Code the symbols from the last to the first; the words are filled from the end. Returns where they begin."""
    position, count = words.size, symbols.size
    for i in range(count - 1, (count & ~(STATES - 1)) - 1, -1):
        lane = i & (STATES - 1)
        states[lane], position = _push(states[lane], symbols[i], inverse, room, start, limit, words, position)
    s0, s1, s2, s3 = states[0], states[1], states[2], states[3]
    for i in range((count & ~(STATES - 1)) - STATES, -1, -STATES):
        s3, position = _push(s3, symbols[i + 3], inverse, room, start, limit, words, position)
        s2, position = _push(s2, symbols[i + 2], inverse, room, start, limit, words, position)
        s1, position = _push(s1, symbols[i + 1], inverse, room, start, limit, words, position)
        s0, position = _push(s0, symbols[i], inverse, room, start, limit, words, position)
    states[0], states[1], states[2], states[3] = s0, s1, s2, s3
    return position


@inlined
def _pop(state, slots, words, position):
    """Take one symbol out of a state and refill it; a slot is frequency - 1, the slot's place within it, the symbol."""
    slot = np.uint64(slots[state & np.uint64((1 << PRECISION) - 1)])
    state = ((slot >> np.uint64(20)) + np.uint64(1)) * (state >> np.uint64(PRECISION))
    state += (slot >> np.uint64(8)) & np.uint64((1 << PRECISION) - 1)
    if state < np.uint64(LEAST):
        state = (state << np.uint64(16)) | np.uint64(words[position])
        position += np.uint64(1)
    return state, slot, position


@jit
def pop(states, slots, words, symbols):
    """Undo ``push``. Returns how many words were used.

    Args:
        states: STATES uint64, left as they are at the end.
        slots: 2^12 uint32, see ``_pop``.
        words: uint16, with STATES more at the end than may be used.
        symbols: uint8, to be filled.
    """
    position, usable = np.uint64(0), np.uint64(words.size - STATES)
    s0, s1, s2, s3 = states[0], states[1], states[2], states[3]
    count = symbols.size
    for i in range(0, count & ~(STATES - 1), STATES):
        s0, slot0, position = _pop(s0, slots, words, position)
        s1, slot1, position = _pop(s1, slots, words, position)
        s2, slot2, position = _pop(s2, slots, words, position)
        s3, slot3, position = _pop(s3, slots, words, position)
        symbols[i], symbols[i + 1], symbols[i + 2], symbols[i + 3] = slot0, slot1, slot2, slot3
        if position > usable:
            return np.int64(position)
    states[0], states[1], states[2], states[3] = s0, s1, s2, s3
    for i in range(count & ~(STATES - 1), count):
        lane = i & (STATES - 1)
        states[lane], slot, position = _pop(states[lane], slots, words, position)
        symbols[i] = slot
    return np.int64(position)
