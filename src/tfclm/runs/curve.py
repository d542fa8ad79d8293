"""The curve of a run: loss and perplexity over optimizer steps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tfclm.metrics.finite import exp

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tfclm.training.finetuning import TrainingRecord


def draw_curve(record: TrainingRecord, path: Path) -> None:
    """Draws the figure of `make_figure` into a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(make_figure(record)).print_png(str(path))


def make_figure(record: TrainingRecord) -> Figure:
    """A figure of training and validation loss, and of validation perplexity on a logarithmic axis."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    steps = [epoch["step"] for epoch in record.epochs]
    losses = [record.initial_loss, *(epoch["val_loss"] for epoch in record.epochs)]
    figure = Figure(figsize=(7, 7), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    above.plot([0, *steps], losses, "o-", label="validation")
    above.plot(steps, [epoch["loss"] for epoch in record.epochs], "o--", label="training (mean of the epoch)")
    above.set(ylabel="loss (nats per token)", title="Loss")
    above.legend()
    below.plot([0, *steps], [exp(loss) for loss in losses], "o-")
    below.set(xlabel="optimizer step", ylabel="perplexity", title="Validation perplexity", yscale="log")
    below.yaxis.set_major_formatter(LogFormatter())
    below.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    for axes in (above, below):
        axes.grid(alpha=0.3)
    return figure
