"""The preparation of blocks as an Apache Beam pipeline, whose elements are the parts of the input."""

from __future__ import annotations

from collections.abc import Sequence

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions

from tfclm.corpus.parts import FilePart
from tfclm.corpus.shards import Recipe, prepare_part
from tfclm.corpus.store import Store


class _PreparePart(beam.DoFn):
    """Writes the shards of one part: an element is the part with its index."""

    def __init__(self, recipe: Recipe, store: Store) -> None:
        super().__init__()
        self._recipe, self._store = recipe, store

    def process(self, element: tuple[int, FilePart]) -> None:
        index, part = element
        prepare_part(index, part, self._recipe, self._store)


def run_pipeline(parts: Sequence[FilePart], recipe: Recipe, store: Store, options: Sequence[str]) -> None:
    """Prepares all parts with a runner of Beam, and waits until it is done.

    Args:
        parts: the parts of the input; each is prepared on its own.
        recipe: how to make the blocks.
        store: the directory for the shards, which every worker must be able to write.
        options: pipeline options of Beam, such as `--runner=FlinkRunner`.

    Raises:
        RuntimeError: the pipeline failed.
    """
    with beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
        elements = pipeline | "Parts" >> beam.Create(list(enumerate(parts)), reshuffle=True)
        _ = elements | "Prepare" >> beam.ParDo(_PreparePart(recipe, store))
