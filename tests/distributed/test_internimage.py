"""InternImage on two ranks, with drop path, recomputation, both heads, and a pass for each size of
the images, against one process with one graph."""

import functools
import shutil

import pytest
import torch
from safetensors.torch import load_file

from pretrain.engine.checkpoint.files import read_full_state, read_manifest
from tests.distributed.internimage_worker import (
    BATCH,
    FAST,
    SGD,
    STEPS,
    batch_of,
    build_model,
    cell_name,
    start,
)
from tests.distributed.internimage_worker import CELLS as ALL
from tests.distributed.launch import Cells, run_ranks, tails
from tests.tiny_run import pack_scenes, tiny_recipe, write_recipe
from tools.support.trained import open_run

WORLD = 2


CELLS = Cells("tests.distributed.internimage_worker", WORLD, ALL, FAST, cell_name)


@functools.cache
def plain(form: str):
    """One process with the undivided batch: losses, first gradients, and buffers at the end."""
    torch.set_num_threads(1)
    model = start(build_model(form)).train()
    optimizer = torch.optim.SGD(model.parameters(), SGD.lr)
    losses, gradients = [], {}
    for step in range(STEPS):
        optimizer.zero_grad()
        totals = {"images": BATCH, "labels": BATCH}
        loss = model("classify", "undivided", batch_of(step), totals)["loss"]
        loss.backward()
        losses.append(loss.item())
        gradients = gradients or {n: p.grad.clone() for n, p in model.named_parameters()}
        optimizer.step()
    return losses, gradients, dict(model.named_buffers())


@pytest.mark.parametrize("cell", CELLS.params)
def test_losses_gradients_and_statistics(tmp_path_factory, cell):
    out, found_losses = CELLS.result(cell, tmp_path_factory)
    losses, gradients, buffers = plain(cell[1])
    assert found_losses == pytest.approx(losses, rel=1e-5)
    found = load_file(out / f"{cell_name(cell)}.safetensors")
    assert found.keys() == gradients.keys() | buffers.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            found[name].view_as(gradient), gradient, atol=1e-6, rtol=1e-4, msg=name
        )
    for name, buffer in buffers.items():
        torch.testing.assert_close(found[name], buffer.float(), atol=1e-6, rtol=1e-5, msg=name)
    assert bool(buffers) == (cell[1] == "conv")


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_resume_repeats_drop_path_and_statistics(stage, tmp_path, monkeypatch):
    """bfloat16, on both ranks, views of two sizes: bit for bit what the run without a break has,
    whatever is in memory that nobody has written to. Nothing reads text: there is no tokenizer."""
    pack_scenes(tmp_path)
    recipe = tiny_recipe(
        tmp_path,
        tmp_path / "run",
        steps=6,
        precision="bf16",
        deepspeed=f"zero{stage}",
        checkpoint={"every_steps": 3, "keep_last": 3},
    )
    data = recipe["tasks"].pop("caption")["data"]
    del recipe["tokenizer"]
    recipe["model"]["encoders"]["image"] = {
        "type": "internimage",
        "channels": 16,
        "depths": [1, 1, 2, 1],
        "groups": [1, 2, 4, 8],
        "head": {"type": "conv"},
        "drop_path": 0.5,
    }
    recipe["tasks"]["classify"] = {
        "global_batch": 8,
        "micro_batch": 2,
        "objective": {"type": "classification", "pool": "head"},
        "data": {
            "shards": data["shards"],
            "image": data["image"],
            "classes": 10,
            "smaller_views": [24],
        },
    }
    path = write_recipe(tmp_path / "recipe.yaml", recipe)
    assert run_ranks("pretrain.train", [path], WORLD, tmp_path / "a") == [0] * WORLD, tails(
        tmp_path / "a"
    )
    last = "checkpoints/step_000000006"
    wanted = read_full_state(tmp_path / "run" / last)
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    shutil.rmtree(tmp_path / "other" / last)
    arguments = ["--resume", tmp_path / "other"]
    monkeypatch.setenv("MALLOC_PERTURB_", "128")  # glibc fills new memory with 0x7f: 3.4e38
    assert run_ranks("pretrain.train", arguments, WORLD, tmp_path / "b") == [0] * WORLD, tails(
        tmp_path / "b"
    )
    found = read_full_state(tmp_path / "other" / last)
    assert found.keys() == wanted.keys()
    differing = {
        name: (found[name] - tensor).abs().max().item()
        for name, tensor in wanted.items()
        if not torch.equal(found[name], tensor)
    }
    assert not differing
    files = [read_manifest(tmp_path / run / last)["files"] for run in ("run", "other")]
    ranks = [name for name in files[0] if name.startswith("rank_")]
    assert len(ranks) == 2 * WORLD and all(files[0][n] == files[1][n] for n in ranks)
    assert not (tmp_path / "run" / "tokenizer").exists()
    assert open_run(tmp_path / "run").tokenizer is None
    statistics = "encoders.image.conv_head.1.0.running_var"
    assert found[statistics].dtype == torch.float32 and found[statistics].std() > 0
