"""Decoder blocks, run one at a time with weights passed in as values.

The model is built by transformers on the meta device: modules without weights. A block runs through
``torch.func.functional_call``, so no weight is ever held by a module.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import record_function

from tasks.engine.architectures import Architecture, architecture_of
from tasks.engine.errors import InputError
from tasks.engine.fused import CODE, fuse
from tasks.engine.lineage import code_digest
from tasks.engine.precision import has_fast_bf16

# hidden states of a whole micro-batch pass a block at once; part of every lineage key
MICRO_BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}

# by which libraries multiply otherwise
PRODUCT_VARIABLES = (
    "CUBLAS_WORKSPACE_CONFIG",
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
)

# hidden states of both models that an evaluation holds at once
STREAM_BYTES = 1 << 30
# rows whose logits are held at once
HEAD_ROWS = 1024

InputHook = Callable[[str, Tensor], Tensor]


@dataclass(frozen=True)
class Decoder:
    """A model without weights: its blocks, its final norm, how inputs enter and logits leave it."""

    architecture: Architecture
    model: nn.Module
    blocks: tuple[nn.Module, ...]
    final_norm: nn.Module
    logit_cap: float | None = None

    def embed(self, embedding: Tensor, tokens: Tensor) -> tuple[Tensor, tuple[dict[str, Any], ...]]:
        """Return the first block's input and each block's other arguments.

        Args:
            embedding: (V, D) embedding matrix; its dtype is the dtype of the hidden states.
            tokens: (B, T) token ids.

        Returns:
            Hidden states (B, T, D), and per block the keyword arguments (mask, positions, rotary
            embedding) that transformers' own forward pass hands it.
        """
        with torch.no_grad():
            module: Any = self.model.embed_tokens
            # not a bare look-up: Gemma's scales what it finds
            hidden = torch.func.functional_call(module, {"weight": embedding}, (tokens,))
            self.model(inputs_embeds=hidden, use_cache=False)
        calls = [recorder.take() for recorder in self.model.layers]  # type: ignore[union-attr]
        return calls[0][0], tuple(arguments for _, arguments in calls)

    def logits(self, hidden: Tensor, head: Tensor) -> Tensor:
        """Logits (..., V) in float32 of hidden states (..., D) after the final norm.

        Args:
            hidden: (..., D).
            head: (V, D), of the same dtype.
        """
        logits = _product(hidden, head.T)
        if self.logit_cap is None:
            return logits
        # in place: of a large vocabulary each copy is as large as the head
        return logits.div_(self.logit_cap).tanh_().mul_(self.logit_cap)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """(..., D) times (D, V) in float32; of half precision on CUDA not rounded in between."""
    if not left.is_cuda or left.dtype == torch.float32:
        return (left @ right).float()
    flat = torch.mm(left.flatten(0, -2), right, out_dtype=torch.float32)
    return flat.unflatten(0, left.shape[:-1])


class _Recorder(nn.Module):
    """Stands where a block would, and keeps the arguments that the model hands it."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.attention_type = getattr(block, "attention_type", "full_attention")
        self.call: tuple[Tensor, dict[str, Any]] | None = None

    def forward(self, hidden_states: Tensor, **arguments: Any) -> Tensor:
        self.call = (hidden_states, arguments)
        return hidden_states

    def take(self) -> tuple[Tensor, dict[str, Any]]:
        call, self.call = self.call, None
        if call is None:
            raise RuntimeError("the model did not call this block")
        return call


def build_decoder(config: Mapping[str, Any], device: str = "cpu") -> Decoder:
    """Build the model of a parsed ``config.json`` without weights.

    Raises:
        InputError: transformers cannot build it, or the architecture is not known.
    """
    architecture = architecture_of(config)
    causal_lm = build_causal_lm(config, device)
    model = causal_lm.model
    # of gradients only, and torch takes none that lies beyond the rows that are looked up
    model.embed_tokens.padding_idx = None
    blocks, final_norm = tuple(model.layers), model.norm
    model.layers = nn.ModuleList(_Recorder(block) for block in blocks)
    model.norm = nn.Identity()
    if architecture.fused:
        for module in (*blocks, final_norm):
            fuse(module)
    # not the file's own: a key that is missing there has transformers' default
    key = architecture.logit_cap
    cap = None if key is None else getattr(causal_lm.config, key)
    return Decoder(architecture, model, blocks, final_norm, cap)


def build_causal_lm(config: Mapping[str, Any], device: str = "cpu") -> Any:
    """Build transformers' causal LM on the meta device, its rotary tables on ``device``."""
    # its models import whatever it knows of and finds installed, images' libraries among it
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    architecture = architecture_of(config)
    values = {k: v for k, v in config.items() if k not in ("auto_map", "quantization_config")}
    try:
        with _silent_transformers(), torch.device("meta"):
            parsed = CONFIG_MAPPING[architecture.model_type].from_dict(values)
            causal_lm = AutoModelForCausalLM.from_config(
                parsed, attn_implementation=architecture.attention, trust_remote_code=False
            )
    # a config that is wrong fails anywhere in transformers, with any kind of error
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(
            f"config.json: transformers cannot build this model ({reason}); correct it there, or "
            "copy the model's own again"
        ) from error
    with torch.device(device):
        # the rotary tables are not weights: no checkpoint holds them
        causal_lm.model.rotary_emb = type(causal_lm.model.rotary_emb)(config=parsed)
        embedding = causal_lm.model.embed_tokens
        if hasattr(embedding, "scalar_embed_scale"):
            embedding.embed_scale = torch.tensor(embedding.scalar_embed_scale)
    return causal_lm.eval()


@contextlib.contextmanager
def _silent_transformers() -> Iterator[None]:
    """Keep its warnings about a config off the console: what matters of them is an error, too."""
    from transformers import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def run_block(
    block: nn.Module,
    weights: Mapping[str, Tensor],
    hidden: Tensor,
    arguments: Mapping[str, Any],
    linears: Sequence[str] = (),
    on_input: InputHook | None = None,
    *,
    gradients: bool = False,
) -> Tensor:
    """Run one block on hidden states (B, T, D) with the given weights.

    Args:
        block: the block, without weights.
        weights: every parameter and buffer of the block by its name in it.
        hidden: (B, T, D).
        arguments: what :meth:`Decoder.embed` gave for this block.
        linears: names of the linears whose input ``on_input`` sees.
        on_input: called with a linear's name and its input; what it returns is the input used.
        gradients: whether they flow to weights and hidden states.

    Returns:
        Hidden states (B, T, D) after the block.
    """
    with (
        record_function("forward"),
        torch.set_grad_enabled(gradients),
        _hooked(block, linears, on_input),
        attention_with_gradients(hidden.device.type) if gradients else contextlib.nullcontext(),
    ):
        # strict: a weight that is missing would be read from memory that nobody wrote
        output = torch.func.functional_call(
            block, dict(weights), (hidden,), dict(arguments), strict=True
        )
    return output[0] if isinstance(output, tuple) else output


def attention_with_gradients(device: str) -> AbstractContextManager[None]:
    """Attention whose gradients are the same each time on a type of device, to be entered.

    On a GPU the fused ones add gradients in an order that changes; this one holds the scores.
    """
    return contextlib.nullcontext() if device == "cpu" else sdpa_kernel(SDPBackend.MATH)


@contextlib.contextmanager
def _hooked(block: nn.Module, linears: Sequence[str], on_input: InputHook | None) -> Iterator[None]:
    def make(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            assert on_input is not None
            return (on_input(name, inputs[0]), *inputs[1:])

        return hook

    handles = (
        []
        if on_input is None
        else [block.get_submodule(n).register_forward_pre_hook(make(n)) for n in linears]
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def micro_batches(windows: Tensor, device: str) -> tuple[Tensor, ...]:
    """Cut windows (W, T, ...) into micro-batches of a fixed number of tokens."""
    kind = torch.device(device).type
    return windows.split(max(1, MICRO_BATCH_TOKENS[kind] // windows.shape[1]))


@cache
def transformers_version() -> str:
    """Of the package that is installed: to import it takes seconds, and a run may not need it."""
    return version("transformers")


@cache
def triton_version() -> str:
    """Of the compiler of kernels, by whichever name torch brought it; none where it did not."""
    for package in ("triton", "pytorch-triton"):
        with contextlib.suppress(PackageNotFoundError):
            return version(package)
    return "none"


def device_fingerprint(device: str) -> dict[str, str]:
    """What decides the last bits of a computation on ``device``: part of every lineage key.

    Asked anew each time: a process may change its number of threads, as a sweep does.
    """
    where = torch.device(device)
    facts = {
        "torch": torch.__version__,
        "transformers": transformers_version(),
        "micro_batch": f"{MICRO_BATCH_TOKENS[where.type]} tokens",
        "between products": code_digest(*CODE),
    }
    if where.type == "cpu":
        capability = torch.backends.cpu.get_cpu_capability()
        tiles = "AMX " if has_fast_bf16() else ""
        return facts | {"device": f"cpu {capability} {tiles}threads={torch.get_num_threads()}"}
    name = torch.cuda.get_device_name(where)
    major, minor = torch.cuda.get_device_capability(where)
    return facts | {
        "device": f"cuda {name} sm{major}{minor} {torch.version.cuda}",
        "triton": triton_version(),
        **{name: os.environ[name] for name in PRODUCT_VARIABLES if name in os.environ},
    }
