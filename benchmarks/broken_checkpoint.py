"""A published checkpoint and the same with one scale doubled, both served by a real SGLang.

    python benchmarks/broken_checkpoint.py CHECKPOINT --python SGLANG_ENVIRONMENT/bin/python

Needs a GPU that SGLang knows. The whole one has to pass ``blockquant serve-check``; the broken one,
whose report and windows are those of the whole one, has to be refused with the gap between the
server's NLL and the published one. Arguments after -- go to the server.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
SCALE = "weight_scale"
GAP = "of the published report"
console = Console(width=180, highlight=False, markup=False, soft_wrap=True)


def main(
    checkpoint: Annotated[Path, typer.Argument(help="A published folder.")],
    arguments: Annotated[
        list[str] | None, typer.Argument(help="After --: arguments of the server's.")
    ] = None,
    python: Annotated[
        str | None, typer.Option(help="Interpreter of an environment with SGLang.")
    ] = None,
) -> None:
    """Check both; fails if the whole one is refused, or the broken one is not."""
    checkpoint = checkpoint.resolve()
    with tempfile.TemporaryDirectory(prefix="broken-") as work:
        broken = Path(work) / checkpoint.name
        doubled = double_a_scale(checkpoint, broken)
        whole = serve_check(checkpoint, python, arguments or [])
        console.print(f"whole: status {whole.returncode}\n{whole.stdout}{last_line(whole)}")
        found = serve_check(broken, python, arguments or [])
        console.print(f"{doubled} doubled: status {found.returncode}\n{last_line(found)}")
    if whole.returncode or not found.returncode or GAP not in found.stderr:
        raise typer.Exit(1)


def double_a_scale(checkpoint: Path, copy: Path) -> str:
    """Copy a checkpoint and double one linear's scales; the name of that tensor."""
    shutil.copytree(checkpoint, copy)
    for file in sorted(copy.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
        tensors = load_file(file)
        scales = sorted(name for name in tensors if name.endswith(SCALE))
        if scales:
            tensors[scales[0]] = tensors[scales[0]] * 2
            file.unlink()
            save_file(tensors, file, metadata)
            return scales[0]
    raise typer.BadParameter(f"{checkpoint}: no tensor whose name ends with {SCALE}")


def serve_check(
    checkpoint: Path, python: str | None, arguments: list[str]
) -> subprocess.CompletedProcess[str]:
    """Run ``blockquant serve-check`` as a user does."""
    command = [sys.executable, "-m", "flows.cli", "serve-check", str(checkpoint)]
    command += [] if python is None else ["--python", python]
    command += ["--", *arguments] if arguments else []
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    """What a command said last of what went wrong."""
    return "\n".join(done.stderr.strip().splitlines()[-1:])


if __name__ == "__main__":
    typer.run(main)
