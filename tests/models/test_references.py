"""Our decoder compared with PyTorch's classes, whose numbers are in tests/references."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tensorflow as tf
from conftest import LONG
from weights import reference_weight

from tfclm.checkpoint import layout
from tfclm.checkpoint.configs import from_fields
from tfclm.compat import apply_transpose
from tfclm.errors import InputError
from tfclm.models.decoder import Cache, decode_tokens
from tfclm.models.families import OWN_CLASSES, spec_of
from tfclm.models.registration import decoder_class
from tfclm.savedmodel.graph import key_value_cache

FOLDER = Path(__file__).parents[1] / "references"
# Float32 sums in another order differ by about 1e-6 of the largest logit in models this small.
TOLERANCE = 1e-5
# Variants that are refused, by what the message must name.
REFUSED = {
    "stablelm_parallel": "qk_layernorm",
    "mpt_bias": "alibi_bias_max",
    "gpt2_scaled": "scale_attn_by_inverse_layer_idx",
}
CASES = sorted(path.parent.name for path in FOLDER.glob("*/reference.npz"))
# PyTorch chooses these frequencies by the longest text of a batch, or of all that it has seen, and drops or keeps a
# cache of other frequencies; here they depend on the text alone.
LENGTH_DEPENDENT = {"llama_dynamic", "phi3_longrope", "phi3_longrope_partial"}


class Reference(NamedTuple):
    """A model with the weights of a case, and PyTorch's numbers."""

    name: str
    model: Any
    numbers: Any
    pad: int

    def error(self, logits: Any, name: str, mask: Any = None) -> float:
        """The largest difference from PyTorch's logits of this name, relative to the largest of all logits."""
        difference = np.abs(np.asarray(logits) - self.numbers[name])
        if mask is not None:
            difference = difference * mask[..., None]
        return float(difference.max() / np.abs(self.numbers["plain"]).max())


def config_of(name: str) -> Any:
    """The config of a case, read as that of a checkpoint."""
    return from_fields(name, json.loads((FOLDER / name / "config.json").read_text()))


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=pytest.mark.slow) if name.startswith("v5_") else name
        for name in CASES
        if name not in REFUSED
    ],
)
def reference(request: pytest.FixtureRequest) -> Reference:
    """Each case in turn."""
    folder = FOLDER / request.param
    config = config_of(request.param)
    model = decoder_class(config.model_type)(config)
    model.build_in_name_scope()
    shapes = json.loads((folder / "weights.json").read_text())
    variables = {name: (variable, transpose) for variable, name, transpose in layout(model)}
    assert variables.keys() == shapes.keys()
    for name, (variable, transpose) in variables.items():
        variable.assign(apply_transpose(transpose, reference_weight(name, shapes[name])).reshape(variable.shape))
    with np.load(folder / "reference.npz") as file:
        numbers = dict(file)
    return Reference(request.param, model, numbers, config.pad_token_id or 0)


# Those that a class of ours generates for, and whose text in PyTorch does not depend on whether it has a cache.
GENERATED = [
    name
    for name in CASES
    if name not in REFUSED.keys() | LENGTH_DEPENDENT and config_of(name).model_type in OWN_CLASSES
]
# The configs of transformers 5 have fields of other names; if they are misread, the logits show it.
of_each_type = pytest.mark.parametrize(
    "reference",
    [
        pytest.param(name, marks=pytest.mark.long) if name.startswith("v5_") else name
        for name in CASES
        if name not in REFUSED
    ],
    indirect=True,
)


def test_logits(reference: Reference):
    """A norm, scale, window, rope, bias, activation or layout of a weight that is not as in PyTorch."""
    ids = reference.numbers["ids"]
    assert reference.error(reference.model(ids).logits, "plain") < TOLERANCE
    assert reference.error(reference.model(ids[:, :12]).logits, "short") < TOLERANCE


@of_each_type
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding(reference: Reference, side: str):
    """Padding that is attended to, or counted as positions."""
    mask = reference.numbers[side]
    ids = np.where(mask, reference.numbers["ids"], reference.pad)
    counted = np.maximum(mask.cumsum(1) - 1, 0)
    if reference.model.spec.padding_id is None and not reference.model.spec.depends_on_length:
        logits = reference.model(ids, attention_mask=mask, position_ids=counted).logits
        assert reference.error(logits, f"{side}_logits", mask) < TOLERANCE
        return
    # PyTorch's depend on the other rows here, or were asked for other positions.
    positions = None if reference.model.spec.padding_id is not None else counted
    logits = reference.model(ids, attention_mask=mask, position_ids=positions).logits.numpy()
    for row, real in enumerate(mask.astype(bool)):
        alone = reference.model(ids[row : row + 1, real]).logits.numpy()[0]
        assert np.abs(logits[row, real] - alone).max() < TOLERANCE * np.abs(alone).max()


@of_each_type
def test_cache(reference: Reference):
    """A step with the cache, at positions that differ by row, that is not the step without: windows, ropes, slots."""
    spec, ids = reference.model.spec, tf.constant(reference.numbers["ids"], tf.int32)
    weights = reference.model.weights_by_name
    # One row is longer than the windows, which are 8 tokens; the other exceeds them after two steps.
    lengths, steps = np.array([11, 6], np.int32), 12 if LONG else 3
    if spec.depends_on_length:
        # One row on either side of the length that changes the rotation, or both in the context.
        lengths, steps = np.array([17 if spec.threshold else 8, 4], np.int32), 7 if LONG else 3
    # Earlier logits do not depend on later tokens, unless the rotation depends on the length.
    own = reference.model(ids).logits.numpy().copy()
    if spec.depends_on_length:
        for row, length in enumerate(lengths):
            for end in range(length + 1, length + steps + 1):
                own[row, end - 1] = reference.model(ids[row : row + 1, :end]).logits.numpy()[0, -1]
    out = decode_tokens(spec, weights, ids[:, : lengths[0]], lengths=tf.constant(lengths))
    pairs = [key_value_cache.fitted(pair, tf.shape(pair[0])[2], tf.constant(24)) for pair in out.pairs]
    for step in range(steps):
        positions = tf.constant(lengths + step)
        append = key_value_cache.Writer(pairs[0][0], positions[:, None]).write
        cache = Cache(pairs, positions[:, None], tf.range(24)[None], append)
        tokens = tf.gather(ids, positions, batch_dims=1)[:, None]
        out = decode_tokens(spec, weights, tokens, positions=positions[:, None], cache=cache)
        pairs = out.pairs
        logits = reference.model.head(out.hidden)[:, 0].numpy()
        expected = own[[0, 1], lengths + step]
        assert np.abs(logits - expected).max() < TOLERANCE * np.abs(own).max(), step


@of_each_type
def test_loss_and_gradients(reference: Reference):
    """A gradient that does not flow, flows twice, or is that of another function."""
    ids = tf.constant(reference.numbers["ids"])
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(reference.model(ids, labels=ids, training=True).loss)
    gradients = [
        tf.convert_to_tensor(g) for g in tape.gradient(loss, reference.model.trainable_variables) if g is not None
    ]
    assert float(loss) == pytest.approx(float(reference.numbers["loss"]), rel=TOLERANCE)
    assert float(tf.linalg.global_norm(gradients)) == pytest.approx(
        float(reference.numbers["grad_norm"]), rel=TOLERANCE
    )


@pytest.mark.long
@pytest.mark.parametrize("reference", GENERATED, indirect=True)
def test_greedy(reference: Reference):
    """`generate` of transformers with a cache that our classes do not understand as theirs do."""
    ids = tf.constant(reference.numbers["ids"][:, :6], tf.int32)
    reference.model.generation_config.eos_token_id = None
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    tokens = reference.model.generate(ids, attention_mask=tf.ones_like(ids), **options).numpy()
    assert tokens.tolist() == reference.numbers["greedy"].tolist()


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str):
    """A variant that is computed as if its setting were the default."""
    with pytest.raises(InputError, match=REFUSED[name]):
        config_of(name)


def test_a_changed_field_is_read_or_refused():
    """A field of a config that no decoder reads, so that it is silently ignored."""
    config = config_of("llama")
    config.pretraining_tp = 2  # changes no logits
    spec_of(config)
    config.rope_scaling = {"rope_type": "spiral", "factor": 2.0}
    with pytest.raises(InputError, match="'spiral'"):
        spec_of(config)
    config = config_of("mistral")
    config.is_encoder_decoder = True
    with pytest.raises(InputError, match="is_encoder_decoder"):
        spec_of(config)
