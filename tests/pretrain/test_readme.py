"""What the READMEs show of DCNv3 and of commands works when pasted."""

import importlib.util
import re
from pathlib import Path

import pytest

from pretrain.recipe.load import SHIPPED

ROOT = Path(__file__).parents[2]
READMES = ["README.md", "pretrain/README.md"]


@pytest.mark.parametrize("readme", READMES)
def test_the_dcnv3_example_runs(readme):
    text = (ROOT / readme).read_text(encoding="utf-8")
    (example,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    names: dict = {}
    exec(example, names)
    gradients = {name: p.grad for name, p in names["mixer"].named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    assert gradients["output_proj.weight"].abs().sum() > 0


@pytest.mark.parametrize("readme", [*READMES, "data_pipeline/README.md"])
def test_launchers_are_quiet(readme):
    """DeepSpeed's speaks of itself unless told not to; see test_failures.py for what is left."""
    commands = re.findall(r"deepspeed (?:--\S+ ).*", (ROOT / readme).read_text(encoding="utf-8"))
    assert commands and all(line.startswith("deepspeed --quiet ") for line in commands)


@pytest.mark.parametrize("readme", READMES)
def test_modules_and_recipes_are_there(readme):
    text = (ROOT / readme).read_text(encoding="utf-8")
    modules = set(re.findall(r"python -m ([a-z_]+(?:\.[a-z_]+)*)", text))
    assert modules
    assert [name for name in modules if importlib.util.find_spec(name) is None] == []
    recipes = set(re.findall(r"\b(?:internimage|digits|git|m3i)_[a-z0-9_]+\b(?=`)", text))
    assert recipes and all((SHIPPED / f"{name}.yaml").is_file() for name in recipes), recipes
