"""The whole chain, shards to losses, in several worlds and stages against plain PyTorch."""

import json

import pytest
import torch

from data_pipeline.loader.loader import LoaderSettings, StepLoader
from data_pipeline.samples.tokenizer import Tokenizer
from pretrain import build
from pretrain.engine.zero.zero import make_optimizer
from pretrain.models.init import initialise
from pretrain.optim.groups import parameter_groups
from pretrain.optim.schedule import lr_factor
from pretrain.recipe.load import load_recipe
from tests.distributed.launch import run_ranks, tails
from tests.tiny_run import pack_scenes, tiny_recipe, write_recipe

STEPS = 6
WITHOUT_DROPOUT = {"steps": STEPS, "tasks__caption__objective__decoder__dropout": 0.0}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    pack_scenes(folder)
    return folder


@pytest.fixture(scope="module")
def plain_losses(data, tmp_path_factory):
    """No DeepSpeed, no accumulation, no worker: the loss of each step."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("plain")
    path = write_recipe(
        folder / "r.yaml",
        tiny_recipe(data, folder / "run", **WITHOUT_DROPOUT, tasks__caption__micro_batch=8),
    )
    recipe = load_recipe(path)
    tokenizer = Tokenizer.load(recipe.tokenizer.path)
    model = build.build_model(recipe, tokenizer)
    initialise(model, recipe.seed)
    groups = parameter_groups(model, recipe.optimizer)
    optimizer = make_optimizer(groups, recipe.optimizer)
    loader = StepLoader(
        build.build_streams(recipe, tokenizer),
        build.build_schedule(recipe),
        LoaderSettings(workers=0),
        0,
        1,
        0,
        STEPS,
    )
    losses = []
    for window in loader:
        (batch,) = window.micro_batches
        totals = {
            k: torch.tensor(float(v)) for k, v in model.objectives["caption"].counts(batch).items()
        }
        loss = model("caption", "undivided", batch, totals)["loss"]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.optimizer.clip_norm)
        for group in optimizer.param_groups:
            factor = lr_factor(window.step, recipe.schedule, recipe.steps)
            group["lr"] = recipe.optimizer.lr * group["lr_multiplier"] * factor
        optimizer.step()
        losses.append(loss.item())
    return losses


def run_losses(data, folder, world: int, **changes) -> list[float]:
    recipe = tiny_recipe(data, folder / "run", **WITHOUT_DROPOUT, **changes)
    codes = run_ranks("pretrain.train", [write_recipe(folder / "r.yaml", recipe)], world, folder)
    assert codes == [0] * world, tails(folder)
    lines = [json.loads(x) for x in (folder / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["images"] for line in lines if line["kind"] == "evaluation"] == [10]
    return [line["loss"] for line in lines if line["kind"] == "train"]


@pytest.mark.parametrize("world, stage, micro_batch", [(1, 1, 8), (2, 2, 2), (3, 3, 2)])
def test_losses_equal_plain_pytorch(data, plain_losses, tmp_path, world, stage, micro_batch):
    """8 samples on 3 ranks with micro-batches of 2: some micro-steps are padding."""
    losses = run_losses(
        data, tmp_path, world, deepspeed=f"zero{stage}", tasks__caption__micro_batch=micro_batch
    )
    assert losses == pytest.approx(plain_losses, rel=2e-6)
    assert plain_losses[-1] < plain_losses[0]


@pytest.mark.parametrize(
    "stage", [pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow), 3]
)
def test_bf16_follows(data, plain_losses, tmp_path, stage):
    losses = run_losses(data, tmp_path, 2, deepspeed=f"zero{stage}", precision="bf16")
    assert losses == pytest.approx(plain_losses, rel=2e-2)
    assert losses != pytest.approx(plain_losses, rel=1e-6)
