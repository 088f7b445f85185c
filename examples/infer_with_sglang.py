"""Generate with a quantized checkpoint in this process: SGLang's engine, no server.

    .venv-sglang/bin/python examples/infer_with_sglang.py CHECKPOINT "The river" "Once"

Needs SGLang and a GPU. SGLang sees from config.json how the checkpoint is quantized.
"""

from __future__ import annotations

import argparse
import json


def main() -> None:
    """Load the checkpoint, continue each prompt greedily."""
    parser = argparse.ArgumentParser(description="Generate with a quantized checkpoint.")
    parser.add_argument("checkpoint")
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--tokens", type=int, default=32, help="new tokens per prompt")
    parser.add_argument("--tensor-parallel", type=int, default=1, help="GPUs")
    parser.add_argument("--engine", type=json.loads, default={}, help="more of its options, JSON")
    given = parser.parse_args()

    import sglang

    engine = sglang.Engine(
        model_path=given.checkpoint, tp_size=given.tensor_parallel, **given.engine
    )
    try:
        sampling = {"temperature": 0, "max_new_tokens": given.tokens}
        for prompt, answer in zip(
            given.prompts, engine.generate(given.prompts, sampling), strict=True
        ):
            print(f"{prompt}{answer['text']}")
    finally:
        engine.shutdown()


# the engine starts processes that import this file again
if __name__ == "__main__":
    main()
