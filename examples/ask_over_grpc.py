"""Asks a served model over gRPC: TensorFlow Serving, or `python -m tfclm.serve`. It needs no TensorFlow.

    python examples/ask_over_grpc.py localhost:8500 quickstart "The import statement"

takes the server's address, the name under which it has the model, and a prompt.
"""

import sys

import tfclm


def main(address: str = "localhost:8500", name: str = "quickstart", prompt: str = "The import statement") -> None:
    """Prints a greedy continuation, a sampled one, and the log-probability of each token of the prompt."""
    with tfclm.Client(f"grpc://{address}", name) as client:
        # Two rows of one request: every parameter may differ between them.
        for row in client.generate([prompt, prompt], max_new_tokens=20, temperature=[0.0, 0.8], seed=7):
            print(repr(row.completion), row.finish_reason)
        print(*client.score(prompt).token_logprobs[1:])


if __name__ == "__main__":
    main(*sys.argv[1:])
