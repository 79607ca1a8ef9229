"""`tools.probe` on a finished run."""

import json
from types import SimpleNamespace

import pytest
import torch

from data_pipeline.images.transforms import ImageSettings, ImageTransform
from data_pipeline.reading.reader import SampleReader
from data_pipeline.shards.shard_set import ShardSet
from tests.pretrain.models.internimage.internimage_models import small_encoder
from tools import probe
from tools.support.trained import open_run


def test_probes_of_a_run(run_dir, scenes, tmp_path, capsys):
    arguments = [
        str(run_dir),
        "--train",
        str(scenes / "train"),
        "--test",
        str(scenes / "heldout"),
        "--classes",
        "10",
        "--workers",
        "0",
        "--batch",
        "7",
        "--json",
        str(tmp_path / "p.json"),
    ]
    assert probe.main(arguments) == 0
    found = json.loads((tmp_path / "p.json").read_text())
    with_label = sum(
        "cls" in SampleReader(ShardSet.open(str(scenes / "heldout"))).read(row).members
        for row in range(10)
    )
    assert found["test_images"] == with_label and 0 < with_label < 10
    assert found["encoder"] == "image" and found["step"] == 24
    assert 0 <= found["knn_top1"] <= 1 and 0 <= found["linear_top1"] <= 1
    assert "kNN" in capsys.readouterr().out


def test_features_are_those_of_the_encoder(run_dir, scenes):
    run = open_run(run_dir)
    name, image = probe.choose_encoder(run, None)
    args = probe._parser().parse_args(
        [
            str(run_dir),
            "--train",
            "x",
            "--test",
            "x",
            "--classes",
            "10",
            "--workers",
            "0",
            "--device",
            "cpu",
        ]
    )
    found, labels = probe.features(run, name, image, [str(scenes / "heldout")], args)
    reader = SampleReader(ShardSet.open(str(scenes / "heldout")))
    rows = [row for row in range(10) if "cls" in reader.read(row).members]
    pixels = torch.from_numpy(ImageTransform(image)(reader.read(rows[0]).members["jpg"], None))
    pixels = pixels.permute(2, 0, 1)[None] / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (image.mean, image.std))
    tokens = run.model.encoders[name]((pixels - mean) / std)
    torch.testing.assert_close(found[0], tokens.mean(1)[0], rtol=1e-4, atol=1e-5)
    assert labels.tolist() == [int(reader.read(row).members["cls"]) for row in rows]


@pytest.mark.parametrize("pool", ["mean", "head"])
def test_features_of_an_internimage(scenes, pool):
    encoder = small_encoder(head={"type": "conv"}).eval()
    run = SimpleNamespace(model=SimpleNamespace(encoders={"image": encoder}))
    image = ImageSettings(size=48)
    args = probe._parser().parse_args(
        [
            "x",
            "--train",
            "x",
            "--test",
            "x",
            "--classes",
            "10",
            "--workers",
            "0",
            "--device",
            "cpu",
            "--pool",
            pool,
        ]
    )
    found, labels = probe.features(run, "image", image, [str(scenes / "heldout")], args)
    reader = SampleReader(ShardSet.open(str(scenes / "heldout")))
    row = next(row for row in range(10) if "cls" in reader.read(row).members)
    pixels = torch.from_numpy(ImageTransform(image)(reader.read(row).members["jpg"], None))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (image.mean, image.std))
    pixels = (pixels.permute(2, 0, 1)[None] / 255 - mean) / std
    if pool == "head":
        expected = encoder.encode(pixels, ("pooled",)).pooled
    else:
        expected = encoder(pixels).mean(1)
    assert len(found) == len(labels)
    torch.testing.assert_close(found[0], expected[0].detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--encoder", "text"], "choose one of the run's encoders of images with --encoder: image"),
        (["--test", "nowhere"], "nowhere"),
        (["--test", "to[/] see"], "to[/] see"),
        (["--label-source", "json:nothing"], "no sample has a label"),
    ],
)
def test_errors_are_one_line(run_dir, scenes, change, words, capsys):
    arguments = [
        str(run_dir),
        "--train",
        str(scenes / "train"),
        "--test",
        str(scenes / "heldout"),
        "--classes",
        "10",
        "--workers",
        "0",
        *change,
    ]
    assert probe.main(arguments) == 1
    message = capsys.readouterr().err
    assert words in " ".join(message.split()) and "Traceback" not in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--batch", "0"], "--batch: '0' is not a number from 1 on"),
        (["--json", "nowhere/a.json"], "--json nowhere/a.json: there is no folder nowhere"),
    ],
)
def test_wrong_usage_is_told_before_anything_is_computed(change, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        probe.main(["run", "--train", "x", "--test", "x", "--classes", "10", *change])
    assert stopped.value.code == 2
    assert words in " ".join(capsys.readouterr().err.split())
