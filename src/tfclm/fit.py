"""`python -m tfclm.fit`: fine-tunes a causal language model; without arguments, the quickstart."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tfclm.cli.arguments import flags, parse
from tfclm.cli.command import command
from tfclm.corpus.settings import BLOCK_SIZE, SourceSettings
from tfclm.destinations import check_export, export, is_unpushed, push, push_callback, reach_hub
from tfclm.errors import InputError
from tfclm.hub.settings import HubSettings
from tfclm.savedmodel.publishing.versions import address, is_remote
from tfclm.settings import record, setting, to_yaml
from tfclm.terminal import log
from tfclm.training.settings import TrainingSettings

SCRATCH = "scratch"
# Settings by which a text is read, and by which it is split into training and validation.
READING = ("text_column", "block_size", "separator")
SPLITTING = (
    *("dataset", "dataset_config", "dataset_revision", "train_split", "validation_split", "train_file"),
    *("validation_file", "validation_fraction", "seed"),
)


@dataclass(frozen=True)
class FitSettings(HubSettings, TrainingSettings, SourceSettings):
    """Settings of `fit`."""

    block_size: int = setting(BLOCK_SIZE, "tokens per block")
    train_split: str = setting("train", "split to train on, also an expression such as train_asks[:5000]")
    validation_split: str | None = setting(None, "split to validate on; the dataset's own if it has one")
    train_file: tuple[str, ...] = setting(
        (), "local files (.txt .jsonl .json .csv .parquet, also .gz) or globs of them"
    )
    validation_file: tuple[str, ...] = setting((), "the same to validate on")
    validation_fraction: float = setting(0.1, "part of the documents to validate on, where nothing else is given")
    model: str = setting(
        SCRATCH, "Hub id or folder; scratch trains a tokenizer on the train split and makes a small GPT-2"
    )
    revision: str | None = setting(None, "branch, tag or commit of the Hub model")
    vocab_size: int = setting(4096, "entries of the tokenizer that scratch trains")
    learning_rate: float | None = setting(  # type: ignore[assignment]
        None, "peak learning rate; if not given, 2e-5 for a checkpoint and 1e-3 for scratch"
    )
    output_dir: str | None = setting(None, "folder of the result; runs/quickstart for the quickstart")
    overwrite: bool = setting(False, "start afresh where a run has been before", recorded=False)
    export_to: str | None = setting(
        None, "servable's folder that the finished model is exported to, serving_models/eli5", recorded=False
    )
    max_perplexity: float | None = setting(
        None, "with --export-to, publish only if the perplexity is at most this", recorded=False
    )
    max_regression: float | None = setting(
        None,
        "with --export-to, publish only if the perplexity is at most this part above the served version's",
        recorded=False,
    )
    push_to_hub: str | None = setting(None, "Hub repository that the model is pushed to, me/eli5")
    push_strategy: Literal["epoch", "steps", "no"] = setting(
        "epoch", "push after every epoch, every --push-steps steps, or at the end alone"
    )
    push_steps: int = setting(500, "optimizer steps between two pushes of --push-strategy steps")
    push_checkpoint: bool = setting(False, "push, after every epoch, the state that --resume-from goes on from")
    push_saved_model: bool = setting(False, "push what --export-to has made as well, zipped", recorded=False)
    push_later: bool = setting(
        False, "train without the Hub if it cannot be reached; python -m tfclm.push delivers later", recorded=False
    )
    resume_from: str | None = setting(
        None, "Hub repository with a state that --push-checkpoint has left; goes on in --output-dir", recorded=False
    )

    def resolved(self) -> FitSettings:
        """With the values that depend on others filled in.

        Raises:
            InputError: settings that contradict each other, or one out of range.
        """
        if self.dataset is None and not self.train_file:
            raise InputError("nothing to train on: give --dataset or --train-file")
        rate = 1e-3 if self.model == SCRATCH else 2e-5
        settings = self if self.learning_rate is not None else dataclasses.replace(self, learning_rate=rate)
        if settings.output_dir is None:
            raise InputError("--output-dir is missing: give the folder that the result goes to, such as runs/eli5")
        if not 0 < self.validation_fraction < 1:
            raise InputError(f"--validation-fraction {self.validation_fraction}: give a number between 0 and 1")
        if self.vocab_size < 257:
            raise InputError(f"--vocab-size {self.vocab_size}: give 257 or more, one entry a byte and the EOS")
        if settings.export_to is None and (settings.max_perplexity, settings.max_regression) != (None, None):
            raise InputError("--max-perplexity and --max-regression decide what is exported: give --export-to as well")
        if settings.push_saved_model and (settings.push_to_hub is None or settings.export_to is None):
            raise InputError("--push-saved-model pushes what --export-to makes: give --export-to and --push-to-hub")
        if settings.push_saved_model and is_remote(address(str(settings.export_to))):
            raise InputError(
                f"--push-saved-model packs a folder, which --export-to {settings.export_to} is not: give one"
            )
        if settings.push_checkpoint and settings.push_strategy != "epoch":
            raise InputError("--push-checkpoint pushes a state after every epoch: give --push-strategy epoch")
        if settings.push_steps < 1:
            raise InputError(f"--push-steps {settings.push_steps}: give 1 or more")
        settings.check_hub()
        settings.check()
        return settings


# What `fit` does without a model or text: from Python's own documentation to a model, minutes on two cores.
QUICKSTART: dict[str, Any] = {
    "dataset": "python-docs",
    "output_dir": "runs/quickstart",
    "epochs": 6,
    "batch_size": 8,
    "learning_rate": 2e-3,
    "schedule": "cosine",
    "warmup_steps": 50,
    "jit_compile": True,
}


def preset(given: Mapping[str, Any]) -> dict[str, Any]:
    """The values that stand in for flags which are not given: the quickstart's, if neither model nor text is.

    A run that goes on from a state of the Hub has the settings that lie beside it.
    """
    if given.get("resume_from") is not None:
        return resumed(given)
    return {} if {"model", "dataset", "train_file"} & given.keys() else QUICKSTART


def resumed(given: Mapping[str, Any]) -> dict[str, Any]:
    """Brings a run's state from the Hub, unless the folder goes on with it already; the run's settings.

    They may be somebody else's. So of their values only those count that a run records, which do not say what is
    overwritten, exported or fetched; and it is pushed to no other repository than the one that it comes from.

    Raises:
        InputError: no folder is given, or one that holds something else, or the Hub has no state there.
    """
    from tfclm.disk import write
    from tfclm.hub import fetch_run

    repo_id, output_dir = str(given["resume_from"]), given.get("output_dir")
    if output_dir is None:
        raise InputError("--resume-from needs --output-dir, the folder that the run goes on in")
    folder = Path(output_dir)
    fetched = not (folder / "fit.yaml").is_file()
    if fetched:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"--output-dir {folder} is there already and holds no run: give another folder")
        fetch_run(repo_id, folder, revision=given.get("branch"))
    settings = parse(FitSettings, ["--config", str(folder / "fit.yaml")], prog="fit", description="")
    target = settings.push_to_hub
    if "push_to_hub" in given:
        settings = dataclasses.replace(settings, push_to_hub=given["push_to_hub"])
    elif target is not None and target not in (repo_id, repo_id.split("/")[-1]):
        log(f"the run of {repo_id} was pushed to {target}, and is not from here; --push-to-hub says where to push")
        settings = dataclasses.replace(settings, push_to_hub=None)
    if fetched:
        write(folder / "fit.yaml", to_yaml(record(settings)))
    return {name: getattr(settings, name) for name in record(settings) if name != "output_dir"}


def run(settings: FitSettings) -> int:
    """Text to blocks to the fine-tuned model's folder."""
    settings = settings.resolved()
    check_export(settings)

    from tfclm import checkpoint, corpus
    from tfclm.runs.card import progress_card, read_base
    from tfclm.runs.folder import RunFolder
    from tfclm.training import finetune
    from tfclm.training.resume import Interrupted

    folder = RunFolder(Path(str(settings.output_dir)), record(settings), settings.overwrite)
    if folder.results is not None:
        note = f"{folder.path} is complete; --overwrite starts afresh"
        code, version = export(settings) if not show(folder.results, settings, note) else (1, None)
        return push(settings, reach_hub(settings), version) or code if is_unpushed(settings) else code
    with folder:
        target = reach_hub(settings)
        strategy = set_up(settings)
        model: Any = None
        tokenizer: Any = None
        if settings.model != SCRATCH:
            with strategy.scope():
                model, tokenizer = checkpoint.load(settings.model, revision=settings.revision)
            corpus.check_block_size(settings.block_size, checkpoint.context_size(model))
        texts = corpus.read(
            dataset=settings.dataset,
            dataset_config=settings.dataset_config,
            revision=settings.dataset_revision,
            split=settings.train_split,
            validation_split=settings.validation_split,
            files=settings.train_file,
            validation_files=settings.validation_file,
            text_column=settings.text_column,
            validation_fraction=settings.validation_fraction,
            seed=settings.seed,
        )
        log(f"{len(texts.train)} documents to train on, {len(texts.validation)} to validate with")
        if tokenizer is None:
            model, tokenizer = from_scratch(settings, texts.train, strategy)
        train = blocks_of("training", texts.train, tokenizer, settings)
        validation = blocks_of("validation", texts.validation, tokenizer, settings)
        corpus.check_vocabulary(max(train.largest_id, validation.largest_id), model.config.vocab_size)
        log(
            f"{len(train.blocks)} blocks of {settings.block_size} tokens to train on, "
            f"{len(validation.blocks)} to validate with"
        )
        protocol = {
            **texts.description,
            "block_size": settings.block_size,
            "separator": settings.separator,
            "dropped_tokens": validation.dropped_tokens,
            "train_dropped_tokens": train.dropped_tokens,
        }
        check_export(settings, protocol, len(validation.blocks) * (settings.block_size - 1))
        corpus_tokens = len(train.blocks) * settings.block_size
        base = read_base(settings.model, settings.revision)
        repo_id = target[0].repo_id if target else None

        def card(epochs: Sequence[Mapping[str, Any]]) -> str:
            named = {**folder.settings, "push_to_hub": repo_id}
            return progress_card(epochs, protocol, {"corpus_tokens": corpus_tokens}, named, base)

        folder.begin()
        pushing = push_callback(settings, target, tokenizer, card)
        try:
            done = finetune(
                model,
                tokenizer,
                train.blocks,
                validation.blocks,
                settings,
                output_dir=folder.path,
                callbacks=pushing,
                strategy=strategy,
            )
        except Interrupted as reason:
            same = "the same command without --overwrite" if settings.overwrite else "the same command"
            log(f"{reason}; {same} goes on from there")
            return 1
        for callback in pushing:
            callback.close()
        files = checkpoint.save(model, tokenizer, folder.path)
        if target is not None:
            from tfclm.hub.delivery import mark

            mark(folder.path, target[0])  # before the run is complete, so that a kill in between leaves it unpushed
        tokens = len(validation.blocks) * (settings.block_size - 1)
        results = folder.finish(done, protocol, tokens, files, corpus_tokens, base, repo_id)
        # The run is complete, whatever becomes of its sample.
        results = folder.record({**results, "sample": closing_sample(settings, validation.blocks[0]["input_ids"])})
        code = show(results, settings)
        version = None
        if not code:
            code, version = export(settings)
        return push(settings, target, version) or code


def blocks_of(name: str, texts: Any, tokenizer: Any, settings: FitSettings) -> Any:
    """The blocks of one split."""
    from tfclm import corpus

    tokens = corpus.tokenize(texts, tokenizer, settings.num_proc)
    try:
        return corpus.pack(tokens, settings.block_size, settings.separator_ids(tokenizer))
    except InputError as error:
        raise InputError(f"{name} split: {error}") from error


def set_up(settings: FitSettings) -> Any:
    """Precision and seed for what is made next, and the strategy to make it under."""
    import tensorflow as tf
    import tf_keras

    tf_keras.mixed_precision.set_global_policy(settings.policy)
    tf_keras.utils.set_random_seed(settings.seed)
    return tf.distribute.MirroredStrategy() if settings.strategy == "mirrored" else tf.distribute.get_strategy()


def from_scratch(settings: FitSettings, train: Any, strategy: Any) -> tuple[Any, Any]:
    """A new model and its tokenizer; the tokenizer sees the train split alone."""
    from tfclm import checkpoint
    from tfclm.checkpoint.scratch import GENERATION, small_config, train_tokenizer

    tokenizer = train_tokenizer(train["text"], settings.vocab_size, settings.block_size)
    with strategy.scope():
        model = checkpoint.create(small_config(tokenizer, settings.block_size))
    model.generation_config.update(**GENERATION)
    log(f"new GPT-2 of {model.num_parameters() / 1e6:.1f} M parameters, tokenizer of {len(tokenizer)} entries")
    return model, tokenizer


def closing_sample(settings: FitSettings, ids: Sequence[int]) -> str | None:
    """A continuation of validation text by the model in the output folder; a failure is said and gives None."""
    import tf_keras

    from tfclm import checkpoint
    from tfclm.checkpoint.generation import sample

    # transformers' top_p does not run in half precision.
    tf_keras.mixed_precision.set_global_policy("float32")
    try:
        model, tokenizer = checkpoint.load(str(settings.output_dir))
        prompt = tokenizer.decode(ids[: min(8, settings.block_size // 2)], skip_special_tokens=True)
        return sample(model, tokenizer, prompt, seed=settings.seed)
    except Exception as error:  # a run that is complete does not fail for its decoration
        log(f"no sample: {type(error).__name__}: {' '.join(str(error).split())[:400]}")
        return None


def show(results: dict[str, Any], settings: FitSettings, note: str | None = None) -> int:
    """Says what a complete run came to; the exit code."""
    folder = shlex.quote(str(settings.output_dir))
    # What `make` has installed is no other shell's `python`.
    own = Path(sys.executable)
    python = shlex.quote(str(own.relative_to(Path.cwd())) if own.is_relative_to(Path.cwd()) else "python")
    before, after = results["initial_perplexity"], results["perplexity"]
    shown = [f"{perplexity:.2f}" if perplexity else "not finite" for perplexity in (before, after)]
    gain = f" ({before / after:.1f} times lower)" if before and after else ""
    # The text is read, and in a training that follows split, as the run did it.
    reading = flags(settings, READING)
    evaluating = shlex.join(["--file", "FILE", *reading])
    further = shlex.join([*flags(settings, SPLITTING), *reading, "--output-dir", f"{settings.output_dir}-2"])
    lines = [
        *([note] if note else []),
        f"validation perplexity {shown[0]} before, {shown[1]} after{gain}, in {settings.output_dir}",
        *([f"sample: {results['sample']!r}"] if results["sample"] is not None else []),
        *still_falling(results["train"]["epochs"], settings),
        "go on with:",
        f'  {python} -m tfclm.generate --model {folder} --prompt "…"',
        f"  {python} -m tfclm.evaluate --model {folder} {evaluating}",
    ]
    # With --export-to the run itself exports the model, if the gate lets it; one without a perplexity is none to serve.
    if settings.export_to is None and after:
        where = f"serving_models/{shlex.quote(own_name(settings))}"
        lines.append(f"  {python} -m tfclm.export --model {folder} --serving-dir {where}")
    lines += ["train it further with:", f"  {python} -m tfclm.fit --model {folder} {further}"]
    if results["train"]["diverged"]:
        lines.insert(
            0,
            f"training stopped: {results['train']['diverged']}; the last good weights are kept. "
            "Try a lower --learning-rate, more --warmup-steps or a smaller --max-grad-norm",
        )
    log("\n".join(lines))
    return 1 if results["train"]["diverged"] else 0


def still_falling(epochs: Sequence[Mapping[str, Any]], settings: FitSettings) -> list[str]:
    """A line if the validation loss fell in the last epoch by so much that the training has probably ended too early.

    Two hundredths are two percent of the perplexity; of an epoch at the end of most schedules, that is much.
    """
    losses = [epoch["val_loss"] for epoch in epochs]
    if len(losses) < 2 or None in losses or not losses[-2] - losses[-1] >= 0.02:
        return []
    length = f"--max-steps ({settings.max_steps} here)" if settings.max_steps else f"--epochs ({settings.epochs} here)"
    return [
        f"the validation loss was still falling at the end ({losses[-2]:.3f} to {losses[-1]:.3f} in the last epoch): "
        f"more {length} or a higher --learning-rate ({settings.learning_rate:g} here) will probably lower the "
        "perplexity"
    ]


def own_name(settings: FitSettings) -> str:
    """The last part of the output folder's name."""
    return Path(str(settings.output_dir)).resolve().name


def main() -> None:
    """The command."""
    command(FitSettings, run, verb="fit", description=__doc__ or "", preset=preset)


if __name__ == "__main__":
    main()
