"""Fine-tuning in this process: the step, what it reports, and how a run ends."""

from __future__ import annotations

import math

import datasets
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from conftest import ARCHITECTURES

from tfclm.corpus import pack
from tfclm.errors import InputError
from tfclm.metrics.perplexity import perplexity
from tfclm.training import TrainingSettings, finetune
from tfclm.training.step import finetuning_step

NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
FAST = {"learning_rate": 1e-2, "deterministic": False, "batch_size": 8}


def blocks(count: int, seed: int = 0, length: int = 16) -> datasets.Dataset:
    """Blocks with something to learn: each token follows from the one before."""
    first = np.random.default_rng(seed).integers(2, 60, (count, 1))
    return datasets.Dataset.from_dict({"input_ids": ((first + np.arange(length) * 3) % 60 + 2).astype(np.int32)})


def weights(model) -> list[np.ndarray]:
    """The values of the trainable variables."""
    return [variable.numpy() for variable in model.trainable_variables]


def batch(rows: int, seed: int = 0):
    """Features and labels [rows, 16]."""
    ids = np.random.default_rng(seed).integers(2, 500, (rows, 16))
    labels = ids.copy()
    labels[1, 3:] = -100  # rows that do not weigh the same
    return {"input_ids": tf.constant(ids), "attention_mask": tf.ones_like(ids)}, tf.constant(labels)


def one_step(model, rows: int, pass_rows: int | None, **options):
    """What one step of plain SGD reports and leaves."""
    with finetuning_step(model, pass_rows, max_grad_norm=1.0):
        model.compile(optimizer=tf_keras.optimizers.legacy.SGD(1.0), **options)
        logs = model.train_on_batch(*batch(rows), return_dict=True)
    return logs, weights(model)


@pytest.mark.parametrize(
    ("rows", "pass_rows"), [*(pytest.param(8, size, marks=pytest.mark.long) for size in (2, 8)), (7, 2), (3, 4)]
)
@pytest.mark.parametrize("jit_compile", [False, pytest.param(True, marks=pytest.mark.long)])
def test_accumulated_passes_equal_one_batch(make_model, rows: int, pass_rows: int, jit_compile: bool):
    """Gradients averaged over passes: one with few labels, or a short last one, would weigh as much as a full one."""
    logs, expected = one_step(make_model(**NO_DROPOUT), rows, None)
    accumulated_logs, accumulated = one_step(make_model(**NO_DROPOUT), rows, pass_rows, jit_compile=jit_compile)
    for name in ("loss", "grad_norm"):
        assert accumulated_logs[name] == pytest.approx(logs[name], rel=1e-5)
    for one, other in zip(expected, accumulated, strict=True):
        np.testing.assert_allclose(other, one, atol=2e-6)


def test_gradient_is_clipped_to_the_global_norm(make_model):
    """Clipping each weight by itself, or a norm reported after clipping."""
    model = make_model(**NO_DROPOUT)
    before = weights(model)
    with finetuning_step(model, None, max_grad_norm=0.125):
        model.compile(optimizer=tf_keras.optimizers.legacy.SGD(1.0))
        logs = model.train_on_batch(*batch(8), return_dict=True)
    change = math.sqrt(sum(float(((a - b) ** 2).sum()) for a, b in zip(before, weights(model), strict=True)))
    assert logs["grad_norm"] > 0.125
    assert change == pytest.approx(0.125, rel=1e-3)


def test_model_is_itself_again(make_model):
    """A model that keeps our steps, or a metric among its weights, saves under another class or with more variables."""
    model = make_model()
    kind, names = type(model), [variable.name for variable in model.weights]
    with finetuning_step(model, None, 1.0):
        assert type(model).__name__ == kind.__name__
        model.compile(optimizer="sgd")
        model.train_on_batch(*batch(4))
        assert [variable.name for variable in model.weights] == names
    assert type(model) is kind
    assert not hasattr(model, "step_state")


@pytest.mark.parametrize(
    "architecture", ["gpt2", *(pytest.param(name, marks=pytest.mark.long) for name in ARCHITECTURES if name != "gpt2")]
)
@pytest.mark.parametrize("batch_size", [pytest.param(4, marks=pytest.mark.long), 5])
def test_val_loss_is_the_perplexity(make_model, tokenizer, architecture: str, batch_size: int):
    """Keras' val_loss is a mean of batch means; 11 blocks leave a short last batch. And the best weights are kept."""
    model = make_model(architecture)
    settings = TrainingSettings(epochs=3, **FAST | {"batch_size": batch_size})
    validation = blocks(11, seed=1)
    initial = perplexity(model, np.array(validation["input_ids"]))
    done = finetune(model, tokenizer, blocks(64), validation, settings)
    assert done.initial_loss == pytest.approx(initial.loss, rel=1e-6)
    # Float64 sums of float32 losses; exp(loss) to 1e-5 is loss to 1e-5.
    final = perplexity(model, np.array(validation["input_ids"]))
    assert math.exp(done.best_loss) == pytest.approx(final.perplexity, rel=1e-5)
    assert final.loss < initial.loss - 0.5
    assert [epoch["epoch"] for epoch in done.epochs] == [1, 2, 3]
    assert done.best_loss == min(epoch["val_loss"] for epoch in done.epochs)
    assert done.steps == 3 * (64 // batch_size)


def test_loss_with_a_prefix_is_that_of_the_labels(make_model, tokenizer):
    """A BOS inside of a block that is trained on, validated or counted; both losses are those of the blocks."""
    tokens = datasets.Dataset.from_dict({"input_ids": [list(range(n, n + 12)) for n in range(3, 80)]})
    model, packed = make_model(**NO_DROPOUT), pack(tokens, 16, [0], [2])
    settings = TrainingSettings(epochs=1, **FAST | {"learning_rate": 1e-12, "batch_size": len(packed.blocks)})
    done = finetune(model, tokenizer, packed.blocks, packed.blocks, settings)
    score = perplexity(model, packed.blocks)
    assert done.tokens == score.tokens == packed.predicted_tokens < 15 * len(packed.blocks)
    assert done.initial_loss == pytest.approx(score.loss, rel=1e-6)
    assert done.epochs[0]["loss"] == pytest.approx(score.loss, rel=1e-6)


def test_training_loss_is_token_weighted(make_model, tokenizer):
    """The mean of batch losses; with a learning rate of next to nothing the epoch's loss is that of the blocks."""
    model = make_model(**NO_DROPOUT)
    train = blocks(24)
    settings = TrainingSettings(epochs=1, **FAST | {"learning_rate": 1e-12})
    done = finetune(model, tokenizer, train, blocks(4, 1), settings)
    assert done.epochs[0]["loss"] == pytest.approx(perplexity(model, np.array(train["input_ids"])).loss, rel=1e-6)


def test_max_steps_ends_inside_an_epoch(make_model, tokenizer):
    """A limit that is rounded to whole epochs, or a last epoch that is not validated."""
    done = finetune(make_model(), tokenizer, blocks(64), blocks(8, 1), TrainingSettings(max_steps=11, **FAST))
    assert [epoch["step"] for epoch in done.epochs] == [8, 11]
    assert done.steps == 11
    assert done.tokens == 11 * 8 * 15


def test_early_stopping(make_model, tokenizer):
    """Patience that counts from the last epoch, not from the best; 9 is a rate at which nothing is learnt."""
    settings = TrainingSettings(epochs=10, early_stopping_patience=2, **FAST | {"learning_rate": 9.0})
    done = finetune(make_model(), tokenizer, blocks(16), blocks(8, 1), settings)
    assert (done.best_epoch, len(done.epochs)) == (0, 2)


def test_fewer_blocks_than_a_batch(make_model, tokenizer):
    """An epoch of no steps."""
    done = finetune(make_model(), tokenizer, blocks(3), blocks(2, 1), TrainingSettings(epochs=2, **FAST))
    assert done.steps == 2


class Poison(tf_keras.callbacks.Callback):
    """Makes one weight NaN after a step, as an overflow would."""

    def __init__(self, step: int):
        self.step = step
        self.seen = 0

    def on_train_batch_end(self, batch, logs=None):
        self.seen += 1
        if self.seen == self.step:
            variable = self.model.trainable_variables[0]
            variable.assign(variable * float("nan"))


@pytest.mark.parametrize(
    ("step", "save_steps", "best_step", "best_epoch", "said"),
    [
        pytest.param(1, 2, 0, 0, "step 2", marks=pytest.mark.slow),
        pytest.param(3, 2, 2, None, "step 4", marks=pytest.mark.long),
        (8, 3, 6, None, "validation loss is not finite after step 8"),
        (9, 100, 8, 1, "step 10"),
        pytest.param(11, 2, 10, None, "step 12", marks=pytest.mark.long),
    ],
)
def test_nan_stops_with_the_last_good_weights(
    make_model, tokenizer, step: int, save_steps: int, best_step: int, best_epoch: int | None, said: str
):
    """A run that continues with NaN and saves it, or weights from inside an epoch that are said to be from its end."""
    model = make_model()
    settings = TrainingSettings(epochs=3, save_steps=save_steps, **FAST)
    validation = blocks(8, 1)
    done = finetune(model, tokenizer, blocks(64), validation, settings, callbacks=[Poison(step)])
    assert done.diverged is not None
    assert said in done.diverged
    assert (done.best_step, done.best_epoch) == (best_step, best_epoch)
    assert done.best_loss < done.initial_loss or best_step == 0
    assert perplexity(model, np.array(validation["input_ids"])).loss == pytest.approx(done.best_loss, rel=1e-6)


def test_changed_text_does_not_resume(make_model, tokenizer, tmp_path):
    """Weights of one text's run that go on silently with another text."""
    settings = TrainingSettings(epochs=1, **FAST)
    finetune(make_model(), tokenizer, blocks(64), blocks(8, 1), settings, output_dir=tmp_path)
    with pytest.raises(InputError, match="have changed"):
        finetune(make_model(), tokenizer, blocks(64, seed=5), blocks(8, 1), settings, output_dir=tmp_path)


def test_no_block_is_refused(make_model, tokenizer):
    """A division by zero."""
    with pytest.raises(InputError, match="more text"):
        finetune(make_model(), tokenizer, blocks(8), blocks(8).select([]), TrainingSettings())


def test_texts_in_place_of_blocks_are_refused(make_model, tokenizer):
    """KeyError: 'input_ids', where texts were given that are still to be tokenized and packed."""
    model, texts = make_model(), datasets.Dataset.from_dict({"text": ["one", "two"]})
    for wrong, found in ((texts, r"columns text"), (["one", "two"], "list"), ("one", "str")):
        for arguments in ((wrong, blocks(8)), (blocks(8), wrong)):
            name = "train" if arguments[0] is wrong else "validation"
            with pytest.raises(InputError, match=rf"^`{name}` has no token ids \({found}\).*tfclm.pack"):
                finetune(model, tokenizer, *arguments)
        with pytest.raises(InputError, match=rf"^`tokens` has no token ids \({found}\)"):
            pack(wrong, 8)
    with pytest.raises(InputError, match=r"^`input_ids` has no token ids \(columns text\)"):
        perplexity(model, texts)
    for wrong in (["one", "two"], "one", [0.5, 1.5]):
        with pytest.raises(ValueError, match="that the model's tokenizer makes"):
            perplexity(model, wrong, window=8)


@pytest.mark.parametrize(
    ("policy", "settings", "words"),
    [
        ("float32", {"mixed_precision": "bfloat16"}, r"computes in float32.*set_global_policy\('mixed_bfloat16'\)"),
        ("mixed_bfloat16", {"mixed_precision": "float16"}, "computes in mixed_bfloat16.*'mixed_float16'"),
        ("mixed_bfloat16", {}, "computes in mixed_bfloat16.*'float32'"),
        ("float32", {"strategy": "mirrored"}, "MirroredStrategy"),
    ],
)
def test_settings_that_the_model_was_not_made_under(make_model, tokenizer, policy: str, settings: dict, words: str):
    """A precision or a strategy that is asked for, recorded, and without any effect."""
    tf_keras.mixed_precision.set_global_policy(policy)
    try:
        model = make_model()
    finally:
        tf_keras.mixed_precision.set_global_policy("float32")
    with pytest.raises(InputError, match=words):
        finetune(model, tokenizer, blocks(8), blocks(8), TrainingSettings(**settings))


@pytest.mark.parametrize(("count", "said"), [(31, True), pytest.param(97, False, marks=pytest.mark.slow)])
def test_blocks_left_out_are_reported(make_model, tokenizer, capfd: pytest.CaptureFixture[str], count: int, said: bool):
    """Half of the text that is not trained on in an epoch, without a word; 1 of 97 is no news."""
    settings = TrainingSettings(max_steps=1, gradient_accumulation_steps=2, **FAST)
    finetune(make_model(), tokenizer, blocks(count), blocks(8, 1), settings)
    err = capfd.readouterr().err
    assert ("leaves out" in err) == said
    assert (f"leaves out 15 of {count} blocks, because a step takes 16 (`batch_size` 8 x" in err) == said


@pytest.mark.parametrize(
    ("architecture", "precision", "jit_compile"),
    [
        ("gpt2", "float16", False),
        ("mistral", "bfloat16", False),
        pytest.param("mistral", "float16", True, marks=pytest.mark.slow),
        pytest.param("mistral", "float16", False, marks=pytest.mark.long),
        pytest.param("mistral", "bfloat16", True, marks=pytest.mark.long),
        pytest.param("gpt2", "bfloat16", False, marks=pytest.mark.long),
        pytest.param("opt", "float16", False, marks=pytest.mark.long),
        pytest.param("opt", "bfloat16", False, marks=pytest.mark.long),
    ],
)
def test_mixed_precision_learns_with_a_float32_loss(
    make_model, tokenizer, architecture: str, precision: str, jit_compile: bool
):
    """A loss reported in bfloat16 (steps of 1/32 here), variables that are not float32, or a type that cannot run."""
    tf_keras.mixed_precision.set_global_policy(f"mixed_{precision}")
    try:
        model = make_model(architecture)
        options = {"mixed_precision": precision, "jit_compile": jit_compile}
        settings = TrainingSettings(epochs=2, gradient_accumulation_steps=2, **options, **FAST)
        done = finetune(model, tokenizer, blocks(64), blocks(9, 1), settings)
    finally:
        tf_keras.mixed_precision.set_global_policy("float32")
    assert all(variable.dtype == tf.float32 for variable in model.trainable_variables)
    losses = [done.initial_loss, *(epoch["val_loss"] for epoch in done.epochs)]
    assert losses[-1] < losses[0] - 0.3
    assert any(loss * 32 % 1 for loss in losses)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "config"), [("gpt2", NO_DROPOUT), pytest.param("mistral", {}, marks=pytest.mark.long)]
)
def test_jit_compile_trains_the_same(make_model, tokenizer, architecture: str, config: dict):
    """A step that XLA compiles to something else; its sums are in another order, hence the tolerance."""
    settings = {"epochs": 2, **FAST, "learning_rate": 1e-3}
    plain, compiled = make_model(architecture, **config), make_model(architecture, **config)
    one = finetune(plain, tokenizer, blocks(64), blocks(9, 1), TrainingSettings(**settings))
    other = finetune(compiled, tokenizer, blocks(64), blocks(9, 1), TrainingSettings(jit_compile=True, **settings))
    assert other.best_loss == pytest.approx(one.best_loss, rel=1e-4)
