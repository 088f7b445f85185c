"""Bad input: one line that says what, where and how to mend it; status 2; nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mlflow import MlflowClient
from safetensors.torch import load_file, save_file

from tests.conftest import Outcome
from tests.flows.conftest import tree
from tests.models import edit_config, make_checkpoint

Here = Callable[..., Outcome]

WEIGHT = {"bit": 4, "symmetric": True, "granularity": "per_group", "group_size": 128}
PACKED = WEIGHT | {"need_pack": True}
CALIBRATED = ("--set", "quant.method=Identity", "--set", "calib.seq_len=64")
SHORT = ("--set", "eval.windows=1", "--set", "eval.seq_len=32")
INDEX = "model.safetensors.index.json"


def write_recipe(folder: Path, **sections: Any) -> Path:
    """A recipe of the given sections; RTN to W4A16 where ``quant`` is not given."""
    path = folder / "recipe.yml"
    path.write_text(yaml.safe_dump({"quant": {"method": "RTN", "weight": PACKED}} | sections))
    return path


def calib_text(path: Path, name: str = "text") -> tuple[str, ...]:
    """Options that calibrate on a file."""
    return (*CALIBRATED, "--set", f"calib.name={name}", "--set", f"calib.path={path}")


def the_line(outcome: Outcome, status: int) -> str:
    """The one line on standard error."""
    assert outcome.status == status, outcome.err
    lines = outcome.err.splitlines()
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith("blockquant: ")
    assert outcome.out == ""
    return lines[0]


@pytest.fixture
def refused(here: Here, tmp_path: Path) -> Callable[..., str]:
    """Run a command that must end with status 2, one line and no trace; returns the line."""

    def run(*arguments: object, says: tuple[str, ...]) -> str:
        before = tree(tmp_path)
        line = the_line(here(*arguments), 2)
        for word in says:
            assert word in line
        assert tree(tmp_path) == before
        return line

    return run


Refused = Callable[..., str]


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A checkpoint of several shards."""
    folder = make_checkpoint(tmp_path / "sharded", hidden=64, intermediate=128, shard_size="500KB")
    assert (folder / INDEX).is_file()
    return folder


# recipes


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        pytest.param(
            {"quant": {"method": "RTN", "weight": WEIGHT | {"ned_pack": True}}},
            ("recipe.yml", "quant.weight.ned_pack", "unknown key", "did you mean 'need_pack'?"),
            id="misspelt_key",
        ),
        pytest.param(
            {"base": {"seed": "many"}},
            ("recipe.yml", "base.seed", "'many' is not a whole number"),
            id="wrong_type",
        ),
        pytest.param(
            {"quant": {"method": "RTN", "weight": 4}},
            ("recipe.yml", "quant.weight", "is not a section", "write its keys below it"),
            id="value_for_a_section",
        ),
        pytest.param(
            {"quant": {"method": "RNT", "weight": PACKED}},
            ("recipe.yml", "quant.method", "'RNT' is not a known method", "did you mean 'RTN'?"),
            id="unknown_method",
        ),
        pytest.param(
            {
                "quant": {
                    "method": "RTN",
                    "weight": {"bit": "e5m2", "granularity": "per_channel"},
                    "act": {"bit": "e5m2", "granularity": "per_token"},
                }
            },
            ("quant.weight.bit", "e5m2", "SGLang loads no e5m2", "write e4m3"),
            id="e5m2",
        ),
        pytest.param(
            {
                "quant": {
                    "method": "RTN",
                    "weight": {"bit": 8, "granularity": "per_tensor"},
                    "act": {"bit": 8, "granularity": "per_token"},
                }
            },
            ("quant.weight.granularity", "per_tensor", "write per_channel"),
            id="per_tensor_int8",
        ),
        pytest.param(
            {"quant": {"method": "RTN", "weight": PACKED | {"bit": 3}}},
            ("quant.weight.bit", "4 and 8 bit", "not 3", "write bit: 4"),
            id="three_bits",
        ),
        pytest.param(
            {"quant": {"method": "GPTQ", "weight": PACKED}},
            ("calib", "missing", "GPTQ needs calibration text", "write calib:"),
            id="no_calibration_text",
        ),
        pytest.param(
            {"ignored_layers": ["mlp.down_prj"]},
            ("ignored_layers", "'mlp.down_prj' matches no linear", "'mlp.down_proj'"),
            id="ignored_layer_that_is_none",
        ),
        pytest.param(
            {"ignored_layers": ["re:model[.layers"]},
            ("ignored_layers", "'re:model[.layers'", "unterminated"),
            id="broken_expression",
        ),
        pytest.param(
            {"ignored_layers": ["self_attn.q_proj"]},
            (
                "ignored_layers",
                "model.layers.0.self_attn.q_proj",
                "SGLang fuses it with",
                "self_attn.k_proj",
                "all of them or none",
            ),
            id="part_of_a_fused_layer",
        ),
        pytest.param(
            {"ignored_layers": ["re:.*"]},
            ("ignored_layers", "no linear is left", "leave out fewer"),
            id="everything_ignored",
        ),
        pytest.param(
            {"eval": {"name": "self_generated", "seq_len": 4096, "windows": 1}},
            ("eval.seq_len", "4096", "context of 2048", "set eval.seq_len to at most 2048"),
            id="windows_over_the_context",
        ),
        pytest.param(
            {"model": {"torch_dtype": "float16"}},
            ("model.torch_dtype", "float16", "torch.bfloat16", "write auto"),
            id="another_dtype",
        ),
    ],
)
def test_recipe(
    refused: Refused,
    tmp_path: Path,
    tiny: Path,
    changes: dict[str, Any],
    says: tuple[str, ...],
) -> None:
    recipe = write_recipe(tmp_path, **changes)
    refused("quantize", recipe, "--model", tiny, "--output", tmp_path / "out", says=says)


@pytest.mark.parametrize("command", ["quantize", "check"])
def test_both_commands_refuse_alike(refused: Refused, tiny: Path, command: str) -> None:
    said = ("override 'quant.weight.bit=four'", "quant.weight.bit", "2..8")
    refused(command, "rtn_w4a16", "--model", tiny, "--set", "quant.weight.bit=four", says=said)


def test_unknown_recipe(refused: Refused, tiny: Path) -> None:
    said = ("rtn_w4a61", "no such file or shipped recipe", "did you mean 'rtn_w4a16'")
    refused("quantize", "rtn_w4a61", "--model", tiny, says=said)


def test_recipe_that_is_not_yaml(refused: Refused, tmp_path: Path, tiny: Path) -> None:
    recipe = tmp_path / "recipe.yml"
    recipe.write_text("quant:\n  method: [RTN\n")
    refused("quantize", recipe, "--model", tiny, says=("recipe.yml", "line 3, column 1"))


def test_range_of_static_scales_that_is_not_built_yet(refused: Refused, tiny: Path) -> None:
    refused(
        *("quantize", "fp8/awq_fp8_static", "--model", tiny),
        *("--set", "quant.act.calib_algo=static_hist", "--set", "calib.name=self_generated"),
        says=("quant.act.calib_algo", "static_hist", "not implemented", "static_minmax"),
    )


@pytest.mark.parametrize("command", ["quantize", "check"])
def test_rotation_of_a_model_that_has_norms_on_what_is_added(
    refused: Refused, tmp_path: Path, words: Path, command: str
) -> None:
    model = make_checkpoint(tmp_path / "model", "gemma2", tied=True)
    line = refused(
        *(command, "w8a8_combin", "--model", model, "--output", tmp_path / "out"),
        *("--set", f"steps.1.calib={{name: text, path: {words}, n_samples: 4, seq_len: 64}}"),
        *("--set", f"eval={{name: text, path: {words}, windows: 1, seq_len: 32}}"),
        says=(
            "steps.0.quant.method: Quarot rotates the residual stream",
            "gemma2 has norms",
            "post_attention_layernorm, post_feedforward_layernorm",
            "remove the step, or take GPTQ or Awq alone",
        ),
    )
    assert line.count("step") == 2


def test_rotation_of_a_model_that_is_served_with_its_embedding_as_its_head(
    refused: Refused, tmp_path: Path, words: Path
) -> None:
    refused(
        *("check", "w8a8_combin", "--model", make_checkpoint(tmp_path / "gemma", "gemma")),
        *("--set", f"steps.1.calib={{name: text, path: {words}, n_samples: 4, seq_len: 64}}"),
        says=("steps.0.quant.method: Quarot", "gemma is served with its embedding as its head"),
    )


def test_rotation_alone_of_a_model_that_has_norms_on_what_is_added(
    refused: Refused, tmp_path: Path
) -> None:
    model = make_checkpoint(tmp_path / "model", "gemma2", tied=True)
    recipe = write_recipe(tmp_path, quant={"method": "Quarot", "weight": PACKED})
    line = refused(
        *("quantize", recipe, "--model", model),
        says=(" quant.method: Quarot rotates", "gemma2 has norms", "take GPTQ or Awq alone"),
    )
    assert "step" not in line


# models


def test_no_model(refused: Refused) -> None:
    refused("quantize", "rtn_w4a16", says=("model: none given", "--model", "model.path"))


def test_missing_folder(refused: Refused, tmp_path: Path) -> None:
    said = (f"model {tmp_path}/nowhere", "no such folder", "safetensors")
    refused("quantize", "rtn_w4a16", "--model", tmp_path / "nowhere", says=said)


def test_a_file_in_place_of_its_folder(refused: Refused, tiny: Path) -> None:
    said = (f"model {tiny}/model.safetensors", "is a file", "the folder that it is in")
    refused("quantize", "rtn_w4a16", "--model", tiny / "model.safetensors", says=said)


def test_hub_that_cannot_be_reached(refused: Refused) -> None:
    said = ("model nobody/nothing", "no such folder here", "hub", "give a local folder")
    refused("quantize", "rtn_w4a16", "--model", "nobody/nothing", says=said)


def without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def config_cut(folder: Path) -> None:
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text[: len(text) // 2])


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def only_pickles(folder: Path) -> None:
    without_weights(folder)
    torch.save({"made": torch.zeros(2)}, folder / "pytorch_model.bin")


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 100)


def cut_in_its_header(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 50)


def not_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").write_text("<html>sign in to download this file</html>")


def empty_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def unknown_architecture(folder: Path) -> None:
    edit_config(folder, model_type="mamba", architectures=["MambaForCausalLM"])


def no_model_type(folder: Path) -> None:
    edit_config(folder, model_type=None)


def quantized_already(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})


def fewer_blocks_than_stored(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=1)


def heads_that_do_not_fit(folder: Path) -> None:
    edit_config(folder, hidden_size=64)


def with_config(**changes: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        edit_config(folder, **changes)

    return damage


def with_null_blocks(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": None}))


def under_other_names(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    renamed = {name.replace("model.layers.", "transformer.h."): t for name, t in tensors.items()}
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})


def without(tensor: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        del tensors[tensor]
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return damage


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (without_config, ("model", "no config.json")),
        (config_cut, ("config.json", "not readable as JSON", "copy it again")),
        (
            without_weights,
            ("no model.safetensors", "model.safetensors.index.json", "save the model as"),
        ),
        (only_pickles, ("pytorch_model.bin", "pickles are never read", "as safetensors")),
        (truncated, ("model.safetensors", "not a whole safetensors file", "download it again")),
        (cut_in_its_header, ("model.safetensors", "not a whole safetensors file")),
        (not_safetensors, ("model.safetensors", "not a whole safetensors file")),
        (empty_weights, ("model.safetensors", "not a whole safetensors file")),
        (
            unknown_architecture,
            ("config.json", "model_type", "'mamba'", "llama, mistral, qwen2, qwen3"),
        ),
        (no_model_type, ("config.json", "model_type", "llama, mistral, qwen2, qwen3")),
        (quantized_already, ("is quantized already", "give the checkpoint before quantization")),
        (
            with_config(num_hidden_layers=3),
            ("config.json: num_hidden_layers: 3, but 2 blocks are stored", "set it to that"),
        ),
        (
            with_config(num_hidden_layers=10**9),
            ("config.json: num_hidden_layers: 1000000000, but 2 blocks are stored",),
        ),
        (under_other_names, ("config.json: num_hidden_layers: 2, but 0 blocks are stored",)),
        (with_config(vocab_size=None), ("config.json: vocab_size: is missing", "copy")),
        (with_config(hidden_size=None), ("config.json: hidden_size: is missing", "copy")),
        (with_config(num_hidden_layers=None), ("config.json: num_hidden_layers: is missing",)),
        (with_null_blocks, ("config.json: num_hidden_layers: None is not a whole number",)),
        (with_config(num_hidden_layers="two"), ("num_hidden_layers: 'two' is not a whole number",)),
        (with_config(num_hidden_layers=1e9), ("num_hidden_layers: 1000000000.0 is not a whole",)),
        (with_config(num_hidden_layers=True), ("num_hidden_layers: True is not a whole number",)),
        (
            with_config(num_hidden_layers=0),
            ("config.json: num_hidden_layers: 0 is not a whole number of at least 1",),
        ),
        (with_config(num_attention_heads=0), ("config.json: num_attention_heads: 0 is not a",)),
        (with_config(vocab_size="8192"), ("config.json: vocab_size: '8192' is not a whole",)),
        (
            with_config(max_position_embeddings="2048"),
            ("config.json: max_position_embeddings: '2048' is not a whole number",),
        ),
        (
            with_config(rope_parameters={"rope_type": "zzz", "rope_theta": 1e4}),
            ("config.json", "transformers cannot build this model", "KeyError: 'zzz'", "correct"),
        ),
        (
            with_config(rms_norm_eps="small"),
            ("config.json", "transformers cannot build this model", "rms_norm_eps", "'small'"),
        ),
        (without("model.norm.weight"), ("no tensor model.norm.weight", "download")),
        (without("model.embed_tokens.weight"), ("no tensor model.embed_tokens.weight",)),
        (without("lm_head.weight"), ("no tensor lm_head.weight",)),
        (
            without("model.layers.1.input_layernorm.weight"),
            ("no tensor model.layers.1.input_layernorm.weight", "download"),
        ),
        (without("model.layers.1.mlp.up_proj.weight"), ("model.layers.1.mlp.up_proj.weight",)),
        (fewer_blocks_than_stored, ("model.layers.1.", "num_hidden_layers")),
        (heads_that_do_not_fit, ("model.layers.0.", "config.json")),
    ],
)
def test_damaged_model(
    refused: Refused,
    copy_of: Callable[..., Path],
    tmp_path: Path,
    tiny: Path,
    damage: Callable[[Path], None],
    says: tuple[str, ...],
) -> None:
    model = copy_of(tiny)
    damage(model)
    output = ("--output", tmp_path / "out")
    refused("quantize", "rtn_w4a16", "--model", model, *output, says=says)


def test_index_that_names_a_missing_shard(refused: Refused, sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    said = (INDEX, shard.name, "not in the folder", "download the missing shard")
    refused("quantize", "rtn_w4a16", "--model", sharded, says=said)


def test_index_that_names_the_wrong_shard(refused: Refused, sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    name, file = next(iter(index["weight_map"].items()))
    other = next(f for f in index["weight_map"].values() if f != file)
    index["weight_map"][name] = other
    (sharded / INDEX).write_text(json.dumps(index))
    said = (INDEX, name, other, "does not hold it")
    refused("quantize", "rtn_w4a16", "--model", sharded, says=said)


def test_index_that_leads_out_of_the_folder(refused: Refused, sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    name, file = next(iter(index["weight_map"].items()))
    shutil.copy(sharded / file, sharded.parent / file)
    index["weight_map"][name] = f"../{file}"
    (sharded / INDEX).write_text(json.dumps(index))
    said = (INDEX, f"../{file}", "not in the folder")
    refused("quantize", "rtn_w4a16", "--model", sharded, says=said)


def test_index_that_is_none(refused: Refused, sharded: Path) -> None:
    (sharded / INDEX).write_text('{"weights": []}')
    said = (INDEX, "not a safetensors index", "copy it again")
    refused("quantize", "rtn_w4a16", "--model", sharded, says=said)


# code and pickles that come with a model

REMOTE = """
import pathlib
pathlib.Path({mark!r}).write_text("ran")
from transformers import LlamaConfig as RemoteConfig, LlamaForCausalLM as RemoteModel
from transformers import PreTrainedTokenizerFast as RemoteTokenizer
"""


def with_remote_code(folder: Path, mark: Path) -> None:
    """Let config and tokenizer name classes in a file that leaves a mark when it is run."""
    (folder / "modeling_remote.py").write_text(REMOTE.format(mark=str(mark)))
    classes = {
        "AutoConfig": "modeling_remote.RemoteConfig",
        "AutoModelForCausalLM": "modeling_remote.RemoteModel",
    }
    edit_config(folder, auto_map=classes)
    path = folder / "tokenizer_config.json"
    described = json.loads(path.read_text())
    described["auto_map"] = {"AutoTokenizer": [None, "modeling_remote.RemoteTokenizer"]}
    path.write_text(json.dumps(described))


def test_remote_code_is_not_run_where_it_is_not_needed(
    here: Here,
    services: object,
    home: Path,
    tmp_path: Path,
    copy_of: Callable[..., Path],
    tiny: Path,
    words: Path,
) -> None:
    model, mark = copy_of(tiny), tmp_path / "mark"
    with_remote_code(model, mark)
    outcome = here(
        *("quantize", "rtn_w4a16", "--model", model, "--output", tmp_path / "out", *SHORT),
        *("--set", "eval.name=text", "--set", f"eval.path={words}"),
    )
    assert outcome.status == 0, outcome.err
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert not list((tmp_path / "out").glob("*.py"))
    outcome = here("evaluate", model, "--text", words, "--windows", 1, "--window", 32)
    assert outcome.status == 0, outcome.err
    assert not mark.exists()


def test_remote_code_is_not_run_where_it_is_needed(
    refused: Refused, tmp_path: Path, copy_of: Callable[..., Path], tiny: Path
) -> None:
    model, mark = copy_of(tiny), tmp_path / "mark"
    with_remote_code(model, mark)
    edit_config(model, model_type="remote")
    refused("quantize", "rtn_w4a16", "--model", model, says=("model_type", "'remote'", "known"))
    assert not mark.exists()


class _Mark:
    """Unpickled, it leaves a mark."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_pickles_are_not_read(
    refused: Refused, tmp_path: Path, copy_of: Callable[..., Path], tiny: Path
) -> None:
    model, mark = copy_of(tiny), tmp_path / "mark"
    without_weights(model)
    torch.save(_Mark(mark), model / "pytorch_model.bin")
    refused("quantize", "rtn_w4a16", "--model", model, says=("pickles are never read",))
    assert not mark.exists()


# tracking


@pytest.mark.parametrize("uri", ["/folder", "folder", "file:///folder", "sqlite:/x", "ftp://host"])
def test_tracking_uri_that_mlflow_does_not_know(
    refused: Refused, tiny: Path, monkeypatch: pytest.MonkeyPatch, uri: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    said = (f"MLFLOW_TRACKING_URI: {uri} is no server or database", "http://HOST:PORT")
    refused("quantize", "rtn_w4a16", "--model", tiny, says=said)


@pytest.mark.parametrize(
    "uri", ["https://host:5000", "postgresql+psycopg://host/base", "databricks", "sqlite:////x.db"]
)
def test_tracking_uri_that_mlflow_knows(
    here: Here, tiny: Path, monkeypatch: pytest.MonkeyPatch, uri: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    outcome = here("check", "rtn_w4a16", "--model", tiny, "--json")
    assert (outcome.status, outcome.err) == (0, "")


# values


@pytest.mark.parametrize(
    ("value", "tensor"),
    [
        (float("nan"), "model.layers.1.mlp.up_proj.weight"),
        (float("-inf"), "model.layers.0.post_attention_layernorm.weight"),
        (float("nan"), "lm_head.weight"),
    ],
)
def test_not_a_number_in_a_weight(
    here: Here,
    services: object,
    home: Path,
    copy_of: Callable[..., Path],
    tmp_path: Path,
    tiny: Path,
    value: float,
    tensor: str,
) -> None:
    model = copy_of(tiny)
    tensors = load_file(model / "model.safetensors")
    tensors[tensor].view(-1)[5] = value
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    text = ("--set", "quant.method=Identity", "--set", "calib.name=text", "--set")
    words = tmp_path / "words.txt"
    words.write_text("some words to be read " * 200)
    outcome = here(
        *("quantize", "rtn_w4a16", "--model", model, "--output", tmp_path / "out", *SHORT),
        *(*text, f"calib.path={words}", "--set", "calib.seq_len=64"),
        *("--set", "calib.n_samples=4"),
        *("--set", "eval.name=text", "--set", f"eval.path={words}"),
    )
    assert outcome.status == 1
    # before it, a log line for each block that was done
    *log, line = outcome.err.splitlines()
    block = int(tensor.split(".")[2]) if "layers" in tensor else 2
    assert [entry.split(" ", 2)[2] for entry in log] == [
        f"block {n + 1} of 2 done (0 cache hits)" for n in range(block)
    ]
    assert line.startswith("blockquant: ")
    for word in (tensor, "holds NaN or Inf", "model.safetensors", "damaged", "download it again"):
        assert word in line
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))
    assert not list((home / "store" / "staging").glob("*"))
    # the failed run keeps its reason, its recipe and its log
    client = MlflowClient(f"sqlite:///{home / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("blockquant").experiment_id])
    assert run.info.status == "FAILED"
    assert tensor in run.data.tags["failure"]
    kept = {Path(file.path).suffix for file in client.list_artifacts(run.info.run_id)}
    assert {".yml", ".log"} <= kept


# sizes


def test_group_size_that_does_not_divide(refused: Refused, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", intermediate=160)
    line = refused(
        *("quantize", "rtn_w4a16", "--model", model, "--set", "serving.check_kernels=false"),
        says=(
            "quant.weight.group_size: 128 does not divide the 160 input features",
            "model.layers.0.mlp.down_proj",
            "sizes that fit it: 32;",
            "1 more linear",
            "--keep-incompatible",
        ),
    )
    assert "1 more linears" not in line


@pytest.mark.shared
def test_group_size_that_no_served_size_mends(refused: Refused, shared: Path) -> None:
    said = ("64 does not divide the 172 input", "mlp.down_proj", "no served size fits it")
    model = ("--model", shared / "models" / "stories260K")
    size = ("--set", "quant.weight.group_size=64", "--set", "serving.check_kernels=false")
    refused("quantize", "rtn_w4a16", *model, *size, says=said)


def test_sizes_that_no_kernel_takes(refused: Refused, shared: Path, tmp_path: Path) -> None:
    model = shared / "models" / "stories260K"
    said = (
        "model.layers.0.self_attn.q_proj + self_attn.k_proj + self_attn.v_proj has 64 input",
        "Marlin takes multiples of 128",
        "schemes that fit: W8A8, FP8 static, FP8 dynamic",
        "--keep-incompatible",
        "serving.check_kernels=false",
    )
    refused("check", "rtn_w4a16", "--model", model, says=said)
    model = shared / "models" / "llama-4m"
    said = ("model.layers.0.self_attn.o_proj has 64 input features on each of 4 GPUs", "fit: 1, 2")
    parallel = ("--set", "serving.tensor_parallel=4")
    refused("check", "rtn_w4a16", "--model", model, *parallel, says=said)
    said = ("serving.tensor_parallel: 3 GPUs cannot share 4 attention heads", "fit: 1, 2, 4")
    parallel = ("--set", "serving.tensor_parallel=3")
    refused("check", "rtn_w8a8", "--model", model, *parallel, says=said)


def test_an_interpreter_that_is_none(refused: Refused, tiny: Path) -> None:
    said = ("serving.python: no-such-python is no program", "has SGLang")
    asked = ("--set", "serving.python=no-such-python")
    refused("check", "rtn_w4a16", "--model", tiny, *asked, says=said)


def stories_of(shape: str, request: pytest.FixtureRequest, folder: Path) -> Path:
    """The real model whose down projections have 172 inputs, or a random one like it."""
    if shape == "shared":
        return Path(request.getfixturevalue("shared")) / "models" / "stories260K"
    return make_checkpoint(
        folder / "stories",
        hidden=64,
        intermediate=172,
        heads=8,
        kv_heads=4,
        blocks=2,
        tied=True,
        dtype=torch.float32,
    )


@pytest.mark.parametrize(
    ("shape", "way"),
    [("random", "ignore"), pytest.param("shared", "keep", marks=pytest.mark.shared)],
)
def test_linears_left_out(
    here: Here,
    services: object,
    home: Path,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    shape: str,
    way: str,
) -> None:
    model, output = stories_of(shape, request, tmp_path), tmp_path / "out"
    recipe = write_recipe(tmp_path, ignored_layers=["mlp.down_proj"] if way == "ignore" else [])
    outcome = here(
        *("quantize", recipe, "--model", model, "--output", output, "--json", *SHORT),
        *("--set", "quant.weight.group_size=32", "--set", "serving.check_kernels=false"),
        *(["--keep-incompatible"] if way == "keep" else []),
    )
    assert outcome.status == 0, outcome.err
    blocks = json.loads((model / "config.json").read_text())["num_hidden_layers"]
    left_out = [f"model.layers.{n}.mlp.down_proj" for n in range(blocks)]
    described = json.loads((output / "config.json").read_text())["quantization_config"]
    assert described["ignore"] == ["lm_head", *left_out]
    names = {name for file in output.glob("*.safetensors") for name in load_file(file)}
    assert {f"{name}.weight" for name in left_out} <= names
    assert not any("down_proj.weight_packed" in name for name in names)
    assert "model.layers.0.mlp.up_proj.weight_packed" in names
    outcome = here("verify", output, "--json")
    assert outcome.status == 0, outcome.err
    assert outcome.json["linears"] == 6 * blocks


# text


def test_text_shorter_than_one_window(refused: Refused, tmp_path: Path, tiny: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("a few words are too few")
    said = ("calib.path", "short.txt", "fewer than one window of 64", "set calib.seq_len")
    refused("quantize", "rtn_w4a16", "--model", tiny, *calib_text(text), says=said)


def test_evaluation_text_shorter_than_one_window(
    refused: Refused, tmp_path: Path, tiny: Path
) -> None:
    text = tmp_path / "short.txt"
    text.write_text("a few words are too few")
    said = ("eval.path", "short.txt", "fewer than one window of 2048", "set eval.seq_len")
    sets = ("--set", "eval.name=text", "--set", f"eval.path={text}")
    refused("quantize", "rtn_w4a16", "--model", tiny, *sets, says=said)


def test_documents_all_shorter_than_one_window(
    refused: Refused, tmp_path: Path, tiny: Path
) -> None:
    text = tmp_path / "short.jsonl"
    text.write_text("\n".join(json.dumps({"text": "a few words " * 4}) for _ in range(200)))
    said = ("calib.path", "short.jsonl", "fewer than one window of 64")
    preset = ("--set", "calib.preproc=pileval")
    refused(
        "quantize", "rtn_w4a16", "--model", tiny, *calib_text(text, "jsonl"), *preset, says=said
    )


@pytest.mark.parametrize(("content", "said"), [("", "is empty"), ("  \n\n \n", "holds no text")])
def test_empty_text(refused: Refused, tmp_path: Path, tiny: Path, content: str, said: str) -> None:
    text = tmp_path / "empty.txt"
    text.write_text(content)
    says = ("calib.path", "empty.txt", said)
    refused("quantize", "rtn_w4a16", "--model", tiny, *calib_text(text), says=says)


def test_missing_text(refused: Refused, tmp_path: Path, tiny: Path) -> None:
    said = ("calib.path", "nowhere.txt", "no such file", "give a text file")
    options = calib_text(tmp_path / "nowhere.txt")
    refused("quantize", "rtn_w4a16", "--model", tiny, *options, says=said)


def test_text_that_is_not_jsonl(refused: Refused, tmp_path: Path, tiny: Path) -> None:
    text = tmp_path / "prose.jsonl"
    text.write_text("once upon a time\n" * 50)
    options = calib_text(text, "jsonl")
    refused("quantize", "rtn_w4a16", "--model", tiny, *options, says=("calib.path", "prose.jsonl"))


def test_column_that_is_not_there(refused: Refused, tmp_path: Path, tiny: Path) -> None:
    text = tmp_path / "rows.jsonl"
    text.write_text(json.dumps({"content": "words " * 200}) + "\n")
    said = ("calib: no column 'text'", "columns: content", "set calib.text_column")
    refused("quantize", "rtn_w4a16", "--model", tiny, *calib_text(text, "jsonl"), says=said)


def test_column_that_holds_no_text(refused: Refused, tmp_path: Path, tiny: Path) -> None:
    text = tmp_path / "rows.jsonl"
    text.write_text("\n".join(json.dumps({"text": n}) for n in range(200)))
    said = ("calib: the column 'text' holds no text", "set calib.text_column")
    refused("quantize", "rtn_w4a16", "--model", tiny, *calib_text(text, "jsonl"), says=said)


def test_text_that_is_not_utf8(refused: Refused, tmp_path: Path, tiny: Path) -> None:
    text = tmp_path / "latin.txt"
    text.write_bytes("déjà vu ".encode("latin-1") * 200)
    said = ("calib.path", "latin.txt cannot be read", "utf-8")
    refused("quantize", "rtn_w4a16", "--model", tiny, *calib_text(text), says=said)


def test_conversations_without_a_chat_template(
    refused: Refused, tmp_path: Path, tiny: Path
) -> None:
    text = tmp_path / "chat.jsonl"
    turns = [{"role": "user", "content": "words " * 200}]
    text.write_text(json.dumps({"messages": turns}) + "\n")
    said = ("calib:", "conversations", "no chat template", "set calib.text_column")
    refused("quantize", "rtn_w4a16", "--model", tiny, *calib_text(text, "jsonl"), says=said)


@pytest.mark.parametrize(
    ("name", "known_as"), [("pileval", "mit-han-lab/pile-val-backup"), ("c4", "allenai/c4")]
)
def test_data_set_that_cannot_be_reached(
    refused: Refused, tiny: Path, name: str, known_as: str
) -> None:
    said = ("calib.name", name, known_as, "cannot be reached", "calib.name=text", "calib.path=FILE")
    sets = (*CALIBRATED, "--set", f"calib.name={name}")
    refused("quantize", "rtn_w4a16", "--model", tiny, *sets, says=said)


def test_text_of_a_step_of_its_own(refused: Refused, tiny: Path, words: Path) -> None:
    # what is given is read by steps without a section of their own
    given = ("--set", "calib.name=text", "--set", f"calib.path={words}")
    said = ("steps.0.calib.name", "pileval", "--set steps.0.calib.name=text", "steps.0.calib.path")
    refused("quantize", "w4a16_combin", "--model", tiny, *given, says=said)
    missing = ("--set", "steps.0.calib.name=text", "--set", f"steps.0.calib.path={words}.not")
    said = ("steps.0.calib.path", f"{words}.not", "no such file")
    refused("quantize", "w4a16_combin", "--model", tiny, *given, *missing, says=said)


def test_no_tokenizer(
    refused: Refused, copy_of: Callable[..., Path], tiny: Path, words: Path
) -> None:
    model = copy_of(tiny)
    for file in model.glob("tokenizer*"):
        file.unlink()
    said = ("no tokenizer files", str(model), "tokenizer.json", "beside the weights")
    refused("quantize", "rtn_w4a16", "--model", model, *calib_text(words), says=said)


def test_no_tokenizer_where_no_text_is_read(
    here: Here, copy_of: Callable[..., Path], tiny: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = copy_of(tiny)
    for file in model.glob("tokenizer*"):
        file.unlink()
    outcome = here("check", "rtn_w4a16", "--model", model, "--json")
    assert outcome.status == 0
    assert "no tokenizer files, which a server needs; copy tokenizer.json" in caplog.text


@pytest.mark.parametrize("reads_text", [False, True])
def test_damaged_tokenizer(
    refused: Refused, copy_of: Callable[..., Path], tiny: Path, words: Path, reads_text: bool
) -> None:
    model = copy_of(tiny)
    os.truncate(model / "tokenizer.json", 1000)
    said = ("the tokenizer cannot be read", str(model), "copy its files once more")
    text = calib_text(words) if reads_text else ()
    refused("quantize", "rtn_w4a16", "--model", model, *text, says=said)


@pytest.mark.parametrize("reads_text", [False, True])
def test_a_tokenizer_of_another_model(
    refused: Refused, copy_of: Callable[..., Path], tiny: Path, words: Path, reads_text: bool
) -> None:
    model = copy_of(tiny)
    tensors = load_file(model / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:300].clone()
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    edit_config(model, vocab_size=300)
    said = ("its tokenizer has 8192 tokens", "the model knows 300", "tokenizer that belongs to it")
    text = calib_text(words) if reads_text else ()
    refused("quantize", "rtn_w4a16", "--model", model, *text, says=said)


def test_tokens_that_the_model_does_not_know(
    refused: Refused, copy_of: Callable[..., Path], tiny: Path, tmp_path: Path
) -> None:
    model = copy_of(tiny)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    added = tokenizer["added_tokens"][0] | {"id": 8192, "content": "<unheard>"}
    tokenizer["added_tokens"].append(added)
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    text = tmp_path / "text.txt"
    text.write_text("a word <unheard> " * 2000)
    said = ("the tokenizer gives token 8192", "the model knows 8192", "tokenizer that belongs")
    refused("quantize", "rtn_w4a16", "--model", model, *calib_text(text), says=said)


def test_calibration_windows_over_the_context(refused: Refused, tiny: Path, words: Path) -> None:
    said = ("calib.seq_len", "4096", "context of 2048", "at most 2048")
    options = (*calib_text(words), "--set", "calib.seq_len=4096")
    refused("quantize", "rtn_w4a16", "--model", tiny, *options, says=said)


# places


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one megabyte."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        pytest.skip("mounting a small disk takes root")
    command = [mount, "-t", "tmpfs", "-o", "size=1m", "none", str(place)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no disk can be mounted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_too_little_disk_for_the_output(refused: Refused, small_disk: Path, tiny: Path) -> None:
    output = small_disk / "below" / "out"
    said = ("--output", str(small_disk), "the export takes 4.", "1.0 MB are free", "another folder")
    refused("quantize", "rtn_w4a16", "--model", tiny, "--output", output, says=said)


def test_too_little_disk_for_the_store(
    refused: Refused, small_disk: Path, tmp_path: Path, tiny: Path
) -> None:
    places = ("--output", tmp_path / "out", "--store", small_disk / "store")
    said = ("--store", str(small_disk), "the export takes 4.", "1.0 MB are free", "another folder")
    refused("quantize", "rtn_w4a16", "--model", tiny, *places, says=said)


def test_output_that_exists(refused: Refused, tmp_path: Path, tiny: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("kept")
    said = (f"--output {tmp_path}/out", "exists already", "--overwrite")
    refused("quantize", "rtn_w4a16", "--model", tiny, "--output", tmp_path / "out", says=said)


def test_output_that_is_no_export_is_not_replaced(
    refused: Refused, tmp_path: Path, tiny: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("kept")
    said = (f"--output {tmp_path}/out", "is no export of blockquant", "give another folder")
    options = ("--output", tmp_path / "out", "--overwrite")
    refused("quantize", "rtn_w4a16", "--model", tiny, *options, says=said)


def test_output_that_exists_and_was_not_named(refused: Refused, tmp_path: Path, tiny: Path) -> None:
    (tmp_path / "work" / f"{tiny.name}-rtn_w4a16").mkdir()
    said = (f"{tiny.name}-rtn_w4a16", "exists already", "--overwrite")
    refused("quantize", "rtn_w4a16", "--model", tiny, says=said)


def test_output_that_is_a_file(refused: Refused, tmp_path: Path, tiny: Path) -> None:
    (tmp_path / "out").write_text("kept")
    options = ("--output", tmp_path / "out", "--overwrite")
    said = (f"--output {tmp_path}/out", "is a file", "give a folder's name")
    refused("quantize", "rtn_w4a16", "--model", tiny, *options, says=said)


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
@pytest.mark.parametrize("stands", [True, False])
def test_output_that_is_a_symbolic_link(
    refused: Refused, tmp_path: Path, tiny: Path, stands: bool, overwrite: tuple[str, ...]
) -> None:
    if stands:
        (tmp_path / "real").mkdir()
        (tmp_path / "real" / "blockquant.json").write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    said = (f"--output {tmp_path}/link", "is a symbolic link", "the folder that it leads to")
    output = ("--output", tmp_path / "link", *overwrite)
    refused("quantize", "rtn_w4a16", "--model", tiny, *output, says=said)


@pytest.mark.parametrize("name", ["/", "out/.."])
def test_output_without_a_name(refused: Refused, tiny: Path, name: str) -> None:
    said = ("--output /", "has no name of its own", "give a new folder's name")
    refused("quantize", "rtn_w4a16", "--model", tiny, "--output", name, says=said)


@pytest.mark.parametrize("name", ["out", "out/deeper"])
def test_output_inside_of_the_model(
    refused: Refused, copy_of: Callable[..., Path], tiny: Path, name: str
) -> None:
    model = copy_of(tiny)
    said = (f"--output {model / name}", f"lies in the model's folder {model}", "give another")
    refused("quantize", "rtn_w4a16", "--model", model, "--output", model / name, says=said)


@pytest.mark.parametrize(
    "name", ["n" * 245, "é" * 120, "n" * 300, f"{'n' * 300}/out", "/".join(["n" * 200] * 20)]
)
def test_output_with_too_long_a_name(
    refused: Refused, tmp_path: Path, tiny: Path, name: str
) -> None:
    said = (f"--output {tmp_path}/n"[:-1], "is too long a name", "give a shorter one")
    refused("quantize", "rtn_w4a16", "--model", tiny, "--output", tmp_path / name, says=said)


def test_output_with_the_longest_name(here: Here, tmp_path: Path, tiny: Path) -> None:
    output = tmp_path / ("n" * (255 - len("..blockquant-new")))
    outcome = here("check", "rtn_w4a16", "--model", tiny, "--output", output, "--json")
    assert (outcome.status, outcome.err) == (0, "")


def test_output_that_became_a_link_meanwhile(
    here: Here,
    services: object,
    home: Path,
    tmp_path: Path,
    tiny: Path,
    words: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tasks.check._check_places", lambda request: None)
    place = tmp_path / "place"
    place.mkdir()
    (place / "out").symlink_to(tmp_path / "nowhere")
    outcome = here(
        *("quantize", "rtn_w4a16", "--model", tiny, "--output", place / "out", *SHORT),
        *("--set", "eval.name=text", "--set", f"eval.path={words}"),
    )
    assert outcome.status == 1
    assert outcome.err.splitlines()[-1].startswith("blockquant: NotADirectoryError: ")
    assert os.listdir(place) == ["out"], "what was made ready is left beside it"


def test_output_below_a_file(refused: Refused, tmp_path: Path, tiny: Path) -> None:
    (tmp_path / "file").write_text("kept")
    said = ("--output", "cannot be written to", "another folder")
    output = ("--output", tmp_path / "file" / "out")
    refused("quantize", "rtn_w4a16", "--model", tiny, *output, says=said)


def test_store_that_is_a_file(refused: Refused, tmp_path: Path, tiny: Path) -> None:
    (tmp_path / "file").write_text("kept")
    said = ("--store", "cannot be written to", "another folder")
    refused("quantize", "rtn_w4a16", "--model", tiny, "--store", tmp_path / "file", says=said)


@pytest.mark.parametrize("output", ["models/model", "models"])
def test_output_over_the_model(
    refused: Refused, copy_of: Callable[..., Path], tmp_path: Path, tiny: Path, output: str
) -> None:
    model = copy_of(tiny, "models/model")
    said = (f"--output {tmp_path}/{output}", "would remove the model", "another folder")
    options = ("--output", tmp_path / output, "--overwrite")
    refused("quantize", "rtn_w4a16", "--model", model, *options, says=said)


def test_output_over_the_store(refused: Refused, tmp_path: Path, tiny: Path) -> None:
    (tmp_path / "home" / "store").mkdir(parents=True)
    options = ("--output", tmp_path / "home", "--overwrite")
    said = ("--output", "would remove the store", "another folder")
    refused("quantize", "rtn_w4a16", "--model", tiny, *options, says=said)


# options


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--device", "gpu"), ("--device gpu", "not a device", "cpu, cuda or cuda:N")),
        (("--device", "mps"), ("--device mps", "not supported", "cpu, cuda or cuda:N")),
        (("--device", "cuda:99"), ("--device cuda:99", "CUDA devices", "use cpu")),
        (("--memory", "plenty"), ("--memory plenty", "not a size", "40GiB")),
        (("--memory", "-1GB"), ("--memory -1GB", "not a size", "40GiB")),
        (("--memory", "0"), ("--memory 0", "not a size", "40GiB")),
        (("--memory", "40"), ("--memory 40", "are bytes", "40GiB")),
        (("--set", "quant.weight"), ("'quant.weight'", "key.path=value")),
        (("--set", "quant.wieght.bit=8"), ("quant.wieght", "did you mean 'weight'?")),
        (("--set", "quant.method.name=RTN"), ("lies below 'RTN'",)),
        (("--otput", "out"), ("No such option: --otput", "--output", "--help")),
        (("surplus",), ("unexpected extra argument", "surplus", "--help")),
    ],
)
def test_option(
    refused: Refused, tiny: Path, options: tuple[str, ...], says: tuple[str, ...]
) -> None:
    refused("quantize", "rtn_w4a16", "--model", tiny, *options, says=says)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_cuda_without_a_gpu(refused: Refused, tiny: Path) -> None:
    said = ("--device cuda", "0 CUDA devices", "use cpu")
    refused("quantize", "rtn_w4a16", "--model", tiny, "--device", "cuda", says=said)


def test_unknown_command(refused: Refused) -> None:
    refused("quantise", says=("quantise", "quantize"))


def test_missing_argument(refused: Refused) -> None:
    refused("quantize", says=("Missing argument 'recipe'", "--help"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--window", "4096"), ("--window", "4096", "context of 2048", "at most 2048")),
        (("--window", "1"), ("--window",)),
        (("--windows", "0"), ("--windows",)),
        (("--dtype", "float8"), ("--dtype", "float8", "'auto', 'float32', 'bfloat16'")),
        (("--device", "gpu"), ("--device gpu", "not a device")),
        (("--reference", "nowhere"), ("nowhere", "no such folder")),
    ],
)
def test_evaluation_option(
    refused: Refused, tiny: Path, words: Path, options: tuple[str, ...], says: tuple[str, ...]
) -> None:
    refused("evaluate", tiny, "--text", words, *options, says=says)


def test_evaluation_text(refused: Refused, tmp_path: Path, tiny: Path) -> None:
    text = tmp_path / "short.txt"
    said = ("--text", "short.txt", "no such file")
    refused("evaluate", tiny, "--text", text, says=said)
    text.write_text("")
    refused("evaluate", tiny, "--text", text, says=("--text", "short.txt", "is empty"))
    text.write_text("a few words")
    line = refused(
        *("evaluate", tiny, "--text", text),
        says=("--text", "short.txt", "fewer than one window of 2048", "--window"),
    )
    # the words of a recipe mean nothing here
    assert "seq_len" not in line
    assert ".path" not in line


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ({"vocabulary": 9000}, ("its vocab_size is 9000", "checkpoint's 8192")),
        ({"hidden": 64}, ("its hidden_size is 64", "checkpoint's 128")),
        ({"blocks": 3}, ("its num_hidden_layers is 3", "checkpoint's 2")),
    ],
)
def test_a_reference_of_another_shape(
    refused: Refused, tmp_path: Path, tiny: Path, words: Path, shape: Any, says: tuple[str, ...]
) -> None:
    other = make_checkpoint(tmp_path / "other", **shape)
    options = ("--windows", 1, "--window", 32, "--reference", other)
    said = ("--reference", *says, "that it was quantized from")
    refused("evaluate", tiny, "--text", words, *options, says=said)


def test_verify_of_what_was_not_quantized(refused: Refused, tmp_path: Path, tiny: Path) -> None:
    refused("verify", tiny, says=("config.json", "no quantization_config"))
    refused("verify", tmp_path / "nowhere", says=("nowhere", "no such folder"))


# in a process of its own


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ("quantize", "rtn_w4a16", "--model", "MODEL", "--set", "quant.weight.bits=4"),
            ("quant.weight.bits", "did you mean 'bit'?"),
        ),
        (("quantize", "rtn_w4a16", "--model", "NOWHERE"), ("no such folder",)),
    ],
)
def test_as_a_process(
    bare: Callable[..., Outcome],
    tmp_path: Path,
    tiny: Path,
    arguments: tuple[str, ...],
    says: tuple[str, ...],
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    places = {"MODEL": str(tiny), "NOWHERE": str(tmp_path / "nowhere")}
    before = tree(tmp_path)
    given = [places.get(argument, argument) for argument in arguments]
    line = the_line(bare(*given, home=tmp_path / "home", cwd=work), 2)
    for word in says:
        assert word in line
    assert tree(tmp_path) == before
