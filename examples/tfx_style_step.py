"""A step of a pipeline: fine-tune, decide by the perplexity, and push to the directory that a server watches.

    python examples/tfx_style_step.py notes.txt runs/quickstart runs/step serving_models/quickstart 60

takes the texts, the base model, the directories for the fine-tuned model and for the pushed versions, and the highest
perplexity that is pushed; flags of `tfclm.fit` may follow. A TFX component, a Kubeflow Pipelines component or a task of
another orchestrator calls `train_and_push` with the URIs of its artifacts. Called again after an interruption, it
resumes. The versions may go to a bucket (gs://...); the other URIs are paths.
"""

import json
import subprocess
import sys
from pathlib import Path


def train_and_push(
    examples_uri: str, base_model_uri: str, model_uri: str, pushed_model_uri: str, max_perplexity: float, *flags: str
) -> dict:
    """Returns the fine-tuned model, its perplexity and the pushed version, None if it was refused."""
    fit = ["--model", base_model_uri, "--train-file", examples_uri, "--output-dir", model_uri, *flags]
    push = ["--export-to", pushed_model_uri, "--max-perplexity", str(max_perplexity)]
    done = subprocess.run([sys.executable, "-m", "tfclm.fit", *fit, *push], stdout=subprocess.PIPE, text=True)
    results = Path(model_uri) / "results.json"
    perplexity = json.loads(results.read_text())["perplexity"] if results.exists() else None
    refused = done.returncode == 1 and perplexity is not None and perplexity > max_perplexity
    if not refused:
        done.check_returncode()
    pushed = None if refused else done.stdout.strip()
    return {"model": model_uri, "perplexity": perplexity, "pushed_model": pushed}


if __name__ == "__main__":
    print(json.dumps(train_and_push(*sys.argv[1:5], float(sys.argv[5]), *sys.argv[6:])))
