"""What a run of M3I on an InternImage hands on: to the official loader, to us, and to probes."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from pretrain.build import build_model
from pretrain.engine.checkpoint.files import read_full_state
from pretrain.models.init import load_weights
from pretrain.models.internimage.weights import official_shapes
from tests.distributed.launch import run_ranks, tails
from tests.distributed.test_m3i import tiny_m3i
from tests.tiny_run import pack_scenes, tiny_recipe, write_recipe
from tools import probe
from tools.convert.__main__ import main
from tools.support.trained import open_run

ENCODER = {
    "type": "internimage",
    "channels": 16,
    "depths": [1, 1, 2, 1],
    "groups": [1, 2, 4, 8],
    "head": {"type": "projector"},
    "drop_path": 0.1,
}


@pytest.fixture(scope="module")
def scenes64(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes64")
    pack_scenes(folder, size=64)
    return folder


@pytest.fixture(scope="module")
def m3i_run(scenes64, tmp_path_factory):
    """Four steps on images of two by two cells."""
    folder = tmp_path_factory.mktemp("m3i_run")
    recipe = tiny_m3i(scenes64, folder / "run", steps=4)
    recipe["model"]["encoders"]["image"] = ENCODER
    task = recipe["tasks"]["m3i"]
    task["micro_batch"] = 8
    task["objective"] |= {"cell": 32, "pooled_width": None}
    for view in ("image", "second_view"):
        task["data"][view] = {**task["data"][view], "size": 64}
    path = write_recipe(folder / "recipe.yaml", recipe)
    assert run_ranks("pretrain.train", [path], 1, folder / "logs") == [0], tails(folder / "logs")
    return folder / "run"


def convert(*arguments) -> None:
    assert main([str(argument) for argument in arguments]) == 0


def official_loader(state: dict) -> dict:
    """What `load_pretrained` of the released code makes of a raw M3I checkpoint, step by step."""
    assert "mask_token" in next(iter(state))
    kept = {}
    for name, tensor in state.items():
        if "mm_dcnv3" in name or not ("dcnv3" in name or "clip_projector" in name):
            continue
        kept[name.replace("dcnv3.", "")] = tensor
    for part in ("weight", "bias"):
        kept[f"fc_norm.{part}"] = state[f"clip.classifier_ln.{part}"]
        kept[f"head.{part}"] = state[f"clip.classifier.{part}"]
    return kept


def test_the_raw_layout(m3i_run, tmp_path):
    """Of the official loader everything gets its own weights; the momentum copy stays outside."""
    out = tmp_path / "raw.pth"
    convert(
        "export-internimage", "--run", m3i_run, "--format", "m3i", "--task", "m3i", "--out", out
    )
    state = torch.load(out, weights_only=True)["model"]
    run = open_run(m3i_run)
    ours = run.model.state_dict()
    shapes = official_shapes(run.recipe.model.encoders["image"], 10)
    loaded = official_loader(state)
    # The released loader writes this norm under a name that its model does not have.
    renamed = {n.replace("fc_norm.", "fc_norm.0."): tensor for n, tensor in loaded.items()}
    assert {n: tuple(t.shape) for n, t in renamed.items()} == shapes
    for name, tensor in renamed.items():
        start = "objectives.m3i." if name.startswith("head.") else "encoders.image."
        assert torch.equal(tensor, ours[start + name])
    copies = {n: t for n, t in state.items() if n.startswith("mm_")}
    assert copies and all("clip_projector" not in name for name in copies)
    for name, tensor in copies.items():
        own = name.removeprefix("mm_").removeprefix("dcnv3.")
        assert torch.equal(tensor, ours[f"objectives.m3i.target.encoder.{own}"])
    moved = "levels.0.blocks.0.mlp.fc1.weight"
    assert not torch.equal(state[f"mm_dcnv3.{moved}"], state[f"dcnv3.{moved}"])
    assert torch.equal(state["mask_token"], ours["objectives.m3i.predictor.mask_token"])


def test_the_raw_layout_of_a_run_without_classes(m3i_run, tmp_path, monkeypatch, capsys):
    """As the joint stage of InternImage-H has none: a classifier of zeros, which is said."""
    run = open_run(m3i_run)
    task = run.recipe.tasks["m3i"]
    data = task.data.model_copy(update={"label_source": None, "classes": None})
    tasks = {"m3i": task.model_copy(update={"data": data})}
    recipe = run.recipe.model_copy(update={"tasks": tasks})
    model = build_model(recipe, run.tokenizer)
    model.load_state_dict(run.model.state_dict(), strict=False)
    assert model.objectives["m3i"].head is None
    unlabelled = replace(run, recipe=recipe, model=model)
    monkeypatch.setattr("tools.support.trained.open_run", lambda *_: unlabelled)
    out, whole = tmp_path / "raw.pth", tmp_path / "whole.pth"
    command = ("export-internimage", "--run", m3i_run, "--format", "m3i", "--task", "m3i", "--out")
    convert(*command, out, "--classes", 7)
    assert "zeros for 7 classes: the run has learned none" in capsys.readouterr().err
    monkeypatch.undo()
    convert(*command, whole)
    states = [torch.load(path, weights_only=True)["model"] for path in (out, whole)]
    assert states[0].keys() == states[1].keys()
    made = ("clip.classifier.weight", "clip.classifier.bias")
    width = states[1][made[0]].shape[1]
    assert [tuple(states[0][name].shape) for name in made] == [(7, width), (7,)]
    for name, tensor in states[0].items():
        assert not tensor.any() if name in made else torch.equal(tensor, states[1][name]), name
    official_loader(states[0])


@pytest.mark.parametrize(
    "kind, weights",
    [
        ("m3i", "master"),
        ("official", "master"),
        ("official", "target"),
    ],
)
def test_the_next_stage_starts_from_it(m3i_run, scenes64, tmp_path, kind, weights):
    """Export, import, and a run of classification with other classes from `initial_weights`."""
    task = ["--task", "m3i"] if kind == "m3i" else []
    convert(
        "export-internimage",
        "--run",
        m3i_run,
        "--format",
        kind,
        "--weights",
        weights,
        *task,
        "--out",
        tmp_path / "a.pth",
    )
    leave = ["--leave-out", "head.*"] if kind == "m3i" else []
    convert("import-internimage", tmp_path / "a.pth", *leave, "--out", tmp_path / "a.safetensors")
    given = load_file(tmp_path / "a.safetensors")
    state = read_full_state(m3i_run / "checkpoints/step_000000004")
    start = "objectives.m3i.target.encoder." if weights == "target" else "encoders.image."
    for name, tensor in given.items():
        assert torch.equal(tensor, state[name.replace("encoders.image.", start)])
    recipe = tiny_recipe(
        scenes64,
        tmp_path / "run",
        steps=1,
        initial_weights=str(tmp_path / "a.safetensors"),
        optimizer={"kind": "sgd", "lr": 1e-30, "weight_decay": 0.0},
        schedule={"kind": "constant", "warmup_steps": 0},
    )
    caption = recipe["tasks"].pop("caption")
    recipe["model"]["encoders"]["image"] = ENCODER
    recipe["tasks"]["classify"] = {
        "global_batch": 8,
        "micro_batch": 8,
        "objective": {"type": "classification", "pool": "head"},
        "data": {"shards": caption["data"]["shards"], "classes": 23, "image": {"size": 64}},
    }
    path = write_recipe(tmp_path / "recipe.yaml", recipe)
    assert run_ranks("pretrain.train", [path], 1, tmp_path / "logs") == [0], tails(
        tmp_path / "logs"
    )
    begun = read_full_state(tmp_path / "run/checkpoints/step_000000001")
    encoder = {n for n in begun if n.startswith("encoders.image.")}
    assert given.keys() == encoder
    assert all(torch.equal(begun[name], given[name]) for name in encoder)


def test_the_target_as_a_graph(m3i_run, tmp_path):
    """What a detector takes may be the momentum copy, too."""
    out = tmp_path / "a.pt2"
    convert(
        "export-graph",
        "--run",
        m3i_run,
        "--weights",
        "target",
        "--outputs",
        "maps",
        "--image-size",
        64,
        "--out",
        out,
    )
    images = torch.rand(3, 3, 64, 64)
    found = torch.export.load(out).module()(images)[-1]
    encoders = {w: open_run(m3i_run, w).model.encoders["image"] for w in ("master", "target")}
    wanted = {
        w: encoder.encode(images, ("maps",)).maps[-1].permute(0, 3, 1, 2)
        for w, encoder in encoders.items()
    }
    torch.testing.assert_close(found, wanted["target"], atol=1e-5, rtol=1e-5)
    assert (found - wanted["master"]).abs().max() > 1e-4


def test_probes(m3i_run, scenes64, tmp_path):
    """The encoder and its momentum copy, by the mean of the last map and by the projector."""
    found = {}
    for weights in ("master", "target"):
        for pool in ("mean", "head"):
            file = tmp_path / f"{weights}_{pool}.json"
            assert (
                probe.main(
                    [
                        str(m3i_run),
                        "--train",
                        str(scenes64 / "train"),
                        "--test",
                        str(scenes64 / "heldout"),
                        "--classes",
                        "10",
                        "--workers",
                        "0",
                        "--pool",
                        pool,
                        "--weights",
                        weights,
                        "--json",
                        str(file),
                    ]
                )
                == 0
            )
            found[weights, pool] = json.loads(file.read_text())
    assert all(result["encoder"] == "image" for result in found.values())
    features = []
    for weights in ("master", "target"):
        run = open_run(m3i_run, weights)
        encoder = run.model.encoders["image"]
        features.append(encoder.encode(torch.zeros(1, 3, 64, 64), ("pooled",)).pooled)
    assert not torch.equal(*features)


@pytest.mark.parametrize("weights", ["master", "target"])
def test_another_recipe_starts_from_weights(m3i_run, tmp_path, weights):
    """All of a run but momentum targets and counters; or a part of it, for other tasks."""
    out, run = tmp_path / "all.safetensors", open_run(m3i_run)
    convert("export-weights", "--run", m3i_run, "--weights", weights, "--out", out)
    state, model = run.model.state_dict(), build_model(run.recipe, run.tokenizer)
    missing = load_weights(model, out)
    assert missing and all(name.startswith("objectives.m3i.target.") for name in missing)
    assert not int(model.objectives["m3i"].watch.steps)
    for name, parameter in model.named_parameters():
        start = "encoders.image."
        if weights == "target" and name.startswith(start):
            name = name.replace(start, "objectives.m3i.target.encoder.")
        elif name in missing or (weights == "target" and ".projector." in name):
            continue
        assert torch.equal(parameter, state[name]), name
    convert(
        "export-weights",
        "--run",
        m3i_run,
        "--only",
        "encoders.image.*",
        "*.head.bias",
        "--out",
        out,
    )
    part = load_file(out)
    assert {name for name in state if name.startswith("encoders.image.")} | {
        "objectives.m3i.head.bias"
    } == part.keys()


def test_what_cannot_be_exported(m3i_run, run_dir, tmp_path, capsys):
    for arguments, message in (
        (["--format", "m3i"], "--classes N, which writes zeros, or take --format official"),
        (["--format", "m3i", "--task", "m3i", "--classes", "3"], "has learned 10 classes, which"),
        (["--format", "m3i", "--classes", "3"], "--task with the name of an m3i task; the run has"),
        (["--classes", "3"], "--classes is for --format m3i; official needs no linear layer"),
        (["--format", "m3i", "--task", "m3i", "--weights", "target"], "leave --weights target out"),
    ):
        command = ["export-internimage", "--run", str(m3i_run), "--out", str(tmp_path / "a.pth")]
        assert main([*command, *arguments]) == 1
        assert message in " ".join(capsys.readouterr().err.split())
    command = ["export-weights", "--run", str(m3i_run), "--out", str(tmp_path / "a.safetensors")]
    assert main([*command, "--only", "encoder.*"]) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert "--only encoder.*: there is no such weight; names are like encoders.image." in error
    with pytest.raises(ValueError, match="no task with a momentum target"):
        open_run(run_dir, "target")
