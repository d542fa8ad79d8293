"""What a run leaves for people: the curve and the model card."""

from __future__ import annotations

import importlib.metadata
import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tfclm.errors import InputError, first_line
from tfclm.metrics.finite import exp
from tfclm.settings import to_yaml

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tfclm.training.finetuning import TrainingRecord

PACKAGES = ("tfclm", "tensorflow", "tf-keras", "transformers", "tokenizers", "datasets", "huggingface-hub")
MOST_NAMES = 5  # of files that a card lists
# What a card's metadata takes from the base model's card.
INHERITED = ("license", "license_name", "license_link", "language")


def draw_curve(done: TrainingRecord, path: Path) -> None:
    """Draws training and validation loss, and perplexity, over optimizer steps as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(curve(done)).print_png(str(path))


def curve(done: TrainingRecord) -> Figure:
    """The figure of `draw_curve`; the perplexity's axis is logarithmic, so that its fall can be seen to the end."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    steps = [epoch["step"] for epoch in done.epochs]
    losses = [done.initial_loss, *(epoch["val_loss"] for epoch in done.epochs)]
    figure = Figure(figsize=(7, 7), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    above.plot([0, *steps], losses, "o-", label="validation")
    above.plot(steps, [epoch["loss"] for epoch in done.epochs], "o--", label="training (mean of the epoch)")
    above.set(ylabel="loss (nats a token)", title="Loss")
    above.legend()
    below.plot([0, *steps], [exp(loss) for loss in losses], "o-")
    below.set(xlabel="optimizer step", ylabel="perplexity", title="Validation perplexity", yscale="log")
    below.yaxis.set_major_formatter(LogFormatter())
    below.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    for axes in (above, below):
        axes.grid(alpha=0.3)
    return figure


def versions() -> dict[str, str]:
    """Of Python and the packages that a run depends on."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}


def read_base(model: str, revision: str | None) -> dict[str, Any]:
    """What a run's card takes from that of the model it begins with: `base_model` (a Hub id), licence and language.

    A base without a card, or one that cannot be read, gives no licence; the run's own card says so.
    """
    from huggingface_hub import ModelCard, hf_hub_download

    if model == "scratch":
        return {}
    folder = Path(model).expanduser()
    base: dict[str, Any] = {} if folder.is_dir() else {"base_model": model}
    try:
        path = folder / "README.md" if folder.is_dir() else Path(hf_hub_download(model, "README.md", revision=revision))
        data: Any = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True).data
    except Exception as error:  # no card, no network, no YAML: none of them keeps a model from being trained
        return base | {"unread": first_line(error)}
    # A folder that was fine-tuned itself names the model that it came from.
    names = (*INHERITED, "base_model") if folder.is_dir() else INHERITED
    return base | {name: data.get(name) for name in names if data.get(name) is not None}


def model_card(results: Mapping[str, Any], settings: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    """The README.md of a complete run: metadata that the Hub reads, data, results, use, settings, versions.

    Args:
        results: what `results.json` holds.
        settings: the run's, as plain values.
        base: what `read_base` gave.
    """
    from huggingface_hub import EvalResult

    protocol, train = results["protocol"], results["train"]
    measured = None
    if math.isfinite(results["perplexity"] or math.inf):
        hub_data, held_out = _hub_dataset(settings), _validation(protocol)
        measured = EvalResult(
            task_type="text-generation",
            dataset_type=hub_data or "text",
            dataset_name=hub_data or _source(protocol),
            dataset_config=settings["dataset_config"],
            dataset_revision=settings["dataset_revision"],
            dataset_split=held_out.split(" ")[1] if held_out.startswith("split ") else None,
            dataset_args={"validation": held_out},
            metric_type="perplexity",
            metric_name="validation perplexity",
            metric_value=round(results["perplexity"], 4),
            metric_args={name: protocol[name] for name in ("block_size", "separator", "dropped_tokens")},
        )
    return f"""{_metadata(settings, base, measured)}

{_origin(settings, base, protocol)}

Validation perplexity **{_number(results["perplexity"])}** ({_number(results["initial_perplexity"])} before training) \
over {results["tokens"]} tokens: exp of the mean negative log-likelihood per token, in blocks of \
{protocol["block_size"]} tokens, each scored on its own; \
{"EOS" if protocol["separator"] == "eos" else "nothing"} between documents; {protocol["dropped_tokens"]} tokens at the \
end filled no block.

{_table(train["epochs"], results["initial_perplexity"])}

The weights are {_weights(train)}. ![loss and perplexity](loss.png)

{_data(protocol, train)}
{_use(settings, base)}
{_record(settings, results["versions"])}"""


def progress_card(
    epochs: Sequence[Mapping[str, Any]],
    protocol: Mapping[str, Any],
    train: Mapping[str, Any],
    settings: Mapping[str, Any],
    base: Mapping[str, Any],
) -> str:
    """The README.md of a state that a run pushes while it goes on; it claims no perplexity of these weights."""
    return f"""{_metadata(settings, base, None)}

{_origin(settings, base, protocol)}

**The training is not complete**: these are the weights that it had reached when this was pushed, not the best ones.

{_table(epochs, None)}

{_data(protocol, train)}
{_use(settings, base)}
{_record(settings, versions())}"""


def plain_card(name: str, epochs: Sequence[Mapping[str, Any]], given: Mapping[str, Any]) -> str:
    """The README.md of a model that no run of `fit` made.

    Args:
        name: the heading.
        epochs: epoch, step, and Keras' loss and val_loss, natural logarithms.
        given: the metadata that transformers' callback takes: language, license, tags, finetuned_from, tasks, dataset.

    Raises:
        InputError: metadata of another name.
    """
    from huggingface_hub import ModelCardData

    names = {
        "language": "language",
        "license": "license",
        "finetuned_from": "base_model",
        "dataset": "datasets",
        "tasks": "pipeline_tag",
        "model_name": "model_name",
    }
    unknown = given.keys() - names.keys() - {"tags"}
    if unknown:
        raise InputError(f"a model card has no {', '.join(sorted(unknown))}: there are {', '.join(names)}, tags")
    tags = given.get("tags") or []
    data = ModelCardData(
        library_name="transformers",
        tags=["tensorflow", "tfclm", *([tags] if isinstance(tags, str) else tags)],
        **{"pipeline_tag": "text-generation"} | {names[key]: value for key, value in given.items() if key in names},
    )
    table = f"\n{_table(epochs, None)}\n" if epochs else ""
    return f"---\n{data.to_yaml()}\n---\n\n# {given.get('model_name') or name}\n{table}"


def _metadata(settings: Mapping[str, Any], base: Mapping[str, Any], measured: Any) -> str:
    from huggingface_hub import ModelCardData

    hub_data = _hub_dataset(settings)
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["tensorflow", "tfclm"],
        datasets=[hub_data] if hub_data else None,
        model_name=_name(settings) if measured else None,
        eval_results=[measured] if measured else None,
        **{key: value for key, value in base.items() if key != "unread"},
    )
    return f"---\n{data.to_yaml()}\n---\n\n# {_name(settings)}"


def _name(settings: Mapping[str, Any]) -> str:
    return str(settings["push_to_hub"] or Path(settings["output_dir"]).resolve().name).split("/")[-1]


def _hub_dataset(settings: Mapping[str, Any]) -> str | None:
    """The Hub id of the dataset, if it has one."""
    dataset = settings["dataset"]
    return None if dataset in (None, "python-docs") or Path(dataset).exists() else str(dataset)


def _origin(settings: Mapping[str, Any], base: Mapping[str, Any], protocol: Mapping[str, Any]) -> str:
    scratch = settings["model"] == "scratch"
    made = "A small GPT-2 trained from scratch" if scratch else f"Fine-tuned from {_base(settings, base)}"
    return f"{made} on {_source(protocol)}{_split(protocol)}."


def _base(settings: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    return str(base.get("base_model") or f"the local model {_last(settings['model'])}")


def _source(protocol: Mapping[str, Any]) -> str:
    """Where the training text is from; of files their names alone, for where they lie is nobody's business."""
    source = protocol["source"]
    if isinstance(source, list | tuple):
        return _names(source)
    return "Python's own documentation (python-docs)" if source == "python-docs" else _last(source)


def _split(protocol: Mapping[str, Any]) -> str:
    """Files have no split."""
    return f", split {protocol['split']}" if protocol["split"] is not None else ""


def _validation(protocol: Mapping[str, Any]) -> str:
    kind, _, paths = str(protocol["validation"]).partition(" ")
    return _names(paths.split(", ")) if kind == "files" else str(protocol["validation"])


def _names(paths: Sequence[str]) -> str:
    """The names of files, the first few of many."""
    names = [Path(path).name for path in paths]
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return f"{'the file' if len(names) == 1 else f'{len(names)} files:'} {', '.join(names[:MOST_NAMES])}{more}"


def _last(value: Any) -> Any:
    """A path without the folders of this machine above it; anything else as it is."""
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "~")) else value


def _table(epochs: Sequence[Mapping[str, Any]], before: float | None) -> str:
    rows = ["| epoch | step | training loss | validation loss | validation perplexity |", "|---|---|---|---|---|"]
    if before is not None:
        rows.append(f"| 0 | 0 | | {_number(math.log(before), 4)} | {_number(before)} |")
    for epoch in epochs:
        loss, own = epoch.get("val_loss"), epoch.get("loss")
        perplexity = None if loss is None else exp(loss)
        shown = (_number(own, 4), _number(loss, 4), _number(perplexity))
        rows.append(f"| {epoch['epoch']} | {epoch['step']} | {' | '.join(shown)} |")
    return "\n".join(rows)


def _number(value: float | None, digits: int = 2) -> str:
    if value is None:
        return ""
    return f"{value:.{digits}f}" if math.isfinite(value) else "not finite"


def _weights(train: Mapping[str, Any]) -> str:
    step, epoch = train["best_step"], train["best_epoch"]
    where = f"those after epoch {epoch} (step {step})" if epoch else f"those after step {step}, inside an epoch"
    ended = f"; training ended early: {train['diverged']}" if train["diverged"] else ""
    return (where if step else "those that training began with") + ended


def _data(protocol: Mapping[str, Any], train: Mapping[str, Any]) -> str:
    config = f", configuration {protocol['dataset_config']}" if protocol.get("dataset_config") else ""
    revision = f", revision {protocol['revision']}" if protocol.get("revision") else ""
    return f"""## Data

* Source: {_source(protocol)}{config}{revision}{_split(protocol)}, column {protocol["text_column"]}.
* Training: {_documents(protocol["train_rows"])}, {train["corpus_tokens"]} tokens in blocks.
* Validation: {_validation(protocol)}; {_documents(protocol["validation_rows"])}.
"""


def _documents(count: int) -> str:
    return f"{count} document{'' if count == 1 else 's'}"


def _use(settings: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    hub = settings["push_to_hub"]
    where = hub or _last(settings["output_dir"])
    served = f"serving_models/{_name(settings)}"
    if hub:
        serve = f"""a version that a stock server hosts. If this repository has a `saved_model.zip`, that is one, \
ready to serve: `python -m tfclm.serve --hub {hub}`, or unpacked into the server's model folder."""
    else:
        serve = f"""a version that a stock server hosts, or `python -m tfclm.serve --model_name={_name(settings)} \
--model_base_path={served}`."""
    if settings["model"] == "scratch":
        licence = "It was trained from scratch; which licence it may have follows from the texts it was trained on."
    elif base.get("license"):
        licence = f"The licence is that of {_base(settings, base)}: {base.get('license_name') or base['license']}."
    else:
        licence = (
            f"The card of {_base(settings, base)} names no licence, or could not be read: ask there before you use the "
            "model."
        )
    return f"""## Intended use

To continue text of the kind that it was trained on. It states what is likely, not what is true, and repeats what is \
wrong or unfair in its texts; it has not been tuned to follow instructions or to refuse any. {licence}

## How to load it

```python
from transformers import pipeline

# Without PyTorch installed, transformers 4.54 trips over its own default of torch_dtype; hence the None.
generator = pipeline("text-generation", model="{where}", torch_dtype=None)
print(generator("Once", max_new_tokens=50)[0]["generated_text"])
```

For TensorFlow Serving, `python -m tfclm.export --model {where} --serving-dir {served}` makes {serve}
"""


def _record(settings: Mapping[str, Any], used: Mapping[str, str]) -> str:
    shown = {
        name: [_last(each) for each in value] if isinstance(value, list) else _last(value)
        for name, value in settings.items()
    }
    return f"""## Settings

```yaml
{to_yaml(shown)}```

## Versions

{", ".join(f"{name} {version}" for name, version in used.items())}
"""
