"""The formats that a run can go out in: what each is of, and why this run cannot be one.

Only the recipe is asked, so that an impossible format is told before a checkpoint is read. A new
format is a line of `FORMATS` and what writes it.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from pretrain.recipe.recipe import Recipe


@dataclass
class Choice:
    """What is written of a run."""

    format: str
    encoder: str
    task: str | None = None
    """Whose head, or whose other tower, goes along."""
    image_task: str = ""
    """How images are prepared without a task of the head: the first that reads the encoder."""
    file: str = ""
    """Name of the one file that is written; empty: a folder."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Part of the run -> why it stays behind."""
    words: list[str] = field(default_factory=list)
    """The command of `tools.convert` that writes it, and its options; empty: export_vit."""


Chooser = Callable[[Recipe, argparse.Namespace], Choice]


class Format(NamedTuple):
    """One line of the list. `choose` raises ValueError with the setting that is in the way."""

    name: str
    what: str
    loads: str
    """The consumer's own call."""
    choose: Chooser
    takes: str = ""
    """Options that mean something to it, beside --weights."""


def _encoder(recipe: Recipe, wanted: str | None, kind: str) -> str:
    """The encoder of a type that is meant."""
    encoders = {name: settings.type for name, settings in recipe.model.encoders.items()}
    if wanted is not None:
        if wanted not in encoders:
            raise ValueError(f"no encoder {wanted!r} in model.encoders: {', '.join(encoders)}")
        if encoders[wanted] != kind:
            raise ValueError(f"model.encoders.{wanted}.type is {encoders[wanted]}, not {kind}")
        return wanted
    fitting = [name for name, one in encoders.items() if one == kind]
    if not fitting:
        types = ", ".join(f"model.encoders.{name}.type is {one}" for name, one in encoders.items())
        raise ValueError(f"no encoder is a {kind}: {types}")
    if len(fitting) > 1:
        raise ValueError(
            f"several encoders are a {kind}: choose with --encoder {' or --encoder '.join(fitting)}"
        )
    return fitting[0]


def _tasks(recipe: Recipe, kind: str, encoder: str | None = None) -> list[str]:
    return [
        name
        for name, task in recipe.tasks.items()
        if task.objective.type == kind
        and encoder in (None, getattr(task.objective, "encoder", None))
    ]


def _task(recipe: Recipe, kind: str, wanted: str | None, encoder: str | None = None) -> str | None:
    """The task of a type that is meant; None: there is none, and none was asked for."""
    names = _tasks(recipe, kind, encoder)
    if wanted is not None and wanted not in names:
        there = ", ".join(f"{n} ({t.objective.type})" for n, t in recipe.tasks.items())
        raise ValueError(
            f"--task {wanted} is no {kind} task that this format could take; the run has {there}"
        )
    if wanted is None and len(names) > 1:
        raise ValueError(f"several {kind} tasks: choose with --task {' or --task '.join(names)}")
    return wanted or (names[0] if names else None)


def _of_vit(recipe: Recipe, options: argparse.Namespace, form: str) -> Choice:
    """A ViT alone; what of the run stays behind."""
    encoder = _encoder(recipe, options.encoder, "vit")
    reading = [
        name
        for name, task in recipe.tasks.items()
        if getattr(task.objective, "encoder", None) == encoder
    ]
    if not reading:
        raise ValueError(
            f"no task reads model.encoders.{encoder}, so that nobody says how its "
            "images are prepared"
        )
    left = {
        f"encoders.{other}": f"{form} has the encoder {encoder} alone"
        for other in recipe.model.encoders
        if other != encoder
    }
    left |= {
        f"objectives.{task}": f"{form} has no place for a {recipe.tasks[task].objective.type} "
        "objective"
        for task in recipe.tasks
    }
    return Choice(form, encoder, image_task=reading[0], left_out=left)


def _timm(recipe: Recipe, options: argparse.Namespace) -> Choice:
    choice = _of_vit(recipe, options, "timm")
    if options.no_head:
        for task in _tasks(recipe, "classification", choice.encoder):
            choice.left_out[f"objectives.{task}"] = "--no-head"
        return choice
    choice.task = _task(recipe, "classification", options.task, choice.encoder)
    if choice.task:
        del choice.left_out[f"objectives.{choice.task}"]
    return choice


def _uniformer(recipe: Recipe, options: argparse.Namespace) -> Choice:
    choice = _of_vit(recipe, options, "uniformerv2")
    activation = recipe.model.encoders[choice.encoder].activation
    if activation != "quick_gelu":
        raise ValueError(
            f"model.encoders.{choice.encoder}.activation is {activation}; UniFormerV2 "
            "has quick_gelu built in"
        )
    choice.file = "uniformerv2.pyth"
    return choice


def _contrast(recipe: Recipe, options: argparse.Namespace, name: str) -> Choice:
    """Both towers of a contrastive task."""
    task = _task(recipe, "contrastive", options.task)
    if task is None:
        raise ValueError(
            "no task is contrastive: "
            + ", ".join(
                f"tasks.{n}.objective.type is {t.objective.type}" for n, t in recipe.tasks.items()
            )
        )
    objective = recipe.tasks[task].objective
    encoder = _encoder(recipe, objective.encoder, "vit")
    where = f"model.encoders.{objective.text_encoder}"
    text = recipe.model.encoders[objective.text_encoder]
    if text.type != "text":
        raise ValueError(f"{where}.type is {text.type}, not text")
    for key, found, wanted in (
        (f"tasks.{task}.objective.pool", objective.pool, "class_token"),
        (f"{where}.pool", text.pool, "end"),
        (f"{where}.causal", text.causal, True),
        (f"{where}.activation", text.activation, recipe.model.encoders[encoder].activation),
    ):
        if found != wanted:
            raise ValueError(f"{key} is {found}; {name} needs {wanted}")
    used = {f"encoders.{encoder}", f"encoders.{objective.text_encoder}", f"objectives.{task}"}
    parts = [f"encoders.{n}" for n in recipe.model.encoders]
    parts += [f"objectives.{n}" for n in recipe.tasks]
    left = {part: f"no part of the contrastive task {task}" for part in parts if part not in used}
    return Choice(name, encoder, task, task, left_out=left)


def _transformers(recipe: Recipe, options: argparse.Namespace) -> Choice:
    """GIT, CLIP, CLIP's vision tower or InternImage, by what the run has or --task names."""
    wanted = options.task and recipe.tasks.get(options.task)
    if options.task and not wanted:
        raise ValueError(f"no task {options.task!r} in tasks: {', '.join(recipe.tasks)}")
    kind = wanted.objective.type if wanted else None
    if options.encoder is None:
        if kind == "captioning" or (options.task is None and _tasks(recipe, "captioning")):
            task = _task(recipe, "captioning", options.task)
            if options.weights == "target":
                raise ValueError(
                    "--weights target: a captioner has no momentum target; take master or ema"
                )
            _check_options(options, ("task", "image_size"))
            more = [] if options.image_size is None else ["--image-size", str(options.image_size)]
            return Choice(
                "transformers",
                recipe.tasks[task].objective.encoder,
                words=["export-git", "--task", task, *more],
            )
        if kind == "contrastive" or (options.task is None and _tasks(recipe, "contrastive")):
            _check_options(options, ("task", "image_size"))
            return _contrast(recipe, options, "transformers")
    types = [s.type for n, s in recipe.model.encoders.items() if options.encoder in (None, n)]
    if "vit" not in types and "internimage" in types:
        _check_options(options, ("task", "encoder", "no_head"))
        return _internimage(recipe, options, "transformers")
    if options.task is not None:
        encoder = getattr(wanted.objective, "encoder", None) or "NAME"
        raise ValueError(
            f"--task {options.task}: transformers' CLIPVisionModel has no head; give "
            f"--encoder {encoder} in its place"
        )
    return _of_vit(recipe, options, "transformers")


def _internimage(recipe: Recipe, options: argparse.Namespace, layout: str) -> Choice:
    encoder = _encoder(recipe, options.encoder, "internimage")
    words = ["export-internimage", "--format", layout, "--encoder", encoder]
    kind = "m3i" if layout == "m3i" else "classification"
    task = None
    if layout in ("detection", "bevformer"):
        if options.task is not None:
            raise ValueError(f"--task {options.task}: a detector takes no head; leave --task out")
    elif not options.no_head:
        task = _task(recipe, kind, options.task, encoder)
    if layout == "m3i" and task is None:
        raise ValueError("no m3i task reads model.encoders." + encoder)
    return Choice(layout, encoder, task, words=words + (["--task", task] if task else []))


def _graph(recipe: Recipe, options: argparse.Namespace) -> Choice:
    task = _task(recipe, "classification", options.task)
    words = ["export-graph"]
    if options.image_size is not None:
        words += ["--image-size", str(options.image_size)]
    if task and options.encoder is None:
        return Choice("graph", "", task, words=[*words, "--task", task])
    encoder = _encoder(recipe, options.encoder, "internimage")
    if options.image_size is None:
        raise ValueError("maps need --image-size")
    return Choice("graph", encoder, words=[*words, "--outputs", "maps", "--encoder", encoder])


FORMATS: Sequence[Format] = (
    Format(
        "safetensors",
        "all weights under our names",
        "initial_weights=FILE",
        lambda recipe, options: Choice("safetensors", "", words=["export-weights"]),
    ),
    Format(
        "dcp",
        "all weights under our names",
        "torch.distributed.checkpoint.load(STATE, FOLDER)",
        lambda recipe, options: Choice("dcp", "", words=["export-weights", "--format", "dcp"]),
    ),
    Format(
        "transformers",
        "GIT, contrastive task, ViT or InternImage",
        "from_pretrained(FOLDER)",
        _transformers,
        "task encoder no_head image_size",
    ),
    Format(
        "timm",
        "ViT, with the head of a classification",
        'timm.create_model("local-dir:FOLDER", pretrained=True)',
        _timm,
        "task encoder no_head image_size",
    ),
    Format(
        "clip",
        "contrastive task",
        'open_clip.create_model_and_transforms("local-dir:FOLDER")',
        lambda recipe, options: _contrast(recipe, options, "clip"),
        "task image_size",
    ),
    Format("uniformerv2", "ViT", "its _MODELS path", _uniformer, "encoder image_size"),
    *(
        Format(
            name,
            "InternImage",
            loads,
            lambda recipe, options, layout=layout: _internimage(recipe, options, layout),
            takes,
        )
        for name, layout, loads, takes in (
            ("internimage", "official", "load_pretrained(FILE.pth)", "task encoder no_head"),
            ("mmdet", "detection", "load_from = FILE.pth", "encoder"),
            ("bevformer", "bevformer", "load_from = FILE.pth", "encoder"),
            ("m3i-raw", "m3i", "load_pretrained(FILE.pth)", "task encoder"),
        )
    ),
    Format(
        "onnx",
        "image encoder: logits or maps",
        "onnxruntime.InferenceSession(FILE.onnx)",
        _graph,
        "task encoder image_size",
    ),
    Format(
        "torch",
        "image encoder: logits or maps",
        "torch.export.load(FILE.pt2)",
        _graph,
        "task encoder image_size",
    ),
)


def _check_options(options: argparse.Namespace, takes: Sequence[str]) -> None:
    """Raise ValueError for an option that would do nothing."""
    for name in ("task", "encoder", "no_head", "image_size"):
        if getattr(options, name) and name not in takes:
            raise ValueError(f"--{name.replace('_', '-')} means nothing to it: leave it out")
    if options.task and options.no_head:
        raise ValueError("--task names a head that --no-head leaves out: give one of them")


def choice_of(recipe: Recipe, options: argparse.Namespace) -> Choice:
    """What `--to` means for this run. Raises ValueError: it cannot be; the text names why."""
    chosen = next(one for one in FORMATS if one.name == options.to)
    try:
        _check_options(options, chosen.takes.split())
        return chosen.choose(recipe, options)
    except ValueError as error:
        raise ValueError(f"--to {options.to}: {error}") from None
