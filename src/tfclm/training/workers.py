"""The workers of a run: the strategy that they train under, which of them this process is, and what they agree on."""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tensorflow as tf

from tfclm.disk import reason
from tfclm.errors import InputError
from tfclm.terminal import log
from tfclm.training.order import RunOrder, WorkerOrder, split_rows
from tfclm.training.startup import limit_startup

_EXAMPLE = '{"cluster": {"worker": ["host0:2222", "host1:2222"]}, "task": {"type": "worker", "index": 0}}'
# Another worker's file appears here later on network file systems.
_FILE_DELAY = 10.0


class WorkersLost(Exception):
    """Another worker has ended or no longer answers, so that the run cannot go on."""


def make_strategy(
    kind: Literal["one", "mirrored", "multi_worker"],
    communication: Literal["auto", "ring", "nccl"] = "auto",
    startup_timeout: float = 600.0,
) -> tf.distribute.Strategy:
    """Makes the strategy that a model is created and trained under.

    Args:
        kind: "one" device; "mirrored" on all devices of this machine; "multi_worker" on all devices of several
            workers, which TF_CONFIG names, or else Slurm. That one has to be made before TensorFlow does anything else.
        communication: how workers exchange gradients.
        startup_timeout: seconds to wait for all workers to start. If they have not, a line names those that are
            missing, and this process exits with code 1, because TensorFlow's own wait has no end.

    Raises:
        InputError: TF_CONFIG is missing or wrong.

    Example:
        >>> strategy = make_strategy("multi_worker")
        >>> with strategy.scope():
        ...     model, tokenizer = tfclm.load("distilgpt2")
    """
    if kind == "one":
        return tf.distribute.get_strategy()
    if kind == "mirrored":
        return tf.distribute.MirroredStrategy()
    resolver = find_cluster()
    implementation = tf.distribute.experimental.CommunicationImplementation[communication.upper()]
    options = tf.distribute.experimental.CommunicationOptions(implementation=implementation)
    with limit_startup(_addresses(resolver), startup_timeout), _keep_sigterm():
        strategy = tf.distribute.MultiWorkerMirroredStrategy(resolver, options)
        # Waits for all workers, which making the strategy does not always do.
        Workers(strategy).wait()
    return strategy


@contextmanager
def _keep_sigterm() -> Iterator[None]:
    """Delays SIGTERM until the block has ended: TensorFlow's cluster takes it over when it starts, and ignores it."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread can handle signals
        return
    handler = signal.getsignal(signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])


class Workers:
    """The workers of a strategy; one if it is not `MultiWorkerMirroredStrategy`.

    Attributes:
        strategy: the strategy.
        names: the workers' names, "chief 0" first if there is one, then "worker 0" and so on.
        index: which of them this process is.

    Example:
        >>> Workers(tf.distribute.get_strategy()).count
        1
    """

    def __init__(self, strategy: tf.distribute.Strategy) -> None:
        self.strategy, self.names, self.index = strategy, ["worker 0"], 0
        if isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
            resolver = strategy.cluster_resolver
            names = list(_addresses(resolver))
            if names:
                self.names, self.index = names, names.index(f"{resolver.task_type} {resolver.task_id}")

        def add(values: tf.Tensor) -> tf.Tensor:
            values = tf.identity(values)  # on this replica's device
            return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, values)

        self._add = tf.function(lambda values: strategy.run(add, args=(values,)), autograph=False)

    @property
    def count(self) -> int:
        """Number of workers."""
        return len(self.names)

    @property
    def is_chief(self) -> bool:
        """Whether this worker is the one that writes files."""
        return self.index == 0

    def gather(self, values: Sequence[float]) -> np.ndarray[Any, Any]:
        """The values of all workers, up to 8 each, float64 [workers, values]; every worker has to call this."""
        table = np.zeros((self.count, 8))  # of one shape, so that it is traced once
        table[self.index, : len(values)] = values
        if self.count > 1:
            sums = self.strategy.experimental_local_results(self._add(tf.constant(table)))[0]
            table = sums.numpy() / (self.strategy.num_replicas_in_sync // self.count)
        return table[:, : len(values)]

    def wait(self) -> None:
        """Waits until every worker has called this."""
        self.gather([0.0])

    def share(self, order: RunOrder | np.ndarray[Any, Any], batch_size: int) -> tuple[WorkerOrder, list[int]]:
        """This worker's part of the batches of a run. Two replicas have the rows that `MirroredStrategy` gives them.

        Args:
            order: indices of rows, in the order of the batches.
            batch_size: rows per batch, over all replicas.

        Returns:
            The indices of the rows of this worker, and the rows per batch of each of its replicas.
        """
        replicas = self.strategy.num_replicas_in_sync
        local = replicas // self.count
        first = self.index * local
        own = split_rows(batch_size, replicas)[first : first + local]
        return WorkerOrder(order, batch_size, replicas, first, local), own

    def check_equal(self, digest: str, what: str) -> None:
        """Raises `InputError` on all workers if a digest, hexadecimal, differs between them."""
        parts = [float(int(digest[at : at + 8], 16)) for at in range(0, 64, 8)]
        rows = self.gather(parts)
        others = [name for name, row in zip(self.names, rows, strict=True) if not np.array_equal(row, rows[0])]
        if others:
            raise InputError(
                f"{what} of {', '.join(others)} differ from those of {self.names[0]}: give all workers the same"
            )

    def check_shared(self, folder: Path) -> None:
        """Raises `InputError` on all workers unless each of them can write in the chief's directory."""
        if self.count == 1:
            return
        if self.is_chief:
            folder.mkdir(parents=True, exist_ok=True)
        token = int(self.gather([float(secrets.randbits(48))])[0, 0])
        files = [folder / f".worker-{token}-{index}" for index in range(self.count)]
        problem = ""
        try:
            files[self.index].touch()
        except OSError as error:
            problem = reason(error)
            log(f"`output_dir` {folder} cannot be written by {self.names[self.index]}: {problem}")
        self.wait()
        # Every worker looks for the chief's file, and so learns of itself whether it shares the chief's directory.
        until = time.monotonic() + _FILE_DELAY
        while not files[0].exists() and time.monotonic() < until:
            time.sleep(0.1)
        shares = self.gather([float(not problem and files[0].exists())])[:, 0]
        files[self.index].unlink(missing_ok=True)
        lacking = [name for name, here in zip(self.names, shares, strict=True) if not here]
        if lacking:
            raise InputError(
                f"`output_dir` {folder} of {self.names[0]} is not where {', '.join(lacking)} can write: give a "
                "directory that all workers share"
            )

    @contextmanager
    def explain_loss(self) -> Iterator[None]:
        """Raises `WorkersLost` in place of the error by which TensorFlow reports that another worker has ended."""
        try:
            yield
        except tf.errors.OpError as error:
            if self.count == 1 or not _tells_of_loss(error):
                raise
            raise WorkersLost(f"{_lost_name(error)} has ended or does not answer any more") from error


def _tells_of_loss(error: tf.errors.OpError) -> bool:
    """Whether an error comes from a collective operation that another worker does not take part in any more."""
    return isinstance(error, tf.errors.UnavailableError | tf.errors.AbortedError | tf.errors.CancelledError)


def _lost_name(error: tf.errors.OpError) -> str:
    """Which worker an error is about, if it says so."""
    found = re.search(r"(?:unhealthy|from)\D*?/job:(\w+)/(?:replica:\d+/)?task:(\d+)", error.message)
    return f"{found[1]} {found[2]}" if found else "another worker"


def _addresses(resolver: tf.distribute.cluster_resolver.ClusterResolver) -> dict[str, str]:
    """The address of each worker by its name."""
    cluster = resolver.cluster_spec().as_dict()
    return {f"{job} {index}": address for job in sorted(cluster) for index, address in enumerate(cluster[job])}


def find_cluster() -> tf.distribute.cluster_resolver.ClusterResolver:
    """The cluster that TF_CONFIG or Slurm describes."""
    if "TF_CONFIG" in os.environ:
        _check_config(os.environ["TF_CONFIG"])
        return tf.distribute.cluster_resolver.TFConfigClusterResolver()
    if "SLURM_STEP_NUM_TASKS" in os.environ:
        return _find_slurm_step()
    raise InputError(
        f"`strategy` multi_worker needs the addresses of the workers: set TF_CONFIG, such as {_EXAMPLE}, or start the "
        "workers with srun or python -m tfclm.launch"
    )


def _check_config(text: str) -> None:
    """Raises `InputError` unless TF_CONFIG names workers, with a chief or without, and the task of this process."""

    def wrong(problem: str) -> InputError:
        return InputError(f"TF_CONFIG {problem}: give the same cluster to all workers, such as {_EXAMPLE}")

    try:
        config = json.loads(text)
        cluster, task = config["cluster"], config["task"]
        job, index = str(task["type"]), int(task["index"])
        jobs = {str(name): [str(address) for address in addresses] for name, addresses in cluster.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise wrong("is not JSON with a cluster and a task") from error
    if other := sorted(jobs.keys() - {"chief", "worker"}):
        raise wrong(f"has tasks of type {', '.join(other)}, where only chief and worker train together")
    if len(jobs.get("chief", [])) > 1:
        raise wrong("has more than one chief")
    addresses = [address for each in jobs.values() for address in each]
    for address in addresses:
        if not re.fullmatch(r"\S+:\d+", address) or addresses.count(address) > 1:
            raise wrong(f"has the address {address!r}, which is not one HOST:PORT per worker")
    if not 0 <= index < len(jobs.get(job, [])):
        raise wrong(f"has no {job} {index}, which it says that this process is")


def _find_slurm_step() -> tf.distribute.cluster_resolver.ClusterResolver:
    """The cluster of a Slurm step, with one worker per task and the devices that Slurm lets each task see."""
    tasks = int(os.environ["SLURM_STEP_NUM_TASKS"])
    # One "GPU" per task, so that the resolver counts tasks and leaves CUDA_VISIBLE_DEVICES to Slurm.
    slurm = tf.distribute.cluster_resolver.SlurmClusterResolver(
        gpus_per_node=tasks, gpus_per_task=1, auto_set_gpu=False
    )
    spec = slurm.cluster_spec()
    host = spec.task_address(slurm.task_type, slurm.task_id).rpartition(":")[0]
    node = os.environ.get("SLURMD_NODENAME", host)
    if host != node:
        raise InputError(
            f"Slurm's task {slurm.task_id} runs on {node}, but TensorFlow expects it on {host}, because it sorts the "
            "names of the nodes: choose nodes whose names sort as Slurm numbers them, or set TF_CONFIG"
        )
    return tf.distribute.cluster_resolver.SimpleClusterResolver(
        spec,
        task_type=slurm.task_type,
        task_id=slurm.task_id,
        num_accelerators={"GPU": len(tf.config.list_physical_devices("GPU"))},
        rpc_layer="grpc",
    )
