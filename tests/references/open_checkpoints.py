"""Opens checkpoints with PyTorch, in an environment of its own, without anything of tfclm.

The first line of stdout has the versions. Then each line of stdin is a request in JSON, the arguments of
`open_checkpoint`, and its answer a line of JSON, what that returns, or {"error"}. An environment for it:

    python -m venv .venv-torch
    .venv-torch/bin/pip install torch==2.13.0 transformers==5.24.0 sentencepiece
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer


def open_checkpoint(folder: str, ids: list[list[int]], text: str, steps: int = 0, **options: Any) -> dict[str, Any]:
    """What PyTorch makes of a checkpoint, opened with options of `from_pretrained`.

    Returns what `from_pretrained` reports (missing, unexpected or mismatched weights), the types of the parameters, the
    ids of the text, the logits of the ids, and the ids with the likeliest token after them, some steps long.
    """
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    tokens = torch.tensor(ids)
    with torch.no_grad():
        logits = model.eval()(tokens).logits
        for _ in range(steps):
            tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], 1)
    return {
        "report": {name: sorted(map(str, found)) for name, found in report.items() if found},
        "types": sorted({str(parameter.dtype) for parameter in model.parameters()}),
        "ids": AutoTokenizer.from_pretrained(folder)(text)["input_ids"],
        "logits": logits.tolist(),
        "tokens": tokens.tolist(),
    }


def main() -> None:
    """Answers requests until stdin ends."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print(json.dumps({"torch": torch.__version__, "transformers": transformers.__version__}), flush=True)
    for line in sys.stdin:
        try:
            answer = open_checkpoint(**json.loads(line))
        except Exception as error:  # whatever the class of the model raises
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
