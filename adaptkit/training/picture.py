"""Plot of a run's metrics; the same metrics give the same bytes."""

import io
from importlib.util import find_spec

from adaptkit.training.history import History


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def draw(history: History) -> bytes:
    """Draw the loss of every step, the held-out loss and the learning rate, as SVG."""
    import matplotlib
    from matplotlib.figure import Figure

    steps = [line for line in history.lines() if "loss" in line]
    measured = history.held_out
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # ignore the user's matplotlibrc
        matplotlib.rcParams.update({"svg.hashsalt": "adaptkit", "svg.fonttype": "none"})
        figure = Figure(figsize=(7, 4))
        # Margins that fit the labels: finding them would mean drawing everything twice more.
        axes = figure.add_axes((0.13, 0.13, 0.71, 0.8))
        axes.plot([line["step"] for line in steps], [line["loss"] for line in steps], label="training", linewidth=1)
        if measured:
            axes.plot(list(measured), list(measured.values()), "o-", label="held out", markersize=4)
        axes.set_xlabel("step")
        axes.set_ylabel("loss per answer token (nats)")
        rates = axes.twinx()
        rates.plot([line["step"] for line in steps], [line["learning_rate"] for line in steps], "--", color="0.7")
        rates.set_ylabel("learning rate (dashed)")
        rates.set_ylim(bottom=0)
        axes.legend()
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue()
