"""Recipes: the shipped ones, overlays, paths, one clear line for each thing that cannot work."""

import os
import re

import pytest

from pretrain.recipe import checks as recipe_checks
from pretrain.recipe.load import SHIPPED, load_recipe, load_resolved
from pretrain.recipe.overlay import RecipeError
from tests.tiny_run import tiny_recipe, write_recipe

NAMES = sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def faults(*overrides: str, recipe="git_digits") -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe, overrides)
    return str(caught.value).splitlines()


def fault(*overrides: str) -> str:
    """The only fault, without the place that leads it."""
    (line,) = faults(*overrides)
    places = [rf"{re.escape(str(SHIPPED))}/git_digits\.yaml(:\d+)?"]
    places += [re.escape(f"override {override!r}") for override in overrides]
    match = re.match(f"({'|'.join(places)}): ", line)
    assert match, line
    return line[match.end() :]


@pytest.mark.parametrize("name", NAMES)
def test_shipped_recipes_are_valid_and_round_trip(name, tmp_path):
    recipe = load_recipe(name)
    assert recipe.name == name
    path = tmp_path / "resolved.yaml"
    recipe.dump(path)
    assert load_resolved(path) == recipe
    assert os.listdir(tmp_path) == ["resolved.yaml"]


@pytest.mark.parametrize("name", NAMES)
def test_shipped_recipes_say_what_a_reader_asks_first(name):
    header = (SHIPPED / f"{name}.yaml").read_text().split("\n\n", 1)[0]
    assert all(line.startswith("#") for line in header.splitlines())
    for word in ("Source", "Expect", "Hardware", "Sure?", "Command"):
        assert f"\n# {word}" in header, f"{name}: {word} is missing"


def test_published_settings_of_git():
    base, large = load_recipe("git_base"), load_recipe("git_large")
    for recipe in (base, large):
        task = recipe.tasks["caption"]
        assert recipe.optimizer.lr == 1e-5
        assert recipe.optimizer.lr_multipliers == {"objectives.*": 5.0}
        assert (recipe.schedule.kind, recipe.schedule.warmup_steps) == ("cosine", 500)
        assert task.objective.label_smoothing == 0.1
        assert (task.data.image.size, task.data.image.scale) == (224, (0.8, 1.0))
        patch = recipe.model.encoders["image"].patch_size
        drawn = [size // patch for size in task.data.image.sizes]
        assert drawn == [size // patch for size in range(160, 225, 16)]
        assert task.data.text_length == 42  # up to 40 of the text, BOS and EOS
    vit = large.model.encoders["image"]
    assert (vit.width, vit.layers, vit.heads, vit.patch_size) == (1024, 24, 16, 14)
    assert base.model.encoders["image"].patch_size == 16


def test_a_file_of_the_user_over_a_shipped_recipe(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA", "/mnt/data")
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_text(
        "base: git_digits\n"
        "name: mine\n"
        "steps: 1e3\n"
        "initial_weights: ~/start.safetensors\n"
        "tokenizer: {path: ./tok}\n"
        "tasks:\n"
        "  caption:\n"
        "    data:\n"
        "      shards: ['${DATA}/{000..099}.tar', 's3://bucket/x', local]\n"
        "    evaluation: null\n"
        "evaluation_every_steps: null\n"
    )
    recipe = load_recipe("recipes/mine.yaml", ["optimizer.lr=3e-4", "deepspeed=ds/mine.json"])
    here = str(tmp_path)
    assert recipe.steps == 1000 and recipe.optimizer.lr == 3e-4
    assert recipe.run_dir == f"{here}/runs/mine"
    assert recipe.tokenizer.path == f"{here}/tok"
    assert recipe.initial_weights == "/home/me/start.safetensors"
    assert recipe.deepspeed == f"{here}/ds/mine.json"
    task = recipe.tasks["caption"]
    assert task.data.shards == ["/mnt/data/{000..099}.tar", "s3://bucket/x", f"{here}/local"]
    assert task.evaluation is None
    assert task.objective.decoder.width == 128, "what the base says stays"


def test_a_resolved_recipe_is_taken_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("y", "z")
    recipe = load_recipe("git_digits", ["tokenizer.path='/x/${y}'"])
    recipe = recipe.model_copy(update={"run_dir": "relative/${gone}"})
    recipe.dump(tmp_path / "r.yaml")
    assert load_resolved(tmp_path / "r.yaml").run_dir == "relative/${gone}"
    assert load_resolved(tmp_path / "r.yaml").tokenizer.path == "/x/z"
    with pytest.raises(RecipeError, match="cannot be read: No such file"):
        load_resolved(tmp_path / "none.yaml")


def test_null_removes_from_free_mappings_and_sets_none_elsewhere():
    recipe = load_recipe(
        "git_base",
        ['optimizer.lr_multipliers."objectives.*"=null', "optimizer.clip_norm=null"],
    )
    assert recipe.optimizer.lr_multipliers == {}
    assert recipe.optimizer.clip_norm is None
    renamed = load_recipe(
        "git_digits",
        [
            "model.encoders.eye={image_size: 64, patch_size: 16}",
            "model.encoders.image=null",
            "tasks.caption.objective.encoder=eye",
        ],
    )
    assert list(renamed.model.encoders) == ["eye"]


def test_a_colon_without_a_space_does_not_remove_a_setting_silently():
    with pytest.raises(RecipeError, match=r"YAML wants a space: \{caption: 1\}"):
        load_recipe("git_digits", ["optimizer.task_clip_norms={caption:1}"])


def test_an_empty_file_lists_what_is_required_and_nothing_else(tmp_path):
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(RecipeError) as error:
        load_recipe(str(tmp_path / "empty.yaml"))
    assert all("required" in line for line in str(error.value).splitlines())


def test_the_source_of_a_fault_is_the_layer_that_wrote_it(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("base: git_digits\nsteps: 100\n\nlogging:\n  evry_steps: 3\n")
    assert faults(recipe=path) == [
        f"{path}:5: logging.evry_steps: unknown key; did you mean 'every_steps'?"
    ]
    assert faults("loader.workers=two", recipe=path)[0].startswith("override 'loader.workers=two':")


def test_every_fault_is_reported_at_once():
    found = faults("optimizer.lr=-1", "stepz=3", "precision=half")
    assert len(found) == 3
    assert any("stepz: unknown key; did you mean 'steps'?" in line for line in found)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["micro_batch=4"],
            "micro_batch: unknown key; that key belongs to tasks.<name>.micro_batch or "
            "tasks.<name>.evaluation.micro_batch",
        ),
        (["steps=true"], "steps: input should be a valid integer, not True"),
        (["steps='10'"], "steps: input should be a valid integer, not '10'"),
        (
            ["precision=bf61"],
            "precision: 'bf61' is not one of bf16, fp16, fp32; did you mean 'bf16'?",
        ),
        (
            ["tasks.caption.objective.type=captoning"],
            "tasks.caption.objective.type: 'captoning' is not one of captioning, classification, "
            "contrastive, m3i, unified_caption, unified_classification, unified_mlm, "
            "unified_retrieval; did you mean 'captioning'?",
        ),
        (
            ["model.encoders.image.heds=4"],
            "model.encoders.image.heds: unknown key; did you mean 'heads'?",
        ),
        (
            ["tasks.caption.data.image.sise=4"],
            "tasks.caption.data.image.sise: unknown key; did you mean 'size'?",
        ),
        (
            ["tasks.caption.micro_batch=128"],
            "tasks.caption: micro_batch=128 is larger than global_batch=64: lower micro_batch",
        ),
        (
            ["tasks.caption.micro_batch=7"],
            "tasks.caption: micro_batch=7 must be 1 or even: use 6",
        ),
        (
            ["tasks.caption.global_batch=65"],
            "tasks.caption: global_batch=65 must be even: use 66 or 64",
        ),
        (
            ["tasks.caption.data.repeats=3"],
            "tasks.caption: global_batch=64 is not a multiple of 6, as data.repeats=3 needs (pairs "
            "of neighbours, 3 times): use 60 or 66",
        ),
        (
            ["tasks.caption.data.image.mode=keep_aspect"],
            "tasks.caption: data.image.mode=keep_aspect gives images of different sizes, so "
            "micro_batch must be 1, not 32",
        ),
        (
            ["tasks.caption.data.image.sizes=[64, 72]"],
            "tasks.caption.data.image.sizes=72 is not a multiple of 16, as model.encoders.image "
            "(vit) needs: use 64 or 80",
        ),
        (
            ["tasks.caption.data.image.size=60"],
            "tasks.caption.data.image.size=60 is not a multiple of 16, as model.encoders.image "
            "(vit) needs: use 48 or 64",
        ),
        (
            ["tasks.caption.data.text_length=65"],
            "tasks.caption.data.text_length=65 exceeds "
            "tasks.caption.objective.decoder.max_positions=64: raise max_positions or lower "
            "text_length",
        ),
        (
            ["tasks.caption.objective.max_new_tokens=65"],
            "tasks.caption.objective.max_new_tokens=65 exceeds "
            "tasks.caption.objective.decoder.max_positions=64: lower max_new_tokens",
        ),
        (
            ["model.encoders.image.heads=3"],
            "model.encoders.image: heads (3) must divide width (128)",
        ),
        (
            ["tasks.caption.objective.decoder.heads=3"],
            "tasks.caption.objective.decoder: heads (3) must divide width (128)",
        ),
        (
            ["steps=30"],
            "schedule.warmup_steps=30 must be smaller than steps=30: lower warmup_steps",
        ),
        (
            ["model.encoders.other={}"],
            "model.encoders.other: no task uses this encoder, so it would only decay: remove it, "
            "or name it in a task's objective.encoder",
        ),
        (
            ["tasks.caption.evaluation=null", "evaluation_every_steps=150"],
            "evaluation_every_steps=150, but no task has an `evaluation` block: add one, or set "
            "evaluation_every_steps=null",
        ),
        (
            ["tasks.caption.evaluation.image={size: 64, mode: keep_aspect}"],
            "tasks.caption.evaluation.micro_batch=32 must be 1 with image mode keep_aspect",
        ),
        (
            ["optimizer.kind=mt_adamw"],
            "optimizer: clip_norm=1.0 does not go with kind=mt_adamw, which gives every gradient "
            "the norm omega, whatever it was before: set clip_norm=null",
        ),
        (
            ["optimizer.kind=mt_adamw", "optimizer.clip_norm=null", "optimizer.omega={cap: 2.0}"],
            "optimizer.omega: 'cap' is not among tasks: caption",
        ),
        (
            ["optimizer.task_clip_norms={cap: 2.0}"],
            "optimizer.task_clip_norms: 'cap' is not among tasks: caption",
        ),
        (
            ["optimizer.layer_decay={image: 0.9}"],
            "optimizer.layer_decay: 'image' is not an encoder; there are: encoders.image",
        ),
        (["ema.decay=1.0"], "ema.decay: input should be less than 1, not 1.0"),
        (
            ["name=a/b"],
            "name: string should match pattern '^[A-Za-z0-9][A-Za-z0-9._-]*$', not 'a/b'",
        ),
        (
            ["tasks={}", "tasks.caption=null", "evaluation_every_steps=null"],
            "tasks: block should have at least 1 item, not 0",
        ),
    ],
)
def test_what_cannot_work_is_one_line_with_the_way_out(overrides, expected):
    assert fault(*overrides) == expected


def test_an_objective_must_name_an_encoder():
    assert [line.split(": ", 1)[1] for line in faults("tasks.caption.objective.encoder=imge")] == [
        "tasks.caption.objective.encoder='imge' is not among model.encoders: image",
        "model.encoders.image: no task uses this encoder, so it would only decay: remove it, or "
        "name it in a task's objective.encoder",
    ]


def test_names_become_parts_of_parameter_names():
    assert "must be letters, digits and _ only" in fault(
        'model.encoders."a.b"={image_size: 64}',
        "model.encoders.image=null",
        "tasks.caption.objective.encoder=a.b",
    )
    assert "the name 'keys' is taken by torch" in fault(
        "model.encoders.keys={}",
        "model.encoders.image=null",
        "tasks.caption.objective.encoder=keys",
    )


SECOND = (
    "tasks.second={objective: {type: captioning}, data: {shards: [x], image: {size: 64}}, "
    "global_batch: 2, micro_batch: 2, weight: 3}"
)


def test_several_tasks_in_one_run():
    recipe = load_recipe("git_digits", [SECOND, "sampling.mode=iid", "sampling.alpha=0.5"])
    assert list(recipe.tasks) == ["caption", "second"]
    assert recipe.tasks["second"].weight == 3.0
    assert (recipe.sampling.mode, recipe.sampling.check_every_steps) == ("iid", 100)


def test_sources_in_place_of_shards(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sources = "tasks.caption.data.sources={a: {shards: [x], weight: 3}, b: {shards: [s3://y/z]}}"
    recipe = load_recipe("git_digits", ["tasks.caption.data.shards=null", sources])
    data = recipe.tasks["caption"].data
    assert data.shards is None
    assert data.sources["a"].shards == [f"{tmp_path}/x"] and data.sources["a"].weight == 3.0
    fewer = load_recipe(
        "git_digits",
        ["tasks.caption.data.shards=null", sources, "tasks.caption.data.sources.a=null"],
    )
    assert list(fewer.tasks["caption"].data.sources) == ["b"]
    assert fault(sources).endswith("is needed, shards and sources are given; set one to null")
    recipe.dump(tmp_path / "r.yaml")
    assert load_resolved(tmp_path / "r.yaml") == recipe


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["sampling.stages=[{from_step: 5, weights: {caption: 1}}]"],
            "sampling.stages[0].weights must name every task (caption, second), with 0 for one "
            "that is off, not caption",
        ),
        (
            ["sampling.stages=[{from_step: 5000, weights: {caption: 1, second: 1}}]"],
            "sampling.stages[0].from_step=5000 never comes: steps=1000; remove the stage or raise "
            "steps",
        ),
        (
            ["sampling.stages=[{from_step: 0, weights: {caption: 1, second: 0}}]"],
            "sampling.stages: second is off in every stage, so its parameters would only decay: "
            "remove the task, or give it a weight",
        ),
        (
            ["sampling.stages=[{from_step: 5, weights: {caption: -1}}]"],
            "sampling.stages[0]: weights.caption=-1.0 must be 0 or more, and finite",
        ),
        (
            ["sampling.mode=mixed", "optimizer.task_clip_norms={caption: 1.0}"],
            "optimizer.task_clip_norms clips each task's gradient on its own, but with "
            "sampling.mode=mixed a step has those of all tasks in one: use block or iid, or "
            "clip_norm",
        ),
        (
            ["sampling.mode=blok"],
            "sampling.mode: 'blok' is not one of block, iid, mixed; did you mean 'block'?",
        ),
        (
            ["sampling.stages=[{step: 5, weights: {caption: 1}}]"],
            "sampling.stages[0].from_step: required, but not given",
        ),
    ],
)
def test_sampling_that_cannot_work(overrides, expected):
    lines = [re.sub(r"^(override '.*?'|\S+): ", "", line) for line in faults(SECOND, *overrides)]
    assert expected in lines


def test_trackers(monkeypatch):
    """A wrong name has its nearest; a missing package is told by `check` and at the start."""
    assert "'wandbb' is not one of aim, " in (said := fault("logging.trackers=[wandbb]"))
    assert said.endswith("did you mean 'wandb'?")
    finder = "pretrain.engine.report.trackers.importlib.util.find_spec"
    monkeypatch.setattr(finder, lambda name: None)
    recipe = load_recipe("git_digits", ["logging.trackers=[wandb]"])
    (warning,) = recipe_checks.warnings(recipe)
    assert "wandb is not installed" in warning and warning.endswith("pip install wandb")


def test_loss_weights_that_cancel_are_pointed_out():
    balanced = ["optimizer.kind=mt_adamw", "optimizer.clip_norm=null"]
    weighted = ["tasks.caption.loss_weight=2"]
    assert recipe_checks.warnings(load_recipe("git_digits", balanced)) == []
    frozen = ['optimizer.frozen=["encoders.*"]']
    (line,) = recipe_checks.warnings(load_recipe("git_digits", frozen))
    assert "random first values" in line
    loaded = [*frozen, "initial_weights=w.safetensors"]
    assert recipe_checks.warnings(load_recipe("git_digits", loaded)) == []
    (line,) = recipe_checks.warnings(load_recipe("git_digits", balanced + weighted))
    assert line.startswith("tasks.caption.loss_weight=2 cancels with") and "omega" in line
    assert recipe_checks.warnings(load_recipe("git_digits", weighted)) == []


def multi(*overrides: str) -> str:
    """The only fault of the multi-task recipe with these overrides, without its place."""
    (line,) = faults(*overrides, recipe="digits_multitask")
    return line[line.index(": tasks.") + 2 :]


def test_tasks_of_all_kinds_share_an_encoder():
    recipe = load_recipe("digits_multitask")
    kinds = {name: (t.objective.type, t.data.type) for name, t in recipe.tasks.items()}
    assert kinds == {
        "caption": ("captioning", "captions"),
        "classify": ("classification", "labels"),
        "contrast": ("contrastive", "captions"),
    }
    assert {name: e.type for name, e in recipe.model.encoders.items()} == {
        "image": "vit",
        "text": "text",
    }
    assert recipe.tasks["classify"].data.classes == 10


def test_what_reads_text_needs_a_tokenizer_and_nothing_else_does():
    found = [line.split(": ", 1)[1] for line in faults("tokenizer=null", recipe="digits_multitask")]
    assert found == ["tokenizer: give tokenizer.path; tasks.caption.data reads text"]
    others = ("tasks.caption=null", "tasks.contrast=null", "tokenizer=null", "steps=60")
    found = faults(*others, recipe="digits_multitask")
    expected = "give tokenizer.path; model.encoders.text reads text"
    assert any(line.endswith(expected) for line in found)
    labels = load_recipe("digits_multitask", [*others, "model.encoders.text=null"])
    assert labels.tokenizer is None and list(labels.tasks) == ["classify"]
    assert load_recipe("internimage_t_in1k").tokenizer is None


def test_text_data_fit_no_objective_that_reads_images():
    text = "tasks.other={objective: {type: captioning}, data: {type: text, shards: [x]}, "
    evaluation = "global_batch: 2, micro_batch: 2, evaluation: {shards: [x], image: {size: 64}}}"
    others = ("tasks.caption=null", "tasks.contrast=null", "model.encoders.text=null")
    found = faults(*others, text + evaluation, recipe="digits_multitask")
    assert any("tasks.other.data.type='text' does not fit" in line for line in found)
    assert any("evaluation.image: data of type text have no images" in line for line in found)


def test_the_objective_says_what_its_data_are_unless_they_say_so_themselves():
    labels = "tasks.classify.data.type=labels"
    assert load_recipe("digits_multitask", [labels]) == load_recipe("digits_multitask")
    assert multi("tasks.contrast.data.type=labls") == (
        "tasks.contrast.data.type: 'labls' is not one of boxes, captions, labels, images, "
        "text, m3i; did you mean 'labels'?"
    )
    shards = "{type: labels, shards: [x], classes: 3, image: {size: 64}}"
    (fault,) = faults(
        "tasks.caption=null",
        "tasks.contrast=null",
        "model.encoders.text=null",
        f"tasks.other={{objective: {{type: captioning}}, data: {shards}, global_batch: 2, "
        "micro_batch: 2}",
        recipe="digits_multitask",
    )
    assert fault.endswith(
        ": tasks.other.data.type='labels' does not fit tasks.other.objective.type='captioning', "
        "which reads 'captions': change one of them"
    )


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["tasks.classify.data.classes=null"],
            "tasks.classify.data.classes: input should be a valid integer, not None",
        ),
        (
            [
                "tasks.more={objective: {type: classification, encoder: image}, global_batch: 4, "
                "micro_batch: 2, data: {type: boxes, shards: [x], classes: 3, image: {size: 64}}}"
            ],
            "tasks.more.data.type='boxes' does not fit tasks.more.objective.type='classification', "
            "which reads 'labels': change one of them",
        ),
        (
            ["tasks.classify.data.second_view={size: 60}"],
            "tasks.classify.data.second_view.size=60 is not a multiple of 16, as "
            "model.encoders.image (vit) needs: use 48 or 64",
        ),
        (
            ["tasks.classify.data.label_source='json:'"],
            "tasks.classify.data.label_source: label_source 'json:': write an extension, or "
            "json:KEY",
        ),
        (
            ["tasks.classify.data.captions_per_image=2"],
            "tasks.classify.data.captions_per_image: unknown key; that key belongs to "
            "tasks.<name>.data.captions_per_image",
        ),
        (
            ["tasks.contrast.data.captions_per_image=2"],
            "tasks.contrast.data.captions_per_image=2 must be 1 for a contrastive objective, "
            "whose images have one text each in a step",
        ),
        (
            ["tasks.contrast.data.text_length=33"],
            "tasks.contrast.data.text_length=33 exceeds model.encoders.text.max_positions=32: "
            "raise max_positions or lower text_length",
        ),
        (
            ["tasks.classify.objective.encoder=text"],
            "tasks.classify.objective.encoder='text' must read images, but "
            "model.encoders.text.type=text reads text: name another encoder",
        ),
        (
            ["tasks.classify.data.image.size=60"],
            "tasks.classify.data.image.size=60 is not a multiple of 16, as model.encoders.image "
            "(vit) needs: use 48 or 64",
        ),
        (
            ["tasks.classify.objective.smaller_sizes=[40]"],
            "tasks.classify.objective.smaller_sizes=40 is not a multiple of 16, as "
            "model.encoders.image (vit) needs: use 32 or 48",
        ),
        (
            ["tasks.classify.objective.smaller_sizes=[640]"],
            "tasks.classify.objective.smaller_sizes: 640 is not below "
            "tasks.classify.data.image.size=64",
        ),
        (
            [
                "tasks.classify.objective.smaller_sizes=[48]",
                "tasks.classify.data.image.sizes=[64, 48]",
            ],
            "tasks.classify.objective.smaller_sizes: 48 is not below "
            "tasks.classify.data.image.sizes=48",
        ),
        (
            ["tasks.classify.data.smaller_views=[40]"],
            "tasks.classify.data.smaller_views=40 is not a multiple of 16, as "
            "model.encoders.image (vit) needs: use 32 or 48",
        ),
        (
            [
                "tasks.classify.data.smaller_views=[48]",
                "tasks.classify.objective.smaller_sizes=[32]",
            ],
            "tasks.classify.objective.smaller_sizes and tasks.classify.data.smaller_views are two "
            "ways to show smaller images: remove one",
        ),
        (
            ["tasks.classify.data.mixing={}", "tasks.classify.micro_batch=1"],
            "tasks.classify: data.mixing mixes neighbours: micro_batch must be even, not 1",
        ),
        (
            ["tasks.contrast.data.frames=2"],
            "tasks.contrast.data.frames=2: a contrastive objective reads images: remove frames",
        ),
        (
            ["tasks.caption.data.frames=2"],
            "tasks.caption.data.frames=2 exceeds tasks.caption.objective.decoder.frames=0: set "
            "that to 2 or more",
        ),
        (
            ["tasks.caption.objective.decoder.frames=6"],
            "tasks.caption.objective.decoder.frames=6 is for clips, but tasks.caption.data.frames "
            "is not set: set both, or none",
        ),
        (
            [
                "tasks.caption.objective.decoder.frames=6",
                "tasks.caption.data.frames=6",
                "tasks.caption.data.second_view={size: 64}",
            ],
            "tasks.caption.data: frames=6: clips have no second_view; remove one",
        ),
        (
            ["tasks.contrast.data.repeats=2"],
            "tasks.contrast.data.repeats=2 must be 1 for a contrastive objective, which would have "
            "to tell an image from its own copies",
        ),
        (
            ["tasks.contrast.objective.temperature=0.001"],
            "tasks.contrast.objective: temperature (0.001) is below 1 / max_scale (0.01), where "
            "it would not be learned: raise one of them",
        ),
        (
            ["tasks.contrast.data=captions"],
            "tasks.contrast.data: input should be a block, not 'captions'",
        ),
    ],
)
def test_faults_of_other_objectives(overrides, expected):
    assert multi(*overrides) == expected


def test_a_contrastive_task_needs_a_text_encoder():
    found = [
        line.split(": ", 1)[1]
        for line in faults("tasks.contrast.objective.text_encoder=image", recipe="digits_multitask")
    ]
    assert found == [
        "tasks.contrast.objective.text_encoder='image' must read text, but "
        "model.encoders.image.type=vit reads images: name another encoder",
        "model.encoders.text: no task uses this encoder, so it would only decay: remove it, or "
        "name it in a task's objective.encoder",
    ]


def test_faults_in_sources_of_captions_name_the_place(tmp_path):
    recipe = tiny_recipe(tmp_path, tmp_path / "run")
    file = write_recipe(tmp_path / "r.yaml", recipe)
    for override, message in (
        ("[{sourc: txt}]", "caption_source[0].sourc: unknown key; did you mean 'source'?"),
        ("[txt, {source: 'json:'}]", "caption_source[1].source: source 'json:': write an ext"),
        ("[{source: txt, weight: '2'}]", "caption_source[0].weight: input should be a valid num"),
        ("3", "caption_source: input should be a list, not 3"),
    ):
        with pytest.raises(RecipeError) as error:
            load_recipe(file, [f"tasks.caption.data.caption_source={override}"])
        assert f"tasks.caption.data.{message}" in str(error.value)
    two = "tasks.caption.data.caption_source=[{source: txt, weight: 2}, json:a]"
    loaded = load_recipe(file, [two])
    loaded.dump(tmp_path / "resolved.yaml")
    assert load_resolved(tmp_path / "resolved.yaml") == loaded
