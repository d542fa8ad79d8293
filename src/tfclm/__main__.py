"""`python -m tfclm`, or `tfclm`: the commands, in the order in which a text becomes a served model."""

from __future__ import annotations

import difflib
import importlib
import sys

from tfclm import __version__
from tfclm.terminal import log, prepare_streams

COMMANDS = {
    "prepare": "make token blocks of large texts with Apache Beam",
    "fit": "fine-tune a causal language model on text",
    "launch": "start several workers of fit on this machine",
    "evaluate": "measure the perplexity of a checkpoint",
    "generate": "continue a prompt with a checkpoint, in this process",
    "export": "write a checkpoint as a SavedModel for TensorFlow Serving",
    "serve": "serve exported models over REST and gRPC, as tensorflow_model_server does",
    "query": "ask a served model for text or for the perplexity of a text",
    "push": "publish a checkpoint on the Hugging Face Hub",
}


def main() -> None:
    """Runs a command: `tfclm fit ...` is `python -m tfclm.fit ...`."""
    prepare_streams()
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in COMMANDS:
        sys.argv = [f"tfclm {name}", *sys.argv[2:]]
        importlib.import_module(f"tfclm.{name}").main()
    elif name in ("-h", "--help"):
        lines = [f"  {command:10}{about}" for command, about in COMMANDS.items()]
        print("usage: tfclm COMMAND [--help] [FLAGS]", "", *lines, "", sep="\n")
        print("`tfclm COMMAND` is `python -m tfclm.COMMAND`; `tfclm --version` prints the version.")
    elif name == "--version":
        print(f"tfclm {__version__}")
    else:
        like = difflib.get_close_matches(name, COMMANDS, 1, 0.5)
        meant = f" (did you mean {like[0]}?)" if like else ""
        log(f"tfclm: there is no command {name}{meant}: give {', '.join(COMMANDS)}")
        sys.exit(2)


if __name__ == "__main__":
    main()
