"""The comparison of mixers: equal sizes, one recipe, its results, and once all of it."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pretrain.recipe.load import load_recipe
from pretrain.recipe.overlay import RecipeError
from tests.tools.finished_run import write_run
from tools import compare_mixers
from tools.compare_mixers import RECIPE, WAYS, changes, hits, losses, size_of
from tools.support.experiment import Run


def plan(tmp_path: Path, *more: str):
    options = compare_mixers.parse_arguments(["--scenes", "10", "--out", str(tmp_path), *more])
    return compare_mixers.plan(options, classes=10)


def test_all_have_the_parameters_of_internimage():
    sizes = {way: size_of(Run(way, RECIPE, changes(way, side=64))) for way in WAYS}
    parameters, flops = sizes["InternImage (DCNv3)"]
    assert 1e6 < parameters < 3e6
    assert all(abs(count / parameters - 1) < 0.05 for count, _ in sizes.values())
    assert abs(sizes["depth-wise convolution 7x7"][1] / flops - 1) < 0.05


def test_ways_differ_in_their_encoder_alone(tmp_path):
    runs = plan(tmp_path, "--seeds", "3", "--steps", "50", "--set", "optimizer.lr=2e-3")
    recipes = [load_recipe(run.recipe, run.overrides) for run in runs.values()]
    assert [run.way for run in runs.values()] == list(WAYS)
    common = {"model", "run_dir"}
    texts = {recipe.model_dump_json(exclude=common) for recipe in recipes}
    assert len(texts) == 1 and recipes[0].optimizer.lr == 2e-3 and recipes[0].steps == 50
    assert len({recipe.model.model_dump_json() for recipe in recipes}) == len(WAYS)
    assert recipes[0].tasks["classify"].data.image.flip_probability == 0  # digits


def test_a_setting_that_does_not_fit_is_found_before_anything_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compare_mixers, "pack", lambda options: 10)
    arguments = ["--scenes", "10", "--out", str(tmp_path), "--set", "optimizer.rl=1"]
    assert compare_mixers.main(arguments) == 2
    assert "optimizer.rl: unknown key" in capsys.readouterr().out


def test_a_folder_of_another_comparison_is_refused(tmp_path):
    first = next(iter(plan(tmp_path).items()))
    first[0].mkdir()
    load_recipe(RECIPE, first[1].overrides).dump(first[0] / "recipe.yaml")
    assert first[0] in plan(tmp_path)
    with pytest.raises(RecipeError, match="holds a run of other settings: give another --out"):
        plan(tmp_path, "--steps", "50")


def test_pictures_that_cannot_be_packed_end_it_with_the_reason(tmp_path, capsys):
    (tmp_path / "flowers" / "rose").mkdir(parents=True)
    (tmp_path / "flowers" / "rose" / "a.jpg").write_bytes(b"no image")
    arguments = ["--images", str(tmp_path / "flowers"), "--out", str(tmp_path / "out")]
    assert compare_mixers.main(arguments) == 1
    assert "not a readable image" in " ".join(capsys.readouterr().out.split())


def test_curves_take_the_losses_between_two_evaluations():
    def trained(step: int, loss: float) -> dict:
        return {"kind": "train", "step": step, "cross_entropy": loss}

    def evaluated(step: int, top1: float) -> dict:
        return {"kind": "evaluation", "step": step, "top1": top1}

    log = [trained(1, 2.0), trained(2, 1.0), evaluated(2, 0.3), trained(4, 0.5), evaluated(4, 0.4)]
    assert losses(log) == {2: 1.5, 4: 0.5} and hits(log) == {2: 0.3, 4: 0.4}
    other = [trained(1, 4.0), evaluated(2, 0.5)]  # stopped early: steps that all have
    band = compare_mixers.line("way", [log, other], hits)
    assert (band.x, band.y, band.low, band.high) == ([2], [pytest.approx(0.4)], [0.3], [0.5])


def test_the_table_has_sizes_and_spread(tmp_path):
    runs = plan(tmp_path, "--seeds", "0", "1")
    accuracies = iter((0.5, 0.4, 0.3, 0.2, 0.7, 0.4, 0.3, 0.2))
    for folder in runs:
        write_run(folder, "finished", next(accuracies))
    rows = compare_mixers.table(runs).splitlines()[2:]
    assert rows[0] == "| InternImage (DCNv3) | 1.81 M | 12 | 0.600 ± 0.141 |"
    assert [row.split(" | ")[0].strip("| ") for row in rows] == list(WAYS)


@pytest.mark.slow
def test_a_small_one_from_a_folder_to_the_curves(tmp_path):
    draws = np.random.default_rng(0)
    for name, colour in (("red", (200, 40, 40)), ("blue", (40, 40, 200))):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for number in range(60):
            pixels = np.clip(draws.normal(colour, 30, (64, 64, 3)), 0, 255).astype(np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG")
            (tmp_path / "pictures" / name / f"{number}.png").write_bytes(buffer.getvalue())
    out = tmp_path / "out"
    arguments = [
        "--images",
        str(tmp_path / "pictures"),
        "--out",
        str(out),
        "--seeds",
        "0",
        "--steps",
        "30",
        "--ways",
        "InternImage (DCNv3)",
        "ViT, patches of 16",
        "--set",
        "evaluation_every_steps=15",
        "schedule.warmup_steps=2",
    ]
    assert compare_mixers.main(arguments) == 0
    table = (out / "table.md").read_text().splitlines()[2:]
    assert all(float(row.split(" | ")[-1].strip("| ")) > 0.9 for row in table) and len(table) == 2
    assert Image.open(out / "curves.png").size[0] > 800
    before = {path: path.stat().st_mtime_ns for path in out.rglob("metrics.jsonl")}
    assert compare_mixers.main(arguments) == 0  # nothing is repeated
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("metrics.jsonl")}
