"""The models that the server's tests ask; `python tests/server/serving_models.py DIR` writes them elsewhere."""

from __future__ import annotations

import sys
from pathlib import Path

import tensorflow as tf


def _strings(name: str) -> tf.TensorSpec:
    return tf.TensorSpec([None], tf.string, name=name)


class Text(tf.Module):
    """Signatures whose input is a prompt."""

    @tf.function(input_signature=[_strings("prompt")])
    def complete(self, prompt):
        return {"text": prompt + " world"}

    @tf.function(
        input_signature=[
            _strings("prompt"),
            tf.TensorSpec([None], tf.int32, name="n"),
            tf.TensorSpec([None], tf.float32, name="temp"),
        ]
    )
    def params(self, prompt, n=tf.constant([7]), temp=tf.constant([0.5])):
        return {"text": prompt + "!", "n": n, "temp": temp}

    @tf.function(input_signature=[_strings("prompt")])
    def scalar(self, prompt):
        return {"text": prompt, "count": tf.size(prompt)}

    @tf.function(input_signature=[_strings("prompt")])
    def twice(self, prompt):
        return {"text": prompt, "twice": tf.concat([prompt, prompt], 0)}

    @tf.function(input_signature=[_strings("prompt")])
    def raw(self, prompt):
        return {"raw": prompt, "raw_bytes": prompt}

    @tf.function(input_signature=[_strings("prompt")])
    def guarded(self, prompt):
        tf.debugging.assert_less(tf.size(prompt), 3, message="at most 2 prompts")
        return {"text": prompt}

    @tf.function(input_signature=[_strings("prompt")])
    def nothing(self, prompt):
        return {"text": prompt[:0]}

    @tf.function(input_signature=[_strings("prompt")])
    def number(self, prompt):
        return {"number": tf.strings.to_number(prompt)}

    def signatures(self) -> dict:
        """By their names in the SavedModel."""
        names = ("params", "scalar", "twice", "raw", "guarded", "nothing", "number")
        return {"serving_default": self.complete, **{name: getattr(self, name) for name in names}}


class HalfPlusTwo(tf.Module):
    """0.5 x + 2, for tensors and for examples."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = tf.Variable(0.5), tf.Variable(2.0)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.float32, name="x")])
    def predict(self, x):
        return {"y": self.a * x + self.b}

    def _of_examples(self, inputs):
        return self.a * tf.io.parse_example(inputs, {"x": tf.io.FixedLenFeature([1], tf.float32)})["x"] + self.b

    @tf.function(input_signature=[_strings("inputs")])
    def regress(self, inputs):
        return {"outputs": self._of_examples(inputs)}

    @tf.function(input_signature=[_strings("inputs")])
    def classify(self, inputs):
        scores = self._of_examples(inputs)
        return {"scores": scores, "classes": tf.fill(tf.shape(scores), "y")}

    def signatures(self) -> dict:
        """By their names in the SavedModel."""
        return {"serving_default": self.predict, "regress": self.regress, "classify": self.classify}


class Same(tf.Module):
    """One signature per type, each returning its input; of two columns under the type's name with "_2"."""

    TYPES = (tf.float32, tf.float64, tf.int32, tf.int64, tf.uint8, tf.uint32, tf.uint64, tf.bool, tf.string)

    def signatures(self) -> dict:
        """By their names in the SavedModel."""
        made = {}
        for dtype in self.TYPES:
            for suffix, shape in (("", None), ("_2", [None, 2])):

                @tf.function(input_signature=[tf.TensorSpec(shape, dtype, name="x")])
                def same(x):
                    return {"y": tf.identity(x)}

                made[dtype.name + suffix] = same

        @tf.function(input_signature=[tf.TensorSpec([None], tf.float32, name="x")])
        def imaginary(x):
            return {"y": tf.complex(x, x)}

        return {**made, "complex": imaginary, "serving_default": made["float32"]}


class Slow(tf.Module):
    """Counts for as long as it is told to: about a second for 200 000."""

    @tf.function(input_signature=[tf.TensorSpec([], tf.int32, name="steps")])
    def count(self, steps):
        return {"steps": tf.while_loop(lambda step: step < steps, lambda step: [step + 1], [tf.constant(0)])[0]}

    def signatures(self) -> dict:
        """By their names in the SavedModel."""
        return {"serving_default": self.count}


class Compiled(tf.Module):
    """A function that XLA is to compile."""

    @tf.function(jit_compile=True, input_signature=[tf.TensorSpec([None], tf.float32, name="x")])
    def plus_one(self, x):
        return {"y": x + 1.0}

    def signatures(self) -> dict:
        """By their names in the SavedModel."""
        return {"serving_default": self.plus_one}


def export(module: tf.Module, base: Path, version: int) -> Path:
    """Writes a version, renamed into place as a deployment does it."""
    base.mkdir(parents=True, exist_ok=True)
    hidden = base / f".writing-{version}"
    tf.saved_model.save(module, str(hidden), signatures=module.signatures())
    return hidden.rename(base / str(version))


def export_all(root: Path) -> str:
    """Writes every model with its versions; gives the server's config in text format."""
    for module, name, versions in (
        (Text(), "m", (1,)),
        (HalfPlusTwo(), "half_plus_two", (1, 2)),
        (Same(), "same", (1,)),
        (Slow(), "slow", (1,)),
        (Compiled(), "compiled", (1,)),
    ):
        for version in versions:
            export(module, root / name, version)
    models = "".join(
        f'  config {{ name: "{name}" base_path: "{root / folder}" model_platform: "tensorflow" {more} }}\n'
        for name, folder, more in (
            ("m", "m", ""),
            (
                "half_plus_two",
                "half_plus_two",
                'model_version_policy { all {} } version_labels { key: "old" value: 1 }',
            ),
            ("same", "same", ""),
            ("slow", "slow", ""),
            ("compiled", "compiled", ""),
            ("modelname!#$%&'()*+,/:;=?@[]", "m", ""),
        )
    )
    return f"model_config_list {{\n{models}}}\n"


if __name__ == "__main__":
    folder = Path(sys.argv[1]).absolute()
    (folder / "models.config").write_text(export_all(folder))
