"""Quantize with all of a GPU's memory, then with less and less of it: peak, seconds, same bytes.

    python benchmarks/residency.py FOLDER awq_w4a16 gptq_w4a16

Blocks are as large as those of a model of 8 billion parameters, with random weights; two of them.
Prints a JSON object per run, until a run finds no way to fit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

SHARES = (1.0, 0.92, 0.8, 0.7, 0.6, 0.5)
BLOCKS = {"hidden": 4096, "intermediate": 14336, "heads": 32, "kv_heads": 8}


def digest(folder: Path) -> str:
    """Digest of all files below a folder and their names."""
    found = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        found.update(str(path.relative_to(folder)).encode())
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def quantized(recipe: str, model: Path, text: Path, place: Path, limit: float) -> dict[str, Any]:
    """Quantize in a store of its own with a share of the GPU's memory."""
    import torch

    from flows.quantize_model import quantize_model

    shutil.rmtree(place, ignore_errors=True)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_per_process_memory_fraction(limit / total)
    texts = [f"calib.path={text}", f"eval.path={text}", "calib.name=text", "eval.name=text"]
    sizes = ["calib.n_samples=16", "calib.seq_len=512", "eval.windows=4", "eval.seq_len=512"]
    rest = ["serving.smoke_test=false", "gate.registry=false"]
    start = time.perf_counter()
    try:
        quantize_model(
            recipe,
            str(model),
            str(place / "out"),
            [*texts, *sizes, *rest],
            device="cuda",
            store=str(place / "store"),
        )
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    return {
        "recipe": recipe,
        "limit_gib": round(limit / 2**30, 2),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "reserved": torch.cuda.max_memory_reserved(),
        "seconds": round(time.perf_counter() - start, 1),
        "digest": digest(place / "out"),
    }


def main() -> None:
    """Run every recipe with every share of the memory that it takes where there is enough."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("recipes", nargs="+")
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("BLOCKQUANT_HOME", str(asked.folder / "home"))
    from flows.prefect_api import prefect_api, quiet_defaults

    quiet_defaults(asked.folder / "prefect")
    import torch

    from tasks.engine.residency import DeviceMemoryError
    from tests.models import make_checkpoint, make_text

    model = make_checkpoint(asked.folder / "model", blocks=2, **BLOCKS)
    text = make_text(asked.folder / "words.txt", words=60000)
    with prefect_api(asked.folder / "server.log"):
        for recipe in asked.recipes:
            place = asked.folder / recipe.replace("/", "-")
            whole = float(torch.cuda.get_device_properties(0).total_memory)
            roomy = quantized(recipe, model, text, place, whole)
            print(json.dumps(roomy), flush=True)
            for share in SHARES[1:]:
                try:
                    lean = quantized(recipe, model, text, place, share * roomy["reserved"])
                except DeviceMemoryError as error:
                    print(json.dumps({"recipe": recipe, "share": share, "error": str(error)}))
                    break
                same = lean["digest"] == roomy["digest"]
                print(json.dumps(lean | {"share": share, "same": same}), flush=True)


if __name__ == "__main__":
    main()
