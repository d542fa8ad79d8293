"""Fine-tunes in your own training loop: tfclm loads, packs, measures and saves; the steps are TensorFlow's.

    python examples/train_your_own_loop.py runs/quickstart notes.txt runs/own_loop

takes a checkpoint (a directory or a Hub id), a text file in which a blank line ends a document, and the directory for
the result. Every fifth document is held out; their perplexity is printed before and after three epochs.
"""

import sys

import datasets
import tensorflow as tf
import tf_keras

import tfclm
from tfclm import corpus


def main(source: str = "runs/quickstart", text_file: str = "notes.txt", output_dir: str = "runs/own_loop") -> None:
    """Fine-tunes a checkpoint on a text and saves the result."""
    tf_keras.utils.set_random_seed(0)
    model, tokenizer = tfclm.load(source)
    texts = datasets.load_dataset("text", data_files=text_file, sample_by="paragraph", split="train")
    tokens = corpus.tokenize(texts, tokenizer)
    held_out = range(0, len(tokens), 5)
    around = {"separator": [tokenizer.eos_token_id], "prefix": corpus.prefix_ids(tokenizer)}
    train, validation = (
        tfclm.pack(tokens.select(rows), block_size=64, **around).blocks
        for rows in ([row for row in range(len(tokens)) if row not in held_out], held_out)
    )
    optimizer = tf_keras.optimizers.Adam(1e-3)

    @tf.function
    def step(ids: tf.Tensor) -> None:
        with tf.GradientTape() as tape:
            loss = model(input_ids=ids, labels=ids, training=True).loss  # the model shifts the labels itself
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))

    print(f"perplexity before {tfclm.perplexity(model, validation).perplexity:.4f}")
    batches = tf.data.Dataset.from_tensor_slices(train.with_format("numpy")[:]["input_ids"])
    for ids in batches.shuffle(len(train), seed=0).batch(16, drop_remainder=True).repeat(3):
        step(ids)
    print(f"perplexity after {tfclm.perplexity(model, validation).perplexity:.4f}")
    tfclm.save(model, tokenizer, output_dir)


if __name__ == "__main__":
    main(*sys.argv[1:])
