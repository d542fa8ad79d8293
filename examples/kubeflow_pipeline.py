"""A pipeline of three containers: fine-tune, decide by the perplexity, push to the directory that a server watches.

    python examples/kubeflow_pipeline.py compile pipeline.yaml      # with kfp installed; for Kubeflow Pipelines
    python examples/kubeflow_pipeline.py run notes.txt runs/quickstart runs/step serving_models/quickstart 60

`run` runs the same commands on this machine: it takes the texts, the base model, the directories for the fine-tuned
model and for the pushed versions, and the highest perplexity that is pushed; flags of `tfclm.fit` may follow.

The steps do what TFX's Trainer, its Evaluator and InfraValidator, and its Pusher do. Each is one command of tfclm, and
its exit code is the contract: 0 goes on; 1 ends the pipeline, because the run was interrupted or the model is refused;
2 says that a setting is wrong, so that trying again does not help.
"""

import shlex
import subprocess
import sys
import tempfile

IMAGE = "registry.example/tfclm:0.1.0"
STEPS = {
    "fit": "python -m tfclm.fit --model {base_model} --train-file {texts} --output-dir {fitted}",
    # Also loads the exported version in a separate process and compares its answers with the checkpoint's.
    "gate": "python -m tfclm.export --model {fitted} --serving-dir {candidate} --max-perplexity {max_perplexity}",
    "push": "python -m tfclm.export --exported {candidate}/1 --serving-dir {serving_dir}",
}


def command(step: str, **values: object) -> list[str]:
    """The command of a step with these values: paths, or the placeholders of Kubeflow Pipelines."""
    return [word.format(**values) for word in shlex.split(STEPS[step])]


def run(texts: str, base_model: str, fitted: str, serving_dir: str, max_perplexity: str, *flags: str) -> int:
    """Runs the steps one after the other; returns the exit code of the first that fails."""
    with tempfile.TemporaryDirectory() as candidate:
        values = {"texts": texts, "base_model": base_model, "fitted": fitted, "candidate": candidate}
        for step in STEPS:
            _, *words = command(step, **values, serving_dir=serving_dir, max_perplexity=max_perplexity)
            code = subprocess.run([sys.executable, *words, *(flags if step == "fit" else ())]).returncode
            if code:
                return code
    return 0


def compile_pipeline(path: str) -> int:
    """Writes the pipeline as YAML for Kubeflow Pipelines."""
    from kfp import compiler, dsl

    @dsl.container_component
    def fit(base_model: str, texts: str, fitted: dsl.Output[dsl.Model]):
        words = command("fit", base_model=base_model, texts=texts, fitted=fitted.path)
        return dsl.ContainerSpec(image=IMAGE, command=words)

    @dsl.container_component
    def gate(fitted: dsl.Input[dsl.Model], max_perplexity: float, candidate: dsl.Output[dsl.Model]):
        words = command("gate", fitted=fitted.path, candidate=candidate.path, max_perplexity=max_perplexity)
        return dsl.ContainerSpec(image=IMAGE, command=words)

    @dsl.container_component
    def push(candidate: dsl.Input[dsl.Model], serving_dir: str):
        words = command("push", candidate=candidate.path, serving_dir=serving_dir)
        return dsl.ContainerSpec(image=IMAGE, command=words)

    @dsl.pipeline(name="tfclm")
    def pipeline(base_model: str, texts: str, max_perplexity: float, serving_dir: str):
        fitted = fit(base_model=base_model, texts=texts).outputs["fitted"]
        candidate = gate(fitted=fitted, max_perplexity=max_perplexity).outputs["candidate"]
        # Each run of the pipeline publishes a version, also where its steps were run before.
        push(candidate=candidate, serving_dir=serving_dir).set_caching_options(False)

    compiler.Compiler().compile(pipeline, path)
    return 0


if __name__ == "__main__":
    sys.exit({"run": run, "compile": compile_pipeline}[sys.argv[1]](*sys.argv[2:]))
