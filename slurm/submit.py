"""Submit a run: check the recipe, lay the run directory out, hand the job to SLURM.

    python -m slurm.submit RECIPE [key=value ...] --nodes 64 --time 24:00:00 --chain 5

On a run that exists it goes on where that one stopped. `--dry-run` prints the script and writes
nothing.
"""

import argparse
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path

import yaml

from slurm import cluster
from slurm.attempts import read_attempts, suspects
from slurm.cluster import SlurmError
from slurm.code_copy import copy_code
from slurm.launch import LAUNCHERS
from slurm.run_files import control, status
from slurm.script import Job, render, version_of
from slurm.site import Site, SiteError, read_site


class SubmitError(RuntimeError):
    """The run cannot be submitted; the message says what to do."""


def resolved(recipe: str, overrides: Sequence[str]) -> dict:
    """The recipe with all its values, as `pretrain show` prints it.

    Raises:
        SubmitError: what is wrong with it, in the words of the trainer.
    """
    done = _pretrain("show", recipe, *overrides)
    if done.returncode:
        raise SubmitError(done.stderr.strip() or done.stdout.strip())
    return yaml.safe_load(done.stdout)


def require_fit(recipe: str, overrides: Sequence[str], world: int) -> str:
    """What `pretrain check` says for this number of ranks.

    Raises:
        SubmitError: it refuses the run.
    """
    done = _pretrain("check", recipe, *overrides, "--world", str(world))
    if done.returncode:
        raise SubmitError(f"`pretrain check` refuses the run on {world} ranks:\n"
                          f"{(done.stdout + done.stderr).strip()}")
    return done.stdout.strip()


def _pretrain(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "pretrain", *words], capture_output=True,
                          text=True, check=False)


def job_name(run: Path) -> str:
    """The same for all jobs of a run directory, and for no other's."""
    readable = re.sub(r"[^A-Za-z0-9._-]", "-", run.name)
    return f"pretrain-{readable}-{zlib.crc32(str(run).encode()):08x}"


def require_free(run: Path, site: Site) -> None:
    """Refuse a directory that nodes do not share, and a run whose job is queued or running.

    Raises:
        SubmitError
    """
    for folder in site.local_folders:
        if run.is_relative_to(Path(folder).resolve()):
            raise SubmitError(
                f"run_dir {run} lies in {folder}, which each node has for itself: choose a shared "
                "folder (run_dir=...), or take it out of the site file's local_folders"
            )
    if jobs := cluster.jobs_named(job_name(run)):
        listed = ", ".join(f"{job['job']} ({job['state'].lower()})" for job in jobs)
        raise SubmitError(f"{run} has jobs already: {listed}. `python -m slurm stop {run}` ends "
                          "the run, `python -m slurm cancel` its jobs")


def plan(options: argparse.Namespace, site: Site, run: Path) -> Job:
    """The job of a run directory; nothing is written."""
    world = int(str(options.nodes).split("-")[-1]) * site.ranks
    number = len(list(run.glob("submit/*.sbatch"))) + 1
    recipe = run / "submit" / f"{number:03d}.yaml"
    train = ["pretrain.train", str(recipe), "--start-or-resume"]
    if "-" not in str(options.nodes):
        train += ["--expect-world", str(world)]
    return Job(
        name=job_name(run), run=run, nodes=str(options.nodes),
        time=options.time or cluster.longest_time(site.partition), launcher=options.launcher,
        train=train, requeue=not options.chain, chain=bool(options.chain),
        code=run / "code" / f"{number:03d}" if options.copy_code else None,
        exclude=suspects(read_attempts(run)),
    )


def submit_run(options: argparse.Namespace, site: Site, overrides: Sequence[str]) -> int:
    """One run: refuse what cannot work, write, submit, say what to do next."""
    recipe = resolved(options.recipe, overrides)
    run = Path(recipe["run_dir"]).resolve()
    require_free(run, site)
    if status(run).get("state") == "finished":
        raise SubmitError(f"{run} is finished; nothing is left to do")
    world = int(str(options.nodes).split("-")[-1]) * site.ranks
    checked = require_fit(options.recipe, overrides, world)
    job = plan(options, site, run)
    script = render(job, site, version_of(cluster.version()))
    if options.dry_run:
        print(script)
        print(f"# {world} ranks; nothing was written\n" + _indented(checked), file=sys.stderr)
        return 0
    path = lay_out(job, recipe, script)
    print(cluster.test_only(str(path)))
    control(run, "stop").unlink(missing_ok=True)  # a person's, of the time before
    jobs = [cluster.submit(str(path)) for _ in range(options.chain or 1)]
    with open(run / "submit" / "jobs.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"jobs": jobs, "script": path.name}) + "\n")
    print(f"submitted: {', '.join(jobs)} ({job.name}), {world} ranks, run directory {run}\n"
          f"  watch   python -m slurm status {run}\n"
          f"  logs    python -m slurm logs {run} -f     ({run / 'logs'})\n"
          f"  stop    python -m slurm stop {run}        (saves; submit again to go on)")
    return 0


def lay_out(job: Job, recipe: dict, script: str) -> Path:
    """Write what the job reads into RUN/submit and RUN/code; returns the script's path."""
    yaml_path = Path(job.train[1])
    yaml_path.parent.mkdir(parents=True, exist_ok=True)
    for folder in ("logs", "control"):
        (job.run / folder).mkdir(exist_ok=True)
    yaml_path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    path = yaml_path.with_suffix(".sbatch")
    path.write_text(script, encoding="utf-8")
    words = shlex.join([sys.executable, "-m", "slurm.submit", *sys.argv[1:]])
    yaml_path.with_suffix(".command").write_text(words + "\n", encoding="utf-8")
    if job.code is not None:
        copy_code(job.code)
    return path


def sweep(path: Path) -> list[list[str]]:
    """Overrides of every element of a grid: `key: [values]` lines, all combinations.

    Raises:
        SubmitError: it is no such file.
    """
    try:
        grid = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise SubmitError(f"{path}: {error}") from None
    if not isinstance(grid, dict) or not all(isinstance(v, list) and v for v in grid.values()):
        raise SubmitError(f"{path}: expected `key: [value, value]` lines")
    return [
        [f"{key}={json.dumps(value) if not isinstance(value, str) else value}"
         for key, value in zip(grid, values, strict=True)]
        for values in itertools.product(*grid.values())
    ]


def _indented(text: str) -> str:
    return "\n".join(f"#   {line}" for line in text.splitlines())


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="slurm submit", description=__doc__.split("\n\n")[0])
    parser.add_argument("recipe", help="a YAML file or the name of a shipped recipe")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--nodes", default="1", help="a number, or a span like 1-2")
    parser.add_argument("--time", help="D-HH:MM:SS; default: the partition's longest")
    parser.add_argument("--site", type=Path, help="site file (default: OMNIPRETRAIN_SITE)")
    follow = parser.add_mutually_exclusive_group()
    follow.add_argument("--requeue", action="store_true", help="one job, requeued (the default)")
    follow.add_argument("--chain", type=int, metavar="N", help="N jobs, one after the other")
    parser.add_argument("--launcher", choices=LAUNCHERS, default="srun")
    parser.add_argument("--sweep", type=Path, metavar="GRID",
                        help="a run for each combination of a YAML grid")
    parser.add_argument("--no-code-copy", dest="copy_code", action="store_false",
                        help="run the code where it lies, not a copy in the run directory")
    parser.add_argument("--dry-run", action="store_true", help="print the script, write nothing")
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    options = parse(argv)
    try:
        site = read_site(options.site)
        if not options.dry_run and not cluster.available():
            raise SubmitError("there is no sbatch here: submit from a login node, or start "
                              "`python -m slurm.supervise RUN -- LAUNCHER ...` by hand")
        if options.sweep is None:
            return submit_run(options, site, options.overrides)
        run_dir = resolved(options.recipe, options.overrides)["run_dir"]
        for number, element in enumerate(sweep(options.sweep)):
            run = f"run_dir={os.path.join(run_dir, f'{number:03d}')}"
            submit_run(options, site, [*options.overrides, *element, run])
        return 0
    except (SiteError, SlurmError, SubmitError) as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
