"""Step counts of fractions of a run, and the learning rate of every step."""

import math
from fractions import Fraction

from adaptkit.training.config import TrainConfig


def steps_in(fraction: float, steps: int) -> int:
    """Return ⌈fraction · steps⌉, exact for the fraction as written in decimal: 0.07 of 100 steps are 7.

    The float only approximates that fraction, and its product may lie just above a whole number.
    """
    return math.ceil(Fraction(str(fraction)) * steps)


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """Return the learning rate of a step (from 0): a linear warm-up, then the schedule.

    Relative to the peak, with n steps, w of them warm-up, and p = (step - w) / (n - w):

        warm-up    (step + 1) / w
        constant   1
        linear     1 - p
        cosine     (1 + cos πp) / 2
        wsd        1 until the last ``decay`` · n steps, then a linear decay (arXiv:2404.06395, linear decay)
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
