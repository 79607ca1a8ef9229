"""The DeepSpeed configuration of a run: engine settings from a JSON file, the rest from the recipe.

A JSON file (`ds_configs/`) says how the engine works: ZeRO stage, buckets, communication. Batch
sizes, clipping, precision, optimizer and schedule belong to the recipe, and a file that names them
is refused: two sources of truth are the commonest fault of DeepSpeed users. DeepSpeed ignores
unknown keys at the top level of its JSON, so a misspelt one would silently do nothing; here it is
an error. What is known is asked of the installed DeepSpeed itself (`_Recorder`).
"""

import json
import logging
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ds_configs
from data_pipeline.order.step_sampler import deal
from pretrain.objectives.objective_settings import EnginePlan
from pretrain.sampler.settings import offload_clashes

if TYPE_CHECKING:
    from pretrain.recipe.recipe import Recipe

SHIPPED = Path(ds_configs.__file__).parent

# Keys of the JSON that the recipe decides, and where it does.
_RECIPE_OWNS = {
    "train_batch_size": "tasks.<name>.global_batch",
    "train_micro_batch_size_per_gpu": "tasks.<name>.micro_batch",
    "gradient_accumulation_steps": "global_batch, micro_batch and the number of ranks",
    "gradient_clipping": "optimizer.clip_norm",
    "optimizer": "optimizer",
    "zero_allow_untested_optimizer": "optimizer.kind",
    "zero_force_ds_cpu_optimizer": "optimizer.kind",
    "scheduler": "schedule",
    "bf16": "precision",
    "bfloat16": "precision",
    "fp16.enabled": "precision",
    "torch_autocast": "precision",
    "steps_per_print": "logging.every_steps",
}

# What DeepSpeed offers, but this engine layer cannot use correctly (dotted path -> reason).
_UNSUPPORTED = {
    "gradient_allreduce_op": "the loop scales losses for gradients averaged over ranks",
    "managed_gradient_accumulation": "the loop marks the end of each accumulation window itself",
    "pipeline": "pipeline parallelism is not supported",
    "tensor_parallel": "tensor parallelism is not supported",
    "expert_parallel": "expert parallelism is not supported",
    "hybrid_engine": "it is for inference inside training, which is not supported",
    "data_efficiency": "data and schedule come from the recipe",
    "weight_quantization": "it is for inference",
    "zero_optimization.offload_optimizer.super_offload": "it brings an optimizer of its own",
    "zero_optimization.zenflow": "it brings an optimizer of its own",
    "zero_optimization.zero_hpz_partition_size": "checkpoints cannot read its second partition",
    "zero_optimization.zero_quantized_weights": "ZeRO++ is not tested with this project",
    "zero_optimization.zero_quantized_gradients": "ZeRO++ is not tested with this project",
    "zero_optimization.zero_quantized_nontrainable_weights": "ZeRO++ is not tested here",
}


class DeepSpeedConfigFault(ValueError):
    """A DeepSpeed JSON that cannot be used with a recipe; one line per fault."""


def engine_config(recipe: "Recipe", world: int) -> dict[str, Any]:
    """The complete configuration for `deepspeed.initialize` on `world` ranks.

    With several tasks the largest micro-batch and accumulation are declared; the loop marks the end
    of a window itself, so that DeepSpeed uses them for nothing but its own throughput line.
    Imports DeepSpeed (seconds) to check the file against the installed version.
    Raises DeepSpeedConfigFault.
    """
    path = find_engine_file(recipe.deepspeed)
    settings = read_engine_file(path)
    faults = _clashes(settings, path) + _unsupported(settings, path)
    faults += [f"{path}: {line}" for line in offload_clashes(recipe.sampling, settings)]
    faults += _stage_faults(settings, recipe.precision, path) or _ask_deepspeed(settings, path)
    faults += _offload_faults(settings, path) + _objective_faults(recipe, settings, path, world)
    if recipe.precision != "fp16" and set(settings.get("fp16", ())) - {"enabled"}:
        faults.append(
            f"{path}: fp16: these settings have no effect with precision="
            f"{recipe.precision}; set precision=fp16 or choose another file"
        )
    if faults:
        raise DeepSpeedConfigFault("\n".join(faults))
    tasks = recipe.tasks.values()
    return {
        **settings,
        "train_micro_batch_size_per_gpu": max(task.micro_batch for task in tasks),
        "gradient_accumulation_steps": max(
            accumulation_steps(task.global_batch, task.micro_batch, world) for task in tasks
        ),
        "gradient_clipping": recipe.optimizer.clip_norm or 0.0,
        "bf16": {"enabled": recipe.precision == "bf16"},
        "fp16": {**settings.get("fp16", {}), "enabled": recipe.precision == "fp16"},
        # ZeRO asks for consent to optimizers that it does not list; AdamW is on its list.
        "zero_allow_untested_optimizer": recipe.optimizer.kind != "adamw",
        # Our own optimizers run on offloaded partitions too; DeepSpeed's would need a compiler.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**12,  # our own metrics say more
    }


def _objective_faults(
    recipe: "Recipe", settings: dict[str, Any], path: Path, world: int
) -> list[str]:
    """What objectives cannot do with this engine."""
    stage = settings.get("zero_optimization", {}).get("stage", 0)
    found = []
    for name, task in recipe.tasks.items():
        steps = accumulation_steps(task.global_batch, task.micro_batch, world)
        plan = EnginePlan(str(path), stage, recipe.precision, world, steps)
        found += task.objective.engine_problems(f"tasks.{name}", task, plan)
    return found


def accumulation_steps(global_batch: int, micro_batch: int, world: int) -> int:
    """Micro-steps of one optimizer step, the same on every rank."""
    return len(deal(global_batch, micro_batch, 0, world))


def find_engine_file(name: str) -> Path:
    """Path of a DeepSpeed JSON: a path as it is, a bare name from ds_configs/."""
    if name.endswith(".json") or "/" in name:
        if not Path(name).is_file():
            raise DeepSpeedConfigFault(f"deepspeed: no such file: {name}")
        return Path(name)
    known = sorted(path.stem for path in SHIPPED.glob("*.json"))
    if name not in known:
        near = get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
        raise DeepSpeedConfigFault(f"deepspeed: no file {name}.json in ds_configs/; {hint}")
    return SHIPPED / f"{name}.json"


def read_engine_file(path: Path) -> dict[str, Any]:
    """The file's JSON object; a key that is given twice is a fault, as is bad syntax."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        for key in keys:
            if keys.count(key) > 1:
                raise DeepSpeedConfigFault(f"{path}: {key}: given twice")
        return dict(pairs)

    try:
        data = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise DeepSpeedConfigFault(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    except OSError as error:
        raise DeepSpeedConfigFault(f"{path}: cannot be read: {error.strerror}") from None
    if not isinstance(data, dict):
        raise DeepSpeedConfigFault(f"{path}: expected a JSON object")
    return data


# ------------------------------------------------------------------------------------- our checks


def _clashes(settings: dict[str, Any], path: Path) -> list[str]:
    return [
        f"{path}: {key}: the recipe decides this ({_RECIPE_OWNS[key]}); remove it from the JSON"
        for key in [*settings, *(f"fp16.{name}" for name in settings.get("fp16") or ())]
        if key in _RECIPE_OWNS
    ]


def _unsupported(settings: dict[str, Any], path: Path) -> list[str]:
    faults = []
    for dotted, reason in _UNSUPPORTED.items():
        value: Any = settings
        for key in dotted.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if not _is_off(value):
            faults.append(f"{path}: {dotted}: {reason}; remove it")
    return faults


def _is_off(value: Any) -> bool:
    """True for a block or key that is there, but switches its feature off."""
    if isinstance(value, dict):
        return value.get("enabled") is False or value.get("device") == "none"
    return value is None or value is False or (value == 1 and value is not True)


def _stage_faults(settings: dict[str, Any], precision: str, path: Path) -> list[str]:
    block = settings.get("zero_optimization")
    if not isinstance(block, dict) or "stage" not in block:
        return [f"{path}: zero_optimization.stage: required: 1, 2 or 3 (see ds_configs/README.md)"]
    where = f"{path}: zero_optimization.stage"
    if block["stage"] == 0:
        reason = "checkpoints need the partitions of a ZeRO optimizer"
        if precision == "bf16":
            reason = (
                "with precision=bf16 DeepSpeed starts with one optimizer step on zero gradients, "
                "which decays weights and shifts Adam's bias correction"
            )
        return [f"{where}: 0 is refused: {reason}; use stage 1"]
    if block["stage"] not in (1, 2, 3):
        return [f"{where}: expected 1, 2 or 3, not {block['stage']!r}"]
    accumulation = settings.get("data_types", {})
    wide = isinstance(accumulation, dict) and accumulation.get("grad_accum_dtype") == "fp32"
    if wide and block["stage"] == 1 and precision == "bf16":
        return [
            f"{path}: data_types.grad_accum_dtype: with stage 1 and precision=bf16 DeepSpeed swaps "
            "in an optimizer whose partitions our checkpoints cannot read; use stage 2"
        ]
    return []


def offloads_optimizer(settings: dict[str, Any]) -> bool:
    """Whether an engine file keeps optimizer states (and masters) off the accelerator."""
    block = settings.get("zero_optimization", {}).get("offload_optimizer")
    return not _is_off(block) and not _is_off(block.get("device", "none"))


def _offload_faults(settings: dict[str, Any], path: Path) -> list[str]:
    zero = settings.get("zero_optimization")
    if not isinstance(zero, dict):
        return []
    faults = []
    for name in ("offload_optimizer", "offload_param"):
        block = zero.get(name)
        if not isinstance(block, dict) or _is_off(block):
            continue
        where = f"{path}: zero_optimization.{name}"
        if name == "offload_param" and zero.get("stage") != 3:
            faults.append(f"{where}: weights can only be offloaded at stage 3; remove it")
        if block.get("device") == "nvme" and name == "offload_optimizer":
            faults.append(
                f"{where}.device: checkpoints cannot read masters that lie in NVMe files "
                "(weights may: offload_param); use cpu"
            )
        elif block.get("device") == "nvme" and not block.get("nvme_path"):
            faults.append(f"{where}.nvme_path: device=nvme needs a folder on the drive")
        if block.get("ratio", 1.0) != 1.0:
            faults.append(f"{where}.ratio: needs DeepSpeed's own CPU optimizer; remove it")
    return faults


# --------------------------------------------------------------------------- DeepSpeed's own check


class _Recorder(dict):
    """A dict that notes which keys are looked at: what DeepSpeed never asks for, it ignores."""

    def __init__(self, data: dict[str, Any]) -> None:
        super().__init__({k: _Recorder(v) if isinstance(v, dict) else v for k, v in data.items()})
        self.seen: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.seen.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.seen.add(str(key))
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.seen.add(key)
        return super().get(key, default)

    def __iter__(self) -> Iterator[str]:
        # Whoever walks over all keys (a pydantic model does) judges them itself.
        self.seen.update(dict.keys(self))
        return super().__iter__()

    def keys(self) -> Any:
        return _RecordedKeys(self)

    def items(self) -> Any:
        self.seen.update(dict.keys(self))
        return super().items()

    def __copy__(self) -> "_Recorder":
        return self


class _RecordedKeys:
    """`mapping.keys()` of a recorder: a lookup notes the key, iteration notes all of them."""

    def __init__(self, mapping: _Recorder) -> None:
        self._mapping = mapping

    def __contains__(self, key: object) -> bool:
        return key in self._mapping

    def __iter__(self) -> Iterator[str]:
        return iter(self._mapping)


def _ask_deepspeed(settings: dict[str, Any], path: Path) -> list[str]:
    """Let the installed DeepSpeed parse the file: its refusals, or the keys it never read."""
    recorder, error = _parse(settings)
    if error is not None:
        # DeepSpeed's messages seldom name the block; parsed one by one, the culprit shows itself.
        for key, value in settings.items():
            _, alone = _parse({key: value})
            if alone is not None:
                return [f"{path}: {line}" for line in _refusal(key, alone)]
        return [f"{path}: {' '.join(str(error).split())}"]
    return [f"{path}: {line}" for line in _unread(recorder, recorder.seen, "")]


def _parse(settings: dict[str, Any]) -> tuple[_Recorder, Exception | None]:
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.utils import logger

    recorder = _Recorder({**settings, "train_micro_batch_size_per_gpu": 1})
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        DeepSpeedConfig(recorder)
    except Exception as error:  # DeepSpeed raises asserts, its own, pydantic's and bare KeyErrors
        return recorder, error
    finally:
        logger.setLevel(level)
    return recorder, None


def _refusal(key: str, error: Exception) -> list[str]:
    """DeepSpeed's exception about one top-level block as one line per fault."""
    from pydantic import ValidationError

    if not isinstance(error, ValidationError):
        return [f"{key}: {' '.join(str(error).split()) or type(error).__name__}"]
    lines = []
    for detail in error.errors(include_url=False):
        place = ".".join([key, *(str(part) for part in detail["loc"])])
        if detail["type"] == "extra_forbidden":
            lines.append(f"{place}: unknown key; {_near(detail['loc'][-1], _fields(error.title))}")
        else:
            lines.append(f"{place}: {detail['msg']}, not {detail['input']!r}")
    return lines


def _fields(title: str) -> list[str]:
    """Fields of DeepSpeed's settings class of that name."""
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel

    classes = [DeepSpeedConfigModel]
    for cls in classes:
        classes.extend(cls.__subclasses__())
    return [name for cls in classes if cls.__name__ == title for name in cls.model_fields]


def _unread(recorder: _Recorder, known: set[str], prefix: str) -> list[str]:
    lines = []
    for key, value in dict.items(recorder):
        if key not in recorder.seen:
            lines.append(f"{prefix}{key}: DeepSpeed ignores this key; {_near(key, sorted(known))}")
        elif isinstance(value, _Recorder) and value.seen:
            lines += _unread(value, value.seen, f"{prefix}{key}.")
    return lines


def _near(key: Any, known: list[str]) -> str:
    near = get_close_matches(str(key), known, n=1)
    if not near:
        return "remove it"
    owner = _RECIPE_OWNS.get(near[0])
    note = f" The recipe decides that one ({owner})." if owner else ""
    return f"did you mean {near[0]!r}?{note}"
