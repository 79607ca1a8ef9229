"""InternImage between our runs, the official code, its detectors, and transformers."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from pretrain.models.build_context import BuildContext
from pretrain.models.init import initialise, load_weights
from pretrain.models.multitask import MultiTaskModel
from pretrain.objectives.classification import ClassificationSettings
from tests.pretrain.models.internimage.internimage_models import (
    PUBLISHED,
    InternImageSettings,
    read_golden,
    settings_of,
    small_settings,
)
from tests.tools.conftest import full_disk
from tests.umask import modes, umask
from tools.convert.__main__ import main
from tools.convert.internimage import _encoder
from tools.convert.internimage_config import config_of_settings, settings_of_config

NAMES = ("t", "postnorm_ls", "rc", "h_smallhead", "g_smallhead")


class Configuration(dict):
    """What the official trainer keeps beside its weights."""


def golden_state(name: str) -> tuple[dict, InternImageSettings, dict]:
    tensors, info = read_golden(f"internimage_tiny_{name}")
    state = {key[3:]: tensor for key, tensor in tensors.items() if key.startswith("sd.")}
    return state, settings_of(f"internimage_tiny_{name}", info), tensors


def describe(folder, settings) -> str:
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    return str(path)


@pytest.mark.parametrize("name", NAMES)
def test_official_file_to_logits(name, tmp_path, capsys):
    """With a configuration object in it, as the official trainer writes them."""
    state, settings, tensors = golden_state(name)
    averaged = {f"module.{n}": t + 1 if t.is_floating_point() else t for n, t in state.items()}
    torch.save(
        {"model": state, "model_ema": averaged, "config": Configuration(a=1), "epoch": 7},
        tmp_path / "a.pth",
    )
    out = tmp_path / "ours.safetensors"
    command = [
        "import-internimage",
        str(tmp_path / "a.pth"),
        "--out",
        str(out),
        "--settings",
        describe(tmp_path, settings),
    ]
    assert main(command) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    read = InternImageSettings.model_validate(printed["model"]["encoders"]["image"])
    assert read == settings
    assert printed["tasks"]["classify"]["data"]["classes"] == 10
    encoder = read.build()
    objective = ClassificationSettings(pool="head").build(
        BuildContext({"image": encoder}, None, (0.5,) * 3, (0.5,) * 3, classes=10)
    )
    model = MultiTaskModel({"image": encoder}, {"classify": objective})
    initialise(model, 0)
    assert load_weights(model, out) == []
    with torch.no_grad():
        pooled = model.eval().encoders["image"].encode(tensors["input"], ("pooled",)).pooled
        logits = model.objectives["classify"].head(pooled)
    torch.testing.assert_close(logits, tensors["logits"], atol=2e-5, rtol=1e-4)
    assert main([*command, "--weights", "ema"]) == 0
    shifted = load_file(out)["encoders.image.patch_embed.conv1.bias"]
    torch.testing.assert_close(shifted, state["patch_embed.conv1.bias"] + 1)


def test_average_of_the_deepspeed_trainer_has_no_dots(tmp_path):
    state, settings, _ = golden_state("t")
    torch.save({"model_ema": {n.replace(".", ""): t for n, t in state.items()}}, tmp_path / "a.pth")
    out = tmp_path / "ours.safetensors"
    assert (
        main(
            [
                "import-internimage",
                str(tmp_path / "a.pth"),
                "--out",
                str(out),
                "--weights",
                "ema",
                "--settings",
                describe(tmp_path, settings),
            ]
        )
        == 0
    )
    found = load_file(out)
    assert len(found) == len(state)
    assert torch.equal(found["objectives.classify.head.weight"], state["head.weight"])


def test_rows_of_the_head_and_what_is_left_out(tmp_path, capsys):
    state, settings, _ = golden_state("t")
    save_file(state, tmp_path / "a.safetensors")
    (tmp_path / "rows.txt").write_text("7\n2\n5\n")
    out = tmp_path / "ours.safetensors"
    command = [
        "import-internimage",
        str(tmp_path / "a.safetensors"),
        "--out",
        str(out),
        "--settings",
        describe(tmp_path, settings),
    ]
    assert main([*command, "--head-rows", str(tmp_path / "rows.txt"), "--task", "sort"]) == 0
    head = load_file(out)["objectives.sort.head.weight"]
    assert torch.equal(head, state["head.weight"][[7, 2, 5]])
    assert yaml.safe_load(capsys.readouterr().out)["tasks"]["sort"]["data"]["classes"] == 3
    assert main([*command, "--leave-out", "head.*", "--leave-out", "conv_head.*"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["encoders"]["image"].get("head") is None and "tasks" not in printed
    (tmp_path / "rows.txt").write_text("10\n")
    assert main([*command, "--head-rows", str(tmp_path / "rows.txt")]) == 1
    assert "names row 10 of a linear layer with 10" in capsys.readouterr().err
    (tmp_path / "rows.txt").write_text("\n")
    assert main([*command, "--head-rows", str(tmp_path / "rows.txt")]) == 1
    assert "names no row" in capsys.readouterr().err


def test_the_middle_point_can_be_left_out(tmp_path, capsys):
    """Into a model without it, but not back."""
    state, settings, _ = golden_state("t")
    save_file(state, tmp_path / "a.safetensors")
    mixer = settings.mixer.model_copy(update={"remove_center": True})
    command = [
        "import-internimage",
        str(tmp_path / "a.safetensors"),
        "--out",
        str(tmp_path / "ours.safetensors"),
        "--settings",
        describe(tmp_path, settings.model_copy(update={"mixer": mixer})),
    ]
    assert main(command) == 0
    said = capsys.readouterr()
    assert "taken: " in said.err and "without the rows of the middle point" in said.err
    printed = yaml.safe_load(said.out)["model"]["encoders"]["image"]
    assert printed["mixer"]["remove_center"] is True
    ours = load_file(tmp_path / "ours.safetensors")
    mask = ours["encoders.image.levels.0.blocks.0.dcn.mask.bias"]
    assert len(mask) == 8 * settings.groups[0]
    state, settings, _ = golden_state("rc")
    save_file(state, tmp_path / "a.safetensors")
    mixer = settings.mixer.model_copy(update={"remove_center": False})
    describe(tmp_path, settings.model_copy(update={"mixer": mixer}))
    assert main(command) == 1
    assert "were trained without the middle point" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes", [{}, {"head": None}, {"mixer": {"type": "dcnv3", "remove_center": True}}]
)
def test_what_a_recipe_changes_in_a_published_size_is_kept(changes):
    settings = InternImageSettings(size="T", drop_path=0.1, **changes)
    described = InternImageSettings.model_validate(_encoder(settings))
    assert described.model_copy(update={"drop_path": 0.1}) == settings


def test_a_model_of_unknown_shape_must_be_described(tmp_path, capsys):
    state, _, _ = golden_state("t")
    save_file(state, tmp_path / "a.safetensors")
    assert (
        main(
            [
                "import-internimage",
                str(tmp_path / "a.safetensors"),
                "--out",
                str(tmp_path / "b.safetensors"),
            ]
        )
        == 1
    )
    assert "describe it with --settings" in capsys.readouterr().err
    assert not (tmp_path / "b.safetensors").exists()


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "config.json is damaged or no JSON"),
        ("[1]", "config.json holds no JSON object"),
        (
            '{"model_type": "internimage", "depths": [1, 1, 1, 1]}',
            "says nothing of channels, groups",
        ),
    ],
)
def test_a_config_that_cannot_be_read_is_named(tmp_path, content, message, capsys):
    state, _, _ = golden_state("t")
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(content)
    out = str(tmp_path / "o.safetensors")
    assert main(["import-internimage", str(tmp_path), "--out", out]) == 1
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("size", PUBLISHED)
def test_config_of_transformers_and_back(size):
    settings = InternImageSettings(size=size)
    config = json.loads(json.dumps(config_of_settings(settings, 1000)))
    assert config["level2_post_norm"] == (size in "HG") == config["use_clip_projector"]
    back = settings_of_config(config)
    assert back.model_copy(update={"size": size}) == settings


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"mixer": {"type": "halo"}}, "no mixer but DCNv3"),
        ({"post_norm": True}, "stage_norm"),
        ({"head": {"type": "projector", "width": 64}}, "no projector but one of width 1024"),
    ],
)
def test_what_the_official_code_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        config_of_settings(small_settings(**changes), 0)


@pytest.mark.parametrize("weights", ["master", "ema"])
@pytest.mark.parametrize("kind", ["official", "transformers", "detection"])
def test_a_run_goes_out_and_comes_back(internimage_run, tmp_path, kind, weights, capsys):
    from tools.support.trained import open_run

    out = tmp_path / ("folder" if kind == "transformers" else "a.pth")
    task = [] if kind == "detection" else ["--task", "classify"]
    with umask(0o027):
        assert (
            main(
                [
                    "export-internimage",
                    "--run",
                    str(internimage_run),
                    "--out",
                    str(out),
                    "--format",
                    kind,
                    "--weights",
                    weights,
                    *task,
                ]
            )
            == 0
        )
    assert modes(out) == {0o640}
    assert "read back bit for bit" in capsys.readouterr().err
    trained = open_run(internimage_run, weights)
    ours = trained.model.state_dict()
    if kind != "transformers":
        content = torch.load(out, weights_only=True)
        assert list(content) == [{"official": "model", "detection": "state_dict"}[kind]]
    else:
        config = json.loads((out / "config.json").read_text())
        assert config["num_classes"] == 10 and config["layer_scale"] == 0.1
        assert json.loads((out / "preprocessor_config.json").read_text())["do_center_crop"]
    back = tmp_path / "back.safetensors"
    # What it is stands beside it, in config.json or NAME.settings.yaml.
    assert main(["import-internimage", str(out), "--out", str(back)]) == 0
    settings = trained.recipe.model.encoders["image"]
    if kind == "detection":
        settings = settings.model_copy(update={"head": None})
    printed = yaml.safe_load(capsys.readouterr().out)["model"]["encoders"]["image"]
    read = InternImageSettings.model_validate(printed)
    trained_with = {
        "drop_path": settings.drop_path,
        "gradient_checkpointing": settings.gradient_checkpointing,
    }
    assert read.model_copy(update=trained_with) == settings
    found = load_file(back)
    heads = ("objectives.", "encoders.image.conv_head.")
    expected = {n for n in ours if not (kind == "detection" and n.startswith(heads))}
    assert found.keys() == expected
    assert all(torch.equal(found[name], ours[name]) for name in found)


def test_places_that_are_taken(internimage_run, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    for out, kind, message in (
        ("there", "transformers", "is there already"),
        ("a.pt", "official", "must end in .pth"),
    ):
        assert (
            main(
                [
                    "export-internimage",
                    "--run",
                    str(internimage_run),
                    "--out",
                    str(tmp_path / out),
                    "--format",
                    kind,
                ]
            )
            == 1
        )
        assert message in capsys.readouterr().err
    assert (
        main(
            [
                "export-internimage",
                "--run",
                str(internimage_run),
                "--out",
                str(tmp_path / "a.pth"),
                "--encoder",
                "eye",
            ]
        )
        == 1
    )
    assert "InternImages are: image" in capsys.readouterr().err


@pytest.mark.parametrize("out, kind", [("a.pth", "official"), ("folder", "transformers")])
def test_a_full_disk_leaves_nothing_of_an_export(internimage_run, tmp_path, capsys, out, kind):
    with full_disk(after=50_000):
        assert (
            main(
                [
                    "export-internimage",
                    "--run",
                    str(internimage_run),
                    "--out",
                    str(tmp_path / out),
                    "--format",
                    kind,
                ]
            )
            == 1
        )
    said = " ".join(capsys.readouterr().err.split())
    assert f"{tmp_path / out} could not be written; is the disk full?" in said
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing_of_an_import(tmp_path, capsys):
    state, settings, _ = golden_state("t")
    save_file(state, tmp_path / "a.safetensors")
    with full_disk(after=50_000):
        assert (
            main(
                [
                    "import-internimage",
                    str(tmp_path / "a.safetensors"),
                    "--out",
                    str(tmp_path / "b.safetensors"),
                    "--settings",
                    describe(tmp_path, settings),
                ]
            )
            == 1
        )
    assert "b.safetensors could not be written" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "settings.yaml"]
