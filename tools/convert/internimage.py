"""InternImage for `tools.convert`: weights of others under our names, and ours under theirs."""

import argparse
import json
import os
import shutil
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor

from data_pipeline.files import give_usual_access, sync_file, write_atomically
from pretrain.models.internimage.internimage import InternImageSettings
from pretrain.models.internimage.weights import (
    Unwrapped,
    cut_centers,
    export_internimage,
    import_internimage,
    official_shapes,
    recognise_size,
    restore_dots,
    unwrap,
)
from pretrain.recipe.overlay import parse_yaml, to_yaml
from tools.convert.internimage_config import config_of_settings, settings_of_config
from tools.support.weight_files import read_config, read_tensors, save_tensors, weight_file, writing

if TYPE_CHECKING:
    from tools.support.trained import TrainedRun

# Where checkpoints keep weights, and the moving average of the official trainers.
WRAPPINGS = {"master": ("model", "state_dict", "module"), "ema": ("model_ema",)}


# ---- import ------------------------------------------------------------------------------------


def import_command(options: argparse.Namespace, console: Console) -> int:
    """Run the command; see `convert_arguments`."""
    file = weight_file(options.source)
    try:
        found, settings = read_internimage(file, options.weights, options.settings)
        tensors = found.tensors
        if options.head_rows:
            tensors = _pick_rows(tensors, options.head_rows)
        settings, ours = _to_ours(tensors, settings, options)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    save_tensors(ours, options.out, "internimage")
    count = sum(tensor.numel() for tensor in ours.values())
    _say(console, f"{options.out}: {len(ours)} tensors, {count / 1e6:,.1f} M values")
    for note in found.notes:
        _say(console, f"taken: {note}")
    _say(console, "settings for a recipe:")
    print(_recipe(options, settings, tensors, ours), end="")
    return 0


def read_internimage(
    file: Path, weights: str, described: Path | None
) -> tuple[Unwrapped, InternImageSettings]:
    """Weights of others under the official names, and the model that they are of.

    file: as `read_tensors`; weights: "master" or "ema"; described: YAML file with settings of the
    encoder, none: those that an export left beside `file`, of a config.json there, or of the
    published size.

    Raises:
        ValueError: no InternImage, or one that must be described.
    """
    found = unwrap(read_tensors(file, WRAPPINGS[weights], skip_objects=True))
    if described is None and settings_beside(file).is_file():
        described = settings_beside(file)
        found.notes.append(f"the settings in {described}")
    settings = _settings(described, file, found.tensors)
    tensors = found.tensors
    if not any("." in name for name in tensors):
        tensors = restore_dots(tensors, list(official_shapes(settings, 1)))
    tensors, note = cut_centers(tensors, settings)
    return Unwrapped(tensors, found.notes + ([note] if note else [])), settings


def settings_beside(file: Path) -> Path:
    """Where an export of ours leaves the settings of the encoder: NAME.settings.yaml."""
    return file.with_name(f"{file.stem}.settings.yaml")


def _settings(
    described: Path | None, file: Path, tensors: Mapping[str, Tensor]
) -> InternImageSettings:
    if described is not None:
        text = described.read_text(encoding="utf-8")
        return InternImageSettings.model_validate(parse_yaml(text, str(described)).data)
    config = read_config(file)
    if config is not None and config.get("model_type") == "internimage":
        return settings_of_config(config)
    size = recognise_size(tensors)
    if size is None:
        names = ", ".join(sorted(tensors)[:4])
        raise ValueError(
            f"no published InternImage has these shapes (it has {names}, ...); if it is one, "
            "describe it with --settings"
        )
    return InternImageSettings(size=size)


def _pick_rows(tensors: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    """The linear layer with these of its rows, in this order."""
    if "head.weight" not in tensors:
        raise ValueError("--head-rows: there is no linear layer (head.weight)")
    try:
        rows = [int(line) for line in file.read_text(encoding="utf-8").split()]
    except ValueError:
        raise ValueError(f"{file} must hold one whole number a line") from None
    if not rows:
        raise ValueError(f"{file} names no row: it must hold one whole number a line")
    classes = len(tensors["head.weight"])
    if wrong := [row for row in rows if not 0 <= row < classes]:
        raise ValueError(f"{file} names row {wrong[0]} of a linear layer with {classes}")
    picked = {name: tensors[name][rows] for name in ("head.weight", "head.bias")}
    return {**tensors, **picked}


def _to_ours(
    tensors: Mapping[str, Tensor], settings: InternImageSettings, options: argparse.Namespace
) -> tuple[InternImageSettings, dict[str, Tensor]]:
    """Our tensors, and the settings without a head if nothing of it is taken."""
    ours = import_internimage(tensors, settings, options.encoder, options.task, options.leave_out)
    bare = settings.model_copy(update={"head": None})
    start = f"encoders.{options.encoder}."
    own = {name.removeprefix(start) for name in ours if name.startswith(start)}
    return (bare if own <= official_shapes(bare, None).keys() else settings), ours


def _recipe(
    options: argparse.Namespace,
    settings: InternImageSettings,
    tensors: Mapping[str, Tensor],
    ours: Mapping[str, Tensor],
) -> str:
    """The part of a recipe that describes this model."""
    recipe: dict[str, Any] = {
        "initial_weights": str(options.out),
        "model": {"encoders": {options.encoder: _encoder(settings)}},
    }
    if f"objectives.{options.task}.head.weight" in ours:
        pool = "mean" if settings.head is None else "head"
        recipe["tasks"] = {
            options.task: {
                "objective": {"type": "classification", "encoder": options.encoder, "pool": pool},
                "data": {"classes": len(tensors["head.weight"])},
            }
        }
    return to_yaml(recipe)


def _encoder(settings: InternImageSettings) -> dict[str, Any]:
    """The encoder of a recipe: the shape of its weights, and what differs from a published size."""
    if settings.size is not None:
        published = InternImageSettings(size=settings.size).model_dump(mode="json")
        shape = settings.model_dump(mode="json")
        shape = {key: value for key, value in shape.items() if value != published[key]}
        shape["size"] = settings.size
    else:
        shape = settings.model_dump(mode="json", exclude_defaults=True)
        shape["mixer"] = settings.mixer.model_dump(mode="json")
        if settings.head is not None:
            shape["head"] = settings.head.model_dump(mode="json")
    return {"type": "internimage"} | {k: v for k, v in shape.items() if k not in _TRAINING}


# Settings that say how to train, not what the weights are.
_TRAINING = ("drop_path", "gradient_checkpointing")


# ---- export ------------------------------------------------------------------------------------


def export_command(options: argparse.Namespace, console: Console) -> int:
    """Run the command; see `convert_arguments`."""
    from tools.support.trained import open_run

    _check_place(options)
    if options.format == "m3i" and options.weights == "target":
        raise ValueError(
            "--format m3i holds the momentum target beside the trained weights: leave "
            "--weights target out"
        )
    with console.status("reading the checkpoint"):
        run = open_run(options.run_dir, options.weights)
    settings = run.recipe.model.encoders.get(options.encoder)
    if not isinstance(settings, InternImageSettings):
        names = [n for n, s in run.recipe.model.encoders.items() if s.type == "internimage"]
        raise ValueError(no_internimage(options.encoder, names))
    ours = run.model.state_dict()
    if options.classes is not None:
        ours |= _zeros_for_classes(run, options)
    if options.format in ("detection", "bevformer"):
        settings = settings.model_copy(update={"head": None})
    config_of_settings(settings, 0 if options.task is None else 1)  # or an error that says why not
    theirs = export_internimage(ours, options.format, options.encoder, options.task)
    if options.format == "transformers":
        _write_folder(options.out, theirs, _files_beside(run.recipe, settings, options, theirs))
    else:
        wrapping = "state_dict" if options.format in ("detection", "bevformer") else "model"
        _write_file(options.out, {wrapping: OrderedDict(theirs)})
        _write_settings(options.out, settings)
    _check_read_back(options, settings, ours)
    _say(console, f"{options.out}: {len(theirs)} tensors, read back bit for bit")
    if options.classes is not None:
        _say(
            console,
            f"the linear layer (clip.classifier) is zeros for {options.classes} classes: "
            "the run has learned none",
        )
    if options.format != "transformers":  # there it is config.json
        _say(console, f"{settings_beside(options.out)}: its settings, for import-internimage")
    return 0


def no_internimage(wanted: str, names: list[str]) -> str:
    """That an encoder is none of the InternImages of a run, which are `names`."""
    if not names:
        return "the run has no InternImage"
    return f"--encoder {wanted}: the run's InternImages are: {', '.join(names)}"


def _zeros_for_classes(run: "TrainedRun", options: argparse.Namespace) -> dict[str, Tensor]:
    """The linear layer that the task has not.

    Raises ValueError: it has one, or is no M3I task, or the layout needs none.
    """
    if options.format != "m3i":
        raise ValueError(
            f"--classes is for --format m3i; {options.format} needs no linear layer: leave it out"
        )
    names = [n for n, task in run.recipe.tasks.items() if task.objective.type == "m3i"]
    if options.task not in names:
        raise ValueError(
            f"--classes needs --task with the name of an m3i task; the run has: {', '.join(names)}"
            if names
            else "the run has no m3i task, which --classes is for: leave it out"
        )
    objective = run.model.objectives[options.task]
    if objective.head is not None:
        raise ValueError(
            f"task {options.task!r} has learned {objective.head.out_features} classes,"
            " which are written: leave --classes out"
        )
    start = f"objectives.{options.task}.head."
    return {
        f"{start}weight": torch.zeros(options.classes, objective.pooled_width),
        f"{start}bias": torch.zeros(options.classes),
    }


def _check_place(options: argparse.Namespace) -> None:
    if options.format == "transformers":
        if options.out.exists():
            raise ValueError(f"--out {options.out} is there already; choose another folder")
    elif options.out.suffix != ".pth":
        raise ValueError(f"--out {options.out}: the file must end in .pth")


def _files_beside(
    recipe: Any,
    settings: InternImageSettings,
    options: argparse.Namespace,
    theirs: Mapping[str, Tensor],
) -> dict[str, Any]:
    """config.json, and how images are prepared if a task says it."""
    from pretrain.build import evaluation_image
    from tools.convert.export_git import image_processor

    head = theirs.get("model.head.weight")
    files = {"config.json": config_of_settings(settings, 0 if head is None else len(head))}
    if options.task is not None:
        image = evaluation_image(recipe.tasks[options.task])
        files["preprocessor_config.json"] = image_processor(image)
    return files


def _write_folder(out: Path, tensors: Mapping[str, Tensor], files: Mapping[str, Any]) -> None:
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        with writing(out):
            save_file(whole, temporary / "model.safetensors", metadata={"format": "pt"})
        for name, content in files.items():
            (temporary / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        for file in temporary.iterdir():
            give_usual_access(file)
            sync_file(file)
        os.rename(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_file(out: Path, content: Mapping[str, Any]) -> None:
    """A file of torch.save with nothing but tensors in it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        with writing(out):
            torch.save(content, temporary)
        sync_file(temporary)
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)


def _write_settings(out: Path, settings: InternImageSettings) -> None:
    """Beside the weights, which tell the shapes of published models only."""
    write_atomically(settings_beside(out), [to_yaml(_encoder(settings)).encode()])


def _check_read_back(
    options: argparse.Namespace, settings: InternImageSettings, ours: Mapping[str, Tensor]
) -> None:
    found = unwrap(read_tensors(weight_file(options.out)))
    back = import_internimage(found.tensors, settings, options.encoder, options.task or "")
    different = [name for name, tensor in back.items() if not torch.equal(tensor, ours[name])]
    if different:
        raise ValueError(f"{options.out}: {different[0]} reads back as another value")


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
