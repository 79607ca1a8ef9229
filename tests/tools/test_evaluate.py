"""Evaluation of an export by transformers, against our own evaluation of the same weights."""

import json
import re
import shutil

import pytest
import torch
from PIL import Image

from data_pipeline.shards.shard_set import Shard, ShardSet
from pretrain.build import build_evaluation_loader
from pretrain.models.git.decoder import GitDecoder
from pretrain.models.vit import VisionTransformer
from pretrain.objectives.objective import EvaluationContext
from tools.convert.__main__ import main as convert
from tools.convert.captioner import evaluate
from tools.convert.record import ExportRecord
from tools.evaluate import main
from tools.support.trained import open_captioner
from tools.support.training_images import TrainingShards, seen_in_training


@pytest.fixture
def without_our_model(monkeypatch) -> None:
    def forbidden(*_):
        raise AssertionError("the evaluation of an export must not run our model")

    for kind, method in ((GitDecoder, "run_layers"), (VisionTransformer, "forward")):
        monkeypatch.setattr(kind, method, forbidden)


def run(*arguments) -> int:
    return main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def ours(run_dir):
    """Metrics and captions of our own objective."""
    captioner = open_captioner(run_dir)
    loader = captioner.recipe.loader.model_copy(update={"workers": 0})
    recipe = captioner.recipe.model_copy(update={"loader": loader})
    return captioner.objective.evaluate(
        captioner.model.encoders,
        build_evaluation_loader(recipe, "caption", captioner.tokenizer),
        EvaluationContext(torch.device("cpu"), captioner.tokenizer, keep_images=1),
    )


@pytest.mark.parametrize("batch", [3, 32])
def test_equals_our_own_evaluation(export, scenes, ours, batch, without_our_model) -> None:
    data = ExportRecord.read(export).data([str(scenes / "heldout")])
    assert data.captions_per_image == 2  # several references per image are scored
    found = evaluate(export, data, batch=batch, keep_images=4)
    metrics, examples = ours
    assert found.metrics == pytest.approx(
        {name: value for name, value in metrics.items() if name != "loss"}, rel=1e-5
    )
    assert [(e.key, e.caption, e.references) for e in found.examples] == [
        (e.key, e.caption, e.references) for e in examples
    ]
    assert len({e.caption for e in found.examples}) > 1  # noisy weights tell images apart
    assert 0 < found.metrics["token_accuracy"] < 1
    kept = [e.image for e in found.examples if e.image is not None]
    assert len(kept) == 4 and torch.equal(kept[0], examples[0].image)


def test_command_line(export, scenes, ours, tmp_path, capsys, without_our_model) -> None:
    sheet, report = tmp_path / "pictures" / "c.png", tmp_path / "m.json"
    status = run(
        export,
        "--shards",
        scenes / "heldout",
        "--caption-source",
        "json:captions",
        "--batch",
        4,
        "--workers",
        1,
        "--sheet",
        sheet,
        "--sheet-rows",
        2,
        "--json",
        report,
        "--examples",
        2,
        "--device",
        "cpu",
    )
    assert status == 0
    out = capsys.readouterr().out
    assert "CIDEr-D" in out and "token accuracy" in out
    assert out.count("predicted") == out.count("reference") == 2
    content = json.loads(report.read_text())
    assert content["metrics"]["cider_d"] == pytest.approx(ours[0]["cider_d"])
    assert [c["caption"] for c in content["captions"]] == [e.caption for e in ours[1]]
    assert content["export"]["step"] == 24
    with Image.open(sheet) as picture:
        assert picture.format == "PNG" and picture.width > 4 * 160


def test_fewer_samples(export, scenes, tmp_path) -> None:
    report = tmp_path / "m.json"
    assert (
        run(
            export,
            "--shards",
            scenes / "heldout",
            "--max-samples",
            3,
            "--workers",
            0,
            "--json",
            report,
        )
        == 0
    )
    rows = [c["row"] for c in json.loads(report.read_text())["captions"]]
    assert rows == [0, 3, 6]  # spread over the ten


def test_samples_that_meet_a_condition(export, scenes, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("OMNIPRETRAIN_CACHE", str(tmp_path / "cache"))
    report, where = tmp_path / "m.json", "key in ['000007', '000002', '000005']"
    assert (
        run(
            export,
            "--shards",
            scenes / "heldout",
            "--where",
            where,
            "--workers",
            0,
            "--json",
            report,
        )
        == 0
    )
    content = json.loads(report.read_text())
    assert [c["row"] for c in content["captions"]] == [2, 5, 7] and content["where"] == where


def test_errors_are_one_line(export, scenes, run_dir, tmp_path, capsys) -> None:
    def complaint(folder, *more) -> str:
        assert run(folder, "--workers", 0, *more) == 1
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ")
        return error

    heldout = ("--shards", scenes / "heldout")
    assert "is a run, not an export" in complaint(run_dir, *heldout)
    assert "gone" in complaint(export, "--shards", scenes / "gone")
    assert "caption_source" in complaint(export, *heldout, "--caption-source", "json:")
    wrong = complaint(export, *heldout, "--caption-source", "json:title")
    assert "KeyError: 'title'" in wrong
    assert "unknown column 'widht'" in complaint(export, *heldout, "--where", "widht > 3")
    with pytest.raises(SystemExit):
        run(export, *heldout, "--device", "abacus")
    assert "no device" in capsys.readouterr().err


def test_what_it_says_of_other_folders_can_be_done(
    export, scenes, run_dir, internimage_run, tmp_path, capsys
) -> None:
    """Each advice is followed: the next call gets on."""
    heldout = ("--shards", scenes / "heldout", "--workers", 0, "--max-samples", 2)
    again = tmp_path / "again"
    shutil.copytree(export, again, ignore=shutil.ignore_patterns("omnipretrain.json"))
    assert run(again, *heldout) == 1
    command = re.search(r"cp (EXPORT/\S+) (\S+)", capsys.readouterr().err)
    shutil.copy(command[1].replace("EXPORT", str(export)), command[2])
    assert run(again, *heldout) == 0

    assert run(run_dir, *heldout) == 1
    command = re.search(r"python -m tools.convert ([^`]*)`", capsys.readouterr().err)[1]
    made = str(tmp_path / "made")
    assert convert(command.replace("EXPORT", made).split()) == 0
    assert run(made, *heldout) == 0

    assert run(internimage_run, *heldout) == 1
    said = capsys.readouterr().err
    assert "it has classify (classification)" in said and "export-git" not in said
    assert '"kind": "evaluation"' in said
    assert '"kind": "evaluation"' in (internimage_run / "metrics.jsonl").read_text()


@pytest.fixture
def subtitle(export, tmp_path, monkeypatch):
    """What stands below the title of the contact sheet of some shards."""
    monkeypatch.setenv("OMNIPRETRAIN_CACHE", str(tmp_path / "cache"))
    drawn = []

    def sheet(*cells, subtitle: str, **_) -> Image.Image:
        drawn.append(subtitle)
        return Image.new("RGB", (1, 1))

    monkeypatch.setattr("tools.support.contact_sheet.contact_sheet", sheet)

    def of(*shards, folder=export, where: str | None = None) -> tuple[str, str]:
        report = tmp_path / "m.json"
        assert (
            run(
                folder,
                "--shards",
                *shards,
                "--max-samples",
                2,
                "--workers",
                0,
                "--json",
                report,
                "--sheet",
                tmp_path / "c.png",
                *(["--where", where] if where else []),
            )
            == 0
        )
        return drawn[-1].split(":")[0], json.loads(report.read_text())["images"]

    return of


def test_the_sheet_says_whether_images_were_trained_on(
    export, scenes, tmp_path, subtitle, capsys
) -> None:
    assert subtitle(scenes / "heldout") == ("2 held-out images", "held-out")
    assert "training images" not in capsys.readouterr().out
    assert subtitle(scenes / "train") == ("2 training images", "training")
    assert "these are training images" in capsys.readouterr().out
    tars = sorted((scenes / "train").glob("*.tar"))
    (tmp_path / "link").symlink_to(scenes / "train")
    copy = shutil.copytree(scenes / "train", tmp_path / "copy")
    (copy / "manifest.json").unlink()
    for other in (tars[0], tmp_path / "link", copy, f"{scenes}/tra*/*.tar"):
        assert subtitle(other) == ("2 training images", "training")
    mixed = subtitle(scenes / "heldout", scenes / "train")
    assert mixed == ("2 images, of shards that were trained on in part", "partly training")
    old = shutil.copytree(export, tmp_path / "old")
    content = json.loads((old / "omnipretrain.json").read_text())
    del content["training_shards"]
    (old / "omnipretrain.json").write_text(json.dumps(content))
    assert subtitle(scenes / "train", folder=old) == ("2 images", "unknown")


def test_conditions_may_part_training_from_held_out_images(scenes) -> None:
    shards = ShardSet.open(scenes / "train")
    trained = [TrainingShards(shards=[str(scenes / "train")], where="width > 3")]
    assert seen_in_training(shards, "width > 3", trained) == "training"
    assert seen_in_training(shards, "width <= 3", trained) == "partly training"
    assert seen_in_training(shards, None, trained) == "partly training"
    trained.append(TrainingShards(shards=[str(scenes / "train")]))  # of another task
    assert seen_in_training(shards, "width <= 3", trained) == "training"


def test_shards_of_servers_are_known_by_their_addresses() -> None:
    shown = ShardSet([Shard(f"https://host/a/{n:05d}.tar?sig=x", 1, 1, "") for n in range(3)])
    for spec in ("https://host/a", "https://host/a/{00000..00002}.tar", "https://host/a/*.tar"):
        assert seen_in_training(shown, None, [TrainingShards(shards=[spec])]) == "training"
    one = [TrainingShards(shards=["https://host/a/00001.tar"])]
    assert seen_in_training(shown, None, one) == "partly training"
    assert seen_in_training(shown, None, [TrainingShards(shards=["https://host/b"])]) == "held-out"


def test_a_record_of_another_version_is_refused(export, tmp_path) -> None:
    content = json.loads((export / "omnipretrain.json").read_text())
    (tmp_path / "omnipretrain.json").write_text(json.dumps(content | {"version": 2}))
    with pytest.raises(ValueError, match=r"version: .*export the checkpoint again"):
        ExportRecord.read(tmp_path)


def test_a_convert_after_evaluation_clears_its_results(export, run_dir, scenes, tmp_path) -> None:
    """Pictures and metrics of the old model must not lie beside the new one."""
    out = tmp_path / "out"
    assert convert(["export-git", "--run", str(run_dir), "--out", str(out)]) == 0
    assert run(out, "--shards", scenes / "heldout", "--workers", 0, "--json", out / "m.json") == 0
    assert convert(["export-git", "--run", str(run_dir), "--out", str(out)]) == 0
    assert not (out / "m.json").exists()
