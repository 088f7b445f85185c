"""The command line: what each command prints, for people and for machines."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from configs.loading import shipped_names
from tests.conftest import Outcome
from tests.flows.conftest import bare_environment, command, tree
from tests.models import edit_config, make_checkpoint

Here = Callable[..., Outcome]

INDEX = "model.safetensors.index.json"
# a small evaluation, a group size that is not the recipe's, and two keys without effect
OPTIONS = (
    *("--set", "eval.windows=2", "--set", "eval.seq_len=32"),
    *("--set", "quant.weight.group_size=64"),
    *("--set", "quant.weight.use_qtorch=true", "--set", "model.tokenizer_mode=fast"),
)
LOG_LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (.*)")


@dataclass(frozen=True)
class Made:
    """A checkpoint made by a real process from nothing, and what that process said."""

    home: Path
    folder: Path
    outcome: Outcome

    @property
    def result(self) -> dict[str, Any]:
        """The object it printed."""
        return self.outcome.json


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Made:
    """A first run as a user has it: no home, no settings, no Prefect or MLflow server."""
    place = tmp_path_factory.mktemp("made")
    done = subprocess.run(
        command(
            *("quantize", "rtn_w4a16", "--model", tiny, "--output", place / "out", "--json"),
            *OPTIONS,
        ),
        cwd=place,
        env=bare_environment(BLOCKQUANT_HOME=str(place / "home")),
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    outcome = Outcome(done.returncode, done.stdout, done.stderr)
    assert outcome.status == 0, outcome.err
    return Made(place / "home", place / "out", outcome)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint."""
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


def size_of(folder: Path) -> int:
    """Bytes of every tensor of a checkpoint."""
    return sum(t.numel() * t.itemsize for t in tensors_of(folder).values())


# recipes


def test_recipes(here: Here, tmp_path: Path) -> None:
    before = tree(tmp_path)
    listed = here("recipes", "--json")
    assert (listed.status, listed.err) == (0, "")
    rows = json.loads(listed.out)["recipes"]
    assert [row["name"] for row in rows] == shipped_names()
    by_name = {row["name"]: row for row in rows}
    wanted = {
        "rtn_w4a16": "W4A16",
        "rtn_w4a16_asym": "W4A16 asym",
        "rtn_w8a16": "W8A16",
        "rtn_w8a8": "W8A8",
        "fp8/rtn_fp8": "FP8 dynamic",
        "fp8/rtn_fp8_block": "FP8 block",
    }
    for name, scheme in wanted.items():
        assert (by_name[name]["scheme"], by_name[name]["method"]) == (scheme, "RTN")
        assert by_name[name]["needs"] == "nothing"
    shown = here("recipes")
    assert (shown.status, shown.err) == (0, "")
    for row in rows:
        (line,) = [line for line in shown.out.splitlines() if f" {row['name']} " in line]
        assert row["scheme"] in line
    assert tree(tmp_path) == before


def test_the_version(here: Here) -> None:
    outcome = here("--version")
    assert (outcome.status, outcome.out) == (0, f"blockquant {version('blockquant')}\n")


@pytest.mark.parametrize("arguments", [(), ("--help",), ("quantize", "--help")])
def test_help(here: Here, arguments: tuple[str, ...]) -> None:
    outcome = here(*arguments)
    assert (outcome.status, outcome.err) == (0, "")
    assert "Usage: " in outcome.out


def test_store_alone(here: Here) -> None:
    outcome = here("store")
    assert outcome.status == 2
    assert outcome.err.startswith("blockquant: Missing command")
    assert len(outcome.err.splitlines()) == 1


# check


def test_check(here: Here, tmp_path: Path, tiny: Path, made: Made) -> None:
    before = tree(tmp_path)
    arguments = ("check", "rtn_w4a16", "--model", tiny, "--output", tmp_path / "out", *OPTIONS)
    outcome = here(*arguments, "--json")
    assert (outcome.status, outcome.err) == (0, "")
    described = outcome.json
    assert described["model"] == str(tiny)
    assert described["architecture"] == "llama"
    assert (described["blocks"], described["linears"], described["ignored"]) == (2, 14, [])
    assert described["format"] == "pack-quantized"
    assert described["export_bytes"] == pytest.approx(size_of(made.folder), rel=0.01)
    assert described["peak_memory_bytes"] > described["export_bytes"]
    assert described["seconds"] > 0
    shown = here(*arguments)
    assert (shown.status, shown.err) == (0, "")
    for key in described:
        assert key in shown.out
    assert tree(tmp_path) == before


@pytest.mark.parametrize("recipe", ["rtn_w8a8", "fp8/rtn_fp8_block"])
def test_check_predicts_the_size_of_a_tied_float32_model(
    here: Here, services: object, home: Path, tmp_path: Path, recipe: str
) -> None:
    model = make_checkpoint(tmp_path / "model", dtype=torch.float32, tied=True, blocks=1)
    options = ("--model", model, "--output", tmp_path / "out", *OPTIONS[:4], "--json")
    options += ("--set", "serving.check_kernels=false")
    predicted = here("check", recipe, *options).json["export_bytes"]
    outcome = here("quantize", recipe, *options)
    assert outcome.status == 0, outcome.err
    assert predicted == pytest.approx(size_of(tmp_path / "out"), rel=0.01)
    assert here("verify", tmp_path / "out").status == 0


# quantize


def test_first_run_for_a_machine(made: Made, tiny: Path) -> None:
    result = made.result
    assert set(result) == {
        *("checkpoint", "metrics", "bytes", "scheme", "seconds", "steps", "mlflow", "launch"),
        *("unserved", "served", "gate", "uploaded", "scores", "marks", "block_ends", "peaks"),
        "phases",
    }
    phases, marks = result["phases"], result["marks"]
    assert phases.pop("computed ahead") == phases["waited for what is computed ahead"] == 0
    assert phases["computed in tasks"] > 0 and phases["written"] > 0
    assert phases["orchestrated"] > 0
    took = marks["last block"] - marks["first block"]
    assert sum(phases.values()) == pytest.approx(took, abs=0.005)
    assert result["unserved"] is None
    assert result["served"]["served"] is False
    assert result["served"]["reason"].startswith(f"no SGLang in {sys.executable}")
    assert result["checkpoint"] == str(made.folder)
    assert result["scheme"] == "W4A16"
    assert result["launch"].startswith("python -m sglang.launch_server --model-path ")
    assert str(made.folder) in result["launch"]
    assert [step["step"] for step in result["steps"]] == [
        *("load_model", "evaluation_set"),
        *(f"{name}[block {block}]" for block in (0, 1) for name in ("quantize", "pack")),
        *("outside", "export", "verify", "evaluate", "sample_text"),
    ]
    assert not any(step["cached"] for step in result["steps"])
    assert result["metrics"]["tokens"] == 2 * 31
    assert result["bytes"] == sum(f.stat().st_size for f in made.folder.glob("*.safetensors"))
    assert result["mlflow"]["uri"] == f"sqlite:///{made.home / 'mlflow.db'}"
    files = {path.name for path in made.folder.iterdir()}
    assert files > {"README.md", "blockquant.json", "config.json", "tokenizer.json"}
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (made.folder / name).read_bytes() == (tiny / name).read_bytes()


def test_overrides_reach_the_export(made: Made) -> None:
    described = json.loads((made.folder / "config.json").read_text())["quantization_config"]
    assert described["config_groups"]["group_0"]["weights"]["group_size"] == 64
    assert tensors_of(made.folder)["model.layers.0.mlp.down_proj.weight_scale"].shape == (128, 4)


def test_nothing_but_log_lines_on_standard_error(made: Made) -> None:
    lines = made.outcome.err.splitlines()
    matched = [LOG_LINE.fullmatch(line) for line in lines]
    assert all(matched), made.outcome.err
    said = [match[1] for match in matched if match]
    # each key without effect once, each block once, then the end
    assert sorted(said[:2]) == [
        "model.tokenizer_mode has no effect here and is ignored",
        "quant.weight.use_qtorch has no effect here and is ignored",
    ]
    assert said[2:4] == [f"block {n} of 2 done (0 cache hits)" for n in (1, 2)]
    assert said[4].startswith("not served: no SGLang in ")
    assert said[5].startswith(f"published {made.folder}: NLL ")
    # two blocks of random weights agree too little
    assert said[6].startswith("tiny-W4A16 version 1: refused: top-1 agreement 0.6")
    assert len(said) == 7
    (log,) = (made.home / "store" / "logs").glob("2*.log")
    kept = log.read_text()
    for line in said:
        assert kept.count(line) == 1
    assert "quantize[block 1] done" in kept


def test_second_run_on_a_terminal(made: Made, tmp_path: Path, tiny: Path) -> None:
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 200, 0, 0))
    environment = bare_environment(BLOCKQUANT_HOME=str(made.home), TERM="xterm-256color")
    process = subprocess.Popen(
        command(
            *("quantize", "rtn_w4a16", "--model", tiny, "--output", tmp_path / "again"), *OPTIONS
        ),
        cwd=tmp_path,
        env={k: v for k, v in environment.items() if k not in ("NO_COLOR", "COLUMNS", "LINES")},
        stdin=follower,
        stdout=follower,
        stderr=follower,
    )
    os.close(follower)
    written = b""
    while True:
        try:
            part = os.read(leader, 1 << 16)
        except OSError:
            # the other end is closed
            break
        if not part:
            break
        written += part
    os.close(leader)
    assert process.wait(timeout=60) == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.decode())
    # the bar, and no log lines beside it
    assert re.search(r"blocks ━+ +\d/2 .* cached", text), text
    assert not LOG_LINE.search(text)
    for noise in ("Traceback", "Warning", "WARN", "prefect", "alembic"):
        assert noise not in text
    lines = text.replace("\r", "\n").splitlines()
    assert any(line.startswith("W4A16: NLL ") for line in lines)
    assert any("(11 steps, 11 found in the store)" in line for line in lines)
    (launch,) = [line for line in lines if line.startswith("serve it: ")]
    assert launch.startswith(
        f"serve it: python -m sglang.launch_server --model-path {tmp_path / 'again'}"
    )
    assert tensors_of(tmp_path / "again").keys() == tensors_of(made.folder).keys()


def test_a_second_run_loads_nothing_that_only_makes_results(
    made: Made, tmp_path: Path, tiny: Path
) -> None:
    libraries = tmp_path / "libraries"
    for name in ("transformers", "compressed_tensors", "datasets", "torchvision"):
        (libraries / name).mkdir(parents=True)
        (libraries / name / "__init__.py").write_text(f"raise SystemExit('{name} is loaded')")
    environment = bare_environment(BLOCKQUANT_HOME=str(made.home))
    environment["PYTHONPATH"] = os.pathsep.join([str(libraries), environment["PYTHONPATH"]])
    done = subprocess.run(
        command(
            *("quantize", "rtn_w4a16", "--model", tiny, "--output", tmp_path / "again", "--json"),
            *OPTIONS,
        ),
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert all(step["cached"] for step in json.loads(done.stdout)["steps"])
    assert tensors_of(tmp_path / "again").keys() == tensors_of(made.folder).keys()


def test_overwrite_and_default_output(
    here: Here, services: object, home: Path, tmp_path: Path, tiny: Path
) -> None:
    arguments = ("quantize", "rtn_w4a16", "--model", tiny, *OPTIONS)
    first = here(*arguments)
    assert first.status == 0, first.err
    folder = tmp_path / "work" / f"{tiny.name}-rtn_w4a16"
    assert "serve it: python -m sglang.launch_server --model-path" in first.out
    (folder / "leftover").write_text("of the first run")
    second = here(*arguments, "--overwrite", "--json")
    assert second.status == 0, second.err
    assert second.json["checkpoint"] == str(folder)
    assert all(step["cached"] for step in second.json["steps"])
    assert not (folder / "leftover").exists()
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name]


# verify


def test_verify(here: Here, made: Made) -> None:
    before = tree(made.folder)
    outcome = here("verify", made.folder, "--json")
    assert (outcome.status, outcome.err) == (0, "")
    report = outcome.json
    assert (report["linears"], report["tensors"]) == (14, len(tensors_of(made.folder)))
    assert report["logit_difference"] < 1e-4
    assert (report["compared"], report["unserved"]) == (True, None)
    shown = here("verify", made.folder)
    assert (shown.status, shown.err) == (0, "")
    assert shown.out.splitlines()[0] == f"{made.folder} is whole"
    assert tree(made.folder) == before


def change_tensors(change: Callable[[dict[str, Tensor]], None]) -> Callable[[Path], None]:
    """A change of the tensors in the shard of block 1, or of what lies outside of the blocks."""

    def apply(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        for file in sorted({*index["weight_map"].values()}):
            tensors = load_file(folder / file)
            known = set(tensors)
            try:
                change(tensors)
            except KeyError:
                continue
            save_file(tensors, folder / file, {"format": "pt"})
            for name in known - set(tensors):
                del index["weight_map"][name]
            index["weight_map"] |= {name: file for name in tensors}
            (folder / INDEX).write_text(json.dumps(index))
            return
        raise AssertionError("no shard has the tensor to change")

    return apply


def change_config(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """A change of ``quantization_config``."""

    def apply(folder: Path) -> None:
        described = json.loads((folder / "config.json").read_text())["quantization_config"]
        change(described)
        edit_config(folder, quantization_config=described)

    return apply


def weights_of(described: dict[str, Any]) -> dict[str, Any]:
    weights: dict[str, Any] = described["config_groups"]["group_0"]["weights"]
    return weights


UP = "model.layers.1.mlp.up_proj"
NORM = "model.layers.1.input_layernorm.weight"


def doubled_scale(tensors: dict[str, Tensor]) -> None:
    tensors[f"{UP}.weight_scale"] *= 2


def another_code(tensors: dict[str, Tensor]) -> None:
    tensors[f"{UP}.weight_packed"][0, 0] ^= 1


def scale_not_a_number(tensors: dict[str, Tensor]) -> None:
    tensors[f"{UP}.weight_scale"][3, 1] = float("nan")


def missing_scale(tensors: dict[str, Tensor]) -> None:
    del tensors[f"{UP}.weight_scale"]


def missing_norm(tensors: dict[str, Tensor]) -> None:
    del tensors[NORM]


def short_norm(tensors: dict[str, Tensor]) -> None:
    tensors[NORM] = tensors[NORM][:-1].clone()


def norm_of_another_dtype(tensors: dict[str, Tensor]) -> None:
    tensors[NORM] = tensors[NORM].float()


def missing_head(tensors: dict[str, Tensor]) -> None:
    del tensors["lm_head.weight"]


def extra_in_a_linear(tensors: dict[str, Tensor]) -> None:
    tensors[f"{UP}.weight_g_idx"] = torch.zeros_like(tensors[NORM])


def extra_in_a_block(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.1.extra.weight"] = torch.zeros_like(tensors[NORM])


def extra_outside(tensors: dict[str, Tensor]) -> None:
    tensors["model.extra.weight"] = torch.zeros_like(tensors["model.norm.weight"])


def truncated_shard(folder: Path) -> None:
    path = folder / "model-00002-of-00003.safetensors"
    os.truncate(path, path.stat().st_size - 64)


def missing_shard(folder: Path) -> None:
    (folder / "model-00002-of-00003.safetensors").unlink()


def without_description(folder: Path) -> None:
    edit_config(folder, quantization_config=None)


def fewer_blocks(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=1)


CONFIG = ("config.json", "quantization_config")
BROKEN: list[tuple[str, Callable[[Path], None], int, tuple[str, ...]]] = [
    ("doubled_scale", change_tensors(doubled_scale), 1, (UP, "other codes or scales")),
    ("another_code", change_tensors(another_code), 1, (UP, "other codes or scales")),
    ("scale_nan", change_tensors(scale_not_a_number), 1, (f"{UP}.weight_scale", "NaN or Inf")),
    ("missing_scale", change_tensors(missing_scale), 1, (f"{UP}.weight_scale", "not in")),
    ("missing_norm", change_tensors(missing_norm), 1, (NORM, "not in the checkpoint")),
    ("short_norm", change_tensors(short_norm), 1, (NORM, "is torch.bfloat16 [127]", "[128]")),
    ("norm_dtype", change_tensors(norm_of_another_dtype), 1, (NORM, "is torch.float32 [128]")),
    ("missing_head", change_tensors(missing_head), 1, ("lm_head.weight", "not in the checkpoint")),
    ("extra_in_a_linear", change_tensors(extra_in_a_linear), 1, (f"{UP}.weight_g_idx", "format")),
    ("extra_in_a_block", change_tensors(extra_in_a_block), 1, ("model.layers.1.extra.weight",)),
    ("extra_outside", change_tensors(extra_outside), 1, ("model.extra.weight", "no tensor of")),
    ("truncated_shard", truncated_shard, 2, ("model-00002-of-00003", "not a whole safetensors")),
    ("missing_shard", missing_shard, 2, (INDEX, "model-00002-of-00003", "not in the folder")),
    ("fewer_blocks", fewer_blocks, 1, ("model.layers.1.", "no tensor of the model")),
    ("no_description", without_description, 2, (*CONFIG, "nothing to verify")),
    (
        "group_size",
        change_config(lambda d: weights_of(d).update(group_size=128)),
        1,
        ("model.layers.0.self_attn.q_proj.weight_scale", "[128, 2]", "should be", "[128, 1]"),
    ),
    (
        "bits",
        change_config(lambda d: weights_of(d).update(num_bits=8)),
        1,
        ("model.layers.0.self_attn.q_proj.weight_packed", "should be"),
    ),
    (
        "symmetry",
        change_config(lambda d: weights_of(d).update(symmetric=False)),
        1,
        ("model.layers.0.self_attn.q_proj.weight_zero_point", "not in the checkpoint"),
    ),
    (
        "unknown_field",
        change_config(lambda d: weights_of(d).update(sparsity=0.5)),
        1,
        (*CONFIG, "compressed-tensors refuses"),
    ),
    (
        "targets",
        change_config(lambda d: d["config_groups"]["group_0"].update(targets=["Conv2d"])),
        1,
        (*CONFIG, "config_groups", "Conv2d"),
    ),
    (
        "method",
        change_config(lambda d: d.update(quant_method="gptq")),
        1,
        (*CONFIG, "quant_method", "'gptq'", "should be 'compressed-tensors'"),
    ),
    (
        "format",
        change_config(lambda d: d.update(format="marlin-24")),
        2,
        (*CONFIG, "'marlin-24'", "exported by `blockquant quantize`"),
    ),
    (
        "head_not_ignored",
        change_config(lambda d: d.update(ignore=[])),
        1,
        (*CONFIG, "ignore", "lm_head is missing"),
    ),
    (
        "parent_ignored",
        change_config(lambda d: d.update(ignore=["lm_head", "model.layers.0"])),
        1,
        (*CONFIG, "ignore", "model.layers.0 is no linear"),
    ),
    (
        "linear_ignored",
        change_config(lambda d: d.update(ignore=["lm_head", UP])),
        1,
        (f"{UP}.weight", "not in the checkpoint"),
    ),
]


@pytest.mark.parametrize(
    ("damage", "status", "says"), [case[1:] for case in BROKEN], ids=[case[0] for case in BROKEN]
)
def test_verify_of_a_broken_checkpoint(
    here: Here,
    copy_of: Callable[..., Path],
    made: Made,
    damage: Callable[[Path], None],
    status: int,
    says: tuple[str, ...],
) -> None:
    folder = copy_of(made.folder)
    damage(folder)
    outcome = here("verify", folder)
    assert (outcome.status, outcome.out) == (status, ""), outcome.err
    (line,) = outcome.err.splitlines()
    assert line.startswith("blockquant: ")
    for word in says:
        assert word in line


def test_scales_are_known_by_the_report_alone(
    here: Here, copy_of: Callable[..., Path], made: Made
) -> None:
    """Without the report nobody can know the scales; the rest is still checked."""
    folder = copy_of(made.folder)
    (folder / "blockquant.json").unlink()
    change_tensors(doubled_scale)(folder)
    outcome = here("verify", folder)
    assert outcome.status == 0 and "is whole" in outcome.out
    assert f"{folder}: no digests of codes are in its report" in outcome.err
    assert here("verify", folder, "--json").json["compared"] is False


def test_what_sglang_does_not_serve_is_said_where_a_checkpoint_is_verified(
    here: Here, copy_of: Callable[..., Path], made: Made
) -> None:
    folder = copy_of(made.folder)
    report = json.loads((folder / "blockquant.json").read_text())
    (folder / "blockquant.json").write_text(json.dumps(report | {"unserved": "unpacked codes"}))
    outcome = here("verify", folder)
    assert outcome.status == 0
    assert f"{folder}: SGLang does not serve it: unpacked codes" in outcome.err


# evaluate


def test_evaluate_with_a_reference(here: Here, made: Made, tiny: Path, words: Path) -> None:
    arguments = ("evaluate", made.folder, "--text", words, "--windows", 3, "--window", 48)
    outcome = here(*arguments, "--reference", tiny, "--json")
    assert (outcome.status, outcome.err) == (0, "")
    report = outcome.json
    wanted = {"nll", "perplexity", "tokens", "reference_nll", "kl", "top1_agreement"}
    assert wanted <= set(report)
    assert report["tokens"] == 3 * 47
    assert report["perplexity"] == pytest.approx(torch.tensor(report["nll"]).exp().item(), rel=1e-5)
    assert 0 < report["kl"] < 0.1
    assert 0.5 < report["top1_agreement"] <= 1
    shown = here(*arguments, "--reference", tiny)
    (line,) = shown.out.splitlines()
    assert line.startswith(f"NLL {report['nll']:.4f}, perplexity ")
    assert "top-1 agreement" in line


def test_evaluate_without_a_reference(here: Here, tiny: Path, words: Path) -> None:
    """The figure of a model that is not quantized is that of transformers."""
    outcome = here("evaluate", tiny, "--text", words, "--windows", 2, "--window", 64, "--json")
    assert (outcome.status, outcome.err) == (0, "")
    report = outcome.json
    assert set(report) == {"nll", "perplexity", "tokens"}
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    ids = [
        tokenizer.bos_token_id,
        *tokenizer(words.read_text(), add_special_tokens=False).input_ids,
    ]
    windows = torch.tensor(ids[:128]).view(2, 64)
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    with torch.no_grad():
        logs = model(windows).logits[:, :-1].log_softmax(-1)
    expected = -logs.gather(-1, windows[:, 1:, None]).mean().item()
    assert report["nll"] == pytest.approx(expected, abs=1e-5)
    assert report["tokens"] == 2 * 63


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_evaluate_on_other_files(
    here: Here, tmp_path: Path, tiny: Path, words: Path, suffix: str
) -> None:
    from datasets import Dataset

    rows = Dataset.from_list([{"text": words.read_text()[:3000]}])
    path = tmp_path / f"rows.{suffix}"
    (rows.to_json if suffix == "jsonl" else rows.to_parquet)(str(path))
    sizes = ("--windows", 2, "--window", 64, "--json")
    assert (
        here("evaluate", tiny, "--text", path, *sizes).json
        == here("evaluate", tiny, "--text", words, *sizes).json
    )


def test_evaluate_of_a_damaged_checkpoint(
    here: Here, copy_of: Callable[..., Path], made: Made, words: Path
) -> None:
    folder = copy_of(made.folder)
    truncated_shard(folder)
    outcome = here("evaluate", folder, "--text", words)
    assert outcome.status == 2
    (line,) = outcome.err.splitlines()
    assert "model-00002-of-00003.safetensors: not a whole safetensors file" in line


# store


def test_store(here: Here, tmp_path: Path, made: Made) -> None:
    shutil.copytree(made.home / "store", tmp_path / "store")
    at = ("--store", tmp_path / "store")
    listed = here("store", "ls", *at, "--json").json
    assert listed["store"] == str(tmp_path / "store")
    made_by_steps = [step["step"].split("[")[0] for step in made.result["steps"]]
    tasks = sorted(entry["task"] for entry in listed["entries"])
    assert tasks == sorted([*made_by_steps, "pictures"])
    assert all(entry["bytes"] >= 0 and entry["created"] > 0 for entry in listed["entries"])
    shown = here("store", "ls", *at)
    assert (shown.status, shown.err) == (0, "")
    assert any("quantize" in line and " 2 " in line for line in shown.out.splitlines())
    # what is young stays
    assert here("store", "gc", *at, "--json").json == {"removed": 0, "bytes": 0}
    (tmp_path / "store" / "staging" / "deadbeef").mkdir(parents=True)
    removed = here("store", "gc", *at, "--days", 0, "--json").json
    assert removed["removed"] == len(listed["entries"])
    assert removed["bytes"] == sum(entry["bytes"] for entry in listed["entries"])
    assert here("store", "ls", *at, "--json").json["entries"] == []
    assert not list((tmp_path / "store" / "staging").iterdir())
    assert here("store", "gc", *at).out == "removed 0 entries, 0.0 MB\n"


def test_store_that_is_not_there(here: Here, tmp_path: Path) -> None:
    before = tree(tmp_path)
    assert here("store", "ls", "--json").json == {
        "store": str(tmp_path / "home" / "store"),
        "entries": [],
    }
    assert here("store", "gc", "--json").json == {"removed": 0, "bytes": 0}
    assert tree(tmp_path) == before
