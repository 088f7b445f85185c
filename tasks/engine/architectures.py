"""Which linears a decoder block has, who feeds them and who shares their input.

The table is data. Blocks themselves are transformers' modules; nothing of a model's forward pass is
written here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tasks.engine.errors import InputError


@dataclass(frozen=True)
class LinearGroup:
    """Linears of a block that share one input, and the module whose output that input is.

    Attributes:
        name: of the group.
        linears: names in the block.
        fed_by: a norm, or a linear whose rows are the group's channels.
        passes_shifts: whether a constant added to the feeder's output arrives unchanged; it does
            through attention, whose weights sum to one, and not through a gate.
    """

    name: str
    linears: tuple[str, ...]
    fed_by: str
    passes_shifts: bool = True


@dataclass(frozen=True)
class Architecture:
    """Module names of one model type, relative to the model or to one of its blocks."""

    model_type: str
    groups: tuple[LinearGroup, ...]
    blocks: str = "model.layers"
    embedding: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm.weight"
    head: str = "lm_head.weight"
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    # linears whose outputs are added to the stream of hidden states
    stream_writers: tuple[str, ...] = ("self_attn.o_proj", "mlp.down_proj")
    # what a norm adds to its weight before it multiplies: 1 in Gemma
    norm_offset: float = 0.0
    # norms of what a block adds to the stream of hidden states: no rotation of it passes them
    output_norms: tuple[str, ...] = ()
    # whether SGLang computes logits with the embedding, whatever head a checkpoint has
    head_is_embedding: bool = False
    # which of transformers' attentions: torch's own knows no softcap of the scores
    attention: str = "sdpa"
    # key of config.json that caps the logits, where the model type has one
    logit_cap: str | None = None
    # whether norms, rotary embeddings and gates are Llama's, which are computed in one pass each
    fused: bool = False

    @property
    def linears(self) -> tuple[str, ...]:
        """Names of the quantizable linears of a block, in the order they run."""
        return tuple(linear for group in self.groups for linear in group.linears)

    @property
    def first_linear(self) -> str:
        """Tensor name of the first block's first linear, whose dtype is the model's."""
        return f"{self.block_prefix(0)}{self.linears[0]}.weight"

    @property
    def fusions(self) -> tuple[tuple[str, ...], ...]:
        """Linears that SGLang fuses on loading: all of a fusion are quantized, or none."""
        return tuple(group.linears for group in self.groups if len(group.linears) > 1)

    def block_prefix(self, block: int) -> str:
        """Prefix of the tensor names of block ``block``, with its trailing dot."""
        return f"{self.blocks}.{block}."


def _dense_groups(mlp_norm: str = "post_attention_layernorm") -> tuple[LinearGroup, ...]:
    return (
        LinearGroup(
            "attention_input",
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            fed_by="input_layernorm",
        ),
        LinearGroup("attention_output", ("self_attn.o_proj",), fed_by="self_attn.v_proj"),
        LinearGroup("mlp_input", ("mlp.gate_proj", "mlp.up_proj"), fed_by=mlp_norm),
        LinearGroup("mlp_output", ("mlp.down_proj",), fed_by="mlp.up_proj", passes_shifts=False),
    )


ARCHITECTURES: Mapping[str, Architecture] = {
    known.model_type: known
    for known in (
        *(
            Architecture(name, _dense_groups(), fused=True)
            for name in ("llama", "mistral", "qwen2", "qwen3")
        ),
        Architecture("gemma", _dense_groups(), norm_offset=1.0, head_is_embedding=True),
        Architecture(
            "gemma2",
            _dense_groups(mlp_norm="pre_feedforward_layernorm"),
            norm_offset=1.0,
            head_is_embedding=True,
            output_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
            attention="eager",
            logit_cap="final_logit_softcapping",
        ),
    )
}


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """Look up the architecture of a parsed ``config.json``.

    Raises:
        InputError: the model type is not in the table; lists the known ones.
    """
    model_type = config.get("model_type")
    known = ARCHITECTURES.get(str(model_type))
    if known is None:
        raise InputError(
            f"config.json: model_type: {model_type!r} is not an architecture known here; "
            f"known: {', '.join(sorted(ARCHITECTURES))}"
        )
    return known
