"""SOURCE: whatever it is, it becomes a folder that transformers loads."""

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.convert.record import RECORD
from tools.support.model_places import image_size, is_run, json_of, names_in
from tools.support.trained import recipe_of

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Source:
    """A folder with config.json, and what it says of images."""

    folder: Path
    config: dict[str, Any]
    scratch: bool = False
    """Only its shape counts; the weights begin at random."""
    size: int = 224
    mean: tuple[float, ...] = _CLIP_MEAN
    std: tuple[float, ...] = _CLIP_STD
    record: dict[str, Any] = field(default_factory=dict)
    """omnipretrain.json, where the folder has one."""


def read_source(options: argparse.Namespace, kept: Path, leads: bool, wait: Any) -> Source:
    """The folder that is meant; a run is exported to `kept` first, by the process that leads.

    Raises ValueError: nothing that could be fine-tuned; the text says what would be.
    """
    scratch = options.source == "scratch"
    if scratch and options.like is None:
        raise ValueError(
            "scratch: say which model with --like SOURCE (a run, an export, or a folder of "
            "transformers); only its shape is taken"
        )
    place = Path(options.like if scratch else options.source)
    if is_run(place):
        if leads and not (kept / "config.json").is_file():
            _export(place, kept, options)
        wait()
        place = kept
    config = json_of(place / "config.json")
    if not config.get("model_type"):
        raise ValueError(_what_is(place, options.kind))
    return Source(place, config, scratch, **_images(place, config), record=json_of(place / RECORD))


def _export(run: Path, out: Path, options: argparse.Namespace) -> None:
    """`tools.convert export --to transformers` of the encoder, or of the captioner."""
    from tools.convert.__main__ import main

    words = ["export", "--run", str(run), "--to", "transformers", "--out", str(out)]
    words += ["--weights", options.weights]
    recipe = recipe_of(run)
    if options.kind == "caption":
        words += ["--task", options.part] if options.part else []
    else:
        types = {name: one.type for name, one in recipe.model.encoders.items()}
        fitting = [name for name, kind in types.items() if kind == "vit"]
        if options.part is None and len(fitting) != 1:
            found = ", ".join(f"{name} ({kind})" for name, kind in types.items())
            raise ValueError(
                f"{run}: its encoders are {found}; "
                + (
                    f"choose one with --part {' or --part '.join(fitting)}"
                    if fitting
                    else "classify takes a vit, which transformers has a class for. Others are "
                    "fine-tuned by a recipe of their own, with initial_weights from "
                    f"`python -m tools.convert export-weights --run {run} --out FILE.safetensors`"
                )
            )
        words += ["--encoder", options.part or fitting[0]]
    if main(words):
        raise ValueError(f"{run} could not be exported: see above")


def _images(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Size and statistics of the images, from the folder's image processor."""
    found = json_of(folder / "preprocessor_config.json")
    images: dict[str, Any] = {"size": image_size(found, config)}
    if "image_mean" in found:
        images |= {"mean": tuple(found["image_mean"]), "std": tuple(found["image_std"])}
    return images


def _what_is(place: Path, kind: str) -> str:
    """What was found in place of a model of transformers, and what to do."""
    if not place.exists():
        return (
            f"{place}: there is no such folder; SOURCE is a run, an export, a folder of "
            "transformers, or the word scratch"
        )
    record = json_of(place / RECORD) if place.is_dir() else {}
    if record:
        return (
            f"{place} is an export for {record.get('to', 'another tool')}, which transformers "
            "cannot train: give the run itself, or `python -m tools.convert export --run RUN --to "
            "transformers --out FOLDER`"
        )
    found = names_in(place) if place.is_dir() else "a file"
    return (
        f"{place}: no run (checkpoints/) and no folder of transformers (config.json with a "
        f"model_type); it is: {found or 'empty'}. Weights in a file become a folder by training: "
        f"`python -m pretrain.train` with initial_weights, then {kind} from its run"
    )
