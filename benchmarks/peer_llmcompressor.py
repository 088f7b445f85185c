"""Quantize a model with llm-compressor, inside llm-compressor's own environment.

``quality.py`` runs this file with the Python of ``.venv-bench`` and one JSON argument; it imports
nothing of this project. What is timed is ``oneshot`` on a model that is in memory already, up to
where the model could be saved: imports, loading, saving and compression to the stored format are
not counted.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

# what comes before the rounding; every option is llm-compressor's default
TRANSFORMS: dict[str, Any] = {"awq": AWQModifier, "smoothquant": SmoothQuantModifier}


@dataclass(frozen=True)
class Task:
    """One quantization."""

    model: str
    # rtn, gptq, awq or smoothquant
    method: str
    # a preset of compressed-tensors: W4A16 (groups of 128, symmetric), W8A8 or FP8_DYNAMIC
    scheme: str
    # where the checkpoint is saved; nowhere if empty
    output: str
    # safetensors with ``tokens`` int (W, T); None for rtn
    tokens: str | None
    # where the figures go, as JSON
    report: str
    dtype: str = "auto"
    device: str = "cpu"


def main(task: Task) -> None:
    """Quantize, save the checkpoint, and report the seconds that ``oneshot`` took."""
    if task.device == "cpu":
        # without a GPU there is no memory to pin, and torch refuses
        IntermediatesCache.pin_memory = lambda self, batch_index, input_names=None: None
    model = AutoModelForCausalLM.from_pretrained(task.model, dtype=task.dtype)
    tokenizer = AutoTokenizer.from_pretrained(task.model)
    modifier = GPTQModifier if task.method == "gptq" else QuantizationModifier
    rounding = modifier(targets="Linear", scheme=task.scheme, ignore=["lm_head"])
    transform = TRANSFORMS.get(task.method)
    recipe = [rounding] if transform is None else [transform(), rounding]
    start, start_cpu = time.perf_counter(), time.process_time()
    oneshot(model=model, processor=tokenizer, recipe=recipe, **_calibration(task.tokens))
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
    if task.output:
        model.save_pretrained(task.output, save_compressed=True)
        tokenizer.save_pretrained(task.output)
    report = {
        "seconds": seconds,
        "peak_device": torch.cuda.max_memory_allocated() if task.device != "cpu" else 0,
        "cpu_seconds": cpu_seconds,
        "versions": {name: version(name) for name in ("llmcompressor", "torch", "transformers")},
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }
    Path(task.report).write_text(json.dumps(report), encoding="utf-8")


def _calibration(tokens: str | None) -> dict[str, Any]:
    """The options of ``oneshot`` for token windows: all of them, each whole, in their order."""
    if tokens is None:
        return {}
    windows = load_file(tokens)["tokens"].tolist()
    return {
        "dataset": Dataset.from_dict(
            {"input_ids": windows, "attention_mask": [[1] * len(ids) for ids in windows]}
        ),
        "num_calibration_samples": len(windows),
        "max_seq_length": len(windows[0]),
        "shuffle_calibration_samples": False,
    }


if __name__ == "__main__":
    main(Task(**json.loads(sys.argv[1])))
