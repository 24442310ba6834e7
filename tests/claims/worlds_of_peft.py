"""Worlds in which PEFT behaves otherwise, for the table of ``test_mutations.py``."""

from __future__ import annotations

import builtins
import inspect
import math
import textwrap
from collections.abc import Callable
from functools import partial
from typing import Any

import peft
import pytest
import torch
from peft import AdaLoraModel, LoraConfig, optimizers
from peft.tuners.adalora.layer import RankAllocator
from peft.tuners.lora import Linear, Linear4bit, LoraModel, dora
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.integrations import dequantize_module_weight
from transformers import AutoModelForCausalLM

World = Callable[[pytest.MonkeyPatch], None]


def instead(owner: Any, name: str, other: Any) -> World:
    """Returns the world in which an attribute is another one."""
    return lambda patch: patch.setattr(owner, name, other)


def around(owner: Any, name: str, change: Callable[[Any], Any]) -> World:
    """Returns the world in which an attribute is what is made of it."""
    return lambda patch: patch.setattr(owner, name, change(getattr(owner, name)))


def without_text(owner: Any, name: str, module: Any, *texts: str) -> World:
    """Returns the world in which a function lacks these texts of its source."""

    def world(patch: pytest.MonkeyPatch) -> None:
        source = inspect.getsource(getattr(owner, name))
        for text in texts:
            source = source.replace(text, "")
        namespace = dict(vars(module))
        exec(textwrap.dedent(source), namespace)
        patch.setattr(owner, name, namespace[name])

    return world


# The layers of LoRA: their scale, their start and their output.


def after_update_layer(change: Callable[[Any, str], Any]) -> World:
    """Returns the world in which a layer is changed whenever PEFT has made an adapter in it."""

    def changed(original: Any) -> Any:
        def update_layer(self: Any, adapter_name: str, *args: Any, **options: Any) -> None:
            original(self, adapter_name, *args, **options)
            change(self, adapter_name)

        return update_layer

    return around(LoraLayer, "update_layer", changed)


def scale_by(exponent: float) -> World:
    """PEFT divides alpha by this power of the rank."""

    def change(layer: Any, name: str) -> None:
        layer.scaling[name] *= layer.r[name] ** (1 - exponent)

    return after_update_layer(change)


ignored_alpha = after_update_layer(lambda layer, name: layer.scaling.update({name: 1.0}))
start_at_zero_always = after_update_layer(lambda layer, name: torch.nn.init.zeros_(layer.lora_B[name].weight))
"""PEFT sets B to zero even if it is told to leave both factors random."""


def _random_start(self: Any, adapter_name: str, init_lora_weights: Any) -> None:
    torch.nn.init.normal_(self.lora_A[adapter_name].weight, std=0.1)
    torch.nn.init.normal_(self.lora_B[adapter_name].weight, std=0.1)


random_start = instead(LoraLayer, "reset_lora_parameters", _random_start)
"""B starts at random, as A does."""
normal_start = instead(torch.nn.init, "kaiming_uniform_", lambda tensor, **_: torch.nn.init.normal_(tensor, std=0.02))


def output_with(term: Callable[[Any], torch.Tensor]) -> World:
    """Returns the world in which a term is added to the output of every adapted layer."""
    return around(Linear, "forward", lambda original: lambda self, x, *_, **__: original(self, x) + term(self))


output_that_depends_on_a_alone = output_with(lambda layer: layer.lora_A["default"].weight.sum())
output_that_depends_on_b_alone = output_with(lambda layer: layer.lora_B["default"].weight.sum(1))


def _forward_with_dropped_matrices(self: Any, x: torch.Tensor) -> torch.Tensor:
    linear, dropout = torch.nn.functional.linear, self.lora_dropout["default"]
    low = linear(x, dropout(self.lora_A["default"].weight))
    return self.base_layer(x) + linear(low, dropout(self.lora_B["default"].weight)) * self.scaling["default"]


dropped_matrices = instead(Linear, "forward", _forward_with_dropped_matrices)
updates_of_full_rank = around(
    Linear, "get_delta_weight", lambda original: lambda self, name: original(self, name) + self.base_layer.weight
)


# What is adapted and what is trained.


def by_default(**values: Any) -> World:
    """Returns the world in which LoRA's options have these defaults."""
    return around(LoraConfig, "__init__", lambda original: lambda self, *a, **k: original(self, *a, **values | k))


factors_with_a_bias = instead(peft, "LoraConfig", partial(LoraConfig, lora_bias=True))
trained_norms = instead(BaseTuner, "_mark_only_adapters_as_trainable", lambda self, model: None)
adapters_of_the_bases_type = around(
    peft, "get_peft_model", lambda original: lambda *args: original(*args, autocast_adapter_dtype=False)
)
one_rate = around(
    optimizers,
    "create_loraplus_optimizer",
    lambda create: lambda *args, loraplus_lr_ratio, **kwargs: create(*args, loraplus_lr_ratio=1, **kwargs),
)


def skipped_output_projection(patch: pytest.MonkeyPatch) -> None:
    inject = peft.inject_adapter_in_model

    def without_output(config: Any, model: Any) -> Any:
        config.target_modules = set(config.target_modules) - {"o_proj"}
        return inject(config, model)

    patch.setattr(peft, "inject_adapter_in_model", without_output)


def no_ia3(patch: pytest.MonkeyPatch) -> None:
    patch.delitem(peft.PEFT_TYPE_TO_CONFIG_MAPPING, peft.PeftType.IA3)


def snippet_with_its_import(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(builtins, "AutoModelForCausalLM", AutoModelForCausalLM, raising=False)


# Merging, swapping, combining and loading.

adapter_that_stays = instead(LoraModel, "merge_and_unload", lambda self, *args, **kwargs: self.model)
adapter_that_is_never_swapped = instead(peft.PeftModel, "set_adapter", lambda self, name: None)
unscaled_merging = around(
    Linear, "get_delta_weight", lambda original: lambda self, name: original(self, name) / self.scaling[name]
)
merging_of_the_first_alone = around(
    Linear,
    "merge",
    lambda original: lambda self, safe_merge=False, adapter_names=None: original(self, safe_merge, ["first"]),
)
sums_that_ignore_their_weights = around(
    LoraModel,
    "add_weighted_adapter",
    lambda original: (
        lambda self, names, weights, *args, **kwargs: original(self, names, [1.0] * len(names), *args, **kwargs)
    ),
)


def no_unmerging(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LoraModel, "unmerge_adapter", lambda self: None)
    patch.setattr(peft.PeftModel, "set_adapter", lambda self, name: None)


def _merge_into_16_bits(self: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
    plain = torch.nn.Linear(self.in_features, self.out_features, bias=False)
    plain.weight.data = dequantize_module_weight(self.base_layer) + self.get_delta_weight("first")
    self.base_layer = plain.to(torch.bfloat16).requires_grad_(False)


merged_into_16_bits = instead(Linear4bit, "merge", _merge_into_16_bits)


def sums_with_the_old_scale(patch: pytest.MonkeyPatch) -> None:
    original = LoraModel.add_weighted_adapter

    def keeps_the_old_scale(self: Any, adapters: Any, weights: Any, name: str, **kwargs: Any) -> None:
        original(self, adapters, weights, name, **kwargs)
        for layer in self.modules():
            if isinstance(layer, LoraLayer):
                layer.scaling[name] = layer.scaling[adapters[0]]

    patch.setattr(LoraModel, "add_weighted_adapter", keeps_the_old_scale)


def files_that_lose_b(patch: pytest.MonkeyPatch) -> None:
    original = peft.PeftModel.load_adapter

    def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = original(self, *args, **kwargs)
        for name, parameter in self.named_parameters():
            if ".lora_B." in name:
                parameter.data.zero_()
        return found

    patch.setattr(peft.PeftModel, "load_adapter", load_adapter)


# DoRA, AdaLoRA and LoftQ.

dora_norm_without_the_update = instead(
    dora.DoraLinearLayer, "get_weight_norm", lambda self, weight, *args, **kwargs: torch.linalg.norm(weight, dim=1)
)
adalora_without_its_call = instead(AdaLoraModel, "update_and_allocate", lambda self, step: None)


def adalora_that_scores_by_svd(patch: pytest.MonkeyPatch) -> None:
    score = RankAllocator._element_score

    def with_svd(self: Any, name: str) -> Any:
        torch.linalg.svdvals(self.exp_avg_ipt[name])
        return score(self, name)

    patch.setattr(RankAllocator, "_element_score", with_svd)


def loftq_with_its_scale(patch: pytest.MonkeyPatch) -> None:
    original = Linear.loftq_init

    def scaled(self: Any, adapter_name: str, config: Any) -> None:
        original(self, adapter_name, config)
        for factor in (self.lora_A, self.lora_B):
            factor[adapter_name].weight.data /= math.sqrt(self.scaling[adapter_name])

    patch.setattr(Linear, "loftq_init", scaled)
