"""An encoder, a module that reads it, an objective, a kind of data and a format from files of their
own, a line in the list of kinds at most: they are checked, trained, evaluated, resumed and exported
like those of the project.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file

from pretrain.engine.checkpoint.files import newest_whole, read_full_state
from pretrain.models.build_context import BuildContext
from pretrain.recipe.checks import _check_encoders
from tests.distributed.launch import ROOT, free_port, rank_environment
from tests.pretrain.plugins.toy_data import ToyDataSettings
from tests.pretrain.plugins.toy_encoder import ToyEncoderSettings, ToyRefinerSettings
from tests.pretrain.plugins.toy_format import TOY_FORMAT, TheirModel
from tests.tiny_run import pack_scenes

ENCODERS = {
    "image": {"type": "toy_encoder", "width": 16},
    "refiner": {"type": "toy_refiner", "of": "image"},
}


def recipe_of(folder: Path) -> dict:
    image = {"size": 32, "mode": "random_resized_crop", "flip_probability": 0.5}
    common = {
        "global_batch": 8,
        "micro_batch": 4,
        "data": {"shards": [str(folder / "data" / "train")], "image": image},
        "evaluation": {"shards": [str(folder / "data" / "heldout")]},
    }
    return {
        "name": "toys",
        "seed": 1,
        "steps": 6,
        "run_dir": str(folder / "run"),
        "precision": "fp32",
        "deepspeed": "zero1",
        "threads_per_rank": 1,
        "model": {"encoders": ENCODERS},
        "tasks": {
            "parity": {**common, "objective": {"type": "toy_classification"}},
            "match": {**common, "objective": {"type": "toy_objective"}},
        },
        "optimizer": {
            "kind": "adamw",
            "lr": 1e-3,
            "layer_decay": {"encoders.image": 0.5, "encoders.refiner": 0.9},
        },
        "schedule": {"kind": "constant", "warmup_steps": 0},
        "loader": {"workers": 0},
        "checkpoint": {"every_steps": 3, "keep_last": 2},
        "logging": {"every_steps": 1, "tensorboard": False},
    }


def run(*arguments) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.pretrain.plugins.run", *map(str, arguments)],
        cwd=ROOT,
        env=rank_environment(0, 1, free_port()),
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def written(folder: Path, recipe: dict) -> Path:
    path = folder / f"recipe{len(list(folder.glob('recipe*')))}.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


def test_toys_train_resume_evaluate_and_go_out(tmp_path):
    pack_scenes(tmp_path / "data")
    recipe, weights = written(tmp_path, recipe_of(tmp_path)), tmp_path / "weights.safetensors"
    straight = tmp_path / "run"
    run(
        "pretrain.train",
        recipe,
        "--",
        "tools.convert",
        "export-weights",
        "--run",
        straight,
        "--only",
        "encoders.*",
        "--out",
        weights,
        "--",
        "tools.convert",
        "export-weights",
        "--run",
        straight,
        "--only",
        "objectives.match.*",
        "--out",
        tmp_path / "match.safetensors",
    )
    lines = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    evaluated = {line["task"]: line for line in lines if line["kind"] == "evaluation"}
    assert len(losses) == 6 and losses[-1] != losses[0] and evaluated.keys() == {"parity", "match"}
    for found in evaluated.values():
        assert found["images"] == 10 and 0 <= found["top1"] <= 1
    assert list(load_file(tmp_path / "match.safetensors")) == ["objectives.match.vectors.weight"]

    state = read_full_state(newest_whole(straight / "checkpoints"), "master")
    found = load_file(weights)
    parts = {"image.patches", "image.norm", "refiner.inner", "refiner.outer"}
    assert set(found) == {f"encoders.{p}.{w}" for p in parts for w in ("weight", "bias")}
    for name, tensor in found.items():
        assert torch.equal(tensor, state[name])

    check_format(found)

    again = tmp_path / "again"
    shutil.copytree(straight, again)
    run("pretrain.train", "--resume", again, "--from-step", 3)
    resumed = read_full_state(newest_whole(again / "checkpoints"), "master")
    assert state.keys() == resumed.keys()
    assert all(torch.equal(state[name], resumed[name]) for name in state)


def check_format(ours: dict[str, torch.Tensor]) -> None:
    """The model whose names the toy format has computes the same, and its weights come back."""
    theirs = TOY_FORMAT.to_theirs(ours)
    model = TheirModel()
    model.load_state_dict(theirs)
    context = BuildContext({"image": IMAGE.build(BuildContext())})
    encoders = {**context.encoders, "refiner": REFINER.build(context)}
    for name, encoder in encoders.items():
        start = f"encoders.{name}."
        encoder.load_state_dict(
            {n.removeprefix(start): t for n, t in ours.items() if n.startswith(start)}
        )
    images = torch.randn(2, 3, 32, 40, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(
            model(images), encoders["refiner"](encoders["image"](images)), rtol=1e-5, atol=1e-6
        )
    back = TOY_FORMAT.to_ours(theirs)
    assert back.keys() == ours.keys() and all(torch.equal(back[n], ours[n]) for n in ours)


REFINER, IMAGE = ToyRefinerSettings(), ToyEncoderSettings()


@pytest.mark.parametrize(
    ("encoders", "messages"),
    [
        ({"image": IMAGE, "refiner": REFINER}, []),
        (
            {"refiner": REFINER, "image": IMAGE},
            [
                "model.encoders.refiner.of='image' must stand above refiner, which reads it: "
                "change their "
                "order"
            ],
        ),
        (
            {"picture": IMAGE, "refiner": REFINER},
            [
                "model.encoders.refiner.of='image' is not among model.encoders: picture, refiner",
                "model.encoders.picture: no task uses this encoder, so it would only decay: "
                "remove it, or "
                "name it in a task's objective.encoder",
            ],
        ),
        (
            {"image": IMAGE, "other": REFINER, "refiner": ToyRefinerSettings(of="other")},
            [
                "model.encoders.refiner.of='other' must read images, but model.encoders.other.type="
                "toy_refiner reads tokens: name another encoder"
            ],
        ),
        (
            {"image": IMAGE, "refiner": REFINER, "more": REFINER},
            [
                "model.encoders.more: no task uses this encoder, so it would only decay: remove "
                "it, or name "
                "it in a task's objective.encoder"
            ],
        ),
    ],
)
def test_a_module_names_what_it_reads_and_uses_it(encoders, messages):
    assert _check_encoders(recipe_like(encoders, size=32)) == messages


def test_images_fit_the_encoders_that_modules_read():
    (fault,) = _check_encoders(recipe_like({"image": IMAGE, "refiner": REFINER}, size=36))
    assert fault == (
        "tasks.t.data.image.size=36 is not a multiple of 8, as model.encoders.image (toy_encoder) "
        "needs: use 32 or 40"
    )


def recipe_like(encoders: dict, size: int) -> SimpleNamespace:
    """What a check of encoders looks at: a task that names the refiner alone."""
    objective = SimpleNamespace(
        encoder_fields={"refiner": "tokens"}, refiner="refiner", uses_head=False, further_sizes=()
    )
    data = ToyDataSettings(shards=["x"], image={"size": size})
    task = SimpleNamespace(
        objective=objective, data=data, images=lambda where: {f"{where}.data.image": data.image}
    )
    return SimpleNamespace(model=SimpleNamespace(encoders=encoders), tasks={"t": task})
