"""A question about memory: the model, the run and the card. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from peftscope.errors import InputError, Problem, close_match, shown
from peftscope.files.content import parse_json, read_text
from peftscope.files.hub import check_reached, mirrored
from peftscope.hardware.cards import CUBLAS_BYTES, Gpu
from peftscope.memory.beside import BESIDE_OPTIONS, Beside, check_beside
from peftscope.memory.formula.states import OTHER_OPTIMIZERS
from peftscope.memory.regimes import REGIMES, settings_of
from peftscope.methods import METHODS
from peftscope.methods.fields import TARGET_PRESETS
from peftscope.models.presets import PRESETS, SIMULATED, did_you_mean, same_shape
from peftscope.models.shapes import ModelShape
from peftscope.models.stored import INT8, Stored, stored_as
from peftscope.spec import RunSpec

METHOD_OPTIONS = (
    "tuner",
    "options",
    "rank",
    "alpha",
    "init_r",
    "target_r",
    "targets",
    "feedforward",
    "virtual_tokens",
    "dropout",
    "adapter_dtype",
    "norm_gradient",
    "double_quant",
    "kbit_preparation",
)
"""The options that are fields of a method."""

SPEC_OPTIONS = (
    "batch_size",
    "seq_len",
    "gradient_accumulation",
    "precision",
    "autocast",
    "optimizer",
    "optimizer_implementation",
    "loss_path",
    "keep_logits",
    "attention",
    "checkpointing",
    "packing",
    "eval_batch_size",
)
"""The options that are fields of the spec."""


def options_of(spec: RunSpec) -> dict[str, Any]:
    """Returns a run as options of ``ask``."""
    options = {name: getattr(spec, name) for name in SPEC_OPTIONS}
    options |= {name: getattr(spec.method, name) for name in METHOD_OPTIONS if hasattr(spec.method, name)}
    return {"method": spec.method.name, **options}


DEFAULTS: dict[str, Any] = {"batch_size": 1, "seq_len": 512, "precision": "bf16", "loss_path": "hf"}
"""What a plain PyTorch and PEFT script does. All other options have the default of their field."""


@dataclass(frozen=True)
class Model:
    """A base model, as far as it decides memory.

    Attributes:
        name: The name, as the question gave it.
        config: The content of its ``config.json``.
        shape: Its sizes, or None if the closed form does not know its family.
        why_no_shape: The reason why there is no shape.
        variant_of: The preset that it is a variant of by its name, if its own configuration was not read.
        stored: How its linear layers are stored, if its checkpoint is quantised or is loaded in 8 bits.
        unpacked: What an answer says of a quantised checkpoint that is unpacked to train.
    """

    name: str
    config: dict[str, Any]
    shape: ModelShape | None
    why_no_shape: str = ""
    variant_of: str = ""
    stored: Stored | None = None
    unpacked: str = ""

    @property
    def max_seq_len(self) -> int | None:
        """The longest sequence that its positions allow, or None if its configuration states no limit."""
        limits = [self.config.get(name) for name in ("max_position_embeddings", "n_positions", "max_seq_len")]
        return next((limit for limit in limits if isinstance(limit, int)), None)


@dataclass(frozen=True)
class Question:
    """A question about the memory of a run.

    Attributes:
        model: The base.
        spec: The run. Every sequence of the longest batch has the length ``seq_len``.
        responses: The number of positions of a sequence that carry a loss.
        gpu: The card, or None if none was named.
        gpus: The number of cards over which weights, gradients and states are sharded.
        beside: What the question says beside the fields of the run.
        by_trainer: What the defaults of a trainer decide, one sentence each.
    """

    model: Model
    spec: RunSpec
    responses: int
    gpu: Gpu | None
    gpus: int
    beside: Beside = field(default_factory=Beside)
    by_trainer: tuple[str, ...] = ()

    @property
    def evaluates(self) -> bool:
        """Whether an evaluation counts."""
        return self.beside.evaluation or not self.spec.method.trains

    @property
    def padded(self) -> bool:
        """Whether the longest batch has padding."""
        return self.beside.padding == "some"

    @property
    def cublas_bytes(self) -> int:
        """The size of cuBLAS's workspace on the card."""
        return self.gpu.cublas_bytes if self.gpu else CUBLAS_BYTES

    @property
    def saved(self) -> dict[str, str]:
        """The modules of which a copy is trained in full, and the precision of the copy: base or fp32."""
        return dict.fromkeys(self.beside.modules_to_save, self.beside.modules_to_save_dtype)

    @property
    def shared(self) -> bool:
        """Whether a card's blocks have other sizes than on one card alone."""
        return self.gpus > 1 or self.beside.offload != "none" or self.beside.master_weights == "fp32"

    @property
    def formula_only(self) -> list[str]:
        """The options whose values the closed form alone knows."""
        beside = self.beside
        asked = {
            "loss": beside.loss == "cut-cross-entropy",
            "eval_gathers_logits": beside.eval_gathers_logits is not None,
            "sharding": self.gpus > 1 and beside.sharding == "fsdp2",
            "master_weights": beside.master_weights == "fp32",
            "offload": beside.offload != "none",
            "optimizer_states": beside.optimizer_states != "own",
            "optimizer_in_bwd": beside.optimizer_in_bwd,
        }
        return [option for option, is_asked in asked.items() if is_asked]

    @property
    def gathered_rows(self) -> int:
        """The rows of the evaluation whose logits are on the card at once; 0 if it gathers none."""
        items, batches = self.beside.eval_gathers_logits or 0, self.beside.eval_accumulation_steps
        return items if batches is None else min(items, batches * self.spec.eval_batch_size * self.gpus)

    @property
    def has_closed_form(self) -> bool:
        """Whether the closed form knows both the method and the model's kind; the rest is simulated."""
        return self.spec.method.closed_form is not None and self.model.shape is not None


def describe_model(name: str) -> Model:
    """Returns the model with this name: a preset, the path of a ``config.json``, a name in models.yaml, or a hub id.

    Raises:
        InputError: The name is none of these, or the model's configuration cannot be read.
    """
    by_hub_id = {preset.hub_id.lower(): preset.shape for preset in PRESETS.values()}
    shape = PRESETS[name.lower()].shape if name.lower() in PRESETS else by_hub_id.get(name.lower())
    if shape is not None:
        return Model(name, shape.to_config(), shape)
    if known := next((known for key, known in SIMULATED.items() if name.lower() in (key, known.hub_id.lower())), None):
        return Model(name, known.config, None, f"model_type {known.config['model_type']} is not one of its kinds")
    path = Path(name)
    if path.suffix == ".json" or _is_folder(path):
        return _read_config(name, path / "config.json" if _is_folder(path) else path)
    if name.startswith((".", "/", "~")):
        raise InputError(Problem("model", f"no such file or folder: {name}", "give the path of a config.json"))
    entry_shape = _catalogued(name)
    if entry_shape is not None:
        return Model(name, entry_shape.to_config(), entry_shape)
    if not _in_mirror(name) and (same := same_shape(name)):
        shape = PRESETS[same].shape
        return Model(name, shape.to_config(), shape, variant_of=same)
    if "/" not in name:
        hint = f"{did_you_mean(name, [*PRESETS, *SIMULATED])}; or give the path of a config.json, or a hub id org/name"
        raise InputError(Problem("model", f"unknown model (got {name!r})", hint))
    return _read_config(name, _downloaded_config(name))


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # the name is too long for a path
        return False


def _catalogued(name: str) -> ModelShape | None:
    """Returns the shape of a model of models.yaml, or None if the file is missing or does not know the shape."""
    from peftscope.models.catalog import find_model

    try:
        return find_model(name).shape
    except InputError:
        return None


def _in_mirror(name: str) -> bool:
    folder = mirrored(name) if "/" in name else None
    return folder is not None and (folder / "config.json").is_file()


def _downloaded_config(hub_id: str) -> Path:
    if _in_mirror(hub_id):
        return Path(str(mirrored(hub_id))) / "config.json"
    remedy = "give a preset (`peftscope models` lists them), or the path of its config.json"
    try:
        from huggingface_hub import hf_hub_download, try_to_load_from_cache
    except ModuleNotFoundError:
        message = f"the config.json of {hub_id!r} is on the hub, and huggingface_hub is not installed"
        raise InputError(Problem("model", message, f"pip install huggingface_hub, or {remedy}")) from None

    if isinstance(cached := try_to_load_from_cache(hub_id, "config.json"), str):
        return Path(cached)
    check_reached(f"model: the config.json of {hub_id!r}", remedy)
    try:
        return Path(hf_hub_download(hub_id, "config.json"))
    except Exception as error:  # network and hub fail in many ways, and the user needs one line
        kind = type(error).__name__
        said = {
            "GatedRepoError": "its owner has to let you in (`hf auth login`)",
            "RepositoryNotFoundError": "the hub has no such model",
        }
        reason = said.get(kind, f"the hub refuses it ({kind})")
        raise InputError(Problem("model", f"cannot fetch the config.json of {hub_id!r}: {reason}", remedy)) from None


def _read_config(name: str, path: Path) -> Model:
    try:
        config = parse_json(read_text(path), str(path))
    except InputError as error:
        raise InputError(replace(problem, where=f"model: {problem.where}") for problem in error.problems) from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise InputError(Problem("model", f"{path} has no `model_type`", "give the config.json of a causal model"))
    if reason := _not_modelled(config):
        raise InputError(Problem("model", f"{path}: {reason[0]}", reason[1]))
    try:
        stored, unpacked = stored_as(config.pop("quantization_config", None))
        return Model(name, config, ModelShape.from_config(config), stored=stored, unpacked=unpacked)
    except KeyError as error:
        remedy = "give the config.json of a causal model"
        raise InputError(Problem("model", f"{path}: `{error.args[0]}` is missing", remedy)) from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ": ".join((str(path), *map(str, first["loc"])))
        message = first["msg"].removeprefix("Value error, ")
        got = "" if isinstance(first["input"], dict) else f" (got {shown(first['input'])})"
        raise InputError(Problem("model", f"{where}: {message}{got}")) from None
    except ValueError as error:
        if stored:
            message = f"{path}: no closed form, and {stored.name} is not simulated"
            raise InputError(Problem("model", message, "give the config.json of its 16-bit base")) from None
        return Model(name, config, None, str(error), unpacked=unpacked)
    except (TypeError, ZeroDivisionError):
        remedy = "check that all its sizes are whole numbers above 0"
        raise InputError(Problem("model", f"{path} does not describe a model", remedy)) from None


ENCODERS = ("bert", "roberta", "xlm-roberta", "distilbert", "albert", "electra", "deberta", "deberta-v2", "modernbert")
"""The most used families of encoders, by ``model_type``."""


def _not_modelled(config: Mapping[str, Any]) -> tuple[str, str] | None:
    """Returns why a configuration is not that of a causal model in plain weights, and what to do, or None."""
    names = config.get("architectures")
    name = next(iter(names if isinstance(names, list) else []), config["model_type"])
    causal = "give the config.json of a causal model"
    if config.get("is_encoder_decoder"):
        return f"{name} is an encoder-decoder, which is not modelled", causal
    if config["model_type"] in ENCODERS:
        return f"{name} is an encoder, which is not modelled", causal
    if re.search(r"For(Sequence|Token)Classification$|ForQuestionAnswering$", str(name)):
        return f"{name} has another head than a causal model, which is not modelled", causal
    return None


def ask(
    model: Model,
    options: Mapping[str, Any],
    *,
    responses: int | None = None,
    gpu: Gpu | None = None,
    gpus: int = 1,
) -> Question:
    """Returns a question. Options that are not given have the values of a plain PyTorch and PEFT script.

    Args:
        model: The base.
        options: Fields of the spec, of the method and of ``Beside``. None means that an option is not given.
        responses: The number of positions of a sequence that carry a loss.
        gpu: The card.
        gpus: The number of cards.

    Raises:
        InputError: An option is wrong, or contradicts another option or the model.
    """
    given = {name: value for name, value in options.items() if value is not None}
    name = given.pop("method", "lora")
    if given.get("optimizer") in OTHER_OPTIMIZERS:
        given |= {"optimizer_states": given.pop("optimizer"), "optimizer_implementation": "fused"}
    if name not in METHODS:
        raise InputError(Problem("method", f"unknown method (got {name!r})", close_match(name, METHODS)))
    try:
        beside = Beside.model_validate({name: given.pop(name) for name in BESIDE_OPTIONS if name in given})
    except ValidationError as error:
        raise InputError(_problems(error)) from None
    if "evaluation" not in beside.model_fields_set and ("eval_batch_size" in given or beside.eval_gathers_logits):
        beside = beside.model_copy(update={"evaluation": True})
    known = given | {option: getattr(beside, option) for option in beside.model_fields_set}
    regime = settings_of(beside.as_trainer, name, known) if beside.as_trainer else {}
    set_by_trainer = {option: value for option, (value, _) in regime.items()}
    beside = beside.model_copy(
        update={option: set_by_trainer.pop(option) for option in BESIDE_OPTIONS if option in set_by_trainer}
    )
    given = set_by_trainer | given
    method: dict[str, Any] = {"name": name}
    for option in METHOD_OPTIONS:
        if option in given:
            method[option] = given.pop(option)
            if option not in METHODS[name].model_fields:
                fields = [field for field in METHODS[name].model_fields if field in METHOD_OPTIONS]
                remedy = f"{name} has {', '.join(fields)}" if fields else f"{name} has no options of its own"
                raise InputError(Problem(option, f"is not an option of the method {name}", remedy))
    defaults = _defaults(model, given)
    values = {**defaults, **given, "eval_batch_size": given.get("eval_batch_size", given.get("batch_size", 1))}
    try:
        spec = RunSpec(model=model.name, task="memory", device="cuda", learning_rate=1e-4, method=method, **values)
    except ValidationError as error:
        # Without a value of its own, the evaluation's batch size follows that of training.
        follows = {"eval_batch_size"} - given.keys()
        raise InputError(p for p in _problems(error) if p.where not in follows) from None
    if beside.load_in_8bit:
        model = replace(model, stored=INT8)
    _check_model(model, spec)
    kept = responses if responses is not None else usual_responses(spec.seq_len)
    if not 1 <= kept <= spec.seq_len:
        raise InputError(Problem("response_len", f"must lie between 1 and seq_len={spec.seq_len} (got {kept})"))
    if gpus < 1:
        raise InputError(Problem("gpus", f"must be at least 1 (got {gpus})"))
    _check_loss(model, beside.loss)
    check_beside(spec, beside)
    said = [f"as {beside.as_trainer}: {option}={value} ({source})" for option, (value, source) in regime.items()]
    if beside.as_trainer:
        version, more = REGIMES[beside.as_trainer].version, REGIMES[beside.as_trainer].beside
        said.insert(0, f"as {beside.as_trainer}, read from {version}{f'; {more}' if more else ''}")
    return Question(model, spec, kept, gpu, gpus, beside, tuple(said))


def preset_or_modules(text: str | None) -> str | list[str] | None:
    """Returns the name of a preset of target modules, or the modules that are listed, separated by commas."""
    names = [name.strip() for name in (text or "").split(",") if name.strip()]
    return text if not text else names[0] if len(names) == 1 and names[0] in TARGET_PRESETS else names


NOT_SDPA = {
    "gemma2": "apply the soft cap of Gemma-2's attention scores",
    "gpt_oss": "know the sinks of gpt-oss's attention",
}
"""Families whose attention is eager by default, and what SDPA does not do."""


def _defaults(model: Model, given: Mapping[str, Any]) -> dict[str, Any]:
    defaults = dict(DEFAULTS)
    if why := NOT_SDPA.get(model.config["model_type"]):
        defaults["attention"] = "eager"
        if given.get("attention") == "sdpa":
            raise InputError(Problem("attention", f"sdpa does not {why}", "use eager or flash_attention_2"))
    return defaults


def _problems(error: ValidationError) -> list[Problem]:
    problems = []
    for item in error.errors():
        names = [str(part) for part in item["loc"] if part not in ("method", *METHODS)]
        where = ".".join(names) or "options"
        got = "" if isinstance(item["input"], dict | list) or not names else f" (got {shown(item['input'])})"
        problems.append(Problem(where, item["msg"].removeprefix("Value error, ") + got))
    return problems


def _check_model(model: Model, spec: RunSpec) -> None:
    limit, virtual = model.max_seq_len, getattr(spec.method, "virtual_tokens", 0)
    if limit is not None and spec.seq_len + virtual > limit:
        length = f"{spec.seq_len}" + (f" and {virtual} virtual tokens" if virtual else "")
        message = f"{length} is over the model's limit of {limit} tokens"
        raise InputError(Problem("seq_len", message, f"use at most {limit - virtual}"))
    form = spec.method.closed_form
    if model.stored and (not form or not spec.method.targets_of() or form.layer != "low-rank" or form.own_group):
        message = f"{spec.method.name} on a base stored as {model.stored.name} is not modelled"
        raise InputError(Problem("method", message, "use lora, rslora or qlora"))
    if model.stored and (
        spec.precision != "bf16" or model.shape is None or (model.shape.experts and model.stored != INT8)
    ):
        message = f"a base stored as {model.stored.name} is modelled for dense models with a closed form, in bf16"
        raise InputError(Problem("model", message, "use precision bf16 and such a model"))
    if model.shape is None:
        return
    modules = [layer.name for layer in model.shape.block]
    for target in spec.method.modules_named():
        if not model.shape.linear_layers([target]):
            remedy = close_match(target, [*modules, *TARGET_PRESETS])
            remedy = FUSED_EXPERTS if model.shape.experts else remedy
            raise InputError(Problem("targets", f"{model.name} has no `{target}`", remedy))
    if spec.method.targets_of() and not model.shape.linear_layers(spec.method.targets_of()):
        raise InputError(Problem("targets", f"{model.name} has no such layers", FUSED_EXPERTS))
    name = spec.method.rank_field
    rank, narrowest = getattr(spec.method, name, None), narrowest_target(model, spec)
    if spec.method.closed_form is None:  # a method of another package may mean something else by its rank
        return
    if rank is not None and narrowest is not None and rank > narrowest:
        message = f"{rank} is more than the smallest adapted width, {narrowest}"
        raise InputError(Problem(name, message, f"use at most {narrowest}"))


FUSED_EXPERTS = "experts are fused parameters, whose adapters are not modelled; use all-linear, or name attention's"

SCALED_LOGITS = ("gemma2", "granite")
"""Families whose logits are scaled or capped after the head, which the fused losses here do not do."""


def _check_loss(model: Model, loss: str) -> None:
    family = model.config["model_type"]
    if loss != "plain" and family in SCALED_LOGITS:
        raise InputError(Problem("loss", f"{loss} is not modelled for {family}, which changes its logits", "use plain"))


def usual_responses(seq_len: int) -> int:
    """Returns the number of positions that carry a loss if the question does not say."""
    return max(1, seq_len // 2)


def narrowest_target(model: Model, spec: RunSpec) -> int | None:
    """Returns the smallest width of the adapted layers; None if the shape is unknown or no layer is adapted.

    A rank above this width adds nothing that the product of the two matrices could express.
    """
    targets = spec.method.targets_of()
    layers = model.shape.linear_layers(targets) if model.shape else ()
    return min((min(layer.inputs, layer.outputs) for layer in layers), default=None)
