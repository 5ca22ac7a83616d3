"""How many steps a fraction of a run is, and the learning rate of every step."""

import math
from fractions import Fraction

from adaptkit.training.config import TrainConfig


def steps_in(fraction: float, steps: int) -> int:
    """⌈fraction · steps⌉, of the decimal fraction that was written: 0.07 of 100 steps are 7.

    A float is near that fraction only, and its product may lie just above a whole number.
    """
    return math.ceil(Fraction(str(fraction)) * steps)


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """The rate of the step-th step (from 0): a linear rise over the warm-up, then the schedule.

    With w steps of warm-up, n steps, and p = (step - w) / (n - w):

        warm-up    (step + 1) / w
        constant   1
        linear     1 - p
        cosine     (1 + cos πp) / 2
        wsd        1 until the last ``decay`` · n steps, then falling in equal parts (arXiv:2404.06395, linear decay)
    """
    warmup = steps_in(config.warmup, steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    if config.schedule == "wsd":
        falling = min(steps_in(config.decay, steps), steps - warmup)
        return config.learning_rate * min(1.0, (steps - step) / max(1, falling))
    progress = (step - warmup) / max(1, steps - warmup)
    shapes = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}
    return config.learning_rate * shapes[config.schedule]
