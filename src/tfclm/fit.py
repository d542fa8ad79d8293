"""`python -m tfclm.fit`: fine-tunes a causal language model; without arguments, the quickstart."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tfclm.cli.arguments import parse
from tfclm.cli.command import command, sigterm_interrupts
from tfclm.cli.evaluation import prefix_entry
from tfclm.cli.hub_target import Card, HubTarget
from tfclm.cli.release import Release
from tfclm.cli.run_data import SCRATCH, DataSettings, load_model_and_blocks, settings_of_blocks
from tfclm.cli.run_release import RunRelease, fields_of_fit
from tfclm.cli.summary import closing_sample, summarize
from tfclm.errors import InputError
from tfclm.hub.settings import HubSettings
from tfclm.savedmodel.publishing.versions import address, is_remote
from tfclm.savedmodel.settings import ServableSettings
from tfclm.settings import record, setting, to_yaml
from tfclm.terminal import log, print_result
from tfclm.training.settings import TrainingSettings

if TYPE_CHECKING:
    import tensorflow as tf
    from transformers import PreTrainedTokenizerBase

    from tfclm.runs.folder import RunFolder
    from tfclm.training.workers import Workers


@dataclass(frozen=True)
class FitSettings(HubSettings, TrainingSettings, DataSettings):
    """Settings of `fit`."""

    # None, which `TrainingSettings` does not have, until `resolved` knows what is trained.
    learning_rate: float | None = setting(  # type: ignore[assignment]
        None, "peak learning rate; if not given, 2e-5 for a checkpoint and 1e-3 for scratch"
    )
    output_dir: str | None = setting(None, "directory of the result; runs/quickstart for the quickstart")
    overwrite: bool = setting(False, "start over, replacing the run in `output_dir`", recorded=False)
    export_to: str | None = setting(
        None,
        "model directory that the finished model is exported to, such as serving_models/eli5",
        recorded=False,
        metavar="DIR",
    )
    max_perplexity: float | None = setting(
        None, "with `export_to`, publish only if the perplexity is at most this", recorded=False
    )
    max_regression: float | None = setting(
        None,
        "with `export_to`, publish only if the perplexity is at most this fraction above the served version's",
        recorded=False,
    )
    communication: Literal["auto", "ring", "nccl"] = setting(
        "auto", "how workers exchange gradients, with `strategy` multi_worker"
    )
    startup_timeout: float = setting(600.0, "seconds to wait for all workers to start, with `strategy` multi_worker")
    push_to_hub: str | None = setting(
        None, "Hub repository that the model is pushed to, such as me/eli5", metavar="REPO"
    )
    push_strategy: Literal["epoch", "steps", "no"] = setting(
        "epoch", "push after every epoch, every `push_steps` steps, or only at the end"
    )
    push_steps: int = setting(500, "optimizer steps between two pushes, with `push_strategy` steps")
    push_checkpoint: bool = setting(False, "after every epoch, also push the state that `resume_from` needs")
    push_saved_model: bool = setting(False, "also push the model that `export_to` exported, zipped", recorded=False)
    push_later: bool = setting(
        False, "train even if the Hub cannot be reached; push later with python -m tfclm.push", recorded=False
    )
    resume_from: str | None = setting(
        None,
        "Hub repository with a state from `push_checkpoint`; the run resumes in `output_dir`",
        recorded=False,
        metavar="REPO",
    )

    def resolved(self) -> FitSettings:
        """With the values that depend on others filled in.

        Raises:
            InputError: settings that contradict each other, or one out of range.
        """
        self.check_data()
        rate = 1e-3 if self.model == SCRATCH else 2e-5
        settings = self if self.learning_rate is not None else dataclasses.replace(self, learning_rate=rate)
        if settings.output_dir is None:
            raise InputError("`output_dir` is missing: give the directory for the result, such as runs/eli5")
        if settings.export_to is None and (settings.max_perplexity, settings.max_regression) != (None, None):
            raise InputError("`max_perplexity` and `max_regression` are limits for an export: give `export_to` too")
        if settings.push_saved_model and (settings.push_to_hub is None or settings.export_to is None):
            raise InputError("`push_saved_model` pushes what `export_to` exports: give `export_to` and `push_to_hub`")
        if settings.push_saved_model and is_remote(address(str(settings.export_to))):
            raise InputError(
                f"`push_saved_model` needs a local directory, which `export_to` {settings.export_to} is not: give one"
            )
        if settings.push_checkpoint and settings.push_strategy != "epoch":
            raise InputError("`push_checkpoint` pushes a state after every epoch: give `push_strategy` epoch")
        if settings.startup_timeout <= 0:
            raise InputError(f"`startup_timeout` {settings.startup_timeout}: give a number above 0")
        if settings.push_steps < 1:
            raise InputError(f"`push_steps` {settings.push_steps}: give 1 or more")
        settings.check_hub()
        settings.check()
        return settings


# What `fit` does without a model or text: trains on Python's own documentation, for minutes on two cores.
QUICKSTART: dict[str, Any] = {
    "dataset": "python-docs",
    "output_dir": "runs/quickstart",
    "epochs": 4,
    "batch_size": 8,
    "learning_rate": 2e-3,
    "schedule": "cosine",
    "warmup_steps": 50,
    "jit_compile": True,
}


def preset(given: Mapping[str, Any]) -> dict[str, Any]:
    """Values for the flags that are not given: the quickstart's, if neither a model nor a text is given.

    A run that resumes from the Hub takes the settings that were pushed with it, and prepared blocks say how they were
    made.
    """
    if given.get("resume_from") is not None:
        return resumed(given)
    if given.get("blocks") is not None:
        return settings_of_blocks(given["blocks"])
    return {} if {"model", "dataset", "train_file"} & given.keys() else QUICKSTART


def resumed(given: Mapping[str, Any]) -> dict[str, Any]:
    """Fetches a run's state from the Hub, unless the directory holds it already; returns the run's settings.

    Somebody else may have pushed the settings. So only those that a run records are used, which cannot overwrite,
    export or fetch anything; and the run is pushed only to the repository that it comes from.

    Raises:
        InputError: no directory is given, or one that holds something else, or the Hub has no state there.
    """
    from tfclm.disk import write
    from tfclm.hub import fetch_run

    repo_id, output_dir = str(given["resume_from"]), given.get("output_dir")
    if output_dir is None:
        raise InputError("`resume_from` needs `output_dir`, the directory in which the run resumes")
    folder = Path(output_dir)
    fetched = not (folder / "fit.yaml").is_file()
    if fetched:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"`output_dir` {folder} exists and holds no run: give another directory")
        fetch_run(repo_id, folder, revision=given.get("branch"))
    settings = parse(FitSettings, ["--config", str(folder / "fit.yaml")], prog="fit", description="")
    target = settings.push_to_hub
    if "push_to_hub" in given:
        settings = dataclasses.replace(settings, push_to_hub=given["push_to_hub"])
    elif target is not None and target not in (repo_id, repo_id.split("/")[-1]):
        log(f"the run of {repo_id} was pushed to {target}; this one is not, unless --push-to-hub says where")
        settings = dataclasses.replace(settings, push_to_hub=None)
    if fetched:
        write(folder / "fit.yaml", to_yaml(record(settings)))
    return {name: getattr(settings, name) for name in record(settings) if name != "output_dir"}


def run(settings: FitSettings) -> int:
    """Reads and packs the text, trains, exports and pushes; returns the exit code."""
    settings = settings.resolved()
    if settings.strategy != "multi_worker":
        return lead(settings)
    from tfclm.training.workers import Workers, WorkersLost

    try:
        workers = Workers(set_up(settings))
        with workers.explain_loss():
            code = lead(settings, workers) if workers.is_chief else follow(settings, workers)
            # All end together, with the chief's code, when it has exported and pushed.
            return int(workers.gather([code])[0, 0])
    except (WorkersLost, KeyboardInterrupt) as error:
        what = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error)
        log(f"tfclm.fit: {what}; start all workers again to resume the run")
        # At once: TensorFlow's own shutdown would wait for the other workers, or talk to the one that is lost.
        os._exit(1)


def lead(settings: FitSettings, workers: Workers | None = None) -> int:
    """The whole run, as the only worker or as the chief of several."""
    release = open_release(settings)
    if release is not None:
        release.check()

    from tfclm.runs.folder import RunFolder

    folder = RunFolder(Path(str(settings.output_dir)), record(settings), settings.overwrite)
    if folder.results is not None:
        if workers is not None:
            begin_together(workers, folder.path, complete=True)
        log(f"{folder.path} is complete; --overwrite starts over")
        hub = open_hub(settings) if is_unpushed(settings) else None
        return deliver(folder.results, settings, release, hub)
    with folder:
        if workers is not None:
            begin_together(workers, folder.path)
        hub = open_hub(settings)
        strategy = workers.strategy if workers is not None else set_up(settings)
        results = fine_tune(settings, folder, release, hub, strategy)
        return 1 if results is None else deliver(results, settings, release, hub)


def begin_together(workers: Workers, output_dir: Path, *, complete: bool = False) -> bool:
    """Tells all workers whether the run is complete, and checks that they share its directory if it is not."""
    if workers.gather([float(complete)])[0, 0]:
        return False
    workers.check_shared(output_dir)
    return True


def follow(settings: FitSettings, workers: Workers) -> int:
    """What every worker but the chief does: it trains, while the chief also writes, exports and pushes."""
    from tfclm.training import finetune
    from tfclm.training.resume import Interrupted

    output_dir = Path(str(settings.output_dir))
    if not begin_together(workers, output_dir):
        return 0
    model, tokenizer, data = load_model_and_blocks(settings, workers.strategy, settings.seed)
    blocks = data.train.blocks, data.validation.blocks
    try:
        finetune(model, tokenizer, *blocks, settings, output_dir=output_dir, strategy=workers.strategy)
    except Interrupted as error:
        log(str(error))
        return 1
    return 0


def fine_tune(
    settings: FitSettings,
    folder: RunFolder,
    release: RunRelease | None,
    hub: HubTarget | None,
    strategy: tf.distribute.Strategy,
) -> dict[str, Any] | None:
    """Trains, and completes the run's directory; None if the training was interrupted."""
    from tfclm import checkpoint, corpus
    from tfclm.runs.card import progress_card, read_base
    from tfclm.training import finetune
    from tfclm.training.resume import Interrupted

    model, tokenizer, data = load_model_and_blocks(settings, strategy, settings.seed)
    train, validation = data.train, data.validation
    protocol = {
        **data.description,
        "block_size": settings.block_size,
        "separator": settings.separator,
        "dropped_tokens": validation.dropped_tokens,
        "train_dropped_tokens": train.dropped_tokens,
        **prefix_entry(tokenizer, validation.prefix),
    }
    if release is not None:
        release.check(protocol, validation.predicted_tokens)
    corpus_tokens = len(train.blocks) * train.block_size
    base = read_base(settings.model, settings.revision)
    repo_id = hub.repository.repo_id if hub else None

    def card(epochs: Sequence[Mapping[str, Any]]) -> str:
        named = {**folder.settings, "push_to_hub": repo_id}
        return progress_card(epochs, protocol, {"corpus_tokens": corpus_tokens}, named, base)

    folder.begin()
    callbacks = push_callbacks(settings, hub, tokenizer, card)
    try:
        done = finetune(
            model,
            tokenizer,
            train.blocks,
            validation.blocks,
            settings,
            output_dir=folder.path,
            callbacks=callbacks,
            strategy=strategy,
        )
    except Interrupted as error:
        same = "the same command without --overwrite" if settings.overwrite else "the same command"
        log(f"{error}; {same} resumes the run")
        return None
    for callback in callbacks:
        callback.close()
    files = checkpoint.save(model, tokenizer, folder.path)
    if hub is not None:
        hub.mark(folder.path)  # before the run is complete, so that one killed in between is still pushed later
    # Prepared blocks do not tell the bytes of their text.
    texts = data.validation_texts
    size = None if texts is None else corpus.block_bytes(texts, tokenizer, validation)
    results = folder.finish(done, protocol, validation.predicted_tokens, size, files, corpus_tokens, base, repo_id)
    # The run is complete, even if it cannot give a sample.
    sample = closing_sample(folder.path, validation.blocks[0]["input_ids"][len(validation.prefix) :], settings.seed)
    return folder.record({**results, "sample": sample})


def deliver(
    results: Mapping[str, Any], settings: FitSettings, release: RunRelease | None, hub: HubTarget | None
) -> int:
    """Prints the results of a complete run, exports and pushes its model if requested; returns the exit code."""
    from tfclm.savedmodel.publishing.canary import CanaryFailed
    from tfclm.savedmodel.publishing.gate import GateFailed

    output_dir = str(settings.output_dir)
    log(summarize(results, settings, output_dir, exports=release is not None))
    code, version = 1 if results["train"]["diverged"] else 0, None
    if release is not None and not code:
        try:
            version = release.publish(output_dir).version
            print_result(f"{str(settings.export_to).rstrip('/')}/{version}")
        except (GateFailed, CanaryFailed) as error:
            log(f"tfclm.fit: {error}")
            code = 1
    if hub is not None:
        pushes = version is not None and settings.push_saved_model
        zipped = Path(address(str(settings.export_to))) / str(version) if pushes else None
        code = code if hub.push(Path(output_dir), zipped.resolve() if zipped else None) else 1
    return code


def open_release(settings: FitSettings) -> RunRelease | None:
    """Where the finished model is exported to; None if it is not."""
    if settings.export_to is None:
        return None
    from tfclm.savedmodel.publishing.gate import Gate

    limits = Gate(settings.max_perplexity, settings.max_regression)
    with fields_of_fit():
        release = Release.open(settings.export_to, ServableSettings(), limits)
    return RunRelease(release, settings, settings.validation_split, settings.validation_file)


def open_hub(settings: FitSettings) -> HubTarget | None:
    """The Hub repository that the run is pushed to; None if it is not."""
    if settings.push_to_hub is None:
        return None
    return HubTarget.open(settings.push_to_hub, settings, push_later=settings.push_later)


def is_unpushed(settings: FitSettings) -> bool:
    """Whether a complete run still has to be pushed."""
    from tfclm.hub.delivery import marked

    return settings.push_to_hub is not None and marked(Path(str(settings.output_dir))) is not None


def push_callbacks(
    settings: FitSettings, hub: HubTarget | None, tokenizer: PreTrainedTokenizerBase, card: Card
) -> list[Any]:
    """The callback that pushes during the training, if the run is pushed and the Hub can be reached."""
    if hub is None:
        return []
    return hub.callbacks(
        Path(str(settings.output_dir)),
        tokenizer,
        card,
        strategy=settings.push_strategy,
        steps=settings.push_steps,
        checkpoint=settings.push_checkpoint,
    )


def set_up(settings: FitSettings) -> tf.distribute.Strategy:
    """Sets precision and seed, and returns the strategy to create the model under."""
    import tf_keras

    from tfclm.training.workers import make_strategy

    strategy = make_strategy(settings.strategy, settings.communication, settings.startup_timeout)
    tf_keras.mixed_precision.set_global_policy(settings.policy)
    tf_keras.utils.set_random_seed(settings.seed)
    return strategy


def main() -> None:
    """The command."""
    with sigterm_interrupts():
        command(FitSettings, run, verb="fit", description=__doc__ or "", preset=preset)


if __name__ == "__main__":
    main()
