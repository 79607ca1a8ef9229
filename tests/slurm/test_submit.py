"""From a recipe and a site file to a batch script; what is refused before SLURM sees it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from slurm import cluster, recipes, submit
from slurm.script import Job, gpu_options, header, render, version_of
from slurm.site import Site, SiteError, read_site
from tests.tiny_run import pack_scenes, tiny_recipe, write_recipe

EXAMPLE = Path(__file__).resolve().parents[2] / "slurm/sites/example.yaml"


def job(run: Path, **changes) -> Job:
    return Job(**{
        "name": "pretrain-a-1", "run": run, "nodes": "64", "time": "24:00:00", "launcher": "srun",
        "train": ["pretrain.train", "r.yaml"], "requeue": True, "chain": False, **changes,
    })  # fmt: skip


def test_the_example_is_a_site(monkeypatch):
    site = read_site(EXAMPLE)
    assert (site.partition, site.ranks, site.cpus_per_task) == ("gpu", 8, 12)
    monkeypatch.setenv("OMNIPRETRAIN_SITE", str(EXAMPLE))
    assert read_site(None) == site
    monkeypatch.delenv("OMNIPRETRAIN_SITE")
    assert read_site(None) == Site()


@pytest.mark.parametrize(("text", "said"), [
    ("partion: gpu", "unknown key 'partion'; did you mean partition?"),
    ("colour: red", "unknown key 'colour'; known: partition, account"),
    ("gpus_per_node: many", "gpus_per_node: 'many' is not a number"),
    ("setup: module load cuda", "setup: 'module load cuda' is not a list of texts"),
    ("exclusive: 1", "exclusive: 1 is not true or false"),
    ("- a", "expected `key: value` lines"),
    ("a: [", "site.yaml: "),
])  # fmt: skip
def test_wrong_site_files(tmp_path, text, said):
    path = tmp_path / "site.yaml"
    path.write_text(text)
    with pytest.raises(SiteError) as error:
        read_site(path)
    assert said in str(error.value) and "site.yaml" in str(error.value)


@pytest.mark.parametrize(("text", "version"), [
    ("slurm 22.05.8", (22, 5)), ("slurm 24.11.0-0rc1", (24, 11)), ("", (0, 0)),
])  # fmt: skip
def test_gpus_are_asked_for_per_node(text, version):
    assert version_of(text) == version
    assert gpu_options(Site(), version) == ["--gpus-per-node=8"]
    assert gpu_options(Site(gres="gres:h100", gpus_per_node=4), version) == ["--gres=gpu:h100:4"]
    assert gpu_options(Site(gpus_per_node=0), version) == []
    options = header(job(Path("/r")), Site(), version)
    assert not [option for option in options if "per-task" in option and "gpu" in option]


def test_header_and_script(tmp_path):
    site = Site(partition="gpu", qos="long", cpus_per_task=12, exclude=["n9"],
                setup=["module load cuda"], environment={"A": "b c"}, header=["--mail-type=END"])
    options = header(job(tmp_path, exclude=["n3"]), site, (22, 5))
    assert {"--nodes=64", "--ntasks-per-node=8", "--gpus-per-node=8", "--requeue", "--exclusive",
            "--mem=0", "--signal=B:USR1@600", "--wait-all-nodes=1", "--open-mode=append",
            "--cpus-per-task=12", "--exclude=n3,n9", "--qos=long", "--mail-type=END",
            "--time=24:00:00"} <= set(options)
    chained = header(job(tmp_path, requeue=False, chain=True, launcher="torchrun"), site, (22, 5))
    assert {"--no-requeue", "--dependency=singleton", "--ntasks-per-node=1",
            "--cpus-per-task=96"} <= set(chained)
    for nodes, launcher in (("1-64", "torchrun"), ("64", "deepspeed"), ("1-64", "srun")):
        text = " ".join(header(job(tmp_path, nodes=nodes, launcher=launcher), site, (22, 5)))
        # With one task a node SLURM would give a span as few nodes as it may.
        assert ("--ntasks-per-node" in text) == ((nodes, launcher) != ("1-64", "torchrun"))
    train = ["pretrain.train", str(tmp_path / "a b.yaml"), "x=$Y"]
    text = render(job(tmp_path, train=train, code=tmp_path / "code 1"), site, (22, 5))
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    lines = text.splitlines()
    assert lines[0] == "#!/bin/bash" and "export A='b c'" in lines
    assert lines.index("module load cuda") > lines.index("export A='b c'")
    # The shell becomes the supervisor, to which the signals of the batch step go.
    assert lines[-1].startswith("exec python3 -u -m slurm.supervise ")
    assert lines[-1].endswith(f"-- pretrain.train '{tmp_path}/a b.yaml' \"x=$Y\"")


@pytest.fixture
def no_cluster(monkeypatch):
    monkeypatch.setattr(cluster, "jobs_of", lambda run: [])
    monkeypatch.setattr(cluster, "longest_time", lambda partition: "2-00:00:00")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> str:
    """A recipe whose data are there."""
    folder = tmp_path_factory.mktemp("recipe")
    pack_scenes(folder)
    return str(write_recipe(folder / "recipe.yaml", tiny_recipe(folder, folder / "run")))


def run_submit(*words: str) -> int:
    return submit.main(list(words))


def test_dry_run_prints_the_script_and_writes_nothing(tmp_path, no_cluster, capsys, recipe):
    run, site = tmp_path / "run", tmp_path / "site.yaml"
    site.write_text("gpus_per_node: 0\nranks_per_node: 2\nlocal_folders: []\n")
    options = ["--nodes", "2", "--site", str(site), "--dry-run"]
    assert run_submit(recipe, f"run_dir={run}", *options) == 0
    out = capsys.readouterr()
    assert "#SBATCH --nodes=2" in out.out and "#SBATCH --time=2-00:00:00" in out.out
    assert f"{run}/submit/001.yaml --start-or-resume --expect-world 4" in out.out
    assert "4 ranks; nothing was written" in out.err and not run.exists()


def test_what_is_refused(tmp_path, no_cluster, monkeypatch, capsys, recipe):
    site = tmp_path / "site.yaml"
    site.write_text("local_folders: []\n")
    shared = ["--dry-run", "--site", str(site)]
    for words, said in (
        (["internimage_smal", *shared], "internimage_smal"),
        ([recipe, "stepz=3", *shared], "stepz"),
        ([recipe, "run_dir=/dev/shm/x", "--dry-run"], "which each node has for itself"),
        ([recipe, "tasks.caption.data.shards=[/nowhere]", *shared], "refuses the run on 8 ranks"),
    ):
        assert run_submit(*words) == 2
        assert said in capsys.readouterr().err, words
    monkeypatch.setattr(cluster, "jobs_of", lambda run: [{"job": "17", "state": "RUNNING"}])
    assert run_submit(recipe, f"run_dir={tmp_path}/r", *shared) == 2
    assert "has jobs already: 17 (running)" in capsys.readouterr().err
    monkeypatch.setattr(cluster, "jobs_of", lambda run: [])
    control = tmp_path / "r/control"
    control.mkdir(parents=True)
    (control / "status.json").write_text(json.dumps({"state": "finished"}))
    assert run_submit(recipe, f"run_dir={tmp_path}/r", *shared) == 2
    assert "is finished" in capsys.readouterr().err


def test_the_code_of_a_run_is_a_copy_that_runs(tmp_path):
    from slurm.code_copy import copy_code

    copy_code(tmp_path / "code")
    done = subprocess.run([sys.executable, "-m", "pretrain", "recipes"], cwd=tmp_path / "code",
                          capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"})
    assert "internimage_small" in done.stdout, done.stderr
    assert (tmp_path / "code/COMMIT").read_text().strip()


def test_sweeps(tmp_path):
    grid = tmp_path / "grid.yaml"
    grid.write_text("optimizer.lr: [1.0e-3, 2.0e-3]\noptimizer.kind: [adamw, mt_adamw]\n")
    assert recipes.sweep(grid) == [
        ["optimizer.lr=0.001", "optimizer.kind=adamw"],
        ["optimizer.lr=0.001", "optimizer.kind=mt_adamw"],
        ["optimizer.lr=0.002", "optimizer.kind=adamw"],
        ["optimizer.lr=0.002", "optimizer.kind=mt_adamw"],
    ]
    grid.write_text("optimizer.lr: 3\n")
    with pytest.raises(recipes.SubmitError, match="expected `key:"):
        recipes.sweep(grid)


def test_a_sweep_is_one_array(tmp_path):
    train = ["pretrain.train", f"{tmp_path}/$ELEMENT/r.yaml"]
    text = render(job(tmp_path, elements=3, train=train),
                  Site(), (22, 5))
    assert "#SBATCH --array=0-2" in text
    assert f"#SBATCH --output={tmp_path}/%3a/logs/job-%A_%a.log" in text
    assert 'ELEMENT=$(printf %03d "$SLURM_ARRAY_TASK_ID")' in text
    assert f'slurm.supervise "{tmp_path}/$ELEMENT"' in text
