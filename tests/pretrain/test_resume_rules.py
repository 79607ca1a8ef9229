"""What a resume may change: the rule is about two recipes, whoever changed one of them."""

import pytest

from pretrain.recipe.load import load_recipe
from pretrain.recipe.overlay import RecipeError
from pretrain.recipe.recipe import Recipe
from pretrain.recipe.schema import reference
from pretrain.resume_rules import FREE, RECORDED, check_changes, differences, matches

FIELDS = {field.path.replace("<name>", "x") for field in reference(Recipe)}


@pytest.mark.parametrize(
    ("override", "path"),
    [
        ("steps=2000", "steps"),
        ("schedule={kind: wsd, warmup_steps: 5, decay_steps: 7}", "schedule.decay_steps"),
        ("optimizer.lr=1e-5", "optimizer.lr"),
        ("optimizer.clip_norm=null", "optimizer.clip_norm"),
        ("optimizer.task_clip_norms={caption: 2.0}", "optimizer.task_clip_norms.caption"),
        ("loader={workers: 3}", "loader.workers"),
        (
            "tasks.caption.evaluation=null; evaluation_every_steps=null",
            "tasks.caption.evaluation.shards",
        ),
        ("tasks.caption.data.shards=[elsewhere]", "tasks.caption.data.shards"),
        ("ema={decay: 0.9}", None),
        ("seed=1", None),
        ("optimizer.kind=sgd", None),
        ("optimizer.lr_multipliers={'encoders.*': 0.5}", None),
        ("tasks.caption.global_batch=32", None),
        ("tasks.caption.objective.label_smoothing=0.2", None),
        ("initial_weights=w.safetensors", None),
    ],
)
def test_what_may_change(override, path):
    """path: a field that is among those that change, if they may."""
    before, now = load_recipe("git_digits"), load_recipe("git_digits", override.split("; "))
    if path:
        assert path in check_changes(before, now, "there", step=10)
        return
    field = override.split("=")[0]
    with pytest.raises(RecipeError, match=f"  {field}.* in there, .* now") as error:
        check_changes(before, now, "there")
    assert {path for path in differences(before, now) if path != "ema.evaluate"} == {
        line.split(":")[0].strip() for line in str(error.value).splitlines() if line[:2] == "  "
    }


def test_the_run_is_not_made_shorter_than_it_is():
    recipe = load_recipe("git_digits", ["steps=600"])
    with pytest.raises(RecipeError, match="steps=600: the run has taken 601 steps already"):
        check_changes(recipe, recipe, "there", step=601)


def test_patterns_name_fields_and_no_more_than_they_say():
    """A star is one name: a source's weight decides the order of the data, a task's does not."""
    for pattern in FREE + RECORDED:
        assert any(matches(field, (pattern,)) for field in FIELDS), pattern
    assert matches("tasks.caption.weight", FREE)
    assert not matches("tasks.caption.data.sources.web.weight", FREE)
    assert not matches("tasks.caption.objective.weight", FREE)


def test_missing_labels_may_be_said_to_be_meant():
    """As a warning in the middle of a run advises; to leave such samples out changes the data."""
    before = load_recipe("digits_demo")
    for value, allowed in (("expected", True), ("fault", False)):
        now = load_recipe("digits_demo", [f"tasks.classify.data.unlabelled={value}"])
        if allowed:
            assert "tasks.classify.data.unlabelled" in check_changes(before, now, "there")
        else:
            with pytest.raises(RecipeError, match="unlabelled"):
                check_changes(before, now, "there")
