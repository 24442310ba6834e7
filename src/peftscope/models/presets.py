"""Shapes of well-known base models, so that the memory calculator need not download anything. No torch.

Source: each model's ``config.json`` on its hub; a test compares the parameter counts with the published ones.
"""

from __future__ import annotations

from peftscope.models.shapes import Family, ModelShape


def _shape(
    family: Family,
    vocab: int,
    hidden: int,
    inner: int,
    layers: int,
    heads: int,
    kv_heads: int,
    max_seq_len: int,
    head_dim: int | None = None,
    tied: bool = False,
    window: int | None = None,
) -> ModelShape:
    return ModelShape(
        family=family,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim or hidden // heads,
        tied_embeddings=tied,
        max_seq_len=max_seq_len,
        sliding_window=window,
    )


PRESETS: dict[str, tuple[str, ModelShape]] = {
    "smollm2-135m": (
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        _shape("llama", 49152, 576, 1536, 30, 9, 3, 8192, tied=True),
    ),
    "llama-33b": ("huggyllama/llama-30b", _shape("llama", 32000, 6656, 17920, 60, 52, 52, 2048)),
    "llama-65b": ("huggyllama/llama-65b", _shape("llama", 32000, 8192, 22016, 80, 64, 64, 2048)),
    "llama-2-7b": ("meta-llama/Llama-2-7b-hf", _shape("llama", 32000, 4096, 11008, 32, 32, 32, 4096)),
    "llama-2-13b": ("meta-llama/Llama-2-13b-hf", _shape("llama", 32000, 5120, 13824, 40, 40, 40, 4096)),
    "llama-2-70b": ("meta-llama/Llama-2-70b-hf", _shape("llama", 32000, 8192, 28672, 80, 64, 8, 4096)),
    "codellama-34b": ("codellama/CodeLlama-34b-hf", _shape("llama", 32000, 8192, 22016, 48, 64, 8, 16384)),
    "llama-3-8b": ("meta-llama/Meta-Llama-3-8B", _shape("llama", 128256, 4096, 14336, 32, 32, 8, 8192)),
    "llama-3.1-8b": ("meta-llama/Llama-3.1-8B", _shape("llama", 128256, 4096, 14336, 32, 32, 8, 131072)),
    "llama-3.1-70b": ("meta-llama/Llama-3.1-70B", _shape("llama", 128256, 8192, 28672, 80, 64, 8, 131072)),
    "llama-3.2-1b": (
        "meta-llama/Llama-3.2-1B",
        _shape("llama", 128256, 2048, 8192, 16, 32, 8, 131072, tied=True),
    ),
    "llama-3.2-3b": (
        "meta-llama/Llama-3.2-3B",
        _shape("llama", 128256, 3072, 8192, 28, 24, 8, 131072, tied=True),
    ),
    "mistral-7b": ("mistralai/Mistral-7B-v0.1", _shape("mistral", 32000, 4096, 14336, 32, 32, 8, 32768, window=4096)),
    "qwen2.5-0.5b": ("Qwen/Qwen2.5-0.5B", _shape("qwen2", 151936, 896, 4864, 24, 14, 2, 32768, tied=True)),
    "qwen2.5-1.5b": ("Qwen/Qwen2.5-1.5B", _shape("qwen2", 151936, 1536, 8960, 28, 12, 2, 131072, tied=True)),
    "qwen2.5-7b": ("Qwen/Qwen2.5-7B", _shape("qwen2", 152064, 3584, 18944, 28, 28, 4, 131072)),
    "phi-3-mini": (
        "microsoft/Phi-3-mini-4k-instruct",
        _shape("phi3", 32064, 3072, 8192, 32, 32, 32, 4096, window=2047),
    ),
    "gemma-2-2b": (
        "google/gemma-2-2b",
        _shape("gemma2", 256000, 2304, 9216, 26, 8, 4, 8192, head_dim=256, tied=True, window=4096),
    ),
}
"""The hub id and the shape of each preset, by the preset's name."""
