"""M3I on two ranks, undivided and in micro-batches, against one process with the whole batch; and a
run that is resumed against one that is not."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from pretrain.ds_config import DeepSpeedConfigFault, engine_config
from pretrain.engine.checkpoint.files import read_full_state
from pretrain.models.init import initialise
from pretrain.recipe.load import load_recipe
from tests.distributed.engines import SEED
from tests.distributed.launch import Cells, run_ranks, tails
from tests.distributed.m3i_worker import CELLS as ALL
from tests.distributed.m3i_worker import FAST, SGD, STEPS, batch_of, build, cell_name
from tests.pretrain.objectives.m3i.m3i_models import follow, half_cosine
from tests.tiny_run import pack_scenes, tiny_recipe, write_recipe

WORLD = 2


CELLS = Cells("tests.distributed.m3i_worker", WORLD, ALL, FAST, lambda cell: cell_name(*cell))


@pytest.fixture(scope="module")
def plain():
    """(encoder, balance) -> metrics of each step, first gradients, weights at the end."""
    torch.set_num_threads(1)
    known = {}

    def run(kind: str, balance: bool):
        if (kind, balance) in known:
            return known[kind, balance]
        model = build(kind, balance).train()
        initialise(model, SEED)
        follow(model, 0.0)
        objective = model.objectives["m3i"]
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, SGD.lr)
        metrics, first = [], {}
        for step in range(STEPS):
            batch = batch_of(kind, step)
            optimizer.zero_grad()
            out = model("m3i", "undivided", batch, objective.counts(batch))
            out["loss"].backward()
            first = first or {
                n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad
            }
            optimizer.step()
            follow(model, half_cosine(step, STEPS, 0.5, 0.9))
            metrics.append({name: value.item() for name, value in out.items()})
        weights = {n: p.detach().clone() for n, p in model.named_parameters()}
        known[kind, balance] = metrics, first, weights
        return known[kind, balance]

    return run


@pytest.mark.parametrize("cell", CELLS.params)
def test_metrics_gradients_and_weights(tmp_path_factory, plain, cell):
    kind, _, _, balance = cell
    out, result = CELLS.result(cell, tmp_path_factory)
    metrics, gradients, weights = plain(kind, balance)
    for found, wanted in zip(result, metrics, strict=True):
        # Roots of eigenvalues near 0, as of so few tokens, are rounding enlarged.
        rank = wanted["effective_rank"]
        assert found["effective_rank"] == pytest.approx(rank, rel=1e-3)
        others = {name: value for name, value in wanted.items() if name != "effective_rank"}
        assert found == pytest.approx(
            others | {"effective_rank": found["effective_rank"]}, rel=2e-5, abs=2e-6
        )
    tensors = load_file(out / f"{cell_name(*cell)}.safetensors")
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            tensors[f"gradient.{name}"],
            gradient.flatten(),
            rtol=1e-4,
            atol=2e-6,
            msg=lambda m, n=name: f"{n}: {m}",
        )
    for name, weight in weights.items():
        if "objectives.m3i.target." not in name:
            torch.testing.assert_close(
                tensors[f"end.{name}"],
                weight.flatten(),
                rtol=1e-4,
                atol=2e-6,
                msg=lambda m, n=name: f"{n}: {m}",
            )


def test_the_comparison_has_teeth(plain):
    """Losses differ from step to step, gradients are far above the tolerance, and the targets
    differ from what they follow: in the losses of the second step a wrong one would be seen."""
    for kind in ("vit", "internimage"):
        metrics, gradients, weights = plain(kind, False)
        for name in ("intra", "inter", "text", "category"):
            assert len({round(step[name], 4) for step in metrics}) == STEPS
        assert gradients["objectives.m3i.temperature.log_scale"].abs() > 1e-3
        assert gradients["objectives.m3i.mark.mark"].abs().max() > 1e-5
        online = weights["objectives.m3i.projector.linear.weight"]
        target = weights["objectives.m3i.target.projector.linear.weight"]
        assert (online - target).abs().max() > 1e-3
    balanced, *_ = plain("vit", True)
    assert balanced[0]["weight_intra"] != pytest.approx(1.0, abs=0.05)


def tiny_m3i(data, run_dir, **changes) -> dict:
    """A recipe of M3I on 32-pixel scenes, with everything switched on."""
    recipe = tiny_recipe(data, run_dir, **changes)
    caption = recipe["tasks"].pop("caption")
    view = {"size": 32, "mode": "random_resized_crop", "scale": [0.5, 1.0], "flip_probability": 0.5}
    recipe["model"]["encoders"]["text"] = {
        "type": "text",
        "width": 32,
        "layers": 1,
        "heads": 2,
        "max_positions": 24,
        "causal": False,
        "pool": "mean",
    }
    recipe["tasks"]["m3i"] = {
        "global_batch": 8,
        "micro_batch": 2,
        "objective": {
            "type": "m3i",
            "cell": 8,
            "pooled_width": 24,
            "momentum_start": 0.9,
            "decoder": {"width": 32, "heads": 2, "projector_layers": 1, "predictor_layers": 1},
        },
        "data": {
            "shards": caption["data"]["shards"],
            "caption_source": "json:captions",
            "text_length": 24,
            "label_source": "cls",
            "classes": 10,
            "image": view,
            "second_view": {**view, "hue": 0.1, "blur_probability": 0.5},
        },
        "evaluation": {**caption["evaluation"], "max_samples": 9},  # one of them has no partner
    }
    return recipe


def test_a_resume_is_bit_for_bit(tmp_path):
    """ZeRO-3 in bf16 with two micro-steps a rank: losses, weights and targets."""
    pack_scenes(tmp_path)
    recipe = tiny_m3i(
        tmp_path,
        tmp_path / "run",
        steps=6,
        precision="bf16",
        deepspeed="zero3",
        checkpoint={"every_steps": 3, "keep_last": 3},
    )
    path = write_recipe(tmp_path / "recipe.yaml", recipe)
    assert run_ranks("pretrain.train", [path], WORLD, tmp_path / "a") == [0] * WORLD, tails(
        tmp_path / "a"
    )
    last = "checkpoints/step_000000006"
    wanted = read_full_state(tmp_path / "run" / last)
    before = metrics_of(tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    shutil.rmtree(tmp_path / "other" / last)
    arguments = ["--resume", tmp_path / "other"]
    assert run_ranks("pretrain.train", arguments, WORLD, tmp_path / "b") == [0] * WORLD, tails(
        tmp_path / "b"
    )
    found = read_full_state(tmp_path / "other" / last)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    target = "objectives.m3i.target.encoder.blocks.0.mlp.expand.weight"
    online = "encoders.image.blocks.0.mlp.expand.weight"
    assert not torch.equal(found[target], found[online])
    after = metrics_of(tmp_path / "other")
    names = ("loss", "intra", "inter", "text", "category", "effective_rank", "top1")
    kinds = [line["kind"] for line in before]
    assert kinds == ["train"] * 6 + ["evaluation"] and len(after) == 7
    for one, other in zip(before, after, strict=True):
        assert [one.get(n) for n in names] == [other.get(n) for n in names]
    assert before[-1]["images"] == 9 and 0 <= before[-1]["image_to_text_r1"] <= 1


def test_balance_is_refused_where_it_cannot_be_measured(tmp_path):
    """Before the start, with both fields and the way out."""
    recipe = tiny_m3i(tmp_path, tmp_path / "run")
    recipe["tasks"]["m3i"]["objective"]["balance"] = {"every_steps": 10}
    found = load_recipe(write_recipe(tmp_path / "a.yaml", recipe))
    with pytest.raises(DeepSpeedConfigFault, match=r"4 of tasks.m3i.micro_batch=2 on 1 rank"):
        engine_config(found, 1)
    recipe["tasks"]["m3i"]["micro_batch"] = 8
    engine_config(load_recipe(write_recipe(tmp_path / "b.yaml", recipe)), 1)
    recipe["precision"] = "fp16"
    with pytest.raises(DeepSpeedConfigFault, match=r"precision=fp16: tasks.m3i.*take bf16"):
        engine_config(load_recipe(write_recipe(tmp_path / "d.yaml", recipe)), 1)
    recipe |= {"deepspeed": "zero3", "precision": "fp32"}
    with pytest.raises(DeepSpeedConfigFault, match=r"stage=3 frees weights.*balance=null"):
        engine_config(load_recipe(write_recipe(tmp_path / "c.yaml", recipe)), 1)


def metrics_of(run) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
