"""One verb out: what a run is for timm, open_clip, transformers' CLIP and UniFormerV2."""

import importlib.util
import io
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoProcessor, CLIPModel, CLIPVisionModel

from tests.tiny_run import three_tasks, write_recipe
from tests.tools.conftest import train
from tools.convert.__main__ import main
from tools.convert.arguments import EXPORTS
from tools.convert.formats.listing import FORMATS
from tools.support.trained import open_run


def run(*arguments) -> int:
    return main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def three(scenes, tmp_path_factory) -> Path:
    """A run of captioning, classification and contrast on one encoder."""
    folder = tmp_path_factory.mktemp("three")
    recipe = three_tasks(
        scenes,
        folder / "run",
        steps=6,
        optimizer__lr=2e-2,
        tasks__contrast__objective__pool="class_token",
    )
    train(write_recipe(folder / "recipe.yaml", recipe), folder / "logs")
    return folder / "run"


@pytest.fixture(scope="module")
def exported(three, tmp_path_factory):
    """Format, options -> the folder or file; each is written once."""
    folder, done = tmp_path_factory.mktemp("exported"), {}

    def get(form: str, *options: str) -> Path:
        key = (form, *options)
        if key not in done:
            out = folder / str(len(done))
            assert run("export", "--run", three, "--to", form, "--out", out, *options) == 0
            done[key] = out
        return done[key]

    return get


@pytest.fixture(scope="module")
def model(three):
    return open_run(three).model


def record(folder: Path) -> dict:
    return json.loads((folder / "omnipretrain.json").read_text(encoding="utf-8"))


def inputs(model, task: str):
    objective = model.objectives[task]
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    mean, std = (
        torch.tensor(v)[:, None, None] for v in (objective.image_mean, objective.image_std)
    )
    return objective, images, (images / 255 - mean) / std


@torch.no_grad()
def test_transformers_loads_both_towers_of_a_contrastive_task(exported, model, three) -> None:
    folder = exported("transformers", "--task", "contrast")
    twin = CLIPModel.from_pretrained(folder).eval()
    objective, images, pixels = inputs(model, "contrast")
    processor = AutoProcessor.from_pretrained(folder)
    tokenizer = open_run(three).tokenizer
    texts = ["a red two", "three", "a green seven above a blue one"]
    tokens = processor(text=texts, return_tensors="pt", padding=True)
    rows = [[tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id] for text in texts]
    longest = max(map(len, rows))
    ours = torch.tensor([row + [tokenizer.pad_id] * (longest - len(row)) for row in rows])
    out = twin(pixel_values=pixels, **tokens)
    assert (out.image_embeds - objective.image_features(model.encoders, images)).abs().max() < 1e-5
    assert (out.text_embeds - objective.text_features(model.encoders, ours)).abs().max() < 1e-5
    assert twin.logit_scale.exp().item() == pytest.approx(objective.temperature().item(), rel=1e-5)


@torch.no_grad()
def test_transformers_loads_the_encoder_alone(exported, model) -> None:
    folder = exported("transformers", "--encoder", "image")
    twin = CLIPVisionModel.from_pretrained(folder).eval()
    picture = Image.effect_noise((32, 32), 80).convert("RGB")
    pixels = AutoImageProcessor.from_pretrained(folder)(picture, return_tensors="pt").pixel_values
    ours = model.encoders["image"](pixels)[:, 0]
    assert (twin(pixels).pooler_output - ours).abs().max() < 1e-5
    left = record(folder)["left_out"]
    assert set(left) == {"encoders.text", *(f"objectives.{t}" for t in model.objectives)}


def test_a_head_goes_along_unless_it_is_left_out(exported, model, capsys) -> None:
    folder = exported("timm")
    assert load_file(folder / "model.safetensors")["head.weight"].shape == (10, 32)
    assert set(record(folder)["verification"]["differences"]) == {"class scores", "tokens"}
    bare = exported("timm", "--no-head")
    assert "head.weight" not in load_file(bare / "model.safetensors")
    assert record(bare)["left_out"]["objectives.classify"] == "--no-head"
    assert "left out: objectives.classify: --no-head" in capsys.readouterr().err


def test_every_export_was_read_back(exported) -> None:
    for options in (
        ("timm",),
        ("clip",),
        ("transformers", "--task", "contrast"),
        ("transformers", "--encoder", "image"),
    ):
        verification = record(exported(*options))["verification"]
        assert verification["passed"], options
        assert 0 <= max(verification["differences"].values()) < 1e-5, (options, verification)


@pytest.mark.parametrize(
    ("options", "left"),
    [
        (("timm",), "objectives."),
        (("clip",), "objectives.ca"),
        (("transformers", "--encoder", "image"), "objectives."),
        (("transformers", "--task", "contrast"), "objectives.ca"),
    ],
)
def test_what_went_out_comes_back(exported, three, options, left, tmp_path, capsys) -> None:
    """Bit for bit, with the settings of the encoder (heads of 16 channels are not the usual ones);
    the scale went through exp and log, and a vocabulary may have a row more."""
    out = tmp_path / "back.safetensors"
    assert run("import", exported(*options), "--out", out) == 0
    printed = yaml.safe_load(capsys.readouterr().out)["model"]["encoders"]
    taken = open_run(three)
    for name, settings in printed.items():
        ours = taken.recipe.model.encoders[name]
        assert type(ours)(**settings) == ours, name
    parameters, back = dict(taken.model.named_parameters()), load_file(out)
    assert {n for n in parameters if n.startswith("encoders.image.")} <= set(back)
    for name, tensor in back.items():
        assert not name.startswith(left)
        expected = parameters[name]
        if name.endswith("log_scale"):
            assert tensor.item() == pytest.approx(expected.item(), rel=1e-6)
        else:
            assert torch.equal(tensor[: len(expected)], expected), name


def test_uniformerv2_by_its_loader_reimplemented(exported, model) -> None:
    """Its loader asks its model for each name of the file; a table of another size stops it."""
    file = exported("uniformerv2", "--image-size", "48")
    state = torch.load(file, weights_only=True)
    block = [
        "attn.in_proj_weight",
        "attn.in_proj_bias",
        *(
            f"{part}.{p}"
            for part in ("attn.out_proj", "ln_1", "mlp.c_fc", "mlp.c_proj", "ln_2")
            for p in ("weight", "bias")
        ),
    ]
    theirs = {
        "class_embedding",
        "positional_embedding",
        "conv1.weight",
        "ln_pre.weight",
        "ln_pre.bias",
        *(f"transformer.resblocks.{b}.{n}" for b in (0, 1) for n in block),
    }
    assert set(state) == theirs
    assert state["positional_embedding"].shape == (37, 32)
    # 2-D to 3-D: the kernel at the middle frame sees a still clip as the image.
    kernel, clip = state["conv1.weight"], torch.randn(1, 3, 1, 48, 48).expand(-1, -1, 3, -1, -1)
    inflated = torch.zeros(32, 3, 3, 8, 8)
    inflated[:, :, 1] = kernel
    patches = torch.nn.functional.conv3d(clip, inflated, stride=(1, 8, 8))[:, :, 0]
    expected = model.encoders["image"].embedding.patches(clip[:, :, 0])
    assert (patches - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    "options",
    [
        ("transformers", "--task", "contrast"),
        ("transformers", "--encoder", "image"),
    ],
)
def test_the_readme_has_a_head_and_a_snippet_that_runs(exported, options, monkeypatch) -> None:
    folder = exported(*options)
    text = (folder / "README.md").read_text(encoding="utf-8")
    _, head, body = text.split("---\n", 2)
    head = yaml.safe_load(head)
    assert head["library_name"] == "transformers" and "omnipretrain" in head["tags"]
    assert head["license"] and head["pipeline_tag"]
    assert "step 6" in body and "contrast (evaluation, step 6)" in body and "train" in body
    (snippet,) = re.findall(r"^```python\n(.*?)^```$", body, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(folder)
    names: dict = {}
    exec(snippet, names)
    assert names["model"] is not None


def test_the_list_says_why_not(three, internimage_run, capsys) -> None:
    assert run("export", "--run", three, "--list") == 0
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().err.splitlines())
    assert tuple(lines) == EXPORTS == tuple(one.name for one in FORMATS)
    assert lines["mmdet"].startswith("not of this run: no encoder is a internimage")
    assert not lines["timm"].startswith("not of")
    assert run("export", "--run", internimage_run, "--list") == 0
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().err.splitlines())
    assert "model.encoders.image.type is internimage" in lines["timm"]
    assert "tasks.classify.objective.type is classification" in lines["clip"]


def test_the_old_commands_are_the_same_code(internimage_run, tmp_path) -> None:
    """And the head of the one classification goes along."""
    new, old = tmp_path / "new.pth", tmp_path / "old.pth"
    assert run("export", "--run", internimage_run, "--to", "internimage", "--out", new) == 0
    assert (
        run("export-internimage", "--run", internimage_run, "--task", "classify", "--out", old) == 0
    )
    ours, theirs = (torch.load(f, weights_only=True)["model"] for f in (new, old))
    assert list(ours) == list(theirs) and "head.weight" in ours
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_torch_loads_a_distributed_checkpoint(internimage_run, tmp_path, capsys) -> None:
    out = tmp_path / "dcp"
    words = ("export", "--run", internimage_run, "--to", "dcp", "--weights", "ema", "--out", out)
    assert run(*words) == 0
    expected = dict(open_run(internimage_run, "ema").model.named_parameters())
    state = {"model": {name: torch.zeros_like(one) for name, one in expected.items()}}
    dcp.load(state, checkpoint_id=out, no_dist=True)
    assert all(torch.equal(state["model"][name], one) for name, one in expected.items())
    assert [path.name for path in tmp_path.iterdir()] == ["dcp"]
    assert run(*words) == 1 and "is there already" in capsys.readouterr().err


def test_bevformer_by_its_loading_rules_reimplemented(internimage_run, tmp_path) -> None:
    """mmcv takes `state_dict` and fills a detector whose image backbone is `img_backbone`."""
    out = tmp_path / "bev.pth"
    assert run("export", "--run", internimage_run, "--to", "bevformer", "--out", out) == 0
    state = torch.load(out, weights_only=True)["state_dict"]
    assert all(n.startswith(("img_backbone.patch_embed.", "img_backbone.levels.")) for n in state)
    encoder = open_run(internimage_run).model.encoders["image"].state_dict()
    backbone = {n: t for n, t in encoder.items() if n.startswith(("patch_embed.", "levels."))}
    assert {n.removeprefix("img_backbone.") for n in state} == set(backbone)
    assert all(torch.equal(state[f"img_backbone.{n}"], t) for n, t in backbone.items())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--to", "transformers", "--task", "nothing"), "nothing"),
        (("--to", "mmdet"), "model.encoders.image.type is vit"),
        (("--to", "timm", "--encoder", "text"), "model.encoders.text.type is text, not vit"),
        (("--to", "timm", "--task", "contrast"), "no classification task"),
        (("--to", "timm", "--task", "classify", "--no-head"), "give one of them"),
        (("--to", "safetensors", "--task", "classify"), "--task means nothing to it"),
        (("--to", "clip", "--no-head"), "--no-head means nothing to it"),
        (("--to", "transformers", "--no-head"), "--no-head means nothing to it"),
        (("--to", "transformers", "--weights", "target"), "take master or ema"),
        (("--to", "transformers", "--task", "classify"), "give --encoder image in its place"),
    ],
)
def test_what_cannot_be_is_told_before_the_checkpoint_is_read(
    three, options, words, monkeypatch, tmp_path, capsys
) -> None:
    monkeypatch.setattr("tools.convert.export_vit.open_run", lambda *_: pytest.fail("read"))
    assert run("export", "--run", three, "--out", tmp_path / "x", *options) == 1
    assert words in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "x").exists()


# ---- the consumers' own code, where an environment has it ----------------------------------------

needs_timm = pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None or importlib.util.find_spec("timm") is None,
    reason="timm and open_clip need torchvision, which breaks other tests: an environment of its "
    "own has them",
)


@needs_timm
@torch.no_grad()
def test_timm_loads_the_folder(exported, model) -> None:
    import timm

    twin = timm.create_model(f"local-dir:{exported('timm')}", pretrained=True).eval()
    objective, _, pixels = inputs(model, "classify")
    tokens = model.encoders["image"](pixels)
    assert (twin(pixels) - objective.head(tokens.mean(dim=1))).abs().max() < 1e-5
    assert (twin.forward_features(pixels) - tokens).abs().max() < 1e-5
    bare = timm.create_model(f"local-dir:{exported('timm', '--no-head')}", pretrained=True).eval()
    assert (bare(pixels) - tokens[:, 0]).abs().max() < 1e-5


@needs_timm
@torch.no_grad()
def test_open_clip_loads_the_folder(exported, model, three) -> None:
    import open_clip

    folder = f"local-dir:{exported('clip')}"
    twin, *_ = open_clip.create_model_and_transforms(folder)
    twin.eval()
    objective, images, pixels = inputs(model, "contrast")
    texts = ["a red two", "three"]
    tokens = open_clip.get_tokenizer(folder)(texts)
    tokenizer = open_run(three).tokenizer
    ours = [[tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id] for text in texts]
    assert [row[: len(one)].tolist() for row, one in zip(tokens, ours, strict=True)] == ours
    image = twin.encode_image(pixels, normalize=True)
    text = twin.encode_text(tokens, normalize=True)
    assert (image - objective.image_features(model.encoders, images)).abs().max() < 1e-5
    assert (text - objective.text_features(model.encoders, tokens)).abs().max() < 1e-5
    assert twin.logit_scale.exp().item() == pytest.approx(objective.temperature().item(), rel=1e-5)


DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
WORDS = ("--metrics", "zeroshot,retrieval", "--caption-source", "json:captions", "--workers", "0")


def judged(source: Path, scenes: Path, folder: Path) -> dict:
    """Zero-shot accuracy and retrieval on the training scenes."""
    from tools.evaluate import main as evaluate

    prompts = folder / "prompts.yaml"
    prompts.write_text(
        f"classes: {DIGITS}\ntemplates: ['a {{}}.', 'a red {{}}']\n", encoding="utf-8"
    )
    out = folder / f"{source.name}.json"
    words = [source, *WORDS, "--prompts", prompts, "--shards", scenes / "train", "--json", out]
    words += ["--task", "contrast", "--max-samples", 40]
    assert evaluate([str(word) for word in words]) == 0
    return json.loads(out.read_text(encoding="utf-8"))["metrics"]


def test_an_export_is_judged_like_its_run(exported, three, scenes, tmp_path) -> None:
    of_run = judged(three, scenes, tmp_path)
    of_folder = judged(exported("transformers", "--task", "contrast"), scenes, tmp_path)
    assert of_run["images"] == 40 < of_run["texts"] and 0 < of_run["text_to_image_r10"] < 1
    assert of_run == of_folder


@needs_timm
@torch.no_grad()
def test_zero_shot_and_retrieval_are_those_of_open_clip(exported, scenes, tmp_path) -> None:
    """Its own model, transforms and tokenizer; to one image in 1,000."""
    import open_clip

    from data_pipeline.reading.reader import SampleReader
    from data_pipeline.shards.shard_set import ShardSet

    ours = judged(exported("transformers", "--task", "contrast"), scenes, tmp_path)
    folder = f"local-dir:{exported('clip')}"
    net, _, prepare = open_clip.create_model_and_transforms(folder)
    net.eval()
    tokenizer = open_clip.get_tokenizer(folder)
    reader = SampleReader(ShardSet.open(str(scenes / "train")))
    rows = [n * 60 // 40 for n in range(40)]
    members = [reader.read(row).members for row in rows]
    pixels = torch.stack([prepare(Image.open(io.BytesIO(one["jpg"]))) for one in members])
    images = net.encode_image(pixels, normalize=True)
    classes = [
        net.encode_text(tokenizer([f"a {name}.", f"a red {name}"]), normalize=True).mean(0)
        for name in DIGITS
    ]
    said = (images @ torch.nn.functional.normalize(torch.stack(classes), dim=1).T).argmax(1)
    known = [n for n, one in enumerate(members) if "cls" in one]
    right = sum(int(said[n]) == int(members[n]["cls"]) for n in known)
    assert ours["zeroshot_top1"] == pytest.approx(right / len(known), abs=1e-3)
    texts = [(n, c) for n, one in enumerate(members) for c in json.loads(one["json"])["captions"]]
    vectors = net.encode_text(tokenizer([text for _, text in texts]), normalize=True)
    owners: dict[str, set[int]] = {}
    for n, text in texts:
        owners.setdefault(text, set()).add(n)
    hits = [
        owners[text] & set((vectors[m] @ images.T).topk(10).indices.tolist()) != set()
        for m, (_, text) in enumerate(texts)
    ]
    assert ours["text_to_image_r10"] == pytest.approx(np.mean(hits), abs=1e-3)


def test_a_finished_run_exports_itself(run_dir, caplog):
    """By the formats of its recipe; one that cannot be is said, and the run is whole."""
    from typing import get_args

    from pretrain.exports import export_finished
    from pretrain.recipe.load import load_resolved
    from pretrain.recipe.recipe import Exported

    assert get_args(Exported) == EXPORTS
    recipe = load_resolved(run_dir / "recipe.yaml")
    recipe = recipe.model_copy(update={"export": ("safetensors", "mmdet"), "run_dir": str(run_dir)})
    heartbeat = run_dir / "control" / "heartbeat"
    os.utime(heartbeat, (1, 1))
    (run_dir / "exports").write_text("in the way", encoding="utf-8")
    with caplog.at_level("INFO"):
        export_finished(recipe)  # an error of the disk is said, and is none of the run
        assert "no export to safetensors" in caplog.text and "exports" in caplog.text
        (run_dir / "exports").unlink()
        export_finished(recipe)
        assert heartbeat.stat().st_mtime > 1  # a supervisor sees that it works
        export_finished(recipe)
    out = run_dir / "exports" / "step_000000024" / "safetensors.safetensors"
    assert any(name.startswith("encoders.image.") for name in load_file(out))
    assert "model.encoders.image.type is vit" in caplog.text
    assert caplog.text.count("exported:") == 1 and list(out.parent.iterdir()) == [out]
    caplog.clear()
    (run_dir / "control" / "status.json").rename(run_dir / "status.kept")
    try:  # a run that was stopped hands nothing on
        out.unlink()
        export_finished(recipe)
        assert caplog.text == "" and not out.exists()
    finally:
        (run_dir / "status.kept").rename(run_dir / "control" / "status.json")
