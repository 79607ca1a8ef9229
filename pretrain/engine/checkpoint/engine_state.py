"""What of a DeepSpeed engine a checkpoint holds: masters, optimizer states, what is not trained.

The engine's side of the format; the files' side is files.py.
"""

from pathlib import Path

import torch
from safetensors import safe_open

from pretrain.engine.checkpoint.files import CheckpointError, FragmentReader
from pretrain.engine.zero.momentum import TargetNetworks
from pretrain.engine.zero.partitions import (
    Partition,
    gathered,
    list_partitions,
    parameter_names,
    push_masters_to_module,
)


def fill_masters(engine, weights: Path) -> None:
    """Give the fp32 masters the full precision of a file that the module was started from.

    In bf16 training DeepSpeed makes its masters from the rounded module; `models.init.load_weights`
    has checked names and shapes, this restores the digits.
    """
    with safe_open(weights, framework="pt") as file:
        held = set(file.keys())
        for partition in list_partitions(engine):
            for f in (f for f in partition.fragments if f.parameter in held):
                flat = file.get_tensor(f.parameter).reshape(-1)[f.start : f.start + f.numel]
                partition.master.data[f.offset : f.offset + f.numel] = flat.to(partition.master)
    push_masters_to_module(engine)


def _optimizer(engine) -> torch.optim.Optimizer:
    return engine.optimizer.optimizer


def states_of(engine, partition: Partition) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Flat tensors and scalars of a partition: the master weights and the optimizer's state."""
    flat, scalars = {"master": partition.master.data}, {}
    for name, value in _optimizer(engine).state.get(partition.master, {}).items():
        if torch.is_tensor(value) and value.shape == partition.master.shape:
            flat[name] = value
        else:
            scalars[name] = float(value)
    return flat, scalars


def state_to_fill(engine, partition: Partition, name: str) -> torch.Tensor:
    """The tensor that training uses for a state, to be read into."""
    if name == "master":
        return partition.master.data
    state = _optimizer(engine).state[partition.master]
    if name not in state:
        state[name] = torch.empty_like(partition.master.data)
    return state[name]


def set_scalar(engine, partition: Partition, name: str, value: float) -> None:
    """Give the optimizer a scalar of its state, as it keeps it itself."""
    optimizer = _optimizer(engine)
    if getattr(optimizer, "scalars_on_host", False):
        optimizer.state[partition.master][name] = value
        return
    group = optimizer.param_groups[partition.group]
    # torch keeps the step counter beside the parameter only for its fused and capturable forms.
    on_device = group.get("fused") or group.get("capturable")
    device = partition.master.device if on_device else torch.device("cpu")
    optimizer.state[partition.master][name] = torch.tensor(
        value, dtype=torch.float32, device=device
    )


def sources_of(targets: TargetNetworks | None) -> dict[str, str]:
    """Momentum target -> the parameter that it follows."""
    return targets.sources if targets is not None else {}


def describe_parameters(engine, sources: dict[str, str]) -> dict:
    """Names, shapes and groups for the manifest. sources: see `sources_of`."""
    model = engine.module
    names = parameter_names(model)
    parameters, tied = {}, {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = names[id(parameter)]
        if name != first:
            tied[name] = first
        else:
            shape = getattr(parameter, "ds_shape", parameter.shape)
            parameters[name] = {"shape": list(shape), "trained": parameter.requires_grad}
            if name in sources:
                parameters[name]["follows"] = sources[name]
    groups = [
        {k: v for k, v in group.items() if isinstance(v, (int, float, str, bool))}
        for group in engine.optimizer.param_groups
    ]
    return {"parameters": parameters, "tied": tied, "groups": groups}


def check_parameters(engine, reader: FragmentReader, sources: dict[str, str]) -> None:
    """Raise CheckpointError, which names all, for names and shapes that differ from the model's."""
    mine = describe_parameters(engine, sources)["parameters"]
    theirs = reader.manifest["parameters"]
    problems = [f"the checkpoint lacks {n}" for n in sorted(set(mine) - set(theirs))]
    problems += [f"the model lacks {n}" for n in sorted(set(theirs) - set(mine))]
    problems += [
        f"{n} is {theirs[n]} in the checkpoint, {mine[n]} in the model"
        for n in sorted(set(mine) & set(theirs))
        if mine[n] != theirs[n]
    ]
    if any(mine[n]["trained"] != theirs[n]["trained"] for n in mine.keys() & theirs.keys()):
        problems.insert(
            0,
            "what is trained may not change within a run: put optimizer.frozen "
            "back, or start a new run from these weights (tools.convert "
            "export-weights, initial_weights)",
        )
    if problems:
        raise CheckpointError(f"{reader.folder} does not fit the model: {_shorten(problems)}")


def _untrained(engine) -> list[str]:
    """Names of frozen parameters and of the buffers that belong to the model's state."""
    frozen = [n for n, p in engine.module.named_parameters() if not p.requires_grad]
    parameters = {n for n, _ in engine.module.named_parameters(remove_duplicate=False)}
    return frozen + [n for n in engine.module.state_dict(keep_vars=True) if n not in parameters]


def _tensors_by_name(engine) -> dict[str, torch.Tensor]:
    model = engine.module
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def module_tensors(engine, sources: dict[str, str]) -> dict[str, torch.Tensor]:
    """Copies in the host's memory of what has no fp32 partition; momentum targets have one."""
    tensors = _tensors_by_name(engine)
    kept = {}
    for name in _untrained(engine):
        if name in sources:
            continue
        with gathered([tensors[name]]):
            kept[name] = tensors[name].detach().to("cpu", copy=True).contiguous()
    return kept


def load_module_tensors(engine, reader: FragmentReader) -> None:
    """Put back what `module_tensors` took."""
    _copy_into_module(engine, dict(reader.module_tensors()))


@torch.no_grad()
def _copy_into_module(engine, values: dict[str, torch.Tensor]) -> None:
    tensors = _tensors_by_name(engine)
    for name, value in values.items():
        with gathered([tensors[name]], writable=True):
            tensors[name].copy_(value)


def _shorten(problems: list[str], most: int = 8) -> str:
    more = len(problems) - most
    return "; ".join(problems[:most]) + (f"; and {more} more" if more > 0 else "")
