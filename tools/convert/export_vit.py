"""Our vision transformer, alone or with the text encoder of a contrastive task, as folders and
files of others: timm, open_clip, transformers' CLIP, UniFormerV2."""

import argparse
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import load_file

from data_pipeline.files import give_usual_access, sync_file, write_atomically
from pretrain.build import evaluation_image
from pretrain.engine.checkpoint.files import MANIFEST, file_entry
from tools.convert.formats.card import card
from tools.convert.formats.clip import resize_positions, turned, vision_map
from tools.convert.formats.listing import Choice, choice_of
from tools.convert.formats.parts import IMAGES, Export, of, save, write_json
from tools.convert.formats.reading import class_scores, read_tokens
from tools.convert.record import RECORD
from tools.support.trained import open_run, recipe_of
from tools.support.training_images import training_shards
from tools.support.weight_files import writing

TOLERANCE = 1e-4
"""Largest difference that passes, as a part of the largest value."""


def command(options: argparse.Namespace, console: Console) -> int:
    """Write one of the formats of `listing`; options as of `tools.convert export`."""
    choice = choice_of(recipe_of(options.run_dir), options)
    write = _writer(choice)
    if options.out.exists():
        raise ValueError(f"--out {options.out} is there already; choose another place")
    with console.status("reading the checkpoint"):
        export = _open(options, choice)
    temporary = options.out.with_name(f".{options.out.name}.{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        with writing(options.out), torch.no_grad():
            lines = write(export, temporary)
        _finish(export, temporary, lines)
        if choice.file:
            os.replace(temporary / choice.file, options.out)
            os.replace(temporary / RECORD, options.out.with_name(f"{options.out.name}.{RECORD}"))
        else:
            os.rename(temporary, options.out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return _report(options.out, export, console)


def _writer(choice: Choice) -> Callable[[Export, Path], str]:
    """The function that fills a folder for a format, and returns how to load it."""
    # transformers takes seconds to import.
    from tools.convert.export_clip import write_open_clip, write_transformers

    return {
        "timm": _write_timm,
        "uniformerv2": _write_uniformer,
        "clip": write_open_clip,
        "transformers": write_transformers,
    }[choice.format]


def _open(options: argparse.Namespace, choice: Choice) -> Export:
    run = open_run(options.run_dir, options.weights)
    vit = run.recipe.model.encoders[choice.encoder]
    source = choice.task or choice.image_task
    image = evaluation_image(run.recipe.tasks[source])
    image = image.model_copy(
        update={
            "size": options.image_size or image.size,
            "mode": "center_crop",
            "max_size": None,
            "mean": run.recipe.tasks[source].data.image.mean,
            "std": run.recipe.tasks[source].data.image.std,
        }
    )
    if image.size % vit.patch_size:
        raise ValueError(
            f"images of {image.size} pixels are no multiple of patch_size "
            f"{vit.patch_size}: choose --image-size"
        )
    tensors = {name: tensor.detach() for name, tensor in run.model.state_dict().items()}
    export = Export(run, choice, vit, tensors, image)
    if image.size != vit.image_size:
        name = f"encoders.{choice.encoder}.embedding.positions"
        tensors[name] = resize_positions(tensors[name], image.size // vit.patch_size)
        export.vit = vit.model_copy(update={"image_size": image.size})
        export.notes.append(
            f"the position table is resized from {vit.image_size} to {image.size} "
            "pixels, bicubic, as our encoder does for every image"
        )
    return export


# ---- timm --------------------------------------------------------------------------------------


def _write_timm(export: Export, folder: Path) -> str:
    vit, choice = export.vit, export.choice
    start = f"encoders.{choice.encoder}."
    theirs = vision_map("timm", choice.encoder).to_theirs(of(export.tensors, start))
    theirs = {name: turned(name, tensor) for name, tensor in theirs.items()}
    classes, pool = 0, "token"
    if choice.task:
        objective = export.run.recipe.tasks[choice.task].objective
        pool = "token" if objective.pool == "class_token" else "avg"
        for part in ("weight", "bias"):
            theirs[f"head.{part}"] = export.tensors[f"objectives.{choice.task}.head.{part}"]
        classes = len(theirs["head.bias"])
    quick = vit.activation == "quick_gelu"
    args = {
        "img_size": vit.image_size,
        "patch_size": vit.patch_size,
        "embed_dim": vit.width,
        "depth": vit.layers,
        "num_heads": vit.heads,
        "mlp_ratio": vit.mlp_ratio,
        "global_pool": pool,
        "pool_include_prefix": pool == "avg",
        "fc_norm": False,
    }
    image, size = export.image, [3, export.image.size, export.image.size]
    write_json(
        folder / "config.json",
        {
            "architecture": f"vit_base_patch16_clip_{'quickgelu_' if quick else ''}224",
            "num_classes": classes,
            "num_features": vit.width,
            "global_pool": pool,
            "model_args": args,
            "pretrained_cfg": {
                "num_classes": classes,
                "input_size": size,
                "fixed_input_size": True,
                "interpolation": "bicubic",
                "crop_pct": 1.0,
                "crop_mode": "center",
                "mean": list(image.mean),
                "std": list(image.std),
                "pool_size": None,
                "first_conv": "patch_embed.proj",
                "classifier": "head",
            },
        },
    )
    save(theirs, folder / "model.safetensors")
    back = load_file(folder / "model.safetensors")
    tokens = read_tokens(back, export.pixels(), names="timm", heads=vit.heads, quick=quick)
    ours = export.run.model.encoders[choice.encoder](export.pixels())
    if choice.task:
        vector = ours[:, 0] if pool == "token" else ours.mean(dim=1)
        ours_scores = export.run.model.objectives[choice.task].head(vector)
        export.compare("class scores", class_scores(back, tokens, args), ours_scores)
    export.compare("tokens", tokens, ours)
    return 'import timm\nmodel = timm.create_model("local-dir:.", pretrained=True).eval()\n'


# ---- UniFormerV2 -------------------------------------------------------------------------------


def _write_uniformer(export: Export, folder: Path) -> str:
    """A bare state dict under CLIP's names. Its loader asks its own model for every name of the
    file, and that model has no last norm."""
    choice = export.choice
    start = f"encoders.{choice.encoder}."
    theirs = vision_map("openai", choice.encoder).to_theirs(of(export.tensors, start))
    theirs = {name: t.clone() for name, t in theirs.items() if not name.startswith("ln_post.")}
    torch.save(theirs, folder / choice.file)
    export.notes.append(
        "norm_after is left out: UniFormerV2 has no ln_post, and its loader stops "
        "at a name that it does not know"
    )
    back = torch.load(folder / choice.file, weights_only=True)
    tokens = read_tokens(back, export.pixels(), names="openai", heads=export.vit.heads, quick=True)
    encoder = export.run.model.encoders[choice.encoder]
    export.compare("tokens", encoder.norm_after(tokens), encoder(export.pixels()))
    return ""


# ---- what all have in common -------------------------------------------------------------------


def _finish(export: Export, folder: Path, loading: str) -> None:
    """Record and README; then everything is safe on the disk."""
    choice, run = export.choice, export.run
    record = {
        "format": "omnipretrain.encoder",
        "version": 1,
        "to": choice.format,
        "recipe": run.recipe.name,
        "step": run.manifest["step"],
        "weights": run.state,
        "checkpoint_sha256": file_entry(run.checkpoint / MANIFEST)["sha256"],
        "encoder": choice.encoder,
        "task": choice.task,
        "image": export.image.model_dump(mode="json"),
        "training_shards": [
            one.model_dump(mode="json")
            for one in training_shards(task.data for task in run.recipe.tasks.values())
        ],
        "left_out": choice.left_out,
        "notes": export.notes,
        "verification": {
            "passed": _passed(export),
            "tolerance": TOLERANCE,
            "differences": export.differences,
        },
    }
    write_atomically(folder / RECORD, [json.dumps(record, indent=1).encode()])
    if loading:
        text = card(record, loading, run.checkpoint)
        (folder / "README.md").write_text(text, encoding="utf-8")
    for file in folder.iterdir():
        give_usual_access(file)
        sync_file(file)


def _passed(export: Export) -> bool:
    return all(gap <= TOLERANCE for gap in export.differences.values())


def _report(out: Path, export: Export, console: Console) -> int:
    def say(text: str, style: str | None = None) -> None:
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    choice = export.choice
    with_task = f", task {choice.task}" if choice.task else ""
    say(
        f"{out}: {choice.format}, recipe {export.run.recipe.name}, step "
        f"{export.run.manifest['step']}, encoder {choice.encoder}{with_task}"
    )
    for name, why in choice.left_out.items():
        say(f"left out: {name}: {why}")
    for note in export.notes:
        say(f"note: {note}")
    for kind, gap in export.differences.items():
        say(f"read back, {kind} of {IMAGES} random images: {gap:.1e} of the largest")
    if _passed(export):
        say(f"verified: all differences are at most {TOLERANCE:g}", "green")
        return 0
    say(
        f"NOT VERIFIED: a difference exceeds {TOLERANCE:g}. The export is kept for inspection; do "
        "not hand it on",
        "red",
    )
    return 1
