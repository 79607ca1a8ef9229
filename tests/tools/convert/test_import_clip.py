"""CLIP of others into a recipe: its features before the first step are those of its own model."""

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPVisionModel

from data_pipeline.samples.tokenizer import Tokenizer
from pretrain.build import build_model
from pretrain.models.init import initialise, load_weights
from pretrain.models.vit import VitSettings
from pretrain.recipe.load import load_recipe
from tests.tiny_run import three_tasks, tiny_recipe, write_recipe
from tools.convert.__main__ import main
from tools.convert.formats.clip import task_map, text_map, turned, vision_map


def run(*arguments) -> int:
    return main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def vocabulary(scenes) -> Tokenizer:
    return Tokenizer.load(scenes / "tokenizer")


@pytest.fixture(scope="module")
def clip(vocabulary, tmp_path_factory) -> tuple[CLIPModel, Path]:
    """A model of transformers with weights that tell images apart, and its folder."""
    tower = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 128,
        "hidden_act": "quick_gelu",
    }
    ids = {
        "bos_token_id": vocabulary.bos_id,
        "eos_token_id": vocabulary.eos_id,
        "pad_token_id": vocabulary.pad_id,
    }
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(
            vision_config={**tower, "image_size": 32, "patch_size": 8},
            projection_dim=16,
            text_config={
                **tower,
                "vocab_size": vocabulary.vocab_size,
                "max_position_embeddings": 24,
                **ids,
            },
        )
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        # transformers takes the largest id for the end of a text where the end is number 2, as in
        # this vocabulary: the last word stands for it there.
        words = model.text_model.embeddings.token_embedding.weight
        words[-1] = words[vocabulary.eos_id]
    folder = tmp_path_factory.mktemp("clip")
    model.save_pretrained(folder)
    return model, folder


def built(recipe_path: Path, weights: Path):
    """The model of a recipe as its first step finds it."""
    recipe = load_recipe(recipe_path)
    model = build_model(recipe, Tokenizer.load(recipe.tokenizer.path))
    initialise(model, 0)
    drawn = load_weights(model, weights)
    return model.eval(), drawn


def merged(recipe: dict, printed: dict) -> dict:
    for key, value in printed.items():
        both = isinstance(value, dict) and isinstance(recipe.get(key), dict)
        recipe[key] = merged(recipe[key], value) if both else value
    return recipe


@torch.no_grad()
def test_a_captioner_begins_with_the_features_of_clip(clip, scenes, tmp_path, capsys) -> None:
    model, folder = clip
    out = tmp_path / "clip.safetensors"
    assert run("import", folder, "--only", "encoders.image.*", "--out", out) == 0
    output = capsys.readouterr()
    assert "encoders.text: left out: --only does not name it" in output.err
    printed = yaml.safe_load(output.out)
    assert set(printed) == {"initial_weights", "model"}
    recipe = merged(tiny_recipe(scenes, tmp_path / "run"), printed)
    ours, drawn = built(write_recipe(tmp_path / "recipe.yaml", recipe), out)
    assert drawn and all(name.startswith("objectives.") for name in drawn)
    pixels = torch.randn(8, 3, 32, 32)
    theirs = model.vision_model(pixels)
    tokens = ours.encoders["image"](pixels)
    assert (tokens[:, 0] - theirs.pooler_output).abs().max() < 1e-5
    expected = model.vision_model.post_layernorm(theirs.last_hidden_state)
    assert (tokens - expected).abs().max() < 1e-5


@torch.no_grad()
def test_both_towers_projections_and_temperature(
    clip, scenes, vocabulary, tmp_path, capsys
) -> None:
    model, folder = clip
    out = tmp_path / "clip.safetensors"
    assert run("import", "--out", out, folder) == 0
    recipe = three_tasks(scenes, tmp_path / "run")
    recipe = merged(recipe, yaml.safe_load(capsys.readouterr().out))
    ours, drawn = built(write_recipe(tmp_path / "recipe.yaml", recipe), out)
    assert not any(name.startswith(("encoders.", "objectives.contrast.")) for name in drawn)
    objective = ours.objectives["contrast"]
    assert objective.pool == "class_token"
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    mean, std = (
        torch.tensor(v)[:, None, None] for v in (objective.image_mean, objective.image_std)
    )
    words = torch.randint(10, 200, (4, 9))
    words[:, 0], words[:, 7:] = vocabulary.bos_id, vocabulary.eos_id
    their_words = words.masked_fill(words == vocabulary.eos_id, vocabulary.vocab_size - 1)
    theirs = model(pixel_values=(images / 255 - mean) / std, input_ids=their_words)
    image, text = (
        objective.image_features(ours.encoders, images),
        objective.text_features(ours.encoders, words),
    )
    assert (image - theirs.image_embeds).abs().max() < 1e-5
    assert (text - theirs.text_embeds).abs().max() < 1e-5
    assert objective.temperature().item() == pytest.approx(model.logit_scale.exp().item())


def openai(ours: dict) -> dict:
    """All of our tensors under OpenAI's names."""

    def of(start: str) -> dict:
        return {name: tensor for name, tensor in ours.items() if name.startswith(start)}

    found = vision_map("openai", "image", "visual.").to_theirs(of("encoders.image."))
    found |= text_map("openai", "text").to_theirs(of("encoders.text."))
    found |= task_map("openai", "contrast").to_theirs(of("objectives.contrast."))
    return {name: turned(name, tensor).contiguous() for name, tensor in found.items()}


def test_every_way_of_naming_gives_the_same_tensors(clip, tmp_path) -> None:
    """open_clip's .safetensors and .pt (with objects that are not made), and a vision tower alone,
    with and without the prefix of older releases."""
    model, folder = clip
    out = tmp_path / "out.safetensors"
    assert run("import", folder, "--out", out) == 0
    ours = load_file(out)
    theirs = openai(ours)
    assert theirs["visual.proj"].shape == (32, 16) and theirs["logit_scale"].shape == ()
    plain, trained = tmp_path / "a.safetensors", tmp_path / "epoch_1.pt"
    save_file(theirs, plain)
    wrapped = {
        "epoch": 1,
        "args": Namespace(lr=1e-3),
        "state_dict": {f"module.{name}": tensor for name, tensor in theirs.items()},
    }
    torch.save(wrapped, trained)
    for source in (plain, trained):
        assert run("import", "--from=clip", "--heads", 2, source, "--out", out) == 0
        found = load_file(out)
        assert found.keys() == ours.keys()
        assert all(torch.equal(found[name], ours[name]) for name in ours), source
    vision = {name: t for name, t in ours.items() if name.startswith("encoders.image.")}
    bare, older = tmp_path / "bare", tmp_path / "older"
    CLIPVisionModel(model.config.vision_config).save_pretrained(bare)
    older.mkdir()
    save_file(
        {f"vision_model.{n}": t for n, t in model.vision_model.state_dict().items()},
        older / "model.safetensors",
    )
    save_file(dict(model.vision_model.state_dict()), bare / "model.safetensors")
    (older / "config.json").write_bytes((bare / "config.json").read_bytes())
    for source in (bare, older):
        assert run("import", source, "--out", out) == 0
        found = load_file(out)
        assert found.keys() == vision.keys()
        assert all(torch.equal(found[name], vision[name]) for name in vision), source


def test_positions_are_resized_as_the_encoder_does_it(clip, tmp_path, capsys) -> None:
    _, folder = clip
    out, larger = tmp_path / "out.safetensors", tmp_path / "larger.safetensors"
    assert run("import", folder, "--out", out) == 0
    assert run("import", folder, "--image-size", 48, "--out", larger) == 0
    assert "resized from 32 to 48 pixels" in capsys.readouterr().err
    encoders = []
    for file, size in ((out, 32), (larger, 48)):
        encoder = VitSettings(image_size=size, patch_size=8, width=32, layers=2, heads=2).build()
        state = {
            n.removeprefix("encoders.image."): t
            for n, t in load_file(file).items()
            if n.startswith("encoders.image.")
        }
        encoder.load_state_dict(state)
        encoders.append(encoder.eval())
    pixels = torch.randn(2, 3, 48, 48)
    assert (encoders[0](pixels) - encoders[1](pixels)).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("visual.ln_pre.weight"), "1 tensors are missing (visual.ln_pre.weight)"),
        (
            lambda s: s.update({"visual.attnpool.x": torch.zeros(1)}),
            "1 tensors are unknown (visual.attnpool.x)",
        ),
        (lambda s: [s.pop(n) for n in list(s) if n != "logit_scale"], "none of the formats"),
    ],
)
def test_what_is_no_clip_is_refused_by_name(clip, change, words, tmp_path, capsys) -> None:
    _, folder = clip
    out, broken = tmp_path / "out.safetensors", tmp_path / "broken.safetensors"
    assert run("import", folder, "--out", out) == 0
    theirs = openai(load_file(out))
    change(theirs)
    save_file(theirs, broken)
    out.unlink()
    assert run("import", broken, "--out", out) == 1
    assert words in " ".join(capsys.readouterr().err.split())
    assert not out.exists()


def test_a_transformer_without_the_first_norm_is_refused(tmp_path, capsys) -> None:
    names = {
        "cls_token": (1, 1, 8),
        "pos_embed": (1, 5, 8),
        "blocks.0.norm1.weight": (8,),
        "mask_token": (1, 1, 8),
        "decoder_pred.weight": (3, 3),
    }
    save_file({n: torch.zeros(s) for n, s in names.items()}, tmp_path / "mae.safetensors")
    assert run("import", tmp_path / "mae.safetensors", "--out", tmp_path / "o.safetensors") == 1
    assert "without norm_pre" in capsys.readouterr().err


def test_settings_that_ours_has_not_are_refused(clip, tmp_path, capsys) -> None:
    _, folder = clip
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for key, value in (("hidden_act", "relu"), ("layer_norm_eps", 1e-6)):
        changed = {**config, "vision_config": {**config["vision_config"], key: value}}
        (copy / "config.json").write_text(json.dumps(changed), encoding="utf-8")
        assert run("import", copy, "--out", tmp_path / "o.safetensors") == 1
        assert f"its {key} is {value}" in " ".join(capsys.readouterr().err.split())


def test_torchscript_is_code_and_is_not_opened(tmp_path, capsys, monkeypatch) -> None:
    file = tmp_path / "ViT-B-32.pt"
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(file))
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("opened"))
    assert run("import", file, "--out", tmp_path / "o.safetensors") == 1
    assert "is a TorchScript archive" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("architecture", "activation"),
    [
        ("vit_base_patch16_clip_224", "gelu"),
        ("vit_base_patch16_clip_quickgelu_224", "quick_gelu"),
    ],
)
def test_the_name_of_a_model_of_timm_tells_its_activation(
    clip, architecture, activation, tmp_path, capsys
) -> None:
    """Weights do not, and the wrong one would be off without a word."""
    _, folder = clip
    whole, theirs = tmp_path / "whole.safetensors", tmp_path / "timm"
    assert run("import", folder, "--out", whole) == 0
    ours = {n: t for n, t in load_file(whole).items() if n.startswith("encoders.image.")}
    names = vision_map("timm", "image").to_theirs(ours)
    theirs.mkdir()
    save_file(
        {n: turned(n, t).contiguous() for n, t in names.items()}, theirs / "model.safetensors"
    )
    (theirs / "config.json").write_text(json.dumps({"architecture": architecture}))
    capsys.readouterr()
    assert run("import", theirs, "--heads", 2, "--out", tmp_path / "back.safetensors") == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["encoders"]["image"]["activation"] == activation
    back = load_file(tmp_path / "back.safetensors")
    assert all(torch.equal(back[name], tensor) for name, tensor in ours.items())
