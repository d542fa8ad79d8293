"""What a run leaves for people: the curve and the model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tfclm.settings import to_yaml
from tfclm.training.run import TrainingRecord


def draw_curve(done: TrainingRecord, path: Path) -> None:
    """Draws training and validation loss over optimizer steps as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [epoch["step"] for epoch in done.epochs]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, *steps], [done.initial_loss, *(epoch["val_loss"] for epoch in done.epochs)], "o-", label="validation")
    axes.plot(steps, [epoch["loss"] for epoch in done.epochs], "o--", label="training (mean of the epoch)")
    axes.set(xlabel="optimizer step", ylabel="loss (nats a token)", title="Loss")
    axes.grid(alpha=0.3)
    axes.legend()
    FigureCanvasAgg(figure).print_png(str(path))


def model_card(results: dict[str, Any], settings: dict[str, Any]) -> str:
    """The folder's README.md: metadata that the Hub reads, data, curve, settings, versions."""
    protocol, train = results["protocol"], results["train"]
    base = None if settings["model"] == "scratch" else settings["model"]
    metadata: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["tensorflow", "tfclm"],
    }
    if base and not Path(base).exists():
        metadata["base_model"] = base
    name = Path(settings["output_dir"]).name
    curve = "\n".join(
        f"| {epoch['epoch']} | {epoch['step']} | {epoch['loss']:.4f} | {epoch['val_loss']:.4f} | "
        f"{epoch['val_perplexity']:.2f} |"
        for epoch in train["epochs"]
    )
    before = f"| 0 | 0 | | {_log(results['initial_perplexity'])} | {results['initial_perplexity']:.2f} |"
    return f"""---
{to_yaml(metadata)}---

# {name}

{"A small GPT-2 trained from scratch" if base is None else f"Fine-tuned from {base}"} on {protocol["source"]}, \
split {protocol["split"]}; validation: {protocol["validation"]}.

Validation perplexity **{results["perplexity"]:.2f}** ({results["initial_perplexity"]:.2f} before training) over \
{results["tokens"]} tokens: exp of the mean negative log-likelihood a token, in blocks of {protocol["block_size"]} \
tokens, each scored on its own; {"EOS" if protocol["separator"] == "eos" else "nothing"} between documents; \
{protocol["dropped_tokens"]} tokens at the end filled no block.

| epoch | step | training loss | validation loss | validation perplexity |
|---|---|---|---|---|
{before}
{curve}

The weights are {_weights(train)}. ![loss](loss.png)

## Settings

```yaml
{to_yaml(settings)}```

## Versions

{", ".join(f"{name} {version}" for name, version in results["versions"].items())}
"""


def _weights(train: dict[str, Any]) -> str:
    step, epoch = train["best_step"], train["best_epoch"]
    where = f"those after epoch {epoch} (step {step})" if epoch else f"those after step {step}, inside an epoch"
    ended = f"; training ended early: {train['diverged']}" if train["diverged"] else ""
    return (where if step else "those that training began with") + ended


def _log(perplexity: float) -> str:
    import math

    return f"{math.log(perplexity):.4f}" if math.isfinite(perplexity) else "inf"
