"""The methods of the suite: one file each, one line each in ``METHODS``. Importing this needs no torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from peftscope.methods.adalora import AdaLoRA
from peftscope.methods.dora import DoRA
from peftscope.methods.fields import Method
from peftscope.methods.full import Full
from peftscope.methods.ia3 import IA3
from peftscope.methods.loftq import LoftQ
from peftscope.methods.lora import LoRA
from peftscope.methods.lora_plus import LoRAPlus
from peftscope.methods.none import Untouched
from peftscope.methods.pissa import PiSSA
from peftscope.methods.prefix_tuning import PrefixTuning
from peftscope.methods.prompt_tuning import PromptTuning
from peftscope.methods.qlora import QLoRA
from peftscope.methods.rslora import RsLoRA

AnyMethod = Annotated[
    Untouched
    | Full
    | LoRA
    | QLoRA
    | DoRA
    | AdaLoRA
    | LoftQ
    | LoRAPlus
    | RsLoRA
    | PiSSA
    | IA3
    | PromptTuning
    | PrefixTuning,
    Field(discriminator="name"),
]

METHODS: dict[str, type[Method]] = {
    cls.model_fields["name"].default: cls
    for cls in AnyMethod.__origin__.__args__  # type: ignore[attr-defined]
}
"""Every method by its name in specs, in the order of tables."""
