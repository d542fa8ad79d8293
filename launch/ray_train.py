"""Trains on two workers of a Ray cluster: python ray_train.py. Ray sets TF_CONFIG; README.md says what to change."""

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.tensorflow import TensorflowTrainer

FLAGS = [
    "--strategy=multi_worker",
    "--model=distilgpt2",
    "--train-file=/shared/texts/*.jsonl",
    "--output-dir=/shared/runs/mine",
]


def fit(config: dict[str, list[str]]) -> None:
    """Runs `tfclm fit` in one worker."""
    import sys

    from tfclm.fit import main

    sys.argv = ["tfclm fit", *config["flags"]]
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"tfclm fit ended with exit code {end.code}") from end


if __name__ == "__main__":
    TensorflowTrainer(
        fit,
        train_loop_config={"flags": FLAGS},
        scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 4}),
        # When one worker ends, Ray starts all of them again.
        run_config=RunConfig(failure_config=FailureConfig(max_failures=20)),
    ).fit()
