"""The whole way on a real SLURM: submit a recipe, meet the time limit, go on, finish."""

import json
import sys

import pytest

from tests.slurm.conftest import attempts, wait_for
from tests.tiny_run import pack_scenes, tiny_recipe, write_recipe

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
NODES = 2


@pytest.mark.parametrize("launcher", ["srun", "torchrun", "deepspeed"])
def test_a_run_through_a_time_limit(emulated, tmp_path, launcher):
    """Two jobs of a chain make every step once, with one recipe and a site file of four lines."""
    pack_scenes(tmp_path / "data")
    run, site = tmp_path / "run", tmp_path / "site.yaml"
    recipe = tiny_recipe(tmp_path / "data", run, steps=400, checkpoint__every_steps=100)
    path = write_recipe(tmp_path / "recipe.yaml", recipe)
    site.write_text(f"gpus_per_node: 0\nranks_per_node: 1\nmemory: null\nlocal_folders: []\n"
                    f"python: {sys.executable}\nenvironment: {{DS_ACCELERATOR: cpu}}\n")
    said = emulated.ask(sys.executable, "-m", "slurm", "submit", str(path), "--nodes", "2",
                        "--time", "30", "--chain", "2", "--launcher", launcher,
                        "--site", str(site))
    jobs = said.split("submitted: ")[1].split(" (")[0].split(", ")
    metrics = run / "metrics.jsonl"

    def story() -> str:
        logs = "\n".join(p.read_text(errors="replace")[-2500:] for p in run.glob("logs/*"))
        return f"{attempts(run)}\n{logs}"

    wait_for(lambda: metrics.exists() and metrics.read_text().count('"train"') > 3, 300, story)
    emulated.ask("scancel", "--batch", "--signal=USR1", jobs[0])
    wait_for(lambda: len(attempts(run)) == 2, 400, story)
    first, second = attempts(run)
    assert (first["decision"], first["state"]) == ("requeue", "stopped"), story()
    assert (second["decision"], second["steps"]) == ("done", [first["steps"][1], 400]), story()
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["step"] for line in lines if line.get("kind") == "train"] == list(range(1, 401))
