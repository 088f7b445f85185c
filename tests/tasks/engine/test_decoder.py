"""Blocks run one by one give the hidden states of transformers' own forward pass."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tasks.engine import decoder as module
from tasks.engine.decoder import (
    PRODUCT_VARIABLES,
    attention_with_gradients,
    build_decoder,
    device_fingerprint,
    micro_batches,
    run_block,
)
from tasks.engine.errors import InputError
from tasks.engine.fused import CODE
from tasks.engine.lineage import code_digest
from tests.models import GEMMA2, make_checkpoint
from tests.tasks.conftest import random_tokens

LENGTH = 40
SHAPE = {"blocks": 3, "hidden": 32, "intermediate": 48, "vocabulary": 256}
# windows shorter than the text; qwen2 slides from a block on
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama with biases": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen3": {},
    "gemma2": GEMMA2 | {"sliding_window": 8},
}
# the same models, nothing of them slides
FULL: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "qwen2": {"use_sliding_window": False},
    "gemma2": {"layer_types": ["full_attention"] * 3},
}


def make(folder: Path, name: str, **changes: Any) -> Path:
    options = {"model_type": name.split()[0], **SHAPE, **MODELS[name], **changes}
    return make_checkpoint(folder, dtype=torch.float32, **options)


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def block_tensors(folder: Path, block: int) -> dict[str, Tensor]:
    prefix = f"model.layers.{block}."
    tensors = load_file(folder / "model.safetensors")
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def whole_model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@torch.no_grad()
def block_by_block(folder: Path, tokens: Tensor) -> list[Tensor]:
    """The embedded tokens, what comes out of each block but the last, and of the final norm."""
    decoder = build_decoder(config_of(folder))
    outside = load_file(folder / "model.safetensors")
    hidden, arguments = decoder.embed(outside["model.embed_tokens.weight"], tokens)
    passed = [hidden]
    for number, block in enumerate(decoder.blocks):
        hidden = run_block(block, block_tensors(folder, number), hidden, arguments[number])
        passed.append(hidden)
    norm = {"weight": outside["model.norm.weight"]}
    passed[-1] = torch.func.functional_call(decoder.final_norm, norm, (hidden,))
    for parameter in [*decoder.model.parameters(), *nn.ModuleList(decoder.blocks).parameters()]:
        assert parameter.is_meta, "no module holds a weight"
    return passed


@pytest.mark.parametrize("name", MODELS)
def test_hidden_states_after_each_block(tmp_path: Path, name: str) -> None:
    folder = make(tmp_path, name)
    tokens = random_tokens(2, LENGTH, 256)
    with torch.no_grad():
        wanted = whole_model(folder)(tokens, output_hidden_states=True).hidden_states
    found = block_by_block(folder, tokens)
    assert len(found) == len(wanted) == SHAPE["blocks"] + 1
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FULL)
def test_the_sliding_window_is_seen(tmp_path: Path, name: str) -> None:
    slid = make(tmp_path / "slid", name)
    full = make(tmp_path / "full", name, **FULL[name])
    tokens = random_tokens(1, LENGTH, 256)
    first = 1 if name == "qwen2" else 0
    pairs = zip(block_by_block(slid, tokens), block_by_block(full, tokens), strict=True)
    for number, (one, other) in enumerate(pairs):
        # up to the window's length nothing slides; before the first sliding block neither
        torch.testing.assert_close(one[:, :8], other[:, :8], rtol=1e-5, atol=1e-5)
        assert torch.allclose(one, other, atol=1e-5) == (number <= first)


def test_each_layer_has_the_mask_of_its_kind(tmp_path: Path) -> None:
    decoder = build_decoder(config_of(make(tmp_path, "gemma2")))
    _, arguments = decoder.embed(torch.randn(256, 32), random_tokens(1, LENGTH, 256))
    seen = [(given["attention_mask"] == 0).sum(-1).flatten() for given in arguments]
    before = torch.arange(1, LENGTH + 1)
    for found, wanted in zip(seen, (before.clamp(max=8), before, before.clamp(max=8)), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("cap", [0.5, None])
def test_logits_are_capped_as_the_config_says(tmp_path: Path, cap: float | None) -> None:
    folder = make(tmp_path, "gemma2", final_logit_softcapping=cap)
    draw = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(2, 5, 32, generator=draw), torch.randn(256, 32, generator=draw)
    raw = hidden @ head.T
    wanted = raw if cap is None else cap * torch.tanh(raw / cap)
    decoder = build_decoder(config_of(folder))
    assert decoder.logit_cap == cap
    torch.testing.assert_close(decoder.logits(hidden, head), wanted)
    in_bits = decoder.logits(hidden.bfloat16(), head.bfloat16())
    assert in_bits.dtype == torch.float32
    torch.testing.assert_close(in_bits, wanted, atol=0.1, rtol=0.02)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_half_precision_are_not_rounded_to_it(tmp_path: Path, dtype: torch.dtype) -> None:
    decoder = build_decoder(config_of(make(tmp_path, "llama")))
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 5, 32, generator=draw).to("cuda", dtype)
    head = torch.randn(257, 32, generator=draw).to("cuda", dtype)
    wanted = (hidden.double() @ head.double().T).float()
    torch.testing.assert_close(decoder.logits(hidden, head), wanted, atol=1e-5, rtol=1e-5)
    # as rows of one window have it
    torch.testing.assert_close(decoder.logits(hidden[0], head), wanted[0], atol=1e-5, rtol=1e-5)


def test_a_cap_that_the_config_leaves_out_is_that_of_transformers(tmp_path: Path) -> None:
    config = config_of(make(tmp_path, "gemma2"))
    del config["final_logit_softcapping"]
    assert build_decoder(config).logit_cap == 30.0


def test_a_key_that_is_none_of_the_model_caps_nothing(tmp_path: Path) -> None:
    config = config_of(make(tmp_path, "llama"))
    assert build_decoder(config | {"final_logit_softcapping": 1.0}).logit_cap is None


def test_inputs_of_linears_are_seen_and_replaced(tmp_path: Path) -> None:
    folder = make(tmp_path, "qwen3")
    tokens = random_tokens(2, LENGTH, 256)
    linears = ("self_attn.k_proj", "self_attn.o_proj", "mlp.down_proj")
    model = whole_model(folder)
    wanted: dict[str, Tensor] = {}

    def halve(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
            wanted[name] = inputs[0]
            return (inputs[0] * 0.5,)

        return hook

    for linear in linears:
        model.model.layers[0].get_submodule(linear).register_forward_pre_hook(halve(linear))
    with torch.no_grad():
        after = model(tokens, output_hidden_states=True).hidden_states[1]

    decoder = build_decoder(config_of(folder))
    hidden, arguments = decoder.embed(model.model.embed_tokens.weight.detach(), tokens)
    seen: dict[str, Tensor] = {}

    def on_input(linear: str, x: Tensor) -> Tensor:
        seen[linear] = x
        return x * 0.5

    weights, block = block_tensors(folder, 0), decoder.blocks[0]
    found = run_block(block, weights, hidden, arguments[0], linears, on_input)
    torch.testing.assert_close(found, after, rtol=1e-5, atol=1e-5)
    assert list(seen) == list(linears)
    for linear in linears:
        torch.testing.assert_close(seen[linear], wanted[linear], rtol=1e-5, atol=1e-5)
    # hooks are gone, after a failure too
    plain = run_block(block, weights, hidden, arguments[0])
    assert not torch.allclose(plain, found)

    def stop(linear: str, x: Tensor) -> Tensor:
        raise RuntimeError(linear)

    with pytest.raises(RuntimeError, match="k_proj"):
        run_block(block, weights, hidden, arguments[0], linears, stop)
    assert torch.equal(run_block(block, weights, hidden, arguments[0]), plain)


@pytest.mark.parametrize("missing", ["mlp.up_proj.weight", "input_layernorm.weight"])
def test_a_block_is_not_run_without_one_of_its_weights(tmp_path: Path, missing: str) -> None:
    # torch multiplies with a weight on the meta device, and gives what lay in memory
    folder = make(tmp_path, "llama")
    decoder = build_decoder(config_of(folder))
    hidden, arguments = decoder.embed(torch.randn(256, 32), random_tokens(1, 4, 256))
    weights = block_tensors(folder, 0)
    del weights[missing]
    with pytest.raises((RuntimeError, ValueError), match=missing):
        run_block(decoder.blocks[0], weights, hidden, arguments[0])


def test_configs_that_cannot_be_built(tmp_path: Path) -> None:
    config = config_of(make(tmp_path, "llama"))
    with pytest.raises(InputError, match="model_type: 'gpt2' is not an architecture known here"):
        build_decoder(config | {"model_type": "gpt2"})
    with pytest.raises(InputError, match="transformers cannot build this model"):
        build_decoder(config | {"hidden_act": "no such function"})
    # what would lead transformers to other code is not passed on
    build_decoder(config | {"auto_map": {"AutoConfig": "x.Y"}, "quantization_config": {"bits": 4}})


@pytest.mark.parametrize(
    ("device", "length", "sizes"),
    [
        ("cpu", 512, [4, 4, 1]),
        ("cpu", 2048, [1] * 9),
        ("cpu", 5000, [1] * 9),
        ("cpu", 1, [9]),
        ("cuda", 2048, [8, 1]),
        ("cuda:1", 4096, [4, 4, 1]),
    ],
)
def test_micro_batches_have_a_fixed_number_of_tokens(
    device: str, length: int, sizes: list[int]
) -> None:
    windows = torch.arange(9 * length).reshape(9, length)
    parts = micro_batches(windows, device)
    assert [len(part) for part in parts] == sizes
    assert torch.equal(torch.cat(parts), windows)


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_a_padding_token_is_one_like_others(tmp_path: Path, kind: str) -> None:
    model = make_checkpoint(tmp_path / "model", kind, **SHAPE)
    tokens = torch.tensor([[1, 5, 9]])
    embedding = load_file(model / "model.safetensors")["model.embed_tokens.weight"].float()
    plain = build_decoder(config_of(model)).embed(embedding, tokens)[0]
    padded = build_decoder(config_of(model) | {"pad_token_id": 5})
    assert torch.equal(padded.embed(embedding, tokens)[0], plain)
    # what blocks are given beside hidden states is asked with one row alone
    assert padded.embed(embedding[:1], torch.zeros_like(tokens))[0].shape == plain.shape


def test_fingerprint_of_a_cpu() -> None:
    found = device_fingerprint("cpu")
    assert found["between products"] == code_digest(*CODE)
    assert found["torch"] == torch.__version__
    assert found["transformers"] == transformers.__version__
    assert found["device"].endswith(f"threads={torch.get_num_threads()}")


def test_fingerprint_of_a_gpu_has_what_its_products_depend_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda where: "H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda where: (9, 0))
    monkeypatch.setattr(module, "triton_version", lambda: "3.6")
    for name in PRODUCT_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    found = device_fingerprint("cuda:1")
    assert found["between products"] == code_digest(*CODE)
    assert found["device"].startswith("cuda H200 sm90") and found["triton"] == "3.6"
    assert found == device_fingerprint("cuda:0")
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    assert device_fingerprint("cuda:0") == found | {"NVIDIA_TF32_OVERRIDE": "0"}


@pytest.mark.parametrize(
    ("installed", "found"), [("triton", "3.6"), ("pytorch-triton", "3.6"), ("other", "none")]
)
def test_the_compiler_of_kernels_has_several_names(
    monkeypatch: pytest.MonkeyPatch, installed: str, found: str
) -> None:
    def version(package: str) -> str:
        if package != installed:
            raise PackageNotFoundError(package)
        return "3.6"

    monkeypatch.setattr(module, "version", version)
    assert module.triton_version.__wrapped__() == found


def backends() -> list[bool]:
    known = torch.backends.cuda
    return [
        known.math_sdp_enabled(),
        known.flash_sdp_enabled(),
        known.mem_efficient_sdp_enabled(),
        known.cudnn_sdp_enabled(),
    ]


def test_a_gpu_s_attention_with_gradients_is_no_fused_one() -> None:
    before = backends()
    with attention_with_gradients("cuda"):
        assert backends() == [True, False, False, False]
    assert backends() == before
    with attention_with_gradients("cpu"):
        assert backends() == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gradients_of_a_block_are_the_same_each_time_on_a_gpu(tmp_path: Path) -> None:
    size = {"hidden": 256, "intermediate": 512, "heads": 4, "kv_heads": 2}
    model = make_checkpoint(tmp_path / "model", blocks=1, vocabulary=256, **size)
    decoder = build_decoder(config_of(model), "cuda")
    weights = {n: t.cuda().to(torch.bfloat16) for n, t in block_tensors(model, 0).items()}
    leaves = {n: t.clone().requires_grad_() for n, t in weights.items()}
    hidden = torch.randn(8, 1024, 256, device="cuda", generator=torch.Generator("cuda"))
    hidden = hidden.to(torch.bfloat16)
    arguments = decoder.embed(
        torch.zeros(1, 256, device="cuda", dtype=torch.bfloat16),
        torch.zeros(8, 1024, dtype=torch.int64, device="cuda"),
    )[1][0]
    found = []
    for _ in range(5):
        with torch.profiler.profile() as profiler:
            out = run_block(decoder.blocks[0], leaves, hidden, arguments, gradients=True)
            grads = torch.autograd.grad(out.float().square().mean(), list(leaves.values()))
        found.append(torch.cat([grad.flatten() for grad in grads]))
        names = [event.name.lower() for event in profiler.events()]
        assert not any("flash" in name or "efficient_attention" in name for name in names)
    assert all(torch.equal(grads, found[0]) for grads in found)
    plain = run_block(decoder.blocks[0], weights, hidden, arguments)
    torch.testing.assert_close(out.float(), plain.float(), rtol=0.02, atol=0.02)
