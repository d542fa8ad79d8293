"""`python -m tfclm.fit`: fine-tunes a causal language model; without arguments, the quickstart."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tfclm.corpus.settings import SourceSettings
from tfclm.errors import InputError
from tfclm.settings import command, record, setting
from tfclm.training.settings import TrainingSettings

if TYPE_CHECKING:
    from tfclm.export import ExportSettings

SCRATCH = "scratch"


@dataclass(frozen=True)
class FitSettings(TrainingSettings, SourceSettings):
    """Settings of `fit`."""

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
    push_to_hub: str | None = setting(None, "Hub repository that the model is pushed to after every epoch, me/eli5")

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


def preset(given: Collection[str]) -> dict[str, Any]:
    """The values that stand in for flags which are not given: the quickstart's, if neither model nor text is."""
    return {} if {"model", "dataset", "train_file"} & set(given) else QUICKSTART


def run(settings: FitSettings) -> int:
    """Text to blocks to the fine-tuned model's folder."""
    settings = settings.resolved()
    check_export(settings)

    from tfclm import checkpoint, corpus, hub
    from tfclm.training import finetune
    from tfclm.training.folder import RunFolder
    from tfclm.training.resume import Interrupted

    folder = RunFolder(Path(str(settings.output_dir)), record(settings), settings.overwrite)
    if folder.results is not None:
        note = f"{folder.path} is complete; --overwrite starts afresh"
        return show(folder.results, settings, note) or export(settings)
    with folder:
        repo_id = hub.preflight(settings.push_to_hub) if settings.push_to_hub else None
        strategy = set_up(settings)
        model: Any = None
        tokenizer: Any = None
        if settings.model != SCRATCH:
            with strategy.scope():
                model, tokenizer = checkpoint.load(settings.model, revision=settings.revision)
            corpus.check_block_size(settings.block_size, getattr(model.config, "max_position_embeddings", None))
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
        say(f"{len(texts.train)} documents to train on, {len(texts.validation)} to validate with")
        if tokenizer is None:
            model, tokenizer = from_scratch(settings, texts.train, strategy)
        train = blocks_of("training", texts.train, tokenizer, settings)
        validation = blocks_of("validation", texts.validation, tokenizer, settings)
        corpus.check_vocabulary(max(train.largest_id, validation.largest_id), model.config.vocab_size)
        say(
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
        check_export(settings, protocol)
        folder.begin()
        push = [hub.push_callback(repo_id, tokenizer, folder.path / "resume" / "hub")] if repo_id else []
        try:
            done = finetune(
                model,
                tokenizer,
                train.blocks,
                validation.blocks,
                settings,
                output_dir=folder.path,
                callbacks=push,
                strategy=strategy,
            )
        except Interrupted as reason:
            same = "the same command without --overwrite" if settings.overwrite else "the same command"
            say(f"{reason}; {same} goes on from there")
            return 1
        files = checkpoint.save(model, tokenizer, folder.path)
        results = folder.finish(done, protocol, len(validation.blocks) * (settings.block_size - 1), files)
        # The run is complete, whatever becomes of its sample.
        results = folder.record({**results, "sample": closing_sample(settings, validation.blocks[0]["input_ids"])})
    code = show(results, settings) or export(settings)
    if push and push[0].repo.commands_failed:
        upload = shlex.join(["hf", "upload", str(repo_id), str(folder.path)])
        say(f"a push to {repo_id} failed, so the Hub may hold older weights: {upload}")
        return 1
    return code


def export(settings: FitSettings) -> int:
    """Publishes the finished model where `--export-to` says, if the gate and the canary let it; the exit code."""
    if settings.export_to is None:
        return 0
    from tfclm.export import run

    return run(export_settings(settings))


def check_export(settings: FitSettings, protocol: Mapping[str, Any] | None = None) -> None:
    """Refuses, before the time of a training, what `--export-to` would refuse behind it.

    Args:
        settings: the run's.
        protocol: how its perplexity is going to be measured, once that is known.

    Raises:
        InputError: a folder that cannot be written, a limit out of its range, or a served version that the run's
            perplexity cannot be compared with.
    """
    if settings.export_to is None:
        return
    from tfclm.export import preflight
    from tfclm.savedmodel.gate import check_comparable, served_record

    try:
        limits = preflight(export_settings(settings))
        check_comparable(limits, served_record(settings.export_to, limits), protocol)
    except InputError as error:
        raise InputError(str(error).replace("--serving-dir", "--export-to")) from error


def export_settings(settings: FitSettings) -> ExportSettings:
    """What `export` is told by a run."""
    from tfclm.export import ExportSettings

    return ExportSettings(
        model=settings.output_dir,
        serving_dir=settings.export_to,
        max_perplexity=settings.max_perplexity,
        max_regression=settings.max_regression,
    )


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
    from tfclm.scratch import small_config, train_tokenizer

    tokenizer = train_tokenizer(train["text"], settings.vocab_size, settings.block_size)
    with strategy.scope():
        model = checkpoint.create(small_config(tokenizer, settings.block_size))
    say(f"new GPT-2 of {model.num_parameters() / 1e6:.1f} M parameters, tokenizer of {len(tokenizer)} entries")
    return model, tokenizer


def closing_sample(settings: FitSettings, ids: Sequence[int]) -> str | None:
    """A continuation of validation text by the model in the output folder; a failure is said and gives None."""
    import tf_keras

    from tfclm import checkpoint
    from tfclm.sampling import sample

    # transformers' top_p does not run in half precision.
    tf_keras.mixed_precision.set_global_policy("float32")
    try:
        model, tokenizer = checkpoint.load(str(settings.output_dir))
        prompt = tokenizer.decode(ids[: min(8, settings.block_size // 2)], skip_special_tokens=True)
        return sample(model, tokenizer, prompt, seed=settings.seed)
    except Exception as error:  # a run that is complete does not fail for its decoration
        say(f"no sample: {type(error).__name__}: {' '.join(str(error).split())[:400]}")
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
    lines = [
        *([note] if note else []),
        f"validation perplexity {shown[0]} before, {shown[1]} after{gain}, in {settings.output_dir}",
        *([f"sample: {results['sample']!r}"] if results["sample"] is not None else []),
        "go on with:",
        f'  {python} -m tfclm.generate --model {folder} --prompt "…"',
        f"  {python} -m tfclm.evaluate --model {folder} --file FILE",
        f"  {python} -m tfclm.export --model {folder} --serving-dir serving_models/{shlex.quote(own_name(settings))}",
    ]
    if results["train"]["diverged"]:
        lines.insert(
            0,
            f"training stopped: {results['train']['diverged']}; the last good weights are kept. "
            "Try a lower --learning-rate, more --warmup-steps or a smaller --max-grad-norm",
        )
    say("\n".join(lines))
    return 1 if results["train"]["diverged"] else 0


def own_name(settings: FitSettings) -> str:
    """The last part of the output folder's name."""
    return Path(str(settings.output_dir)).resolve().name


def say(text: str) -> None:
    """Progress goes to stderr."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """The command."""
    command(FitSettings, run, verb="fit", description=__doc__ or "", preset=preset)


if __name__ == "__main__":
    main()
