"""Generates and scores text in an application that has TensorFlow alone, without tfclm, transformers or a server.

    python examples/load_in_another_app.py serving_models/quickstart/1 "The import statement"

takes the directory of an exported version and a prompt.
"""

import sys

import tensorflow as tf


def main(version: str = "serving_models/quickstart/1", prompt: str = "The import statement") -> None:
    """Prints the prompt with its continuation, and the perplexity of that text."""
    signatures = tf.saved_model.load(version).signatures
    text = signatures["serving_default"](prompt=tf.constant([prompt]))["generated_text"]
    perplexity = signatures["score"](text=text)["perplexity"]
    print(text.numpy()[0].decode())
    print(f"perplexity {perplexity.numpy()[0]:.4f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
