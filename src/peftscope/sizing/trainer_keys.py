"""How to read the keys of trainers' files that say more than the value of an option. No torch.

Each function that reads takes the reading and the row of the trainer's table.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from peftscope.errors import InputError, Problem, shown
from peftscope.memory.regimes import REGIMES, Trainer, settings_of
from peftscope.methods import METHODS
from peftscope.sizing.reading import Reading, Row, flatten, read_content, take
from peftscope.sizing.sharding import read_sharding

SAVED_MODULES = ("embed_tokens", "lm_head")
"""Modules of which a copy can be trained beside an adapter."""


def refused(key: str, what: str) -> Row:
    """Returns the row of a key that is refused when it is switched on, because what it asks for is not modelled."""

    def read(reading: Reading, row: Row) -> None:
        if reading.is_on(key):
            reading.refuse(key, f"{what} is not modelled (got {shown(reading.values[key])})", "leave it out")

    return Row("", key, read=read)


def saving(key: str, what: str) -> Row:
    """Returns the row of a key that saves memory in a way that is not modelled; it is noted when it is switched on."""
    return noted(key, f"{key}: {what}; without it the peak is higher, so the answer is an upper bound", "not_modelled")


def noted(key: str, line: str, where: Literal["assumed", "not_modelled"] = "assumed") -> Row:
    """Returns the row of a key that changes no option; its line goes to a list when it is switched on."""

    def read(reading: Reading, row: Row) -> None:
        if reading.is_on(key):
            getattr(reading, where).append(line)

    return Row("", key, read=read)


def four_bit(key: str, remedy: str) -> Row:
    """Returns the row of a key for a 4-bit base, which makes QLoRA of LoRA; the remedy switches an adapter on."""

    def read(reading: Reading, row: Row) -> None:
        if reading.options.get("load_in_8bit"):
            return
        if reading.options["method"] == "full" and reading.is_on(key):
            reading.refuse(key, "a 4-bit base needs an adapter", remedy)
        elif reading.options["method"] != "full" and key in reading.values:
            reading.options["method"] = "qlora" if reading.is_on(key) else "lora"

    return Row("method", key, read=read)


def read_model(reading: Reading, row: Row) -> None:
    """Reads the name of the base."""
    key = reading.find(*row.keys)
    if key and isinstance(name := reading.values[key], str) and name:
        reading.model, reading.keys["model"] = name, key


def read_checkpointing(reading: Reading, row: Row) -> None:
    """Reads whether activations are recomputed; axolotl may also say where they wait: unsloth, offload."""
    if isinstance(reading.values.get(row.key), str):
        reading.options["checkpointing"] = True
        reading.find(row.key)
        reading.set("offload_activations", True, row.key)
    else:
        take(reading, row)


def read_attention(reading: Reading, row: Row) -> None:
    """Reads the attention kernel. Without one, the family of the model decides."""
    take(reading, row)
    if "attention" not in reading.options and reading.given.get("attention") is None:
        reading.assumed.append(f"{row.key}: the kernel that transformers chooses, sdpa for most families")


def read_evaluation(reading: Reading, row: Row) -> None:
    """Reads the batch of an evaluation, by default that of the training."""
    take(reading, replace(row, default=reading.options.get("batch_size")))


def read_packing(reading: Reading, row: Row) -> None:
    """Reads whether rows are packed. Flash attention packs without a mask: its rows are answered as full rows."""
    attention = reading.given.get("attention") or reading.options.get("attention")
    if not reading.get(row.key):
        return
    if attention == "flash_attention_2":
        stands = "rows of the whole length without a mask stand in for it"
        reading.assumed.append(f"{row.key} with flash attention: {stands}")
        reading.options["padding"] = "none"
    else:
        take(reading, row)


def read_optimizer(reading: Reading, row: Row) -> None:
    """Reads the optimizer and its implementation, or refuses one that is not known."""
    name = reading.get(row.key)
    if name is None and row.default:
        reading.assumed.append(f"optimizer=adamw (fused): {row.key} is {row.default}, {row.source}")
        name = row.default
    if name is None or reading.given.get("optimizer") is not None:
        return
    if str(name) not in row.words:
        what = f"an optimizer that is not modelled (got {shown(str(name))})"
        reading.refuse(row.key, what, "give --optimizer")
        return
    optimizer, implementation = row.words[str(name)]
    reading.set("optimizer", optimizer, row.key)
    if implementation:
        reading.options["optimizer_implementation"] = implementation


def read_variant(reading: Reading, row: Row) -> None:
    """Reads the variants of LoRA that the row's option lists, in the order of their keys; the first one counts."""
    method = reading.options["method"]
    if "rank" not in METHODS[method].model_fields:
        return
    chosen = {variant: key for variant, key in zip(row.option.split(), row.keys, strict=True) if reading.get(key)}
    taken = method if method == "qlora" else next(iter(chosen), method)
    if method == "qlora" and "dora" in chosen:
        reading.refuse(chosen["dora"], "DoRA on a 4-bit base is not modelled", "leave out one of the two")
    elif len(chosen) + (method == "qlora") > 1:
        reading.assumed.append(f"{', '.join(chosen.values())}: together they take what {taken} takes")
    reading.options["method"] = taken


def modules_of(value: object) -> list[str]:
    """Returns the modules of a list, or of text with commas between them, or none if it is neither."""
    names = [name.strip() for name in value.split(",")] if isinstance(value, str) else value
    return names if isinstance(names, list) and all(isinstance(name, str) and name for name in names) else []


def read_targets(reading: Reading, row: Row) -> None:
    """Reads target modules: their names, or all linear layers, unless a row above has set them."""
    value = reading.get(row.key)
    if "targets" in reading.options:
        return
    if value is None:
        take(reading, row)
    else:
        set_targets(reading, row.key, value)


def set_targets(reading: Reading, key: str, value: object) -> None:
    """Sets the target modules that a key lists, or refuses what is no list of modules."""
    names = modules_of(value)
    reading.set("targets", "all-linear" if names in (["all"], ["all-linear"], ["all_linear"]) else names, key)
    if not names:
        reading.refuse(key, f"must be a list of modules (got {shown(value)})", "list them, or give --targets")
    elif not isinstance(value, list) and any(set(name) & set("*^$|()[]\\+") for name in names):
        reading.pattern = str(value)  # the model decides what it means


def read_saved_modules(reading: Reading, row: Row) -> None:
    """Reads the modules that are trained in full beside the adapter."""
    if "targets" not in METHODS[reading.options["method"]].model_fields or not reading.is_on(row.key):
        return
    value = reading.values[row.key]
    names = [name.rpartition(".")[2] for name in modules_of(value)]
    if names and set(names) <= set(SAVED_MODULES):
        reading.set("modules_to_save", names, row.key)
        return
    what = f"training these modules beside the adapter is not modelled (got {shown(value)})"
    reading.refuse(row.key, what, f"use {' and '.join(SAVED_MODULES)}, or leave it out")


def read_half(reading: Reading, default: str = "") -> bool:
    """Returns whether products are in 16 bits. A default in words means that they are if no key says otherwise."""
    brain, half = reading.get("bf16"), reading.get("fp16")
    if half and half != "auto":
        reading.assumed.append("fp16 takes the bytes of bf16, but for the scaler of the loss")
        return True
    if brain is None and default:
        reading.assumed.append(default)
        return True
    return brain in (True, "auto", "full", "true")


def set_precision(reading: Reading, trainer: Trainer, *, narrow: bool, half: bool, mixed: bool) -> None:
    """Sets the precision, and what follows: what the trainer does beside its keys, and the shards.

    ``narrow``: the weights are in 16 bits; ``half``: products are; ``mixed``: it trains in mixed precision.
    """
    reading.options["precision"] = "bf16" if narrow else "amp" if half else "fp32"
    names = ["keep_logits", "loss"]
    if mixed and narrow:
        names += ["autocast", "kbit_preparation", "adapter_dtype", "modules_to_save_dtype"]
    decided = reading.options | {name: value for name, value in reading.given.items() if value is not None}
    for name, (value, source) in settings_of(trainer, decided["method"], decided).items():
        if name in names:
            reading.assume(name, value, f"{REGIMES[trainer].version}, {source}")
    read_sharding(reading, mixed=mixed)


def read_axolotl_precision(reading: Reading, row: Row) -> None:
    """Reads the precision of axolotl's files."""
    half = read_half(reading, "axolotl's default is bf16: auto")
    set_precision(reading, "axolotl", narrow=half, half=half, mixed=half and reading.values.get("bf16") != "full")


def read_plugins(reading: Reading, row: Row) -> None:
    """Reads axolotl's plugins. Cut cross-entropy is on with its plugin, unless its own key switches it off."""
    named = reading.get(row.key)
    for plugin in named if isinstance(named, list) else []:
        name = str(plugin).rpartition(".")[2]
        if name == "CutCrossEntropyPlugin":
            if reading.values.get("cut_cross_entropy") is not False:
                reading.set("loss", "cut-cross-entropy", row.key)
        elif name not in ("LigerPlugin", "SwanLabPlugin"):  # Liger has keys of its own, the other one logs
            reading.not_modelled.append(f"{row.key}: {name} may change memory")


def read_factory_packing(reading: Reading, row: Row) -> None:
    """Reads how LLaMA-Factory packs rows."""
    if reading.get("neat_packing"):
        reading.options["packing"] = True
    elif reading.get("packing"):
        line = "packing without neat_packing: full rows, each seen as one text, without a mask of blocks"
        reading.assumed.append(line)


def read_factory_alpha(reading: Reading, row: Row) -> None:
    """Reads the alpha of LLaMA-Factory's files, by default twice the rank."""
    rank = reading.options.get("rank")
    take(reading, replace(row, default=2 * rank if isinstance(rank, int) else row.default))


def read_factory_precision(reading: Reading, row: Row) -> None:
    """Reads the precision of LLaMA-Factory's files."""
    half, pure, full = read_half(reading), bool(reading.get("pure_bf16")), reading.options["method"] == "full"
    if full and not pure:
        reading.assumed.append("trained weights are upcast to fp32 unless pure_bf16, LLaMA-Factory's model/adapter.py")
    elif pure and not full:
        reading.options["adapter_dtype"] = "base"
    elif not pure and not half:
        reading.assumed.append("precision=bf16: the base keeps the dtype of its checkpoint")
    set_precision(reading, "llama-factory", narrow=pure or not full, half=half, mixed=half and not pure)


def read_trl_precision(reading: Reading, row: Row) -> None:
    """Reads the precision of TRL's files."""
    weights, four_bit = reading.get("dtype", "torch_dtype"), reading.options["method"] == "qlora"
    half = read_half(reading, row.source)
    if weights is None and not four_bit:
        reading.assumed.append("weights in fp32: TRL 1.16.0, trainer/model_config.py:89; --precision bf16 if not")
    narrow = four_bit or weights in ("bfloat16", "float16", "auto")
    set_precision(reading, "trl", narrow=narrow, half=half, mixed=half)
    reading.assumed.append(f"the defaults of {REGIMES['trl'].version}: {REGIMES['trl'].beside}")


def read_torchtune_model(reading: Reading, row: Row) -> None:
    """Reads the base and the method from the name of torchtune's builder, such as qlora_llama3_1_8b."""
    builder = str(reading.get(row.key) or "").rpartition(".")[2]
    method, _, base = builder.partition("_") if builder.startswith(("lora_", "qlora_")) else ("full", "", builder)
    base = "phi-4" if base == "phi4_14b" else base
    reading.model, reading.keys["model"], reading.options["method"] = base or None, row.key, method


def read_torchtune_targets(reading: Reading, row: Row) -> None:
    """Reads target modules under torchtune's names."""
    modules = reading.get(row.key)
    if isinstance(modules, list):
        modules = ["o_proj" if name == "output_proj" else name for name in modules]
        modules += ["gate_proj", "up_proj", "down_proj"] if reading.get("model.apply_lora_to_mlp") else []
        set_targets(reading, row.key, modules)


def read_torchtune_precision(reading: Reading, row: Row) -> None:
    """Reads the precision of torchtune's files."""
    take(reading, row)
    narrow = reading.options["method"] == "qlora" or reading.options.get("precision") != "fp32"
    set_precision(reading, "torchtune", narrow=narrow, half=False, mixed=False)


def read_torchtune_implementation(reading: Reading, row: Row) -> None:
    """Reads whether torchtune's optimizer is fused, if it is one of torch."""
    if reading.get(row.key) and reading.options.get("optimizer") in ("adamw", "sgd"):
        reading.options["optimizer_implementation"] = "fused"


def read_torchtune_shards(reading: Reading, row: Row) -> None:
    """Notes that the weights are sharded, if torchtune's file has one of the keys for it."""
    reading.assume(
        "sharding", "fsdp2", "torchtune, training/_distributed.py, if its recipe is distributed: give --gpus"
    )
    if reading.options["method"] == "qlora":
        reading.options["quant_storage"] = "bf16"  # torchao's NF4Tensor is sharded
    for key in row.keys:
        if key in reading.values:
            reading.get(key)
            reading.sharded = reading.sharded or key


def read_torchtune_loss(reading: Reading, row: Row) -> None:
    """Notes one of torchtune's losses that save memory."""
    if any(word in str(reading.get(row.key)) for word in ("Linear", "Chunked")):
        saving(row.key, "a loss over chunks of the tokens").read(reading, row)


def read_peft_companions(reading: Reading, row: Row) -> None:
    """Reads the files that lie beside: PEFT's comparison keeps the base, the length and the batch there or above."""
    folder, values = reading.path.parent, reading.values
    names = ["training_params.json"] if "peft_type" in values else ["adapter_config.json", "training_params.json"]
    above = [parent / "default_training_params.json" for parent in [folder, *folder.resolve().parents][:5]]
    for path in [*(folder / name for name in names), *[path for path in above if path.is_file()][:1]]:
        if path.is_file() and path.resolve() != reading.path.resolve():
            reading.understood.append(f"read {path}, a companion")
            content = read_content(path) or {}
            if not isinstance(content, dict):
                problem = Problem(str(path), f"must be a mapping (got {shown(content)})", "correct it, or move it away")
                raise InputError(problem)
            values |= {key: value for key, value in flatten(content).items() if values.get(key) is None}


def read_peft_start(reading: Reading, row: Row) -> None:
    """Reads the methods that PEFT has as starts of LoRA."""
    start = str(reading.get(row.key)).split("_")[0]
    if start in ("pissa", "loftq"):
        reading.options["method"] = start


def read_peft_precision(reading: Reading, row: Row) -> None:
    """Reads the precision of PEFT's method comparison."""
    weights = reading.get("dtype")
    wide = weights == "float32"
    reading.options["precision"] = "bf16" if not wide else "amp" if reading.get("use_amp") else "fp32"
    if weights is None:
        reading.assumed.append("precision=bf16: the file does not say it; --precision replaces it")
