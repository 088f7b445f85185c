"""Small checkpoints and texts that tests make for themselves."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

DEMO_MODEL = Path(__file__).parent.parent / "assets" / "demo-model"
VOCABULARY = 8192
# a window shorter than the texts of tests, and caps that small scores and logits feel
GEMMA2: dict[str, Any] = {
    "model_type": "gemma2",
    "tied": True,
    "sliding_window": 16,
    "query_pre_attn_scalar": 16,
    "attn_logit_softcapping": 1.0,
    "final_logit_softcapping": 1.0,
}


def make_checkpoint(
    folder: Path,
    model_type: str = "llama",
    *,
    blocks: int = 2,
    hidden: int = 128,
    intermediate: int = 256,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int | None = None,
    tied: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    shard_size: str = "1GB",
    seed: int = 0,
    vocabulary: int = VOCABULARY,
    context: int = 2048,
    **config: Any,
) -> Path:
    """Write a random checkpoint with the demo model's tokenizer; its outliers are seeded too."""
    torch.manual_seed(seed)
    parsed = CONFIG_MAPPING[model_type](
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim or hidden // heads,
        max_position_embeddings=context,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=1,
        dtype=dtype,
        **config,
    )
    model = AutoModelForCausalLM.from_config(parsed, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # random biases and norms: left at zero and one, tests would not see them
            if name.endswith("bias"):
                parameter.normal_(0, 0.02)
            elif "norm" in name:
                parameter.normal_(1, 0.1)
    model.save_pretrained(folder, max_shard_size=shard_size)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_MODEL / name, folder / name)
    return folder


def make_text(path: Path, words: int = 20000, seed: int = 0) -> Path:
    """Write a text of random common words: enough for windows, nobody's work."""
    draw = random.Random(seed)
    known = [
        "the",
        "of",
        "and",
        "a",
        "to",
        "in",
        "he",
        "was",
        "that",
        "his",
        "with",
        "it",
        "for",
        "as",
        "had",
        "on",
        "at",
        "by",
        "which",
        "be",
        "she",
        "her",
        "they",
        "house",
        "river",
        "winter",
        "letter",
        "garden",
        "morning",
        "horse",
        "captain",
        "window",
        "evening",
        "money",
        "friend",
        "road",
        "walked",
        "looked",
        "found",
        "gave",
        "came",
        "went",
        "said",
        "thought",
        "kept",
        "turned",
        "small",
        "old",
        "long",
        "white",
        "dark",
    ]
    sentences = []
    while words > 0:
        length = draw.randint(5, 14)
        sentence = " ".join(draw.choices(known, k=length))
        sentences.append(sentence.capitalize() + ".")
        words -= length
    path.write_text(" ".join(sentences), encoding="utf-8")
    return path


def edit_config(folder: Path, **changes: Any) -> None:
    """Change a checkpoint's config.json; None removes a key."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key, value in changes.items():
        config.pop(key, None)
        if value is not None:
            config[key] = value
    path.write_text(json.dumps(config))
