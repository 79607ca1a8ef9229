"""From a recipe and a site file to a batch script; what is refused before SLURM sees it."""

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from slurm import recipes, submit
from slurm.script import Job, gpu_options, header, render, version_of
from slurm.site import Site, SiteError, read_site
from tests.tiny_run import pack_scenes, tiny_recipe, write_recipe

EXAMPLE = Path(__file__).resolve().parents[2] / "slurm/sites/example.yaml"


def job(run: Path, **changes) -> Job:
    return Job(
        **{
            "name": "pretrain-a-1",
            "run": run,
            "nodes": "64",
            "time": "24:00:00",
            "launcher": "srun",
            "train": ["pretrain.train", "r.yaml"],
            "requeue": True,
            "chain": False,
            **changes,
        }
    )


def test_the_example_is_a_site(monkeypatch):
    site = read_site(EXAMPLE)
    assert (site.partition, site.ranks, site.cpus_per_task) == ("gpu", 8, 12)
    monkeypatch.setenv("OMNIPRETRAIN_SITE", str(EXAMPLE))
    assert read_site(None) == site
    monkeypatch.delenv("OMNIPRETRAIN_SITE")
    assert read_site(None) == Site()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("partion: gpu", "unknown key 'partion'; did you mean partition?"),
        ("colour: red", "unknown key 'colour'; known: partition, account"),
        ("gpus_per_node: many", "gpus_per_node: 'many' is not a number"),
        ("setup: module load cuda", "setup: 'module load cuda' is not a list of texts"),
        ("exclusive: 1", "exclusive: 1 is not true or false"),
        ("- a", "expected `key: value` lines"),
        ("a: [", "site.yaml: "),
    ],
)
def test_wrong_site_files(tmp_path, text, said):
    path = tmp_path / "site.yaml"
    path.write_text(text)
    with pytest.raises(SiteError) as error:
        read_site(path)
    assert said in str(error.value) and "site.yaml" in str(error.value)


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("slurm 22.05.8", (22, 5)),
        ("slurm 24.11.0-0rc1", (24, 11)),
        ("", (0, 0)),
        ("slurm 18.08.9", (18, 8)),
    ],
)
def test_gpus_are_asked_for_per_node(text, version):
    assert version_of(text) == version
    word = "gres=gpu:8" if version == (18, 8) else "gpus-per-node=8"
    assert gpu_options(Site(), version) == [f"--{word}"]
    assert gpu_options(Site(gres="gres:h100", gpus_per_node=4), version) == ["--gres=gpu:h100:4"]
    assert gpu_options(Site(gpus_per_node=0), version) == []
    per_task = Site(header=["--gpus-per-task=1"])
    if version >= (24, 11):
        with pytest.raises(SiteError, match=r"24\.11 refuses GPUs per task"):
            gpu_options(per_task, version)
    else:
        assert gpu_options(per_task, version) == [f"--{word}"]
    options = header(job(Path("/r")), Site(), version)
    assert not [option for option in options if "per-task" in option and "gpu" in option]


def test_header_and_script(tmp_path):
    site = Site(
        partition="gpu",
        qos="long",
        cpus_per_task=12,
        exclude=["n9"],
        setup=["module load cuda"],
        environment={"A": "b c"},
        header=["--mail-type=END"],
    )
    options = header(job(tmp_path, exclude=["n3"]), site, (22, 5))
    assert {
        "--nodes=64",
        "--ntasks-per-node=8",
        "--gpus-per-node=8",
        "--requeue",
        "--exclusive",
        "--mem=0",
        "--signal=B:USR1@600",
        "--wait-all-nodes=1",
        "--open-mode=append",
        "--cpus-per-task=12",
        "--exclude=n3,n9",
        "--qos=long",
        "--mail-type=END",
        "--time=24:00:00",
    } <= set(options)
    chained = header(job(tmp_path, requeue=False, chain=True, launcher="torchrun"), site, (22, 5))
    assert {
        "--no-requeue",
        "--dependency=singleton",
        "--ntasks-per-node=1",
        "--cpus-per-task=96",
    } <= set(chained)
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


SLURM = {
    "sbatch": """case "$*" in *--test-only*) cat > /dev/null; echo "would start now" >&2;;
              *) echo x >> "$0.calls"; n=$(wc -l < "$0.calls"); [ $n -le ${MOST:-9} ] || {
                 echo "job limit reached" >&2; exit 1; }; echo $((70 + n));; esac""",
    "squeue": 'echo "$JOBS" | sed "/^$/d"',
    "sinfo": 'case "$*" in *version*) echo slurm 22.05.8;; *) echo "gpu*|2-00:00:00";; esac',
    "scontrol": 'echo "PreemptMode = REQUEUE"; echo "SlurmctldParameters = $PARAMETERS"',
}


@pytest.fixture
def on_cluster(tmp_path, monkeypatch):
    """SLURM's commands, as far as a submission asks them."""
    for name, body in SLURM.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    return tmp_path / "bin"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> str:
    """A recipe whose data are there."""
    folder = tmp_path_factory.mktemp("recipe")
    pack_scenes(folder)
    return str(write_recipe(folder / "recipe.yaml", tiny_recipe(folder, folder / "run")))


@pytest.fixture
def in_process(monkeypatch):
    """`python -m pretrain` without a process of its own, which would import torch each time."""
    from pretrain import __main__ as pretrain

    def run(*words: str):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = pretrain.main(words)
        return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())

    monkeypatch.setattr(recipes, "_pretrain", run)


@pytest.fixture
def checks_well(in_process, monkeypatch):
    """What `pretrain check` says is recorded; recipes are read and resolved as ever."""
    read = recipes._pretrain

    def run(*words: str):
        if words[0] == "check":
            return subprocess.CompletedProcess(words, 0, "ok    as recorded\n", "")
        return read(*words)

    monkeypatch.setattr(recipes, "_pretrain", run)


def site_file(tmp_path, ranks: int = 2) -> str:
    path = tmp_path / "site.yaml"
    path.write_text(f"gpus_per_node: 0\nranks_per_node: {ranks}\nlocal_folders: []\n")
    return str(path)


def run_submit(*words: str) -> int:
    return submit.main(list(words))


def test_dry_run_prints_the_script_and_writes_nothing(tmp_path, on_cluster, capsys, recipe):
    """With the real `pretrain show` and `pretrain check`."""
    run = tmp_path / "run"
    options = ["--nodes", "2", "--site", site_file(tmp_path), "--dry-run"]
    assert run_submit(recipe, f"run_dir={run}", *options) == 0
    out = capsys.readouterr()
    assert "#SBATCH --nodes=2" in out.out and "#SBATCH --time=2-00:00:00" in out.out
    assert f"{run}/submit/001.yaml --start-or-resume --expect-world 4" in out.out
    assert "--check pretrain.node_check" in out.out and "would start now" in out.err
    assert "4 ranks; nothing was written" in out.err and not run.exists()
    assert not Path(f"{on_cluster}/sbatch.calls").exists()


def test_a_chain_is_laid_out_and_handed_over(
    tmp_path, on_cluster, capsys, monkeypatch, recipe, checks_well
):
    """What is written, said and warned of; a chain of which a part is refused names the rest."""
    run, options = tmp_path / "run", ["--site", site_file(tmp_path), "--no-code-copy"]
    (run / "control").mkdir(parents=True)
    (run / "control/stop").touch()
    assert run_submit(recipe, f"run_dir={run}", "--chain", "3", *options) == 0
    out = capsys.readouterr()
    assert "submitted: 71, 72, 73 (pretrain-run-" in out.out and f"status {run}" in out.out
    assert "SlurmctldParameters lacks preempt_send_user_signal" in out.err
    assert not (run / "control/stop").exists()
    assert "steps" in (run / "submit/001.yaml").read_text()
    script = (run / "submit/001.sbatch").read_text()
    assert "--dependency=singleton" in script and "--chain pretrain-run-" in script
    assert (run / "submit/001.command").read_text().strip()

    monkeypatch.setenv("PARAMETERS", "preempt_send_user_signal")
    monkeypatch.setenv("MOST", "4")
    assert run_submit(recipe, f"run_dir={run}", "--chain", "3", *options) == 2
    err = capsys.readouterr().err
    assert "job limit reached; submitted all the same: 74 of 3" in err and "lacks" not in err

    (on_cluster / "sbatch").write_text("#!/bin/sh\necho no such partition >&2; exit 1\n")
    (run / "control/stop").touch()
    assert run_submit(recipe, f"run_dir={run}", *options) == 2
    assert "sbatch refuses the job: no such partition" in capsys.readouterr().err
    assert (run / "control/stop").exists() and not (run / "submit/003.sbatch").exists()


def test_a_sweep_is_handed_over_as_runs(tmp_path, on_cluster, capsys, recipe, checks_well):
    """Each element has its own recipe and folder; one that is finished does not hold up others."""
    grid, run = tmp_path / "grid.yaml", tmp_path / "run"
    grid.write_text("seed: [1, 2]\n")
    options = ["--site", site_file(tmp_path), "--sweep", str(grid), "--no-code-copy"]
    (run / "000/control").mkdir(parents=True)
    (run / "000/control/status.json").write_text(json.dumps({"state": "finished"}))
    assert run_submit(recipe, f"run_dir={run}", *options) == 0
    assert "2 runs" in capsys.readouterr().out
    for number, seed in enumerate((1, 2)):
        folder = run / f"{number:03d}"
        found = yaml.safe_load((folder / "submit/001.yaml").read_text())
        assert (found["seed"], found["run_dir"]) == (seed, str(folder))
        assert json.loads((folder / "submit/job.json").read_text())["element"] == number
    (run / "001/control/status.json").write_text(json.dumps({"state": "finished"}))
    assert run_submit(recipe, f"run_dir={run}", *options) == 2
    assert "is finished" in capsys.readouterr().err


def test_a_span_of_nodes_has_to_fit_at_both_ends(
    tmp_path, on_cluster, monkeypatch, recipe, in_process
):
    asked: list[int] = []
    monkeypatch.setattr(submit, "require_fit", lambda *words: asked.append(words[-1]) or "")
    options = ["--nodes", "1-4", "--site", site_file(tmp_path), "--dry-run"]
    assert run_submit(recipe, *options) == 0
    assert asked == [2, 8]


def test_what_is_refused(tmp_path, on_cluster, monkeypatch, capsys, recipe, in_process):
    shared = ["--dry-run", "--site", site_file(tmp_path, 8)]
    for words, said in (
        (["internimage_smal", *shared], "internimage_smal"),
        ([recipe, "stepz=3", *shared], "stepz"),
        ([recipe, "run_dir=/dev/shm/x", "--dry-run"], "which each node has for itself"),
        ([recipe, "tasks.caption.data.shards=[/nowhere]", *shared], "refuses the run on 8 ranks"),
    ):
        assert run_submit(*words) == 2
        assert said in capsys.readouterr().err, words
    monkeypatch.setenv("JOBS", "17|RUNNING|None|n1|1:00")
    assert run_submit(recipe, f"run_dir={tmp_path}/r", *shared) == 2
    assert "has jobs already: 17 (running)" in capsys.readouterr().err


def test_the_code_of_a_run_is_a_copy_that_runs(tmp_path):
    from slurm.code_copy import copy_code

    copy_code(tmp_path / "code")
    done = subprocess.run(
        [sys.executable, "-m", "pretrain", "recipes"],
        cwd=tmp_path / "code",
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin"},
    )
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
    text = render(job(tmp_path, elements=3, train=train), Site(), (22, 5))
    assert "#SBATCH --array=0-2" in text
    assert f"#SBATCH --output={tmp_path}/%3a/logs/job-%A_%a.log" in text
    assert 'ELEMENT=$(printf %03d "$SLURM_ARRAY_TASK_ID")' in text
    assert f'slurm.supervise "{tmp_path}/$ELEMENT"' in text
