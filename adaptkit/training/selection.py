"""Which adapter of a run is the best, and when a run has stopped getting better: functions of what was measured."""

from adaptkit.training.history import History


def best_step(history: History) -> int | None:
    """The step after which the held-out loss was lowest, the first of equals; None if it was not measured.

    The measurement before the first step does not count: that adapter is nobody's wish.
    """
    measured = _measured(history)
    return min(measured, key=lambda step: measured[step]) if measured else None


def is_over(history: History, patience: int) -> bool:
    """Whether the last ``patience`` measurements brought nothing better than the one before them; 0 waits for ever."""
    best = best_step(history)
    return patience > 0 and best is not None and sum(step > best for step in _measured(history)) >= patience


def _measured(history: History) -> dict[int, float]:
    return {
        line["step"]: line["held_out_loss"] for line in history.lines if "held_out_loss" in line and line["step"] > 0
    }
