"""Any tuner of PEFT by its own name, with options of PEFT's own configuration; virtual tokens apart.

Source: https://github.com/huggingface/peft, whose page on each tuner names its paper.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, ValidationInfo, field_validator

from peftscope.errors import InputError, Problem, close_match
from peftscope.methods.fields import AdapterDtype, Method, RunSpec, Targets, adapted_modules, target_modules
from peftscope.methods.tuner_options import limit_of, options_of, problems_of_options, tuners, with_json_types

OTHER_LAYERS = ("adaption_prompt", "ln_tuning", "trainable_tokens")
"""Tuners of other layers than linear ones. Without targets, they take those that PEFT names for the model's family."""

RESERVED = {"target_modules": "write it as `targets`"}
"""Options of PEFT's that are fields here."""

LONG_LIST = re.compile(r"(\[[^,\]]*, [^,\]]*), [^\]]*, [^\]]*\]")
"""A list of four values or more, of which a label shows two."""


class PeftTuner(Method):
    """A tuner of PEFT, of which only the name and the options are known before it is built."""

    model_config = ConfigDict(validate_default=True)

    label: ClassVar[str] = "PEFT"
    run_defaults: ClassVar[Mapping[str, Any]] = {"learning_rate": 1e-3}
    supports_shards: ClassVar[bool] = False

    name: Literal["peft"] = "peft"
    tuner: Annotated[
        str, Field(description="a tuner of the installed PEFT, by PEFT's name: vera, loha, ln_tuning, ...")
    ] = "vera"
    options: Annotated[
        dict[str, Any], Field(description="fields of PEFT's configuration; those left out have PEFT's defaults")
    ] = {}
    targets: Annotated[
        Targets | None, Field(description="as LoRA's; null: all-linear, or PEFT's choice for tuners of other layers")
    ] = None
    adapter_dtype: AdapterDtype = "fp32"
    base_weights: Annotated[Literal["full", "nf4"], Field(description="nf4: a base stored in 4 bits, as QLoRA's")] = (
        "full"
    )

    @property
    def mergeable(self) -> bool:  # type: ignore[override]
        """Whether the adapter can be merged."""
        return not limit_of(self.tuner, "merge")

    @property
    def supports_checkpointing(self) -> bool:  # type: ignore[override]
        """Whether activations can be recomputed."""
        return not limit_of(self.tuner, "recompute")

    @property
    def draws_start(self) -> bool:  # type: ignore[override]
        """Whether the seed decides the initial adapter; some tuners draw by a seed among their options."""
        return not limit_of(self.tuner, "seed")

    @field_validator("tuner")
    @classmethod
    def _tuner_can_be_trained(cls, tuner: str) -> str:
        if tuner not in tuners():
            known = [name for name, options in tuners().items() if options is not None]
            raise ValueError(f"PEFT has no such tuner; {close_match(tuner, known)}")
        if tuners()[tuner] is None:
            raise ValueError("it trains virtual tokens; use the method prompt-tuning or prefix-tuning")
        if reason := limit_of(tuner, "train"):
            raise ValueError(f"it does not train here: {reason}")
        return tuner

    @field_validator("options")
    @classmethod
    def _options_are_pefts(cls, options: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        """Returns all options of the tuner, PEFT's defaults among them: the spec says everything about a run."""
        tuner = info.data.get("tuner")
        if tuner is None:  # which is a problem of its own
            return options
        if problems := problems_of_options(tuner, options, RESERVED):
            raise ValueError("; ".join(f"{p.where}: {p.message}" + f" ({p.remedy})" * bool(p.remedy) for p in problems))
        known = {name: option for name, option in options_of(tuner).items() if name not in RESERVED}
        return {
            name: with_json_types(option, options[name]) if name in options else option.default
            for name, option in known.items()
        }

    @field_validator("base_weights")
    @classmethod
    def _tuner_takes_the_base(cls, base_weights: str, info: ValidationInfo) -> str:
        tuner = info.data.get("tuner", "")
        if base_weights == "nf4" and (reason := limit_of(tuner, "4-bit")):
            raise ValueError(f"{tuner} does not train on a 4-bit base: {reason}")
        return base_weights

    def why_not_simulated(self) -> str:
        """Returns why the tuner cannot be simulated; empty if it can."""
        reason = limit_of(self.tuner, "simulate")
        return f"PEFT's {self.tuner} cannot be simulated: {reason}" if reason else ""

    def _chosen_text(self) -> str:
        """Returns the options that differ from PEFT's defaults, or from those of a method that is a tuner's options."""
        usual = {name: option.default for name, option in options_of(self.tuner).items()}
        usual |= type(self).model_fields["options"].default
        chosen = {name: value for name, value in self.options.items() if value != usual[name]}
        return ", ".join(f"{name} {json.dumps(value)}" for name, value in chosen.items())

    def targets_of(self) -> list[str]:
        """Returns the names of the adapted modules; none where PEFT chooses them."""
        if self.targets is None:
            return [] if self.tuner in OTHER_LAYERS else target_modules("all-linear")
        return target_modules(self.targets)

    def full_label(self) -> str:
        """Returns the tuner's name, with the options that differ from the defaults."""
        chosen = LONG_LIST.sub(r"\1, ...]", self._chosen_text())
        own = f"PEFT {self.tuner}" if self.label == PeftTuner.label else self.label
        return own + f" ({chosen})" * bool(chosen) + ", NF4" * (self.base_weights == "nf4")

    def columns(self) -> dict[str, Any]:
        """Returns the fields as columns of a table; of the options only those that differ from PEFT's defaults."""
        return super().columns() | {"options": self._chosen_text()}

    def id_parts(self) -> list[str]:
        """Returns the tuner, its rank if it has one, and the targets."""
        rank = [f"r{self.options['r']:g}"] if self.options.get("r") else []
        return [self.tuner, *rank, *super().id_parts()]

    def build(self, model: Any, spec: RunSpec) -> Any:
        """Returns the base wrapped with the tuner.

        Raises:
            InputError: PEFT refuses the options or the base, in its own words.
        """
        from peft import TaskType, get_peft_model
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
        from peft.utils import PeftType

        names = adapted_modules(model, self.targets or "all-linear") if self.targets_of() else []
        targets = {"target_modules": names} if names else {}
        try:
            config = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[self.tuner.upper()]](
                task_type=TaskType.CAUSAL_LM, **targets, **copy.deepcopy(self.options)
            )
            return get_peft_model(model, config, autocast_adapter_dtype=self.adapter_dtype == "fp32")
        except Exception as error:  # any tuner may refuse in its own way, and the user needs one line
            message = f"PEFT cannot build {self.tuner}: {str(error) or type(error).__name__}"
            raise InputError(Problem("method", message, "change its options or targets")) from error

    def build_empty(self, model: Any, spec: RunSpec) -> Any:
        """Returns the same model on tensors without values: LoHa and LoKr must not ask for the value of a draw."""
        wrapped = self.build(model, spec)
        for module in wrapped.modules():
            dropout = getattr(module, "module_dropout", None)
            if isinstance(dropout, dict) and not any(dropout.values()):
                module.module_dropout = dict.fromkeys(dropout, _BelowAnyDraw())
        return wrapped


class _BelowAnyDraw:
    """Stands in for a dropout of zero in ``torch.rand(1) > dropout``: the tensor is made, and nobody reads it."""

    def __lt__(self, draw: Any) -> bool:
        return True
