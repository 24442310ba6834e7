"""The subjects of checks: small models with random weights, models without weights, real weights, English text."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from peftscope.claims.measurement import NotRunError
from peftscope.evaluation.retention import prose
from peftscope.models.catalog import LOCAL, model_folder
from peftscope.models.presets import PRESETS

TINY = "a Llama of two layers, 64 wide, with random weights"
"""The description of ``tiny_llama`` for readers."""

STORY_SHA256 = "e9048bcd282207d6f093bff92b3ad7c94689352205105c3716f0fdf5e245a25c"
WINDOW_TOKENS = 128

BLOCK_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def tiny_llama(dtype: str = "float32", **sizes: Any) -> Any:
    """Returns a Llama of two narrow layers with random weights, in evaluation mode. ``sizes`` override its config."""
    config = LlamaConfig(
        **{
            "vocab_size": 96,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "initializer_range": 0.1,
            "pad_token_id": 0,
            "use_cache": False,
            **sizes,
        }
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()


def meta_model(preset: str) -> Any:
    """Returns a preset's model on ``meta``, with all modules and shapes but without weights."""
    with torch.device("meta"):
        return random_model(PRESETS[preset].shape.to_config())


def random_model(config: Mapping[str, Any]) -> Any:
    """Returns a model with random weights."""
    sizes = {name: value for name, value in config.items() if name != "model_type"}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **sizes))


def token_ids(model: Any, length: int = 12, batch: int = 2) -> torch.Tensor:
    """Returns (batch, length) random tokens of a model's vocabulary."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, model.config.vocab_size, (batch, length), generator=generator)


def weight_matrices(model: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the name and the (out, in) fp32 weights of every linear layer inside the blocks of a fetched model.

    Raises:
        NotRunError: The model was not fetched.
    """
    with safe_open(fetched(model) / "model.safetensors", "pt") as file:
        for name in sorted(file.keys()):
            if ".layer" in name and name.endswith(".weight") and "norm" not in name.lower():
                yield name.removesuffix(".weight"), file.get_tensor(name).to(torch.float32)


def fetched(model: str) -> Path:
    """Returns the folder of a fetched model.

    Raises:
        NotRunError: The model was not fetched.
    """
    folder = model_folder(model)
    if not (folder / "model.safetensors").is_file():
        raise NotRunError(f"the weights of {model} are missing; run `peftscope fetch {model}`")
    return folder


@cache
def english() -> str:
    """Returns the project's held-out prose, followed by a story of 1889 that the package reasoning-gym has.

    The story is "In the Year 2889" by Michel and Jules Verne, in the public domain (Project Gutenberg 19362). Lines of
    a paragraph are joined.

    Raises:
        NotRunError: The package has another edition of the story.
    """
    content = files("reasoning_gym.data").joinpath("in_the_year_2889.txt").read_bytes()
    if hashlib.sha256(content).hexdigest() != STORY_SHA256:
        raise NotRunError("the installed reasoning-gym has another text; install the version of requirements.lock")
    # Project Gutenberg's own words stand before and after the story.
    story = content.decode().replace("\r", "").partition("IN THE YEAR 2889.\n")[2].partition("End of Project")[0]
    paragraphs = [" ".join(lines.split()) for lines in story.split("\n\n") if lines.strip()]
    return "\n\n".join([prose().strip(), *paragraphs])


def text_windows(model: str, count: int) -> torch.Tensor:
    """Returns the first (count, ``WINDOW_TOKENS``) tokens of ``english`` under a fetched model's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(fetched(model), local_files_only=True, trust_remote_code=False)
    ids = tokenizer(english(), add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < count * WINDOW_TOKENS:
        raise NotRunError(f"the text has {len(ids) // WINDOW_TOKENS} windows for {model}, not {count}")
    return torch.tensor(ids[: count * WINDOW_TOKENS]).view(count, WINDOW_TOKENS)


def fetched_model(model: str, auto_class: str) -> Any:
    """Returns a fetched model in fp32 and evaluation mode, loaded by a class of transformers such as ``AutoModel``."""
    loaded = getattr(transformers, auto_class).from_pretrained(fetched(model), dtype=torch.float32, **LOCAL)
    return loaded.eval()


def window_losses(model: Any, windows: torch.Tensor) -> torch.Tensor:
    """Returns a language model's mean loss on each window of tokens, in fp64."""
    with torch.no_grad():
        logits = model(input_ids=windows).logits[:, :-1].transpose(1, 2)
    return torch.nn.functional.cross_entropy(logits, windows[:, 1:], reduction="none").double().mean(1)


def operations(work: Callable[[], Any]) -> int:
    """Returns the floating-point operations of some work, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def flat(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Returns all values of some tensors in one vector."""
    return torch.cat([tensor.flatten() for tensor in tensors])
