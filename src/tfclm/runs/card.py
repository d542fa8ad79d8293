"""Model cards: of a complete run, of a run in progress, and of a model that no run made."""

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
    from huggingface_hub import EvalResult

PACKAGES = ("tfclm", "tensorflow", "tf-keras", "transformers", "tokenizers", "datasets", "huggingface-hub")
MAX_FILE_NAMES = 5  # file names that a card lists
# Metadata that a card takes from the base model's card.
INHERITED = ("license", "license_name", "license_link", "language")


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that a run depends on."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}


def read_base(model: str, revision: str | None) -> dict[str, Any]:
    """Reads the metadata that a run's card takes from the card of its base model.

    Args:
        model: Hub id or directory of the base model, or "scratch".
        revision: branch, tag or commit of a Hub model.

    Returns:
        `base_model` (a Hub id), the license and the language, as far as they are known. If the card cannot be read,
        `unread` says why, and the run's card states that the license is not known.
    """
    from huggingface_hub import ModelCard, hf_hub_download

    if model == "scratch":
        return {}
    folder = Path(model).expanduser()
    base: dict[str, Any] = {} if folder.is_dir() else {"base_model": model}
    try:
        path = folder / "README.md" if folder.is_dir() else Path(hf_hub_download(model, "README.md", revision=revision))
        data: Any = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True).data
    except Exception as error:  # no card, no network or no YAML: training does not depend on it
        return base | {"unread": first_line(error)}
    # A fine-tuned model in a directory has a base model itself.
    names = (*INHERITED, "base_model") if folder.is_dir() else INHERITED
    return base | {name: data.get(name) for name in names if data.get(name) is not None}


def model_card(results: Mapping[str, Any], settings: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    """The README.md of a complete run: metadata for the Hub, results, data, use, settings and versions.

    Args:
        results: the content of `results.json`.
        settings: the run's settings as plain values.
        base: metadata of the base model, from `read_base`.
    """
    protocol, train = results["protocol"], results["train"]
    return f"""{_metadata(settings, base, _eval_result(results, settings))}

{_origin(settings, base, protocol)}

Validation perplexity **{_number(results["perplexity"])}** ({_number(results["initial_perplexity"])} before training) \
over {results["tokens"]} tokens: exp of the mean negative log-likelihood per token, in blocks of \
{protocol["block_size"]} tokens, {_prefix(protocol)}each scored on its own; \
{"EOS" if protocol["separator"] == "eos" else "nothing"} between documents; {protocol["dropped_tokens"]} tokens at the \
end did not fill a block.

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
    """The README.md of weights that a run pushes during training; it states no perplexity for them."""
    return f"""{_metadata(settings, base, None)}

{_origin(settings, base, protocol)}

**The training is not complete**: these are its weights at the time of this push, not the best ones.

{_table(epochs, None)}

{_data(protocol, train)}
{_use(settings, base)}
{_record(settings, versions())}"""


def plain_card(name: str, epochs: Sequence[Mapping[str, Any]], given: Mapping[str, Any]) -> str:
    """The README.md of a model that was not trained by `fit`.

    Args:
        name: the heading.
        epochs: the epoch, the step, and Keras' loss and val_loss in nats.
        given: metadata, with the names of transformers' PushToHubCallback: language, license, tags, finetuned_from,
            tasks, dataset.

    Raises:
        InputError: an unknown metadata argument.
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
        raise InputError(f"a model card has no {', '.join(sorted(unknown))}: give only {', '.join(names)}, tags")
    tags = given.get("tags") or []
    data = ModelCardData(
        library_name="transformers",
        tags=["tensorflow", "tfclm", *([tags] if isinstance(tags, str) else tags)],
        **{"pipeline_tag": "text-generation"} | {names[key]: value for key, value in given.items() if key in names},
    )
    table = f"\n{_table(epochs, None)}\n" if epochs else ""
    return f"---\n{data.to_yaml()}\n---\n\n# {given.get('model_name') or name}\n{table}"


def _metadata(settings: Mapping[str, Any], base: Mapping[str, Any], result: EvalResult | None) -> str:
    from huggingface_hub import ModelCardData

    hub_data = _hub_dataset(settings)
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["tensorflow", "tfclm"],
        datasets=[hub_data] if hub_data else None,
        model_name=_name(settings) if result else None,
        eval_results=[result] if result else None,
        **{key: value for key, value in base.items() if key != "unread"},
    )
    return f"---\n{data.to_yaml()}\n---\n\n# {_name(settings)}"


def _eval_result(results: Mapping[str, Any], settings: Mapping[str, Any]) -> EvalResult | None:
    """The perplexity as metadata; None if it is not finite."""
    from huggingface_hub import EvalResult

    if not math.isfinite(results["perplexity"] or math.inf):
        return None
    protocol = results["protocol"]
    dataset, validation = _hub_dataset(settings), _validation(protocol)
    return EvalResult(
        task_type="text-generation",
        dataset_type=dataset or "text",
        dataset_name=dataset or _source(protocol),
        dataset_config=settings["dataset_config"],
        dataset_revision=settings["dataset_revision"],
        dataset_split=validation.split(" ")[1] if validation.startswith("split ") else None,
        dataset_args={"validation": validation},
        metric_type="perplexity",
        metric_name="validation perplexity",
        metric_value=round(results["perplexity"], 4),
        metric_args={
            name: protocol[name] for name in ("block_size", "separator", "dropped_tokens", "prefix") if name in protocol
        },
    )


def _name(settings: Mapping[str, Any]) -> str:
    return str(settings["push_to_hub"] or Path(settings["output_dir"]).resolve().name).split("/")[-1]


def _hub_dataset(settings: Mapping[str, Any]) -> str | None:
    """The Hub id of the dataset, if it has one."""
    dataset = settings["dataset"]
    return None if dataset in (None, "python-docs") or Path(dataset).exists() else str(dataset)


def _origin(settings: Mapping[str, Any], base: Mapping[str, Any], protocol: Mapping[str, Any]) -> str:
    scratch = settings["model"] == "scratch"
    training = "A small GPT-2 trained from scratch" if scratch else f"Fine-tuned from {_base(settings, base)}"
    return f"{training} on {_source(protocol)}{_split(protocol)}."


def _base(settings: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    return str(base.get("base_model") or f"the local model {_strip_folders(settings['model'])}")


def _source(protocol: Mapping[str, Any]) -> str:
    """The source of the training text; of files only the names, because the card may be published."""
    source = protocol["source"]
    if isinstance(source, list | tuple):
        return _names(source)
    return "Python's own documentation (python-docs)" if source == "python-docs" else _strip_folders(source)


def _split(protocol: Mapping[str, Any]) -> str:
    """The split as the end of a phrase; empty for files, which have none."""
    return f", split {protocol['split']}" if protocol["split"] is not None else ""


def _validation(protocol: Mapping[str, Any]) -> str:
    kind, _, paths = str(protocol["validation"]).partition(" ")
    return _names(paths.split(", ")) if kind == "files" else str(protocol["validation"])


def _names(paths: Sequence[str]) -> str:
    """A phrase with the names of the first files."""
    names = [Path(path).name for path in paths]
    more = f" and {len(names) - MAX_FILE_NAMES} more" if len(names) > MAX_FILE_NAMES else ""
    return f"{'the file' if len(names) == 1 else f'{len(names)} files:'} {', '.join(names[:MAX_FILE_NAMES])}{more}"


def _strip_folders(value: Any) -> Any:
    """The last part of an absolute path; anything else unchanged."""
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "~")) else value


def _prefix(protocol: Mapping[str, Any]) -> str:
    """The tokens with which each block begins, as a part of a phrase; empty if there are none."""
    prefix = protocol.get("prefix")
    return f"which begin with `{''.join(prefix)}`, " if prefix else ""


def _table(epochs: Sequence[Mapping[str, Any]], before: float | None) -> str:
    rows = ["| epoch | step | training loss | validation loss | validation perplexity |", "|---|---|---|---|---|"]
    if before is not None:
        rows.append(f"| 0 | 0 | | {_number(math.log(before), 4)} | {_number(before)} |")
    for epoch in epochs:
        loss, val_loss = epoch.get("loss"), epoch.get("val_loss")
        perplexity = None if val_loss is None else exp(val_loss)
        cells = (_number(loss, 4), _number(val_loss, 4), _number(perplexity))
        rows.append(f"| {epoch['epoch']} | {epoch['step']} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _number(value: float | None, digits: int = 2) -> str:
    if value is None:
        return ""
    return f"{value:.{digits}f}" if math.isfinite(value) else "not finite"


def _weights(train: Mapping[str, Any]) -> str:
    step, epoch = train["best_step"], train["best_epoch"]
    where = f"those after epoch {epoch} (step {step})" if epoch else f"those after step {step}, within an epoch"
    ended = f"; training ended early: {train['diverged']}" if train["diverged"] else ""
    return (where if step else "the initial ones") + ended


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
    where = hub or _strip_folders(settings["output_dir"])
    served = f"serving_models/{_name(settings)}"
    if hub:
        serve = f"""a version that an unmodified server hosts. If this repository has a \
`saved_model.zip`, that is such a version: serve it by `python -m tfclm.serve --hub {hub}`, or unpack it into the \
server's model directory."""
    else:
        serve = f"""a version that an unmodified server hosts, or `python -m tfclm.serve \
--model_name={_name(settings)} --model_base_path={served}`."""
    if settings["model"] == "scratch":
        license = "It was trained from scratch: its license depends on the texts that it was trained on."
    elif base.get("license"):
        license = f"The license is that of {_base(settings, base)}: {base.get('license_name') or base['license']}."
    else:
        license = (
            f"The card of {_base(settings, base)} names no license, or could not be read: ask its authors before you "
            "use the model."
        )
    return f"""## Intended use

To continue text like that it was trained on. Its output is likely, not necessarily true, and repeats errors and \
biases of its training text. The model is not tuned to follow or to refuse instructions. {license}

## How to load it

```python
from transformers import pipeline

# torch_dtype=None: without PyTorch, transformers 4.54 fails on its own default.
generator = pipeline("text-generation", model="{where}", torch_dtype=None)
print(generator("Once", max_new_tokens=50)[0]["generated_text"])
```

For TensorFlow Serving, `python -m tfclm.export --model {where} --serving-dir {served}` makes {serve}
"""


def _record(settings: Mapping[str, Any], used: Mapping[str, str]) -> str:
    public = {
        name: [_strip_folders(each) for each in value] if isinstance(value, list) else _strip_folders(value)
        for name, value in settings.items()
    }
    return f"""## Settings

```yaml
{to_yaml(public)}```

## Versions

{", ".join(f"{name} {version}" for name, version in used.items())}
"""
