"""The shape of a decoder-only model, and the sizes that follow from it by arithmetic. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from peftscope.errors import shown
from peftscope.files.content import Count, Strict

Dense = Literal[
    "llama", "mistral", "qwen2", "phi3", "gemma", "gemma2", "qwen3", "smollm3", "granite", "olmo2", "gemma3_text"
]
Family = Literal[Dense, "mixtral", "qwen3_moe"]
"""The ``model_type`` of a ``config.json``, which decides how the blocks are wired."""

UNMODELLED: dict[str, Any] = {
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
    "no_rope_layer_interval": 4,
    "sliding_window_pattern": 6,
    "mlp_only_layers": [],
    "decoder_sparse_step": 1,
    "router_jitter_noise": 0.0,
    "output_router_logits": False,
}
"""Fields of a ``config.json`` that the closed form does not model, and the value at which they have no effect."""

FAMILIES: tuple[Family, ...] = get_args(Family)

ROTATED_OF_FOUR = 3
"""SmolLM3 rotates the heads of the first three layers of every four. Source: transformers, ``SmolLM3Config``."""
LOCAL_OF_SIX = 5
"""Gemma 3 has five layers with a sliding window before one without. Source: transformers, ``Gemma3TextConfig``."""

HEAD_DIMS: dict[str, int] = {"qwen3": 128, "gemma": 256, "gemma2": 256, "gemma3_text": 256}
"""The width of a head where a ``config.json`` does not state it and transformers does not divide."""
EXPERTS: dict[str, tuple[str, str]] = {
    "mixtral": ("num_local_experts", "intermediate_size"),
    "qwen3_moe": ("num_experts", "moe_intermediate_size"),
}
"""Families of mixtures of experts, and the keys of the number of experts and of the inner size of one."""
TIED_BY_DEFAULT = ("gemma", "gemma2", "gemma3_text", "smollm3")
"""Families whose head has the weights of the embedding unless a ``config.json`` says otherwise."""


@dataclass(frozen=True)
class LinearLayer:
    """A linear layer: its name inside its block, its widths, and whether it has a bias."""

    name: str
    inputs: int
    outputs: int
    bias: bool = False

    @property
    def weights(self) -> int:
        """The number of values of the matrix."""
        return self.inputs * self.outputs


class Experts(Strict):
    """The experts of every layer of a mixture, and how many of them a token goes through."""

    number: Count
    per_token: Count
    size: Annotated[Count, Field(description="intermediate size of one expert")]


def module_path(index: int, layer: str) -> str:
    """Returns the path of a linear layer in a block.

    >>> module_path(12, "down_proj")
    'layers.12.mlp.down_proj'
    """
    part = "mlp" if layer in ("gate_proj", "up_proj", "gate_up_proj", "down_proj") else "self_attn"
    return f"layers.{index}.{part}.{layer}"


def is_named(path: str, names: Sequence[str]) -> bool:
    """Returns whether one of the names means a module: it is the end of the module's path, as PEFT matches targets.

    >>> is_named("layers.12.mlp.down_proj", ["down_proj"]), is_named("layers.12.mlp.down_proj", ["2.mlp.down_proj"])
    (True, False)
    """
    return any(path == name or path.endswith(f".{name}") for name in names)


class ModelShape(Strict):
    """The sizes of a decoder, named as in its ``config.json``."""

    family: Annotated[Family, Field(description="model_type of its config.json")] = "llama"
    vocab_size: Count
    hidden_size: Count
    intermediate_size: Count
    num_layers: Annotated[Count, Field(le=10_000)]
    num_heads: Count
    num_kv_heads: Count
    head_dim: Count
    tied_embeddings: bool
    max_seq_len: Annotated[Count | None, Field(description="max_position_embeddings; null: not checked")] = None
    sliding_window: Annotated[Count | None, Field(description="tokens that a layer sees; null: all")] = None
    experts: Annotated[Experts | None, Field(description="of a mixture; null: a dense model")] = None

    @model_validator(mode="after")
    def _heads_share_keys_evenly(self) -> ModelShape:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}")
        if (self.experts is not None) != (self.family in EXPERTS):
            raise ValueError(f"experts belong to {' and '.join(EXPERTS)} (got family={self.family})")
        return self

    @cached_property
    def block(self) -> tuple[LinearLayer, ...]:
        """The linear layers of one transformer block, in the order of its parameters."""
        hidden, inner = self.hidden_size, self.intermediate_size
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        if self.family == "phi3":
            return (
                LinearLayer("o_proj", queries, hidden),
                LinearLayer("qkv_proj", hidden, queries + 2 * keys),
                LinearLayer("gate_up_proj", hidden, 2 * inner),
                LinearLayer("down_proj", inner, hidden),
            )
        bias = self.family == "qwen2"
        attention = (
            LinearLayer("q_proj", hidden, queries, bias),
            LinearLayer("k_proj", hidden, keys, bias),
            LinearLayer("v_proj", hidden, keys, bias),
            LinearLayer("o_proj", queries, hidden),
        )
        if self.experts:  # transformers 5 fuses them into parameters, which are no layers
            return attention
        return (
            *attention,
            LinearLayer("gate_proj", hidden, inner),
            LinearLayer("up_proj", hidden, inner),
            LinearLayer("down_proj", inner, hidden),
        )

    @property
    def norms(self) -> tuple[str, ...]:
        """The names of a block's norms of its whole width, in the order in which they run."""
        if self.family in ("gemma2", "gemma3_text"):
            inside = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
            return ("input_layernorm", "post_attention_layernorm", *inside)
        if self.family == "olmo2":
            return ("post_attention_layernorm", "post_feedforward_layernorm")
        return ("input_layernorm", "post_attention_layernorm")

    @property
    def head_norms(self) -> tuple[int, int] | None:
        """The widths of the norms of queries and keys: of one head, or of all; None without such norms."""
        if self.family in ("qwen3", "qwen3_moe", "gemma3_text"):
            return self.head_dim, self.head_dim
        if self.family == "olmo2":
            return self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return None

    def rotates(self, index: int) -> bool:
        """Returns whether a layer rotates its queries and keys; some layers of SmolLM3 see no positions."""
        return self.family != "smollm3" or index % 4 < ROTATED_OF_FOUR

    def linear_layers(self, names: Sequence[str]) -> list[LinearLayer]:
        """Returns all layers of the model that these names mean, see ``is_named``."""
        if not any("." in name for name in names):
            return [layer for layer in self.block if layer.name in names] * self.num_layers
        paths = [(module_path(index, layer.name), layer) for index in range(self.num_layers) for layer in self.block]
        return [layer for path, layer in paths if is_named(path, names)]

    @property
    def linear_parameters(self) -> int:
        """The weights of all linear layers inside blocks, without biases. 4-bit loading quantises these."""
        return self.num_layers * sum(layer.weights for layer in self.block)

    @property
    def expert_parameters(self) -> int:
        """The weights of all experts, without their routers. 4-bit loading leaves them as they are."""
        one = self.experts
        return 3 * self.num_layers * one.number * one.size * self.hidden_size if one else 0

    @property
    def embedding_parameters(self) -> int:
        """The number of weights of the embedding and of the output layer; tied weights count once."""
        return self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)

    @property
    def parameters(self) -> int:
        """The number of all weights; tied weights count once."""
        biases = self.num_layers * sum(layer.outputs for layer in self.block if layer.bias)
        norms = (len(self.norms) * self.num_layers + 1) * self.hidden_size
        norms += self.num_layers * sum(self.head_norms or ())
        routers = self.num_layers * self.experts.number * self.hidden_size if self.experts else 0
        return self.linear_parameters + self.expert_parameters + routers + biases + self.embedding_parameters + norms

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ModelShape:
        """Returns the shape that a ``config.json`` describes.

        Raises:
            KeyError: A size is missing; its name is the argument.
            ValueError: The family is unknown, or the model has a feature that the closed form does not model.
        """
        family = config.get("model_type")
        if family not in FAMILIES:
            raise ValueError(f"model_type {shown(family)} is not one of {', '.join(FAMILIES)}")
        for name, usual in UNMODELLED.items():
            if config.get(name, usual) not in (usual, None):
                raise ValueError(f"{name}={shown(config[name])} changes sizes in a way that is not modelled")
        heads = config["num_attention_heads"]
        experts = None
        if family in EXPERTS:
            number, size = (config[key] for key in EXPERTS[family])
            experts = Experts(number=number, per_token=config["num_experts_per_tok"], size=size)
        usual_head = HEAD_DIMS.get(family) or config["hidden_size"] // heads
        return cls(
            family=family,
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or usual_head,
            tied_embeddings=config.get("tie_word_embeddings", family in TIED_BY_DEFAULT),
            max_seq_len=config.get("max_position_embeddings"),
            sliding_window=config.get("sliding_window") if config.get("use_sliding_window", True) else None,
            experts=experts,
        )

    def to_config(self) -> dict[str, Any]:
        """Returns the fields of a ``config.json`` of this shape."""
        config = {
            "model_type": self.family,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "tie_word_embeddings": self.tied_embeddings,
            "max_position_embeddings": self.max_seq_len or 4096,
            "pad_token_id": None,
        }
        if self.family in ("mistral", "phi3", "gemma2", "gemma3_text"):
            config["sliding_window"] = self.sliding_window
        if self.experts:
            sizes = dict(zip(EXPERTS[self.family], (self.experts.number, self.experts.size), strict=True))
            config |= sizes | {"num_experts_per_tok": self.experts.per_token}
        return config
