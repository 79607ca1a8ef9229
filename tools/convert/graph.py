"""`export-graph` of `tools.convert`: a model as ONNX or as torch's ExportedProgram."""

import argparse
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import nn

from pretrain.models.internimage.internimage import STAGES, InternImage, InternImageSettings
from pretrain.models.internimage.weights import import_internimage
from pretrain.recipe.recipe import Recipe
from tools.convert.export_graph import Logits, Maps, require_writer, write_graph
from tools.convert.internimage import no_internimage, read_internimage
from tools.support.trained import choose_task, open_run
from tools.support.weight_files import weight_file

# What the published models were trained on, in units of the full range.
_IMAGENET = {"image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)}


class Chosen(NamedTuple):
    """A model to be written, and what is known of it."""

    model: nn.Module
    about: dict[str, Any]
    size: int | None
    """Side of the images that it was evaluated on, if that is known."""


def export(options: argparse.Namespace, console: Console) -> int:
    """Run the command; see `convert_arguments`."""
    require_writer(options.out)
    with console.status("reading the weights"):
        chosen = _of_run(options) if options.run_dir else _of_source(options)
    size = _size(options, chosen)
    names = ["logits"]
    if options.outputs == "maps":
        names = [f"stage_{stage + 1}" for stage in range(STAGES)]
    with console.status("tracing the model, and running what comes out"):
        difference = write_graph(chosen.model, names, size, chosen.about, options.out)
    console.print(
        f"{options.out}: images (batch, 3, {size[0]}, {size[1]}) to {', '.join(names)}; read back "
        f"and run: largest difference {difference:.1e}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    return 0


def _size(options: argparse.Namespace, chosen: Chosen) -> tuple[int, int]:
    given = options.image_size or ([chosen.size] if chosen.size else [])
    if not 1 <= len(given) <= 2 or min(given) < 1:
        raise ValueError("--image-size: give height and width of images, or one number for both")
    return given[0], given[-1]


def _of_run(options: argparse.Namespace) -> Chosen:
    from pretrain.build import evaluation_image

    if options.settings:
        raise ValueError("--settings is for --source: the recipe of a run describes its model")
    maps = options.outputs == "maps"
    if (options.task if maps else options.encoder) is not None:
        raise ValueError("--task chooses logits, --encoder maps (--outputs)")
    run = open_run(options.run_dir, options.weights)
    tasks = run.recipe.tasks
    if maps:
        name = options.encoder or "image"
        encoder = _internimage(run.model.encoders, name)
        readers = [t for t in tasks.values() if name in _encoders(t.objective)]
        image, size, model = readers[0].data.image, None, Maps(encoder)
    else:
        task = _choose_task(run.recipe, options.task)
        objective = run.model.objectives[task]
        model = Logits(run.model.encoders[objective.encoder], objective.pool, objective.head)
        image = evaluation_image(tasks[task])
        size = image.size if image.fixed_size else None
    about = {
        "image_mean": image.mean,
        "image_std": image.std,
        "recipe": run.recipe.name,
        "step": run.manifest["step"],
        "weights": options.weights,
    }
    return Chosen(model, about, size)


def _encoders(objective: Any) -> list[str]:
    return [getattr(objective, field) for field in objective.encoder_fields]


def _internimage(encoders: nn.ModuleDict, name: str) -> InternImage:
    names = [n for n, encoder in encoders.items() if isinstance(encoder, InternImage)]
    if name not in names:
        raise ValueError(no_internimage(name, names) + "; only InternImages have maps of stages")
    return encoders[name]


def _choose_task(recipe: Recipe, wanted: str | None) -> str:
    try:
        return choose_task(recipe, "classification", wanted)
    except ValueError as error:
        if not any(e.type == "internimage" for e in recipe.model.encoders.values()):
            raise
        raise ValueError(f"{error}; its InternImage has maps too (--outputs maps)") from None


def _of_source(options: argparse.Namespace) -> Chosen:
    if options.task or options.encoder:
        raise ValueError("--task and --encoder are for --run: --source has one model")
    if options.weights == "target":
        raise ValueError("--weights target is for --run: --source has no momentum targets")
    file = weight_file(options.source)
    try:
        found, settings = read_internimage(file, options.weights, options.settings)
        # Maps need no head, of which a detector's backbone has none.
        maps = options.outputs == "maps"
        if maps:
            settings = settings.model_copy(update={"head": None})
        elif "head.weight" not in found.tensors:
            raise ValueError("there is no linear layer (head.weight): use --outputs maps")
        model = _build(found.tensors, settings, maps)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return Chosen(model, {**_IMAGENET, "weights": options.weights}, None)


def _build(
    tensors: dict[str, torch.Tensor], settings: InternImageSettings, maps: bool
) -> Logits | Maps:
    """The model that weights under official names describe."""
    heads = ("head.", "conv_head.", "dcnv3_head_", "clip_projector.", "fc_norm.")
    if maps:
        tensors = {n: t for n, t in tensors.items() if not n.startswith(heads)}
    ours = import_internimage(tensors, settings, encoder="image", task="classify")
    with torch.device("meta"):
        encoder = settings.build()
    start = "encoders.image."
    own = {n.removeprefix(start): t for n, t in ours.items() if n.startswith(start)}
    encoder.load_state_dict(own, assign=True)
    encoder.requires_grad_(False).eval()
    if maps:
        return Maps(encoder)
    weight, bias = (ours[f"objectives.classify.head.{part}"] for part in ("weight", "bias"))
    head = nn.Linear(weight.shape[1], len(weight), device="meta")
    head.load_state_dict({"weight": weight, "bias": bias}, assign=True)
    pool = "mean" if settings.head is None else "head"
    return Logits(encoder, pool, head.requires_grad_(False))
