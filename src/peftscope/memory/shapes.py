"""The shape of a decoder-only model, and what follows from it by arithmetic. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from pydantic import BaseModel, ConfigDict, PositiveInt


@dataclass(frozen=True)
class LinearLayer:
    """One linear layer's name inside its block and its widths."""

    name: str
    inputs: int
    outputs: int


class ModelShape(BaseModel):
    """Sizes of a Llama-like decoder, in the words of its ``config.json``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    vocab_size: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_layers: PositiveInt
    num_heads: PositiveInt
    num_kv_heads: PositiveInt
    head_dim: PositiveInt
    tied_embeddings: bool

    @cached_property
    def block(self) -> tuple[LinearLayer, ...]:
        """The linear layers of one transformer block."""
        hidden, inner = self.hidden_size, self.intermediate_size
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return (
            LinearLayer("q_proj", hidden, queries),
            LinearLayer("k_proj", hidden, keys),
            LinearLayer("v_proj", hidden, keys),
            LinearLayer("o_proj", queries, hidden),
            LinearLayer("gate_proj", hidden, inner),
            LinearLayer("up_proj", hidden, inner),
            LinearLayer("down_proj", inner, hidden),
        )

    def linear_layers(self, names: Sequence[str]) -> list[LinearLayer]:
        """Returns the layers of the whole model with one of these names."""
        return [layer for layer in self.block if layer.name in names] * self.num_layers

    @property
    def linear_parameters(self) -> int:
        """Weights of all block-internal linear layers: what 4-bit loading quantises."""
        return self.num_layers * sum(layer.inputs * layer.outputs for layer in self.block)

    @property
    def parameters(self) -> int:
        """All weights, tied ones once; RMSNorm has two vectors a block and one at the end."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        return self.linear_parameters + embeddings + (2 * self.num_layers + 1) * self.hidden_size
