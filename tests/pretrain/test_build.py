"""Objects from a recipe, on real shards: model, streams, evaluation, and the check command."""

import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from data_pipeline.images.transforms import ImageSettings
from data_pipeline.loader.loader import MicroBatch, StepSampler, TaskStream
from data_pipeline.order.order import Order
from data_pipeline.reading.reader import SampleReader
from data_pipeline.samples.boxes import BoxDataSettings
from data_pipeline.samples.labels import LabelDataSettings
from data_pipeline.samples.pictures import PictureDataSettings
from data_pipeline.samples.text import TextDataSettings
from data_pipeline.shards.shard_set import ShardSet
from pretrain.__main__ import main
from pretrain.build import (
    build_evaluation_loader,
    build_model,
    build_schedule,
    build_streams,
    build_tokenizer,
    evaluation_image,
    plan_sampling,
)
from pretrain.check import state_bytes
from pretrain.models.build_context import BuildContext
from pretrain.models.init import initialise
from pretrain.recipe.load import SHIPPED, load_recipe, validate
from pretrain.recipe.overlay import parse_yaml
from pretrain.sampler import ledger_entries
from tests.tiny_run import pack_scenes, three_tasks, tiny_recipe, write_recipe


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    pack_scenes(folder)
    return folder


@pytest.fixture
def recipe_file(data, tmp_path, monkeypatch):
    monkeypatch.setenv("OMNIPRETRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    return write_recipe(tmp_path / "tiny.yaml", tiny_recipe(data, tmp_path / "run"))


def test_an_objective_is_told_what_its_data_know():
    image = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    pixels = {"image_mean": image["mean"], "image_std": image["std"]}
    names = [f"the {n}" for n in range(7)]
    classes = {"classes": 7, "class_names": names}
    options = {"shards": ["x"], "image": image}
    kinds = [
        (PictureDataSettings(**options), pixels),
        (
            LabelDataSettings(**options, **classes, smaller_views=[160]),
            pixels | classes | {"smaller_views": (160,)},
        ),
        (BoxDataSettings(**options, **classes), pixels | classes),
        (TextDataSettings(shards=["x"]), {}),
    ]
    for data, known in kinds:
        context = BuildContext(**data.facts())
        assert {name: getattr(context, name) for name in known} == known
        assert set(data.facts()) <= known.keys() | {"smaller_views"}
    for settings in (LabelDataSettings, BoxDataSettings):
        with pytest.raises(ValueError, match="class_names: 7 names for classes=8: name each"):
            settings(**options, classes=8, class_names=names)
        with pytest.raises(ValueError, match="class_names: class 1 has an empty name"):
            settings(**options, classes=2, class_names=["a", " "])


def test_model_learns_from_the_streams_of_its_recipe(recipe_file):
    """All parts fit together: a few plain steps on the batches of the recipe lower its loss."""
    recipe = load_recipe(recipe_file, ["tasks.caption.micro_batch=8"])
    tokenizer = build_tokenizer(recipe)
    model = build_model(recipe, tokenizer)
    initialise(model, recipe.seed)
    stream = build_streams(recipe, tokenizer)["caption"]
    schedule = build_schedule(recipe)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for request in StepSampler(schedule, {"caption": stream}, 0, 1, 0, 25):
        batch = stream.load(request)
        totals = model.objectives["caption"].counts(batch)
        loss = model("caption", "undivided", batch, totals)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert len(losses) == 25
    assert np.mean(losses[-3:]) < 0.75 * np.mean(losses[:3])


def test_streams_depend_on_seed_and_task_name(data, tmp_path):
    def rows(**changes):
        recipe = tiny_recipe(data, tmp_path, **changes)
        task = recipe["tasks"].pop("caption")
        recipe["tasks"][changes.get("name", "caption")] = task
        layer = parse_yaml(write_recipe(tmp_path / "r.yaml", recipe).read_text(), "r")
        loaded = validate(layer)
        (stream,) = build_streams(loaded, build_tokenizer(loaded)).values()
        return stream.order.rows(np.arange(60)).tolist()

    assert sorted(rows()) == list(range(60))
    assert rows() == rows()
    assert rows() != rows(seed=4)
    assert rows() != rows(name="other")


def test_evaluation_covers_held_out_data_once_without_augmentation(recipe_file):
    recipe = load_recipe(recipe_file)
    tokenizer = build_tokenizer(recipe)
    loaders = [build_evaluation_loader(recipe, "caption", tokenizer, rank, 3) for rank in range(3)]
    assert len({len(loader) for loader in loaders}) == 1
    batches = [batch for loader in loaders for batch in loader]
    samples = [
        (int(row), captions)
        for batch in batches
        for row, valid, captions in zip(
            batch["row"], batch["valid"], batch["captions"], strict=True
        )
        if valid
    ]
    assert sorted(row for row, _ in samples) == list(range(10))
    assert all(len(captions) == 5 for _, captions in samples)
    again = next(iter(build_evaluation_loader(recipe, "caption", tokenizer, 0, 3)))
    assert torch.equal(again["images"], batches[0]["images"])
    image = evaluation_image(recipe.tasks["caption"])
    assert (image.mode, image.size) == ("center_crop", 32)


def test_each_kind_of_data_has_its_fields(data, recipe_file):
    recipe = load_recipe(recipe_file)
    tokenizer = build_tokenizer(recipe)
    image = ImageSettings(size=32)
    kinds = {
        "boxes": BoxDataSettings(shards=[str(data / "train")], classes=10, image=image),
        "second_images": PictureDataSettings(
            shards=[str(data / "train")], image=image, second_view=image
        ),
    }
    for name, settings in kinds.items():
        reader = SampleReader(ShardSet.open(settings.shards))
        fields = settings.processor(tokenizer, train=True)
        stream = TaskStream("t", reader, Order.plan(len(reader.shards), 0, 4), fields, 0, 4, 4)
        batch = stream.load(MicroBatch(0, 0, "t", (0, 1, 2, 3), (True,) * 4))
        assert not batch["faults"] and len(batch["images"]) == len(batch[name]) == 4


def test_evaluation_settings_win(recipe_file):
    overrides = [
        "tasks.caption.evaluation.micro_batch=5",
        "tasks.caption.evaluation.max_samples=7",
        "tasks.caption.evaluation.image={size: 64, mode: center_crop}",
    ]
    recipe = load_recipe(recipe_file, overrides)
    loader = build_evaluation_loader(recipe, "caption", build_tokenizer(recipe))
    batches = list(loader)
    assert [len(batch["valid"]) for batch in batches] == [5, 2]
    assert batches[0]["images"].shape == (5, 3, 64, 64)
    none = load_recipe(recipe_file, ["tasks.caption.evaluation=null"])
    with pytest.raises(ValueError, match=r"tasks\.caption\.evaluation: this task has no held-out"):
        build_evaluation_loader(none, "caption", build_tokenizer(none))


def test_check_reports_what_a_run_would_do(recipe_file, capsys):
    assert main(["check", str(recipe_file), "--world", "3"]) == 0
    text = capsys.readouterr().out
    assert all(line.startswith("ok ") for line in text.splitlines())
    assert "ZeRO stage 2, fp32" in text
    assert "global batch 8 = 3 rank(s) x 2 micro-step(s) of up to 2, less 4 padding rows" in text
    assert "60 samples in 3 shard(s); 7.5 steps an epoch, 12 steps = 1.60 epochs" in text
    assert "evaluation on 10 of 10 samples" in text


def test_check_counts_images_however_often_they_are_repeated(data, recipe_file, capsys):
    """Of 8 views 4 are images: 12 steps are 48 of 60."""
    repeats = ["tasks.caption.data.repeats=2"]
    assert main(["check", str(recipe_file), *repeats, "--world", "3"]) == 0
    text = capsys.readouterr().out
    assert "15.0 steps an epoch, 12 steps = 0.80 epochs; every image 2 times in a step" in text
    sources = [
        "tasks.caption.data.shards=null",
        f"tasks.caption.data.sources={{a: {{shards: ['{data}/train'], weight: 3}}, "
        f"b: {{shards: ['{data}/heldout']}}}}",
    ]
    assert main(["check", str(recipe_file), *repeats, *sources]) == 0
    text = capsys.readouterr().out
    assert "sources in a cycle of 4 pairs of samples: a 3/4, b 1/4" in text
    assert "tasks.caption: source a: 60 samples, read 0.60 times" in text
    recipe = load_recipe(recipe_file, repeats)
    stream = build_streams(recipe, build_tokenizer(recipe))["caption"]
    rows = stream.order.rows(np.arange(8)).reshape(2, 4)
    assert (rows[0] == rows[1]).all() and stream.epoch_metrics(96) == {"epoch": 0.8}


def test_check_tells_what_a_cache_will_do(recipe_file, tmp_path, capsys):
    cache = ["loader.cache.folder=" + str(tmp_path / "cache"), "loader.cache.max_gib=1"]
    assert main(["check", str(recipe_file), *cache, "--world", "2"]) == 0
    text = capsys.readouterr().out
    assert "cache: 1 GiB of 0.00 GiB on each node of 2 rank(s), in blocks of 0." in text
    # Three shards of one block each; every step reads of two or three of them.
    hits = re.search(r"in the first 12 steps (.*)% hits and 0.00 GiB downloaded", text)
    assert 85 < float(hits[1]) < 95
    assert not (tmp_path / "cache").exists()
    assert main(["check", str(recipe_file), *cache, "loader.cache.max_gib=0.00001"]) == 1
    assert "loader.cache.max_gib (1e-05) holds less than one step reads" in capsys.readouterr().out


def test_check_tells_stages_and_sources(data, recipe_file, capsys):
    two = [
        "steps=120",
        "tasks.second="
        + json.dumps(
            tiny_recipe(data, "x")["tasks"]["caption"] | {"weight": 1.8, "evaluation": None}
        ),
        "tasks.caption.data.shards=null",
        f"tasks.caption.data.sources={{a: {{shards: ['{data}/train'], weight: 3}}, "
        f"b: {{shards: ['{data}/heldout']}}}}",
        "sampling.stages=[{from_step: 100, weights: {caption: 1, second: 0}}]",
    ]
    assert main(["check", str(recipe_file), *two]) == 0
    text = capsys.readouterr().out
    assert "schedule: from step 0: cycle of 14 steps: caption 5/14, second 9/14; largest" in text
    assert (
        "schedule: from step 100: cycle of 1 steps: caption 1/1; largest error of a share 0.00%"
        "; off: second" in text
    )
    assert "sources in a cycle of 4 pairs of samples: a 3/4, b 1/4" in text
    # 56 visits: 448 samples, of which 336 from the 60 of a and 112 from the 10 of b.
    assert "tasks.caption: source a: 60 samples, read 5.60 times" in text
    assert "tasks.caption: source b: 10 samples, read 11.20 times" in text
    assert main(["check", str(recipe_file), *two, "sampling.alpha=0.5"]) == 0
    # sqrt(70) against 1.8 sqrt(60)
    assert "caption 3/8, second 5/8" in capsys.readouterr().out


def test_conditions_decide_what_is_read_and_check_tells(data, recipe_file, capsys):
    where = "width == 32 and captions.count > 0 and key < '000024'"
    overrides = [
        f'tasks.caption.data.where="{where}"',
        "tasks.caption.evaluation.where=\"key >= '000004'\"",
    ]
    recipe = load_recipe(recipe_file, overrides)
    assert main(["check", str(recipe_file), *overrides]) == 0
    text = capsys.readouterr().out
    assert "24 samples (40.0% of 60, by `where`) in 3 shard(s); 3.0 steps an epoch" in text
    assert "evaluation on 6 of 6 samples (60.0% of 10, by `where`)" in text
    tokenizer = build_tokenizer(recipe)
    stream = build_streams(recipe, tokenizer)["caption"]
    assert sorted(stream.order.rows(np.arange(24)).tolist()) == list(range(24))
    assert stream.epoch_metrics(36) == {"epoch": 1.5}
    loaders = [build_evaluation_loader(recipe, "caption", tokenizer, rank, 2) for rank in range(2)]
    keys = [key for loader in loaders for batch in loader for key in batch["key"]]
    assert sorted(filter(None, keys)) == [f"{n:06d}" for n in range(4, 10)]

    assert main(["check", str(recipe_file), "tasks.caption.data.where=width < 32"]) == 1
    text = capsys.readouterr().out
    assert "FAULT tasks.caption: where: condition `width < 32`: none of the 60 samples" in text
    assert main(["check", str(recipe_file), "tasks.caption.data.where=width < "]) == 2
    assert "tasks.caption.data.where: condition `width <`: character" in capsys.readouterr().err


def test_schedules_follow_the_ledger(recipe_file):
    recipe = load_recipe(recipe_file)
    planned = plan_sampling(recipe)
    ledger = ledger_entries(planned, [], 0)
    assert ledger[0]["stages"] == [{"from_step": 0, "mode": "block", "weights": {"caption": 1.0}}]
    assert build_schedule(recipe, ledger)(12) == ("caption", 12)


def test_check_reports_tasks_of_every_kind(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    path = write_recipe(tmp_path / "three.yaml", three_tasks(data, tmp_path / "run"))
    assert main(["check", str(path), "--world", "2"]) == 0
    text = capsys.readouterr().out
    assert "cycle of 3 steps: caption 1/3, classify 1/3, contrast 1/3" in text
    samples = {line.split(":")[0]: line for line in text.splitlines() if "first samples" in line}
    assert "labels (2,) int64" in samples["ok    tasks.classify"]
    assert "tokens (2, 1, " in samples["ok    tasks.contrast"]
    for part in ("encoders.text", "objectives.classify", "objectives.contrast"):
        assert f"{part} " in text


def test_evaluation_of_each_kind_reads_what_its_objective_needs(data, tmp_path):
    path = write_recipe(tmp_path / "three.yaml", three_tasks(data, tmp_path / "run"))
    recipe = load_recipe(path, ["tasks.contrast.objective.evaluation_references=3"])
    tokenizer = build_tokenizer(recipe)
    batches = {
        name: next(iter(build_evaluation_loader(recipe, name, tokenizer, 0, 1)))
        for name in recipe.tasks
    }
    assert batches["contrast"]["tokens"].shape[:2] == (2, 3)
    assert batches["contrast"]["loss_mask"].any(dim=2).all()
    assert batches["caption"]["tokens"].shape[:2] == (2, 2)
    assert batches["classify"]["labels"].shape == (2,)
    trained = build_streams(recipe, tokenizer)["contrast"]
    request = next(
        iter(StepSampler(lambda step: ("contrast", step), {"contrast": trained}, 0, 1, 0, 1))
    )
    assert trained.load(request)["tokens"].shape[:2] == (2, 1)


def test_check_counts_the_parameters_that_the_model_has(recipe_file, capsys):
    recipe = load_recipe(recipe_file)
    model = build_model(recipe, build_tokenizer(recipe))
    total = sum(parameter.numel() for parameter in model.parameters())
    main(["check", str(recipe_file)])
    assert f"model: {total / 1e6:.2f} M parameters" in capsys.readouterr().out


def test_check_reads_samples_as_training_will(recipe_file, capsys):
    assert main(["check", str(recipe_file)]) == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if "first samples" in x]
    assert "images (2, 3, 32, 32) uint8, tokens (2, 2, " in line
    assert main(["check", str(recipe_file), "tasks.caption.data.caption_source=txt"]) == 1
    assert "FAULT tasks.caption: task caption, position 0: " in capsys.readouterr().out


def test_check_compares_initial_weights(recipe_file, tmp_path, capsys):
    recipe = load_recipe(recipe_file)
    model = build_model(recipe, build_tokenizer(recipe))
    part = {k: v.contiguous() for k, v in model.state_dict().items() if k.startswith("encoders.")}
    path = tmp_path / "part.safetensors"
    save_file(part, path)
    assert main(["check", str(recipe_file), f"initial_weights={path}"]) == 0
    assert f"initial_weights: {len(part)} of " in capsys.readouterr().out
    for pattern, random in (("encoders.*", False), ("*.weight", True)):
        frozen = f'optimizer.frozen=["{pattern}"]'
        assert main(["check", str(recipe_file), f"initial_weights={path}", frozen]) == 0
        assert ("at their random first values" in capsys.readouterr().out) == random
    save_file({**part, "encoders.image.positions": torch.zeros(2, 2)}, path)
    assert main(["check", str(recipe_file), f"initial_weights={path}"]) == 1
    text = capsys.readouterr().out
    assert f"initial_weights: 1 of {len(part) + 1} tensors have no place" in text
    assert "encoders.image.positions (2, 2)" in text


def test_check_goes_on_after_a_fault(recipe_file, capsys):
    overrides = ["tasks.caption.data.shards=[nowhere]", "deepspeed=zero9", "tokenizer.path=/none"]
    assert main(["check", str(recipe_file), *overrides]) == 1
    lines = capsys.readouterr().out.splitlines()
    faults = [line for line in lines if line.startswith("FAULT")]
    assert len(faults) == 3
    assert any("no file zero9.json" in line for line in faults)
    assert any("tasks.caption: " in line and "nowhere" in line for line in faults)
    assert any(line.startswith("FAULT tokenizer: ") and "/none" in line for line in faults)


def test_check_tells_the_memory_of_a_model_before_there_are_data(capsys):
    assert main(["check", "internimage_t_in1k", "--world", "8"]) == 1
    text = capsys.readouterr().out
    assert "tokenizer" not in text and text.count("FAULT") == 1  # there are no shards
    # 29.92 M parameters, ZeRO-1 in bfloat16, a moving average: 2 + 2 + (12 + 4 + 4) / 8 bytes each.
    assert "memory per rank: about 0.18 GiB" in text


def test_check_counts_what_is_trained_and_what_is_frozen(capsys):
    """A frozen encoder has bfloat16 weights and nothing else."""
    override = 'optimizer={frozen: ["encoders.image.*"], layer_decay: {}, lr_multipliers: {}}'
    main(["check", "internimage_t_in1k", override, "--world", "8"])
    text = capsys.readouterr().out
    assert "model: 0.77 M parameters are trained, 29.15 M are not" in text
    assert "model: 29.15 M parameters in" in text
    assert "frozen by optimizer.frozen, at their random first values" in text
    assert "memory per rank: about 0.06 GiB" in text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            'optimizer.frozen=["encoders.imag.*"]',
            "there is no encoders.imag; did you mean 'encoders.image'",
        ),
        (
            'optimizer.frozen=["*.nothing"]',
            "pattern '*.nothing' matches no trained parameter; the nearest name is",
        ),
        ('optimizer={frozen: ["*"], lr_multipliers: {}}', "optimizer.frozen names all of them"),
        (
            'optimizer={frozen: ["encoders.*"], lr_multipliers: {"encoders.image.*": 0.5}}',
            "matches frozen parameters only",
        ),
        (
            'optimizer.lr_multipliers={"encoders.*": 0.0}',
            "remove it and set optimizer.frozen=['encoders.*']",
        ),
    ],
)
def test_what_cannot_be_frozen_is_told_before_a_start(capsys, override, message):
    assert main(["check", "internimage_t_in1k", override]) != 0
    said = capsys.readouterr()
    assert message in said.out + said.err


@pytest.mark.parametrize(
    ("stage", "precision", "world", "bytes_per_parameter"),
    [
        (1, "bf16", 1, 20),
        (1, "bf16", 8, 2 + 2 + 16 / 8),
        (2, "bf16", 8, 2 + 18 / 8),
        (3, "bf16", 8, 20 / 8),
        (2, "fp32", 4, 4 + 20 / 4),
    ],
)
def test_memory_formula(stage, precision, world, bytes_per_parameter):
    assert state_bytes(1000, stage, world, precision, 2) == pytest.approx(
        1000 * bytes_per_parameter
    )


@pytest.mark.parametrize(
    ("stage", "precision", "world", "more"),
    [
        (1, "bf16", 8, 2 * 300 + 4 * 200 / 8),
        (2, "fp32", 2, 4 * 300 + 4 * 200 / 2),
        (3, "bf16", 8, (2 * 300 + 4 * 200) / 8),
    ],
)
def test_frozen_parameters_have_weights_and_momentum_targets_a_master(
    stage, precision, world, more
):
    trained = state_bytes(1000, stage, world, precision, 2)
    beside = state_bytes(1000, stage, world, precision, 2, frozen=300, following=200)
    assert beside - trained == pytest.approx(more)


def test_sub_groups_bound_the_gradients_of_a_step_at_stage_3():
    whole = state_bytes(1000, 3, 2, "bf16", 2)
    assert state_bytes(1000, 3, 2, "bf16", 2, sub_group_size=100) == whole - 4 * (500 - 100)
    assert state_bytes(1000, 3, 2, "bf16", 2, sub_group_size=10**9) == whole
    assert state_bytes(1000, 2, 2, "bf16", 2, sub_group_size=100) == (
        state_bytes(1000, 2, 2, "bf16", 2)
    )


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("git_base", 153.18),
        ("git_large", 370.76),
        ("git", 688.07),
        ("git2_scale", 5098.42),
        ("git_internimage_h", 1141.88),
    ],
)
def test_sizes_of_git_and_work_for_512_ranks(name, millions, capsys):
    """Nothing is missing but the data, and no rank idles; with the words of the paper."""
    main(["check", name, "--world", "512"])
    lines = capsys.readouterr().out.splitlines()
    faults = [line.split(":")[0] for line in lines if line.startswith(("FAULT", "warn"))]
    assert faults == ["FAULT tokenizer", "FAULT tasks.caption"]
    assert any(f"model: {millions} M parameters" in line for line in lines)


def test_recipes_lists_all(capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines]
    assert names == sorted(path.stem for path in SHIPPED.glob("*.yaml"))
    assert {"digits_demo", "git_base", "internimage_t_in1k"} < set(names)
    assert all(len(line.split(maxsplit=1)[1]) > 20 for line in lines)


def test_show_prints_a_recipe_that_loads_again(capsys, tmp_path):
    override = 'optimizer.lr_multipliers."objectives.*"=2.5'
    assert main(["show", "git_coco_small", override]) == 0
    text = capsys.readouterr().out
    path = tmp_path / "shown.yaml"
    path.write_text(text)
    assert load_recipe(path) == load_recipe("git_coco_small", [override])
    (line,) = [line for line in text.splitlines() if line.strip().startswith("objectives.*")]
    assert line.endswith(f"# override {override!r}")
    (line,) = [line for line in text.splitlines() if line.strip().startswith("warmup_steps")]
    assert "git_coco_small.yaml:" in line


def test_show_fields_documents_every_field(capsys):
    assert main(["show", "--fields"]) == 0
    lines = capsys.readouterr().out.splitlines()
    docs = dict(zip(lines[::2], lines[1::2], strict=True))
    assert all(doc.startswith("    ") and len(doc) > 12 for doc in docs.values())
    assert "tasks.<name>.micro_batch: int = required" in docs
    assert "precision: bf16 | fp16 | fp32 = bf16" in docs
    assert "model.encoders.<name>.patch_size: int = 16" in docs


def test_a_faulty_recipe_is_told_on_stderr(capsys):
    assert main(["show", "git_digits", "stepz=1"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "did you mean 'steps'?" in captured.err
    with pytest.raises(SystemExit, match="2"):
        main(["show"])
    with pytest.raises(SystemExit, match="2"):
        main(["check", "git_digits", "--world", "0"])
