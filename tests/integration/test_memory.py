"""Memory of quantizing does not depend on how many blocks there are."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.models import edit_config, make_checkpoint, make_text

ROOT = Path(__file__).parent.parent.parent
FEW, MANY = 8, 64
HIDDEN, INTERMEDIATE = 256, 1024
# what one more block would add if its weights were held, as stored (bfloat16): 2.0 MB; 56 more
# would be 110 MB beside the 520 MB that were measured for both, of which 5% are allowed
BLOCK_BYTES = 2 * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * HIDDEN // 2 + 3 * HIDDEN * INTERMEDIATE)
ALLOWED = 0.05
RECIPE = """
calib: {{name: text, path: {text}, n_samples: 4, seq_len: 64}}
eval: {{name: text, path: {text}, windows: 2, seq_len: 64}}
quant:
  method: Identity
  quant_out: true
  weight: {{bit: 4, symmetric: true, granularity: per_group, group_size: 128, need_pack: true}}
"""
# samples RssAnon while the flow runs, and tells the peak and what each step saw
SAMPLED = """
import json, sys, threading, time
import torch
import tasks.verify
from flows.progress import _reporter
from flows.quantize_model import quantize_model

torch.set_num_threads(1)
# the second opinion on small models loads them whole; none of that for the sizes in question
tasks.verify.WHOLE_MODEL_BYTES = 0

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))

peaks, step, ended = {}, ["start"], threading.Event()

def sample():
    while not ended.is_set():
        peaks[step[0]] = max(peaks.get(step[0], 0), anonymous())
        time.sleep(0.003)

class Reporter:
    def plan(self, blocks): pass
    def begin(self, label): step[0] = label
    def end(self, label, cached): pass
    def block_done(self, block): pass

_reporter.set(Reporter())
sampler = threading.Thread(target=sample, daemon=True)
sampler.start()
result = quantize_model(**json.loads(sys.argv[1]))
ended.set()
sampler.join()
print(json.dumps(peaks))
"""


def equal_blocks(folder: Path, blocks: int) -> Path:
    """A checkpoint of equal blocks: a file for each, all written from the same tensors."""
    make_checkpoint(folder, blocks=1, hidden=HIDDEN, intermediate=INTERMEDIATE)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    prefix = "model.layers.0."
    block = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    outside = {n: t for n, t in tensors.items() if not n.startswith(prefix)}
    weight_map = dict.fromkeys(outside, "outside.safetensors")
    save_file(outside, folder / "outside.safetensors", metadata={"format": "pt"})
    for number in range(blocks):
        names = {f"model.layers.{number}.{name}": tensor for name, tensor in block.items()}
        file = f"block-{number}.safetensors"
        save_file(names, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    edit_config(folder, num_hidden_layers=blocks, layer_types=None)
    assert sum(t.numel() * 2 for t in block.values() if t.ndim == 2) == BLOCK_BYTES
    assert tensors["lm_head.weight"].dtype == torch.bfloat16
    return folder


def begin(folder: Path, blocks: int, prepared: Path) -> subprocess.Popen[str]:
    """Start a run in a home of its own, in a process that samples itself."""
    home = folder / f"home-{blocks}"
    home.mkdir()
    shutil.copy(prepared / "mlflow.db", home / "mlflow.db")
    recipe = folder / f"recipe-{blocks}.yml"
    text = make_text(folder / f"words-{blocks}.txt", words=3000)
    recipe.write_text(RECIPE.format(text=text))
    model = equal_blocks(folder / f"model-{blocks}", blocks)
    given = {"recipe": str(recipe), "model": str(model), "output": str(folder / f"out-{blocks}")}
    return subprocess.Popen(
        [sys.executable, "-c", SAMPLED, json.dumps(given)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "BLOCKQUANT_HOME": str(home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def peaks(process: subprocess.Popen[str]) -> dict[str, int]:
    """Largest RssAnon in KiB during each step."""
    out, err = process.communicate(timeout=280)
    assert process.returncode == 0, err
    found: dict[str, int] = json.loads(out.splitlines()[-1])
    return found


def test_memory_is_the_same_for_8_and_64_blocks(
    services: dict[str, str], prepared_home: Path, tmp_path: Path
) -> None:
    processes = [begin(tmp_path, blocks, prepared_home) for blocks in (FEW, MANY)]
    few, many = (peaks(process) for process in processes)
    assert len(many) > len(few) > 4 * FEW, "sampled in every step"
    least, most = max(few.values()), max(many.values())
    held = (MANY - FEW) * BLOCK_BYTES / 1024
    assert held > 2 * ALLOWED * least, "the test could not see blocks that are held"
    assert abs(most - least) <= ALLOWED * least, (
        f"{least / 1024:.0f} MiB became {most / 1024:.0f} MiB"
    )
