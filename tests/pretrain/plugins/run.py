"""Run modules of the project with the toys among the kinds of a recipe: `run MODULE ARGS [-- ...]`.

The toys are files of their own, and each of these lines is all that `kinds.py` would get.
"""

import importlib
import importlib.util
import sys
import types
from pathlib import Path

LINES = (
    "from tests.pretrain.plugins.toy_data import ToyClassificationSettings, ToyDataSettings",
    "from tests.pretrain.plugins.toy_encoder import ToyEncoderSettings, ToyRefinerSettings",
    "from tests.pretrain.plugins.toy_objective import ToyObjectiveSettings",
)
KINDS = "pretrain.recipe.kinds"


def plug_in() -> None:
    """Load `kinds.py` with the lines behind its other imports, before anything reads it."""
    assert KINDS not in sys.modules
    path = Path(importlib.util.find_spec(KINDS).origin)
    above, found, below = path.read_text(encoding="utf-8").partition("\n\n\ndef ")
    assert found
    module = types.ModuleType(KINDS)
    module.__file__ = str(path)
    sys.modules[KINDS] = module
    exec(compile("\n".join([above, *LINES]) + found + below, str(path), "exec"), module.__dict__)


def main() -> int:
    plug_in()
    commands: list[list[str]] = [[]]
    for argument in sys.argv[1:]:
        if argument == "--":
            commands.append([])
        else:
            commands[-1].append(argument)
    for module, *arguments in commands:
        found = importlib.import_module(module)
        if hasattr(found, "__path__"):  # a package, which `python -m` would run by this file
            found = importlib.import_module(f"{module}.__main__")
        code = found.main(arguments)
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
