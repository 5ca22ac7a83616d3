"""The history's properties, which are updated with each line, equal those computed from all lines."""

import json

from hypothesis import given
from hypothesis import strategies as st

from adaptkit.training.history import History

LOSSES = st.one_of(st.none(), st.integers(0, 4).map(float))
STEPS = st.lists(st.tuples(st.booleans(), LOSSES), max_size=30)


def lines_of(steps, first):
    """Return the lines of an optional measurement at step 0, and of steps, some followed by a measurement."""
    found = [] if first is None else [{"step": 0, "held_out_loss": first}]
    for number, (skipped, loss) in enumerate(steps, 1):
        found.append(
            {"step": number, "tokens": 5, "answer_tokens": 3} | ({"skipped": "why"} if skipped else {"loss": 1.0})
        )
        found += [] if loss is None else [{"step": number, "held_out_loss": loss}]
    return found


@given(STEPS, LOSSES, st.integers(0, 60))
def test_properties_equal_those_computed_from_all_lines(steps, first, cut):
    """The first lines are read from a checkpoint, the others are added."""
    lines = lines_of(steps, first)
    history = History(None, b"".join((json.dumps(line) + "\n").encode() for line in lines[:cut]))
    for line in lines[cut:]:
        history.add(line)
    assert history.lines() == lines
    assert [json.loads(line) for line in history.content().splitlines()] == lines
    measured = {line["step"]: line["held_out_loss"] for line in lines if "held_out_loss" in line}
    assert history.held_out == measured
    counted = [step for step in measured if step > 0]
    best = min(counted, key=measured.get) if counted else None
    assert history.best_step == best
    assert history.since_best == sum(step > best for step in counted) if counted else history.since_best == 0
    flags = [skipped for skipped, _ in steps]
    flags = flags[: sum("answer_tokens" in line for line in lines)]
    assert history.skipped_in_a_row == next((n for n, skipped in enumerate(reversed(flags)) if not skipped), len(flags))
    newest = lines[-1]["step"] if lines else 0
    assert history.known(newest) == {name for line in lines if line["step"] == newest for name in line}
    assert history.known(newest + 1) == set()
