"""Which results are made again when something changes: what they depend on, and nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tasks.advance import advance
from tasks.calibration_set import calibration_set
from tasks.engine import lineage
from tasks.engine.job import Job
from tasks.engine.lineage import quantizer_imports
from tasks.engine.streams import Streams, start_stream
from tasks.engine.version import Version
from tasks.evaluate import evaluate
from tasks.evaluation_set import evaluation_set
from tasks.export import export
from tasks.learn import learn
from tasks.load_model import load_model
from tasks.outside import outside
from tasks.pack import pack
from tasks.quantize import Origin, quantize
from tasks.transform import transform
from tasks.verify import verify
from tests.models import edit_config, make_checkpoint, make_text
from tests.tasks.conftest import JobOf

TEXTS = {"calibration_set", "evaluation_set"}
FIRST = {"transform 0", "quantize 0", "pack 0", "advance 0"}
SECOND = {"transform 1", "quantize 1", "pack 1"}
BLOCKS = FIRST | SECOND
END = {"export", "verify", "evaluate"}
OUTSIDE = {"outside"} | END
ALL = {"load_model", *TEXTS, *BLOCKS, *OUTSIDE}


def keys_of(job: Job) -> dict[str, str]:
    """The keys of all steps of a run, in the flow's order; nothing is computed."""
    step = job.steps[-1]
    assert step.calib is not None
    keys = {
        "load_model": load_model.key(job),
        "evaluation_set": evaluation_set.key(job, job.evaluation),
        "calibration_set": calibration_set.key(job, step.calib),
    }
    stream = start_stream(job, keys["calibration_set"])
    packed = []
    for block in job.blocks:
        decision = transform.key(job, step, stream, block=block)
        origin = Origin(step, stream, decision)
        packed.append(pack.key(job, origin, block=block))
        keys[f"transform {block}"] = decision
        keys[f"quantize {block}"] = quantize.key(job, origin, block=block)
        keys[f"pack {block}"] = packed[-1]
        if block + 1 < len(job.blocks):
            through = packed[-1] if step.quant.quant_out else None
            keys[f"advance {block}"] = advance.key(job, stream, through, block=block)
            stream = stream.after(keys[f"advance {block}"], through)
    beside = outside.key(job)
    exported = export.key(job, tuple(packed), beside)
    tokens = keys["evaluation_set"]
    return keys | {
        "outside": beside,
        "export": exported,
        "verify": verify.key(job, exported, {}),
        "evaluate": evaluate.key(job, exported, tokens, job.evaluation),
    }


class Case:
    """A model, a text and a recipe, each to be changed."""

    def __init__(self, folder: Path, model: Path, job_of: JobOf) -> None:
        self.model = Path(shutil.copytree(model, folder / "model"))
        self.text = make_text(folder / "words.txt", words=500)
        self.job_of = job_of

    def keys(self, recipe: str, *overrides: str) -> dict[str, str]:
        texts = [
            f"{place}={{name: text, path: {self.text}, seq_len: 16{more}}}"
            for place, more in (("calib", ", n_samples: 2, seed: 1"), ("eval", ", windows: 2"))
        ]
        identity = "quant.method=Identity"
        return keys_of(self.job_of(self.model, recipe, identity, *texts, *overrides))

    def flip(self, name: str) -> None:
        tensors = load_file(self.model / "model.safetensors")
        tensors[name].view(torch.uint8).view(-1)[0] ^= 1
        save_file(tensors, self.model / "model.safetensors", {"format": "pt"})

    def edit(self, name: str, **changes: Any) -> None:
        path = self.model / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys") / "model"
    return make_checkpoint(folder, hidden=64, intermediate=128)


@pytest.fixture
def case(tmp_path: Path, model: Path, job_of: JobOf) -> Case:
    return Case(tmp_path, model, job_of)


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    assert set(before) == set(after) == ALL
    assert len(set(before.values())) == len(ALL)
    return {name for name in before if before[name] != after[name]}


FILES: dict[str, tuple[Callable[[Case], object], set[str]]] = {
    "a weight of block 0": (
        lambda case: case.flip("model.layers.0.mlp.up_proj.weight"),
        BLOCKS | END,
    ),
    "a norm of block 0": (
        lambda case: case.flip("model.layers.0.input_layernorm.weight"),
        BLOCKS | END,
    ),
    "a weight of block 1": (
        lambda case: case.flip("model.layers.1.self_attn.v_proj.weight"),
        SECOND | END,
    ),
    "the embedding": (lambda case: case.flip("model.embed_tokens.weight"), BLOCKS | OUTSIDE),
    "the final norm": (lambda case: case.flip("model.norm.weight"), OUTSIDE),
    "the head": (lambda case: case.flip("lm_head.weight"), OUTSIDE),
    "config.json": (
        lambda case: edit_config(case.model, rms_norm_eps=1e-4),
        {"load_model"} | BLOCKS | END,
    ),
    "the tokenizer": (
        lambda case: case.edit("tokenizer_config.json", more=1),
        TEXTS | BLOCKS | END,
    ),
    "generation_config.json": (lambda case: case.edit("generation_config.json", top_k=3), END),
    "the text": (
        lambda case: case.text.write_text("More. " + case.text.read_text()),
        TEXTS | BLOCKS | END,
    ),
}


@pytest.mark.parametrize(("change", "again"), FILES.values(), ids=FILES.keys())
@pytest.mark.parametrize("quant_out", ["false", "true"])
def test_a_changed_file(
    case: Case, change: Callable[[Case], object], again: set[str], quant_out: str
) -> None:
    through = f"quant.quant_out={quant_out}"
    before = case.keys("rtn_w8a8", through)
    assert case.keys("rtn_w8a8", through) == before
    change(case)
    assert changed(before, case.keys("rtn_w8a8", through)) == again


CODES = {"quantize 0", "quantize 1", "pack 0", "pack 1"} | END
RECIPES: dict[str, tuple[str, set[str]]] = {
    "group size": ("quant.weight.group_size=32", CODES),
    "zero points": ("quant.weight.symmetric=false", CODES),
    "bits": ("quant.weight.bit=8", CODES),
    "a linear left out": (
        "ignored_layers=[model.layers.1.mlp.down_proj]",
        {"load_model", "transform 1", "quantize 1", "pack 1"} | END,
    ),
    "calibration seed": ("calib.seed=2", {"calibration_set"} | BLOCKS | END),
    "calibration samples": ("calib.n_samples=3", {"calibration_set"} | BLOCKS | END),
    "evaluation windows": ("eval.windows=3", {"evaluation_set", "evaluate"}),
    "the place of the model": ("model.path=/elsewhere", set()),
    "the place of the output": ("save.save_path=elsewhere", set()),
    "a key without effect": ("quant.weight.use_qtorch=true", set()),
}


@pytest.mark.parametrize(("override", "again"), RECIPES.values(), ids=RECIPES.keys())
def test_a_changed_recipe(case: Case, override: str, again: set[str]) -> None:
    base = "quant.weight.group_size=64"
    assert changed(case.keys("rtn_w4a16", base), case.keys("rtn_w4a16", base, override)) == again


def test_the_dtype_of_an_evaluation(case: Case) -> None:
    found = changed(case.keys("rtn_w8a8"), case.keys("rtn_w8a8", "eval.dtype=bfloat16"))
    assert found - TEXTS == {"evaluate"}


STATIC = ("quant.act.calib_algo=static_percentile", "quant.act.percentile=99.9")


@pytest.mark.parametrize(
    "override", ["quant.act.calib_algo=static_minmax", "quant.act.percentile=99"]
)
@pytest.mark.parametrize("method", ["Awq", "OsPlus"])
def test_a_search_reads_how_static_inputs_are_quantized(
    case: Case, method: str, override: str
) -> None:
    given = (f"quant.method={method}", "quant.special={}", *STATIC)
    before = case.keys("fp8/awq_fp8_static", *given)
    after = case.keys("fp8/awq_fp8_static", *given, override)
    assert changed(before, after) == BLOCKS | END


def test_learning_reads_how_static_inputs_are_quantized(case: Case) -> None:
    def key(*overrides: str) -> str:
        job = case.job_of(case.model, "fp8/awq_fp8_static", *STATIC, *overrides)
        stream = start_stream(job, "windows")
        return learn.key(job, job.steps[-1], Streams(stream, stream), block=0)

    assert key() != key("quant.act.percentile=99")
    assert key() == key("serving.tensor_parallel=2")


def test_where_the_files_lie_does_not_matter(case: Case) -> None:
    before = case.keys("rtn_w8a8")
    case.model = case.model.rename(case.model.with_name("moved"))
    case.text = case.text.rename(case.text.with_name("moved.txt"))
    assert case.keys("rtn_w8a8") == before


def test_what_decides_the_last_bits(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    before = case.keys("rtn_w8a8")
    threads = torch.get_num_threads()
    for name, value in (
        ("torch.get_num_threads", lambda: threads + 1),
        ("torch.__version__", "9.9.9"),
        ("tasks.engine.decoder.transformers_version", lambda: "9.9.9"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(name, value)
            assert changed(before, case.keys("rtn_w8a8")) == ALL
    assert case.keys("rtn_w8a8") == before


@pytest.mark.parametrize("change", ["weights", "config"])
def test_text_that_the_model_writes_is_the_models(case: Case, change: str) -> None:
    given = ("calib={name: self_generated, n_samples: 2, seq_len: 16, seed: 1}",)
    before = case.keys("rtn_w8a8", *given)
    if change == "weights":
        case.flip("lm_head.weight")
    else:
        # the token that each window starts with
        edit_config(case.model, bos_token_id=5)
    again = changed(before, case.keys("rtn_w8a8", *given))
    assert again >= {"calibration_set"} | BLOCKS | END
    assert "evaluation_set" not in again


@pytest.mark.parametrize("helper", ["collect", "folding", "ranges", "sharing", "streams"])
def test_what_rounds_and_reports_counts(helper: str) -> None:
    known = lineage._closure((*quantizer_imports("tasks.quantize"), *quantize.code))
    assert set(quantizer_imports(f"tasks.engine.{helper}")) <= known


def test_what_is_rotated_is_the_architecture_s(case: Case) -> None:
    def outside_of(version: Version) -> str:
        return outside.key(case.job_of(case.model, "rtn_w8a8"), version)

    plain, rotated = Version(), Version(rotation="a rotation's key")
    before = {version: outside_of(version) for version in (plain, rotated)}
    # their tensors have the same names, but one adds 1 to what a norm multiplies with
    edit_config(case.model, model_type="gemma")
    assert outside_of(plain) == before[plain]
    assert outside_of(rotated) != before[rotated]
