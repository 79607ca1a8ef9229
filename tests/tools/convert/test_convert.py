"""Export to transformers and import of others' weights, by their command line."""

import json
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer, GitForCausalLM

import tools.convert.export_git
from data_pipeline.samples.tokenizer import Tokenizer
from pretrain.engine.checkpoint.files import newest_whole, read_full_state
from pretrain.models.git.decoder import GitDecoderSettings
from pretrain.models.git.weights import export_git, import_git
from pretrain.models.init import load_weights
from pretrain.models.vit import VitSettings
from pretrain.recipe.load import load_resolved
from tests.pretrain.models.git.git_models import GOLDENS, Golden, Words, build
from tests.tiny_run import tiny_recipe
from tests.tools.conftest import make_run, train
from tests.umask import modes, umask
from tools.convert.__main__ import main
from tools.convert.record import ExportRecord
from tools.support.trained import open_captioner


def run(*arguments) -> int:
    return main([str(argument) for argument in arguments])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- export ------------------------------------------------------------------------------------


def test_transformers_loads_the_folder_without_code_of_ours(export, run_dir) -> None:
    names = set(contents(export))
    assert names == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "omnipretrain.json",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert list(export.parent.iterdir()) == [export]  # nothing temporary stays
    processor = AutoProcessor.from_pretrained(export)
    assert type(processor).__name__ == "GitProcessor"
    assert AutoImageProcessor.from_pretrained(export).crop_size["height"] == 32
    model = GitForCausalLM.from_pretrained(export).eval()
    tokenizer = Tokenizer.load(run_dir / "tokenizer")
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_id
    assert model.generation_config.max_new_tokens == 8
    ids = [tokenizer.bos_id, *tokenizer.encode("a red two"), tokenizer.eos_id]
    assert processor(text="a red two").input_ids == ids
    assert processor.tokenizer.cls_token_id == tokenizer.bos_id
    # A caption begins with its first word, however it is decoded.
    for text in ("a red two", "two"):
        ids_of = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
        decoded = processor.batch_decode([ids_of, ids_of[1:-1]], skip_special_tokens=True)
        assert decoded == [text, text]
    # Ours reads it as well, and gives the ids of training.
    assert Tokenizer.load(export).encode("a red two") == ids[1:-1]


def test_the_record_says_where_the_export_came_from(export, run_dir) -> None:
    record = ExportRecord.read(export)
    assert (record.recipe, record.step, record.task) == ("tiny", 24, "caption")
    assert record.image.size == 32 and record.image.mode == "center_crop"
    assert record.verification.passed
    differences = record.verification.differences
    assert set(differences) == {
        "random images and captions",
        "generation on random images",
        "held-out images and captions",
        "generation on held-out images",
    }
    assert 0 < max(differences.values()) < 1e-4
    # The scenes have their final size, so that no resizing comes between.
    assert record.verification.preprocessing["largest"] < 1e-3


def test_round_trip_is_bitwise(export, run_dir, tmp_path, capsys) -> None:
    out = tmp_path / "back.safetensors"
    assert run("import", "--encoder", "image", export, "--out", out) == 0  # sees that it is GIT
    weights = read_full_state(newest_whole(run_dir / "checkpoints"))
    expected = {
        name: tensor
        for name, tensor in weights.items()
        if name.startswith(("encoders.image.", "objectives.caption.decoder."))
    }
    del expected["objectives.caption.decoder.output.weight"]  # tied
    found = load_file(out)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    recipe = load_resolved(run_dir / "recipe.yaml")
    settings = yaml.safe_load(capsys.readouterr().out)
    assert VitSettings(**settings["model"]["encoders"]["image"]) == recipe.model.encoders["image"]
    decoder = recipe.tasks["caption"].objective.decoder
    printed = GitDecoderSettings(**settings["tasks"]["caption"]["objective"]["decoder"])
    assert printed == decoder.model_copy(update={"embedding_norm_eps": 1e-12})
    assert settings["initial_weights"] == str(out)
    assert settings["tokenizer"] == {"path": str(export)}


def test_the_moving_average_is_exported_on_request(export, run_dir, tmp_path) -> None:
    out = tmp_path / "averaged"
    with umask(0o027):  # others of the group may read it, and nobody else
        assert run("export-git", "--run", run_dir, "--weights", "ema", "--out", out) == 0
    assert modes(out) == {0o640} and out.stat().st_mode & 0o777 == 0o750
    assert ExportRecord.read(out).weights == "ema"
    assert ExportRecord.read(export).weights == "master"
    assert "step 24, averaged weights" in (out / "README.md").read_text()
    back = tmp_path / "back.safetensors"
    with umask(0o027):
        assert run("import-git", out, "--out", back) == 0
    assert modes(back) == {0o640}
    checkpoint = newest_whole(run_dir / "checkpoints")
    average, trained = read_full_state(checkpoint, "ema"), read_full_state(checkpoint)
    for name, tensor in load_file(back).items():
        assert torch.equal(tensor, average[name]), name
    assert not torch.equal(
        average["encoders.image.norm_after.weight"], trained["encoders.image.norm_after.weight"]
    )


def test_a_checkpoint_is_as_open_to_others_as_what_lies_around_it(run_dir, tmp_path) -> None:
    (tmp_path / "any").write_bytes(b"")
    assert modes(newest_whole(run_dir / "checkpoints")) == modes(tmp_path / "any")


def test_an_untied_model_for_larger_images_than_its_table(scenes, tmp_path, capsys) -> None:
    """Images of 40 pixels on a position table for 32; from an older checkpoint's folder."""
    made = make_run(
        tmp_path,
        scenes,
        tasks__caption__objective__decoder__tied_output=False,
        tasks__caption__evaluation={
            "shards": [str(scenes / "heldout")],
            "image": {"size": 40, "mode": "center_crop"},
        },
    )
    out, back = tmp_path / "large", tmp_path / "large.safetensors"
    checkpoint = made / "checkpoints" / "step_000000012"
    assert run("export-git", "--run", checkpoint, "--out", out) == 0
    record = ExportRecord.read(out)
    assert record.step == 12 and record.verification.passed
    assert any("position table is resized" in note for note in record.notes)
    assert record.verification.preprocessing["largest"] > 1  # two bicubic filters, two results
    config = json.loads((out / "config.json").read_text())
    assert config["vision_config"]["image_size"] == 40 and not config["tie_word_embeddings"]
    capsys.readouterr()
    assert run("import-git", out, "--out", back) == 0
    assert yaml.safe_load(capsys.readouterr().out)["model"]["encoders"]["image"]["image_size"] == 40
    found, ours = load_file(back), open_captioner(checkpoint).weights()
    name = "objectives.caption.decoder.output.weight"
    assert torch.equal(found[name], ours[name])


def test_an_earlier_export_is_replaced_and_nothing_else(export, run_dir, tmp_path, capsys) -> None:
    arguments = ("export-git", "--run", run_dir, "--out")
    out = tmp_path / "out"
    shutil.copytree(export, out)
    (out / "captions.png").write_bytes(b"of the old model")
    assert run(*arguments, out) == 0
    assert contents(out) == contents(export)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("all of it")
    assert run(*arguments, mine) == 1
    assert "choose another --out" in capsys.readouterr().err
    assert contents(mine) == {"thesis.txt": b"all of it"}
    assert run(*arguments, mine / "thesis.txt") == 1
    assert "is a file" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "out"]


def test_an_export_with_other_scores_is_kept_but_not_verified(
    run_dir, tmp_path, monkeypatch, capsys
) -> None:
    honest = tools.convert.export_git.transformers_model

    def wrong(*arguments):
        model = honest(*arguments)
        with torch.no_grad():
            model.git.encoder.layer[1].output.dense.weight[0, 0] += 0.1
        return model

    monkeypatch.setattr(tools.convert.export_git, "transformers_model", wrong)
    out = tmp_path / "wrong"
    assert run("export-git", "--run", run_dir, "--out", out) == 1
    assert "NOT VERIFIED" in capsys.readouterr().err
    assert not ExportRecord.read(out).verification.passed


def test_without_heldout_data_random_images_do(run_dir, tmp_path, capsys) -> None:
    moved = tmp_path / "run"
    shutil.copytree(run_dir, moved)
    for path in moved.glob("checkpoints/step_*/recipe.yaml"):
        path.write_text(path.read_text().replace("/heldout", "/gone"))
        _forget(path)
    out = tmp_path / "out"
    assert run("export-git", "--run", moved, "--out", out) == 0
    assert "verified on random images only" in capsys.readouterr().err
    assert len(ExportRecord.read(out).verification.differences) == 2


def _forget(path: Path) -> None:
    """Take a file out of its checkpoint's manifest, as if it had always been what it is now."""
    from pretrain.engine.checkpoint.files import MANIFEST, read_manifest, seal_manifest

    manifest = read_manifest(path.parent)
    manifest["files"].pop(path.name, None)
    (path.parent / MANIFEST).write_bytes(seal_manifest(manifest))


def test_errors_name_what_to_do(run_dir, internimage_run, tmp_path, capsys) -> None:
    out = tmp_path / "out"

    def complaint(*arguments) -> str:
        assert run("export-git", "--out", out, *arguments) == 1
        assert list(tmp_path.iterdir()) == []
        return capsys.readouterr().err

    text = complaint("--run", run_dir, "--task", "classify")
    assert "'classify' is not among them" in text
    assert main(["export-git", "--run", str(internimage_run), "--out", str(out)]) == 1
    said = capsys.readouterr().err
    assert "no captioning task" in said and "it has classify (classification)" in said
    assert "--task" not in said
    assert "neither a run directory" in complaint("--run", tmp_path)
    text = complaint("--run", run_dir, "--image-size", "33")
    assert "no multiple of patch_size 8" in text and "--image-size 32" in text


def test_a_damaged_checkpoint_is_not_exported(run_dir, tmp_path, capsys) -> None:
    moved = tmp_path / "run"
    shutil.copytree(run_dir, moved)
    tensors = newest_whole(moved / "checkpoints") / "rank_00000.safetensors"
    data = bytearray(tensors.read_bytes())
    data[-1] ^= 1
    tensors.write_bytes(data)
    assert run("export-git", "--run", moved, "--out", tmp_path / "o") == 1
    assert "is damaged" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


# ---- import ------------------------------------------------------------------------------------


def test_a_released_file_of_the_original_repository(tmp_path, capsys) -> None:
    golden = Golden.load("git_orig_caption")
    state = {f"module.{name}": tensor for name, tensor in golden.part("w").items()}
    source, out = tmp_path / "model.pt", tmp_path / "git.safetensors"
    torch.save({"model": state, "iteration": 7}, source)
    names = ("--encoder", "eye", "--task", "say")
    heads = ("--encoder-heads", 4, "--decoder-heads", 4)
    assert run("import-git", source, "--out", out, *names, *heads) == 0
    settings = yaml.safe_load(capsys.readouterr().out)
    vit = VitSettings(**settings["model"]["encoders"]["eye"])
    decoder = GitDecoderSettings(**settings["tasks"]["say"]["objective"]["decoder"])
    assert (vit.image_size, vit.patch_size, vit.width, vit.layers) == (32, 8, 64, 2)
    assert (decoder.layers, decoder.mlp_width, decoder.max_positions) == (3, 96, 64)
    assert decoder.tied_output and decoder.embedding_norm_eps == 1e-8
    assert "tokenizer" not in settings
    # The model that the settings describe takes the file, and gives the reference's scores.
    assert run("import-git", source, "--out", out, *heads) == 0
    model = build(vit, decoder.model_copy(update={"dropout": 0.0}), Words())
    assert load_weights(model, out) == []
    reference = golden.model(label_smoothing=0.1)
    for name, parameter in reference.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name
    assert load_file(out).keys() == import_git(golden.part("w")).keys()


@pytest.mark.parametrize("name", ["git_caption", "git_caption_untied"])
def test_a_folder_of_transformers(name: str, tmp_path, capsys) -> None:
    golden = Golden.load(name)
    config = golden.info["config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = golden.part("w")
    halves = [dict(list(weights.items())[:40]), dict(list(weights.items())[40:])]
    places = {}
    for number, half in enumerate(halves):
        save_file(half, tmp_path / f"part{number}.safetensors")
        places |= {key: f"part{number}.safetensors" for key in half}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    assert run("import-git", tmp_path, "--out", tmp_path / "o.safetensors") == 0
    out, err = capsys.readouterr()
    assert "assumed" not in err
    settings = yaml.safe_load(out)
    assert settings["model"]["encoders"]["image"]["heads"] == 4
    decoder = settings["tasks"]["caption"]["objective"]["decoder"]
    assert decoder["tied_output"] == config["tie_word_embeddings"]
    assert decoder["embedding_norm_eps"] == 1e-12
    found, expected = load_file(tmp_path / "o.safetensors"), import_git(weights)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_what_cannot_be_imported(tmp_path, capsys) -> None:
    out = tmp_path / "o.safetensors"

    def complaint(source, *more) -> str:
        assert run("import-git", source, "--out", out, *more) == 1
        assert not out.exists()
        return capsys.readouterr().err

    assert "does not exist" in complaint(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    assert "give the weight file itself" in complaint(tmp_path / "empty")
    golden = GOLDENS / "git_orig_caption.safetensors"
    assert "not weights of GIT" in complaint(golden)  # holds inputs too, all under prefixes
    weights = tmp_path / "orig.safetensors"
    save_file(Golden.load("git_orig_caption").part("w"), weights)
    assert "--format transformers" in complaint(weights, "--format", "transformers")
    assert "--decoder-heads" in complaint(weights)  # 48 channels
    rest = Golden.load("git_orig_caption").part("w")
    del rest["textual.output.bias"]
    save_file(rest, tmp_path / "part.safetensors")
    assert "1 tensors are missing" in complaint(tmp_path / "part.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(weights.read_bytes()[:100])
    assert "damaged" in complaint(tmp_path / "cut.safetensors")
    (tmp_path / "empty" / "model.safetensors.index.json").write_text('{"weights": {}}')
    assert "no index of a transformers folder" in complaint(tmp_path / "empty")
    torch.save([1, 2], tmp_path / "list.pt")
    assert "no state dict" in complaint(tmp_path / "list.pt")
    assert run("import-git", weights, "--out", tmp_path / "o.bin", "--decoder-heads", 4) == 1
    assert "must end in .safetensors" in capsys.readouterr().err


def test_other_activations_are_refused(tmp_path, capsys) -> None:
    golden = Golden.load("git_caption")
    save_file(golden.part("w"), tmp_path / "model.safetensors")
    for changes, text in (
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"layer_norm_eps": 1e-5}, "layer_norm_eps is 1e-05"),
        ({"num_image_with_embedding": 6}, "num_image_with_embedding is 6"),
    ):
        config = golden.info["config"] | changes
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert run("import-git", tmp_path, "--out", tmp_path / "o.safetensors") == 1
        assert text in capsys.readouterr().err


@pytest.mark.parametrize("name", ["git_video3", "git_orig_video3"])
def test_models_of_clips_are_read(name, tmp_path, capsys) -> None:
    golden = Golden.load(name)
    save_file(golden.part("w"), tmp_path / "model.safetensors")
    heads = ("--encoder-heads", 4, "--decoder-heads", 4)
    out = tmp_path / "o.safetensors"
    assert run("import-git", tmp_path, "--out", out, *heads) == 0
    task = yaml.safe_load(capsys.readouterr().out)["tasks"]["caption"]
    assert task["objective"]["decoder"]["frames"] == task["data"]["frames"] == 3
    assert load_file(out)["objectives.caption.decoder.temporal.vectors"].shape[0] == 3


def test_models_of_clips_are_not_written_as_a_folder(tmp_path) -> None:
    captioner = SimpleNamespace(
        vit=VitSettings(image_size=16, patch_size=8, width=32, layers=1, heads=4),
        decoder=GitDecoderSettings(frames=6),
        task_name="caption",
    )
    with pytest.raises(ValueError, match=r"tasks\.caption\.objective\.decoder\.frames=6: "):
        tools.convert.export_git.write_git(captioner, tmp_path, None)
    assert not list(tmp_path.iterdir())


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_code_in_a_weight_file_does_not_run(tmp_path, capsys) -> None:
    source, mark = tmp_path / "model.bin", tmp_path / "ran"
    torch.save({"model": {"textual.output.bias": Bomb(mark)}}, source)
    assert run("import-git", source, "--out", tmp_path / "o.safetensors") == 1
    message = capsys.readouterr().err
    assert "could run code" in message and "weights_only" not in message
    source.write_bytes(pickle.dumps(Bomb(mark), protocol=2))
    assert run("import-git", source, "--out", tmp_path / "o.safetensors") == 1
    assert not mark.exists()


def test_imported_weights_start_a_run(export, scenes, tmp_path, capsys) -> None:
    """Export, import, and paste the printed settings into a recipe: the run begins with them."""
    weights = tmp_path / "start.safetensors"
    assert run("import-git", export, "--out", weights) == 0
    settings = yaml.safe_load(capsys.readouterr().out)
    recipe = tiny_recipe(scenes, tmp_path / "run", steps=1, schedule={"warmup_steps": 0})
    recipe["optimizer"] |= {"lr": 1e-12, "weight_decay": 0.0}
    for tower in ("model", "tokenizer"):  # what the settings must bring
        del recipe[tower]
    del recipe["tasks"]["caption"]["objective"]["decoder"]
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(recipe))
    settings["base"] = "./base.yaml"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    train(tmp_path / "recipe.yaml", tmp_path / "logs")
    after, start = open_captioner(tmp_path / "run").weights(), load_file(weights)
    assert after.keys() == start.keys()
    for name in start:
        torch.testing.assert_close(after[name], start[name], atol=1e-9, rtol=0)


def test_export_of_an_import_equals_the_source(export, tmp_path) -> None:
    """transformers -> ours -> transformers: the same tensors under the same names."""
    ours = import_git(load_file(export / "model.safetensors"))
    theirs = GitForCausalLM.from_pretrained(export).state_dict()
    back = export_git(ours, "transformers")
    assert all(torch.equal(back[name], theirs[name]) for name in back)


def test_tokenizer_with_the_ends_in_its_own_file(tmp_path) -> None:
    """BERT's fast tokenizer adds [CLS] and [SEP] itself; that stays as it is."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "two", "##s"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    plain = Tokenizer.load(tmp_path / "vocab.txt")
    for number, source in enumerate((plain, None)):
        source = source or Tokenizer.load(tmp_path / "0")
        folder = tmp_path / str(number)
        folder.mkdir()
        tools.convert.export_git.write_tokenizer(source, 40, folder, source.eos_id)
        loaded = AutoTokenizer.from_pretrained(folder)
        assert loaded("a red twos").input_ids == [2, 5, 6, 7, 8, 3]
        assert loaded.decode([2, 5, 6, 7, 8, 3], skip_special_tokens=True) == "a red twos"
    assert contents(tmp_path / "0") == contents(tmp_path / "1")
