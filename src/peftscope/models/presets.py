"""Shapes of well-known base models, so that the memory calculator need not download anything. No torch.

Each preset names the public code that lists its shape; a test compares the parameter counts with the published ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import SequenceMatcher
from typing import Any, NamedTuple

from peftscope.errors import close_match
from peftscope.models.shapes import Experts, Family, ModelShape
from peftscope.models.vision import Vision, vision_of


class Simulated(NamedTuple):
    """A base model of a kind without a closed form: where its ``config.json`` differs from transformers' defaults."""

    hub_id: str
    config: dict[str, Any]
    source: str
    vision: Vision | None = None


class Preset(NamedTuple):
    """A well-known base model.

    Attributes:
        hub_id: Its hub id.
        shape: Its sizes.
        source: The public code that lists them: repository, file and commit, and what is from elsewhere.
        vision: Its vision tower, if it has one.
    """

    hub_id: str
    shape: ModelShape
    source: str
    vision: Vision | None = None

    @property
    def parameters(self) -> int:
        """The number of all weights."""
        return self.shape.parameters + (self.vision.parameters if self.vision else 0)


LITGPT = "Lightning-AI/litgpt litgpt/config.py @ 0006c973aa7d6ace293e2a5fedaf1f8f804f960c"
OLMO_CORE = "allenai/OLMo-core src/olmo_core/nn/transformer/config.py @ 004aefffd1e84115c3e75950d7a7fe5d38aee0a7"
NEMO = "NVIDIA/NeMo nemo/collections/llm/gpt/model/mistral.py @ 09d2252fd8f5bface4ce5ac51f055614b73912c9"
SMOLLM3 = (
    "huggingface/transformers src/transformers/models/smollm3/configuration_smollm3.py"
    " @ 008e574391258935f3ecc3035c882e73bbcac419"
)
FMS = "foundation-model-stack/foundation-model-stack fms/models/granite.py @ 00b9af6305656b97003d6c14529457b401db8bc6"
HUB = "config.json of its hub"
GEMMA3 = f"{LITGPT}, but the vocabulary and the tower of transformers 5.24"
TORCHTUNE = (
    "pytorch/torchtune torchtune/models/qwen2_5_vision/_model_builders.py @ 49698b248e5ac5fe4a5e46950a2bf9bb05caee9c"
)
TORCHTITAN = "pytorch/torchtitan torchtitan/experiments/qwen3_vl/__init__.py @ 0375bb6789fa55559e7bb58d81e8cca47cb418a1"
OTHER_SOURCES: dict[str, str] = {
    "HuggingFaceTB/SmolLM3-3B": f"{SMOLLM3}; its longest sequence is that of its hub",
    "huggyllama/llama-65b": HUB,
    "mistralai/Mistral-Nemo-Base-2407": f"{NEMO}; its vocabulary is that of its hub",
    "mistralai/Mistral-Small-24B-Base-2501": f"{LITGPT}, but the width of a head and the longest sequence of its hub",
    "mistralai/Mistral-Small-3.2-24B-Instruct-2506": f"{LITGPT}, for the base of 2501; its hub for the tower",
    "microsoft/Phi-3-mini-4k-instruct": f"{LITGPT}, but the window of its hub",
    "google/gemma-3-1b-it": f"{LITGPT}, but the longest sequence of its hub",
    "google/gemma-3-4b-it": GEMMA3,
    "google/gemma-3-12b-it": GEMMA3,
    "google/gemma-3-27b-it": GEMMA3,
    "allenai/OLMo-2-0425-1B": f"{OLMO_CORE}; its vocabulary is that of its hub",
    "allenai/OLMo-2-0325-32B": f"{OLMO_CORE}; its vocabulary is that of its hub",
    "ibm-granite/granite-3.1-2b-base": "the README.md of its hub; no public code that lists it was found",
    "ibm-granite/granite-3.1-8b-base": f"{FMS}; its longest sequence is that of its hub",
}
"""Where shapes are listed that ``LITGPT`` does not list, or not as they are, by hub id."""
TOWERS = {"mistralai/Mistral-Small-3.2-24B-Instruct-2506": "mistral3"}
TOWERS |= dict.fromkeys((hub_id for hub_id, source in OTHER_SOURCES.items() if source == GEMMA3), "gemma3")
"""Models with a vision tower of the usual sizes of its kind, by hub id."""


def _preset(
    hub_id: str,
    family: Family,
    vocab: int,
    hidden: int,
    inner: int,
    layers: int,
    heads: int,
    kv_heads: int,
    max_seq_len: int,
    head_dim: int | None = None,
    *,
    tied: bool = False,
    window: int | None = None,
    experts: tuple[int, int, int] | None = None,
) -> Preset:
    shape = ModelShape(
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
        experts=Experts(number=experts[0], per_token=experts[1], size=experts[2]) if experts else None,
    )
    tower = vision_of(TOWERS[hub_id], {}, hidden) if hub_id in TOWERS else None
    return Preset(hub_id, shape, OTHER_SOURCES.get(hub_id, LITGPT), tower)


PRESETS: dict[str, Preset] = {
    "smollm2-135m": _preset(
        "HuggingFaceTB/SmolLM2-135M-Instruct", "llama", 49152, 576, 1536, 30, 9, 3, 8192, tied=True
    ),
    "smollm2-360m": _preset(
        "HuggingFaceTB/SmolLM2-360M-Instruct", "llama", 49152, 960, 2560, 32, 15, 5, 8192, tied=True
    ),
    "smollm2-1.7b": _preset(
        "HuggingFaceTB/SmolLM2-1.7B-Instruct", "llama", 49152, 2048, 8192, 24, 32, 32, 8192, tied=True
    ),
    "smollm3-3b": _preset("HuggingFaceTB/SmolLM3-3B", "smollm3", 128256, 2048, 11008, 36, 16, 4, 65536, tied=True),
    "llama-33b": _preset("huggyllama/llama-30b", "llama", 32000, 6656, 17920, 60, 52, 52, 2048),
    "llama-65b": _preset("huggyllama/llama-65b", "llama", 32000, 8192, 22016, 80, 64, 64, 2048),
    "llama-2-7b": _preset("meta-llama/Llama-2-7b-hf", "llama", 32000, 4096, 11008, 32, 32, 32, 4096),
    "llama-2-13b": _preset("meta-llama/Llama-2-13b-hf", "llama", 32000, 5120, 13824, 40, 40, 40, 4096),
    "llama-2-70b": _preset("meta-llama/Llama-2-70b-hf", "llama", 32000, 8192, 28672, 80, 64, 8, 4096),
    "codellama-34b": _preset("codellama/CodeLlama-34b-hf", "llama", 32000, 8192, 22016, 48, 64, 8, 16384),
    "llama-3-8b": _preset("meta-llama/Meta-Llama-3-8B", "llama", 128256, 4096, 14336, 32, 32, 8, 8192),
    "llama-3.1-8b": _preset("meta-llama/Llama-3.1-8B", "llama", 128256, 4096, 14336, 32, 32, 8, 131072),
    "llama-3.1-70b": _preset("meta-llama/Llama-3.1-70B", "llama", 128256, 8192, 28672, 80, 64, 8, 131072),
    "llama-3.2-1b": _preset("meta-llama/Llama-3.2-1B", "llama", 128256, 2048, 8192, 16, 32, 8, 131072, tied=True),
    "llama-3.2-3b": _preset("meta-llama/Llama-3.2-3B", "llama", 128256, 3072, 8192, 28, 24, 8, 131072, tied=True),
    "llama-3.3-70b": _preset("meta-llama/Llama-3.3-70B-Instruct", "llama", 128256, 8192, 28672, 80, 64, 8, 131072),
    "mistral-7b": _preset("mistralai/Mistral-7B-v0.1", "mistral", 32000, 4096, 14336, 32, 32, 8, 32768, window=4096),
    "mistral-7b-v0.3": _preset("mistralai/Mistral-7B-v0.3", "mistral", 32768, 4096, 14336, 32, 32, 8, 32768),
    "mistral-nemo-12b": _preset(
        "mistralai/Mistral-Nemo-Base-2407", "mistral", 131072, 5120, 14336, 40, 32, 8, 1024000, 128
    ),
    "mistral-small-24b": _preset(
        "mistralai/Mistral-Small-24B-Base-2501", "mistral", 131072, 5120, 32768, 40, 32, 8, 32768, 128
    ),
    "mistral-small-3.2-24b": _preset(
        "mistralai/Mistral-Small-3.2-24B-Instruct-2506", "mistral", 131072, 5120, 32768, 40, 32, 8, 131072, 128
    ),
    "mixtral-8x7b": _preset(
        "mistralai/Mixtral-8x7B-v0.1", "mixtral", 32000, 4096, 14336, 32, 32, 8, 32768, experts=(8, 2, 14336)
    ),
    "mixtral-8x22b": _preset(
        "mistralai/Mixtral-8x22B-v0.1", "mixtral", 32768, 6144, 16384, 56, 48, 8, 65536, experts=(8, 2, 16384)
    ),
    "qwen2.5-0.5b": _preset("Qwen/Qwen2.5-0.5B", "qwen2", 151936, 896, 4864, 24, 14, 2, 32768, tied=True),
    "qwen2.5-1.5b": _preset("Qwen/Qwen2.5-1.5B", "qwen2", 151936, 1536, 8960, 28, 12, 2, 131072, tied=True),
    "qwen2.5-3b": _preset("Qwen/Qwen2.5-3B", "qwen2", 151936, 2048, 11008, 36, 16, 2, 32768, tied=True),
    "qwen2.5-7b": _preset("Qwen/Qwen2.5-7B", "qwen2", 152064, 3584, 18944, 28, 28, 4, 131072),
    "qwen2.5-14b": _preset("Qwen/Qwen2.5-14B", "qwen2", 152064, 5120, 13824, 48, 40, 8, 131072),
    "qwen2.5-32b": _preset("Qwen/Qwen2.5-32B", "qwen2", 152064, 5120, 27648, 64, 40, 8, 131072),
    "qwen2.5-72b": _preset("Qwen/Qwen2.5-72B", "qwen2", 152064, 8192, 29568, 80, 64, 8, 131072),
    "qwen3-0.6b": _preset("Qwen/Qwen3-0.6B", "qwen3", 151936, 1024, 3072, 28, 16, 8, 40960, 128, tied=True),
    "qwen3-1.7b": _preset("Qwen/Qwen3-1.7B", "qwen3", 151936, 2048, 6144, 28, 16, 8, 40960, tied=True),
    "qwen3-4b": _preset("Qwen/Qwen3-4B", "qwen3", 151936, 2560, 9728, 36, 32, 8, 40960, 128, tied=True),
    "qwen3-8b": _preset("Qwen/Qwen3-8B", "qwen3", 151936, 4096, 12288, 36, 32, 8, 40960),
    "qwen3-14b": _preset("Qwen/Qwen3-14B", "qwen3", 151936, 5120, 17408, 40, 40, 8, 40960),
    "qwen3-32b": _preset("Qwen/Qwen3-32B", "qwen3", 151936, 5120, 25600, 64, 64, 8, 40960, 128),
    "qwen3-30b-a3b": _preset(
        "Qwen/Qwen3-30B-A3B", "qwen3_moe", 151936, 2048, 6144, 48, 32, 4, 40960, 128, experts=(128, 8, 768)
    ),
    "qwen3-235b-a22b": _preset(
        "Qwen/Qwen3-235B-A22B", "qwen3_moe", 151936, 4096, 12288, 94, 64, 4, 40960, 128, experts=(128, 8, 1536)
    ),
    "phi-3-mini": _preset("microsoft/Phi-3-mini-4k-instruct", "phi3", 32064, 3072, 8192, 32, 32, 32, 4096, window=2047),
    "phi-4": _preset("microsoft/phi-4", "phi3", 100352, 5120, 17920, 40, 40, 10, 16384),
    "gemma-2-2b": _preset(
        "google/gemma-2-2b", "gemma2", 256000, 2304, 9216, 26, 8, 4, 8192, 256, tied=True, window=4096
    ),
    "gemma-2-9b": _preset(
        "google/gemma-2-9b", "gemma2", 256000, 3584, 14336, 42, 16, 8, 8192, 256, tied=True, window=4096
    ),
    "gemma-2-27b": _preset(
        "google/gemma-2-27b", "gemma2", 256000, 4608, 36864, 46, 32, 16, 8192, 128, tied=True, window=4096
    ),
    "gemma-3-1b": _preset(
        "google/gemma-3-1b-it", "gemma3_text", 262144, 1152, 6912, 26, 4, 1, 32768, 256, tied=True, window=512
    ),
    "gemma-3-4b": _preset(
        "google/gemma-3-4b-it", "gemma3_text", 262208, 2560, 10240, 34, 8, 4, 131072, 256, tied=True, window=1024
    ),
    "gemma-3-12b": _preset(
        "google/gemma-3-12b-it", "gemma3_text", 262208, 3840, 15360, 48, 16, 8, 131072, 256, tied=True, window=1024
    ),
    "gemma-3-27b": _preset(
        "google/gemma-3-27b-it", "gemma3_text", 262208, 5376, 21504, 62, 32, 16, 131072, 128, tied=True, window=1024
    ),
    "olmo-2-1b": _preset("allenai/OLMo-2-0425-1B", "olmo2", 100352, 2048, 8192, 16, 16, 16, 4096),
    "olmo-2-7b": _preset("allenai/OLMo-2-1124-7B", "olmo2", 100352, 4096, 11008, 32, 32, 32, 4096),
    "olmo-2-13b": _preset("allenai/OLMo-2-1124-13B", "olmo2", 100352, 5120, 13824, 40, 40, 40, 4096),
    "olmo-2-32b": _preset("allenai/OLMo-2-0325-32B", "olmo2", 100352, 5120, 27648, 64, 40, 8, 4096),
    "granite-3.1-2b": _preset(
        "ibm-granite/granite-3.1-2b-base", "granite", 49155, 2048, 8192, 40, 32, 8, 131072, tied=True
    ),
    "granite-3.1-8b": _preset(
        "ibm-granite/granite-3.1-8b-base", "granite", 49155, 4096, 12800, 40, 32, 8, 131072, tied=True
    ),
}
"""The well-known base models by the names that commands take."""

_WIDER = {"intermediate_size": 3456}
_SMALLER = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096}
_VISION: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen2.5-vl-3b": ("qwen2.5-3b", TORCHTUNE, {}),
    "qwen2.5-vl-7b": ("qwen2.5-7b", TORCHTUNE, {}),
    "qwen2.5-vl-32b": ("qwen2.5-32b", TORCHTUNE, _WIDER),
    "qwen2.5-vl-72b": ("qwen2.5-72b", TORCHTUNE, _WIDER),
    "qwen3-vl-2b": ("qwen3-1.7b", TORCHTITAN, _SMALLER),
    "qwen3-vl-4b": ("qwen3-4b", f"{TORCHTITAN}, for its 2B; its hub for the rest", _SMALLER),
    "qwen3-vl-8b": ("qwen3-8b", TORCHTITAN, {}),
    "qwen3-vl-32b": ("qwen3-32b", f"{TORCHTITAN}, for the tower of its 8B; its hub for the rest", {}),
    "qwen3-vl-30b-a3b": ("qwen3-30b-a3b", TORCHTITAN, {}),
    "qwen3-vl-235b-a22b": ("qwen3-235b-a22b", TORCHTITAN, {}),
}
"""Vision-language models: the preset of their text model, the code that lists them, and what their towers have else."""


def _seeing(name: str, text: str, source: str, tower: dict[str, Any]) -> Preset:
    kind, length = ("qwen2_5_vl", 128000) if name.startswith("qwen2.5") else ("qwen3_vl", 262144)
    shape = PRESETS[text].shape.model_copy(update={"max_seq_len": length})
    hub_id = f"Qwen/{name.upper().replace('QWEN', 'Qwen')}-Instruct"
    return Preset(hub_id, shape, source, vision_of(kind, tower, shape.hidden_size))


PRESETS |= {name: _seeing(name, *rest) for name, rest in _VISION.items()}

TRANSFORMERS = "huggingface/transformers src/transformers/models/{} @ {}"
_GEMMA4 = TRANSFORMERS.format("gemma4/convert_gemma4_weights.py", "0f3f0632a38798af2adf264adc752130ecc5fa66")


def _simulated(hub_id: str, kind: str, length: int, beside: str = "", **config: Any) -> Simulated:
    source = TRANSFORMERS.format(kind.removesuffix("_text"), f"5.24.0, the defaults of its configuration{beside}")
    return Simulated(hub_id, {"model_type": kind, "max_position_embeddings": length, **config}, source)


def _gemma4(size: str, sizes: tuple[int, ...], length: int, local: int = 5, **more: Any) -> Simulated:
    names = "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"
    layers = [*["sliding_attention"] * local, "full_attention"] * (sizes[2] // (local + 1))
    config = {"model_type": "gemma4_text", "max_position_embeddings": length, "final_logit_softcapping": 30.0}
    config |= {**dict(zip(names, sizes, strict=True)), "layer_types": layers, **more}
    return Simulated(f"google/gemma-4-{size}-it", config, f"{_GEMMA4}; the text model alone")


_WIDE = {"hidden_size_per_layer_input": 0, "attention_k_eq_v": True, "sliding_window": 1024}
_EXPERTS = {"enable_moe_block": True, "num_experts": 128, "moe_intermediate_size": 704, "top_k_experts": 8}
_OF_20B = ", but the layers and experts of arXiv 2508.10925, table 1"
_TEXT = "; the text model alone"
_TOWER_9B, _TOWER_35B = (vision_of("qwen3_5", {}, hidden) for hidden in (4096, 2048))

SIMULATED: dict[str, Simulated] = {
    "gpt-oss-20b": _simulated(
        "openai/gpt-oss-20b", "gpt_oss", 131072, _OF_20B, num_hidden_layers=24, num_local_experts=32
    ),
    "gpt-oss-120b": _simulated("openai/gpt-oss-120b", "gpt_oss", 131072),
    "deepseek-v3": _simulated("deepseek-ai/DeepSeek-V3", "deepseek_v3", 163840, ", but its hub's longest sequence"),
    "llama-4-scout": _simulated("meta-llama/Llama-4-Scout-17B-16E", "llama4_text", 131072, _TEXT),
    "qwen3.5-9b": _simulated("Qwen/Qwen3.5-9B", "qwen3_5_text", 262144)._replace(vision=_TOWER_9B),
    "qwen3.5-35b-a3b": _simulated("Qwen/Qwen3.5-35B-A3B", "qwen3_5_moe_text", 262144)._replace(vision=_TOWER_35B),
    "gemma-4-e2b": _gemma4("E2B", (1536, 6144, 35, 8, 1), 131072, 4, num_kv_shared_layers=20, use_double_wide_mlp=True),
    "gemma-4-e4b": _gemma4("E4B", (2560, 10240, 42, 8, 2), 131072, num_kv_shared_layers=18),
    "gemma-4-31b": _gemma4("31B", (5376, 21504, 60, 32, 16), 262144, num_global_key_value_heads=4, **_WIDE),
    "gemma-4-26b-a4b": _gemma4(
        "26B-A4B", (2816, 2112, 30, 16, 8), 262144, num_global_key_value_heads=2, **_WIDE, **_EXPERTS
    ),
}
"""Well-known base models whose kind has no closed form, by the names that commands take."""

VARIANT = re.compile(r"^meta-|-(instruct|chat|it|hf|base|2507)(?=-|$)|[^a-z0-9]")
"""The parts of a model's name that do not change its shape."""
SIZE = re.compile(r"(?<![\d.x])(?<!-a)\d+(\.\d+)?[bm](?![a-z0-9])")
"""The size in a model's name; of 8x7b and 30b-a3b a part stays, because a dense model is none of theirs."""
ALIKE = 0.85
"""From this similarity on, two words count as one that is misspelt: llama with one l less, but not mixtral."""


def same_shape(name: str) -> str | None:
    """Returns the preset whose name, or whose hub id without its owner, differs only by the kind of tuning."""
    if name.lower() in {*PRESETS, *(preset.hub_id.lower() for preset in PRESETS.values())}:
        return None  # it is a preset
    bare = _bare(name)
    return next((name for name, preset in PRESETS.items() if bare in (_bare(name), _bare(preset[0]))), None)


def _bare(name: str) -> str:
    """Returns the part of a model's name that decides its shape.

    >>> _bare("NousResearch/Meta-Llama-3-8B-Instruct"), _bare("llama3_8b")
    ('llama38b', 'llama38b')
    """
    return VARIANT.sub("", name.rstrip("/").split("/")[-1].lower().replace("_", "-"))


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns "did you mean ...?" for a name of the same family and version, or where the known ones are listed.

    A name that goes on from the one that was asked for comes before one that is alike.

    >>> did_you_mean("lama-2-7b", PRESETS), did_you_mean("qwen3-30b", PRESETS), did_you_mean("llama-4", PRESETS)
    ('did you mean `llama-2-7b`?', 'did you mean `qwen3-30b-a3b`?', '`peftscope models` lists the known ones')
    """
    asked = _family(name)
    known = list(known)
    longer = [other for other in known if other.startswith(name.lower())]
    kin = longer or [other for other in known if _are_kin(asked, _family(other))]
    return close_match(name.lower(), kin) or "`peftscope models` lists the known ones"


def _family(name: str) -> list[str]:
    """Returns the words and numbers of a model's name without its size and its kind of tuning.

    >>> _family("Llama-3.1-8B-Instruct"), _family("mixtral-8x7b"), _family("qwen2.5-vl-7b")
    (['llama', '3.1'], ['mixtral', '8', 'x', '7', 'b'], ['qwen', '2.5', 'vl'])
    """
    bare = SIZE.sub("", name.lower())
    return re.findall(r"[a-z]+|\d+(?:\.\d+)?", re.sub(r"-(instruct|chat|it|hf|base)(?=-|$)", "", bare))


def _are_kin(asked: list[str], other: list[str]) -> bool:
    """Returns whether one family begins with the other's words, which may be misspelt, and has its numbers."""
    return 0 < len(asked) <= len(other) and all(
        first == second or (first.isalpha() and SequenceMatcher(None, first, second).ratio() >= ALIKE)
        for first, second in zip(asked, other, strict=False)
    )
