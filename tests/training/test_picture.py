"""The plot of a run's metrics."""

import json
from xml.etree import ElementTree

import pytest

from adaptkit.training.history import History
from adaptkit.training.picture import draw

LETTER = 10
"""Height of a letter, in points."""


@pytest.mark.parametrize(("loss", "rate"), [(2.0, 2e-4), (1.2345e-3, 2.345e-3), (12345.0, 1e-6), (1e-7, 0.75)])
def test_all_labels_are_inside_the_picture(loss, rate):
    """Of short and long numbers, and powers of ten above an axis."""
    steps = [{"step": step, "loss": loss / step, "learning_rate": rate / step} for step in range(1, 101)]
    lines = [*steps, {"step": 100, "held_out_loss": loss}]
    root = ElementTree.fromstring(draw(History(None, "".join(json.dumps(line) + "\n" for line in lines).encode())))
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    texts = [text for text in root.iter("{http://www.w3.org/2000/svg}text") if text.text]
    assert {"step", "loss per answer token (nats)", "learning rate (dashed)"} <= {text.text for text in texts}
    for text in texts:
        x, y = float(text.attrib["x"]), float(text.attrib["y"])  # of the base line, at the left of upright letters
        assert LETTER <= x <= width - LETTER / 2, text.text
        assert LETTER <= y <= height - LETTER / 2, text.text
