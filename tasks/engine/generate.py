"""Text sampled from the model itself: calibration and evaluation without data."""

from __future__ import annotations

import torch
from torch import Tensor

from tasks.engine.architectures import architecture_of
from tasks.engine.decoder import build_causal_lm
from tasks.engine.errors import InputError, RunError
from tasks.engine.plan import is_tied
from tasks.engine.source import Source

# sequences sampled side by side; part of what decides the bytes
BATCH = 16


def sample_windows(source: Source, windows: int, seq_len: int, seed: int, device: str) -> Tensor:
    """Sample windows from the source model at temperature 1: int64 (windows, seq_len).

    Every window starts with BOS (or token 0 where there is none). Weights stay in mapped files on a
    CPU and lie on the device on a GPU.

    Raises:
        InputError: the model does not fit the device.
        RunError: the model's output holds NaN or Inf.
    """
    causal_lm = build_causal_lm(source.config, device)
    names = [n for n in source.tensors if n in causal_lm.state_dict()]
    try:
        architecture = architecture_of(source.config)
        # of mixed dtypes, as fine-tunes have them: that of the linears is computed in
        dtype = source.tensors[architecture.first_linear].dtype
        weights = {
            name: tensor.to(dtype) if tensor.is_floating_point() else tensor
            for name, tensor in source.read(names, device).items()
        }
        if is_tied(source):
            weights[architecture.head] = weights[architecture.embedding]
        causal_lm.load_state_dict(weights, assign=True, strict=False)
        return _sample_all(causal_lm, source, windows, seq_len, seed, device)
    except torch.cuda.OutOfMemoryError as error:
        raise InputError(
            f"name: self_generated: the model does not fit {device}; give a text file instead"
        ) from error
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        raise RunError(
            f"name: self_generated: {source.path} cannot write text, its own output holds NaN or "
            "Inf; its weights are damaged, or overflow their dtype"
        ) from error


def _sample_all(
    causal_lm: object, source: Source, windows: int, seq_len: int, seed: int, device: str
) -> Tensor:
    bos = source.config.get("bos_token_id")
    first = bos[0] if isinstance(bos, list) else bos
    counts = [min(BATCH, windows - start) for start in range(0, windows, BATCH)]
    with torch.random.fork_rng(devices=[] if device == "cpu" else [device]):
        torch.manual_seed(seed)
        return torch.cat([_sample(causal_lm, n, seq_len, first or 0, device) for n in counts])


def _sample(causal_lm: object, count: int, seq_len: int, bos: int, device: str) -> Tensor:
    start = torch.full((count, 1), bos, dtype=torch.int64, device=device)
    if seq_len == 1:
        return start.cpu()
    from transformers import GenerationConfig

    # no end of text: a window is filled to its end
    config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=seq_len - 1,
        min_new_tokens=seq_len - 1,
        eos_token_id=None,
        pad_token_id=bos,
        bos_token_id=bos,
    )
    with torch.no_grad():
        sampled: Tensor = causal_lm.generate(  # type: ignore[attr-defined]
            start, generation_config=config, attention_mask=torch.ones_like(start)
        )
    return sampled.cpu()
