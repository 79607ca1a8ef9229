"""A finished run and its export, made once for all tests of tools."""

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from data_pipeline.samples.tokenizer import Tokenizer
from pretrain.build import build_model
from pretrain.models.init import initialise
from pretrain.recipe.load import load_recipe
from tests.distributed.launch import run_ranks, tails
from tests.tiny_run import pack_scenes, tiny_recipe, write_recipe


def train(recipe: Path, logs: Path) -> None:
    """Run a recipe on one rank."""
    assert run_ranks("pretrain.train", [recipe], 1, logs) == [0], tails(logs)


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    pack_scenes(folder)
    return folder


@contextlib.contextmanager
def full_disk(after: int) -> Iterator[None]:
    """No file may grow beyond so many bytes: writing more fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (after, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def make_run(folder: Path, scenes: Path, **changes) -> Path:
    """A run directory after 24 steps from noisy weights, which tell images apart."""
    recipe = tiny_recipe(
        scenes,
        folder / "run",
        steps=24,
        initial_weights=str(folder / "noisy.safetensors"),
        checkpoint={"every_steps": 12},
        optimizer__lr=2e-3,
        ema={"decay": 0.9, "evaluate": False},
        **changes,
    )
    path = write_recipe(folder / "recipe.yaml", recipe)
    loaded = load_recipe(path)
    model = build_model(loaded, Tokenizer.load(loaded.tokenizer.path))
    initialise(model, 0)
    noise = torch.Generator().manual_seed(1)
    weights = {
        name: parameter.detach() + 0.2 * torch.randn(parameter.shape, generator=noise)
        for name, parameter in model.named_parameters()
    }
    save_file(weights, folder / "noisy.safetensors")
    train(path, folder / "logs")
    return folder / "run"


@pytest.fixture(scope="session")
def run_dir(scenes, tmp_path_factory) -> Path:
    """A finished run of the tiny recipe."""
    return make_run(tmp_path_factory.mktemp("tiny"), scenes)


@pytest.fixture(scope="session")
def export(run_dir, tmp_path_factory) -> Path:
    """A verified export of it."""
    from tools.convert.__main__ import main

    out = tmp_path_factory.mktemp("exports") / "caption"
    assert main(["export-git", "--run", str(run_dir), "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="session")
def internimage_run(scenes, tmp_path_factory) -> Path:
    """Four steps of classification on a small InternImage with layer scale and batch norm."""
    folder = tmp_path_factory.mktemp("internimage")
    recipe = tiny_recipe(scenes, folder / "run", steps=4, ema={"decay": 0.5})
    caption = recipe["tasks"].pop("caption")
    recipe["model"]["encoders"]["image"] = {
        "type": "internimage",
        "channels": 16,
        "depths": [1, 1, 2, 1],
        "groups": [1, 2, 4, 8],
        "post_norm": True,
        "layer_scale": 0.1,
        "stage_norm": False,
        "head": {"type": "conv"},
        "drop_path": 0.2,
    }
    recipe["tasks"]["classify"] = {
        "global_batch": 8,
        "micro_batch": 8,
        "objective": {"type": "classification", "pool": "head"},
        "data": {
            "shards": caption["data"]["shards"],
            "image": caption["data"]["image"],
            "classes": 10,
        },
        "evaluation": caption["evaluation"],
    }
    train(write_recipe(folder / "recipe.yaml", recipe), folder / "logs")
    return folder / "run"
