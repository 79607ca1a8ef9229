"""Submit a run: check the recipe, lay the run directory out, hand the job to SLURM.

    python -m slurm.submit RECIPE [key=value ...] --nodes 64 --time 24:00:00 --chain 5

On a run that exists it goes on where that one stopped. `--dry-run` prints the script and writes
nothing.
"""

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from slurm import cluster
from slurm.cluster import SlurmError
from slurm.code_copy import copy_code
from slurm.launch import LAUNCHERS
from slurm.recipes import SubmitError, require_fit, resolved, sweep
from slurm.run_files import control, read_attempts, status, suspects, write_json
from slurm.script import Job, render, version_of
from slurm.site import Site, SiteError, read_site


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
    if jobs := cluster.jobs_of(run):
        listed = ", ".join(f"{job['job']} ({job['state'].lower()})" for job in jobs)
        raise SubmitError(
            f"{run} has jobs already: {listed}. `python -m slurm stop {run}` ends "
            "the run, `python -m slurm cancel` its jobs"
        )


def plan(options: argparse.Namespace, site: Site, run: Path, elements: int = 0) -> Job:
    """The job of a run directory, or of the folder of a sweep; nothing is written."""
    number = len(list(run.glob("submit/*.sbatch"))) + 1
    name = f"{number:03d}"
    folder = run / "$ELEMENT" if elements else run
    train = ["pretrain.train", str(folder / "submit" / f"{name}.yaml"), "--start-or-resume"]
    if "-" not in options.nodes:
        train += ["--expect-world", str(world_of(options, site))]
    return Job(
        name=cluster.job_name(run),
        run=run,
        nodes=options.nodes,
        time=options.time or cluster.longest_time(site.partition),
        launcher=options.launcher,
        train=train,
        requeue=not options.chain,
        chain=bool(options.chain),
        code=run / "code" / name if options.copy_code else None,
        exclude=suspects(read_attempts(run)),
        script=run / "submit" / f"{name}.sbatch",
        check="pretrain.node_check" if site.node_check else "",
        elements=elements,
    )


def world_of(options: argparse.Namespace, site: Site) -> int:
    """Ranks on all nodes; on as many as there may be."""
    return int(options.nodes.split("-")[-1]) * site.ranks


def accept(options: argparse.Namespace, site: Site, overrides: Sequence[str]) -> tuple[dict, str]:
    """The complete recipe of a run that may start, and what `pretrain check` says of it.

    Raises:
        SubmitError: it may not.
    """
    recipe = resolved(options.recipe, overrides)
    run = Path(recipe["run_dir"]).resolve()
    require_free(run, site)
    worlds = [int(nodes) * site.ranks for nodes in options.nodes.split("-")]  # the ends of a span
    return recipe, [require_fit(options.recipe, overrides, world) for world in worlds][-1]


def submit_runs(options: argparse.Namespace, site: Site) -> int:
    """Refuse what cannot work, write, submit, say what to do next."""
    run = Path(resolved(options.recipe, options.overrides)["run_dir"]).resolve()
    grid = sweep(options.sweep) if options.sweep else []
    runs = [run / f"{number:03d}" for number in range(len(grid))] or [run]
    changes = [
        [*options.overrides, *element, f"run_dir={folder}"]
        for element, folder in zip(grid or [[]], runs, strict=True)
    ]
    accepted = [accept(options, site, overrides) for overrides in changes]
    if all(status(folder).get("state") == "finished" for folder in runs):
        raise SubmitError(f"{run} is finished; nothing is left to do")
    job = plan(options, site, run, len(grid))
    script = render(job, site, version_of(cluster.ask("sinfo", "--version")))
    if warning := cluster.preemption_warning():
        print(f"warn  {warning}", file=sys.stderr)
    world = world_of(options, site)
    if cluster.available():  # before anything is written
        print(cluster.test_only(script), file=sys.stderr)
    if options.dry_run:
        print(script)
        print(
            f"# {world} ranks; nothing was written\n" + _indented(accepted[0][1]), file=sys.stderr
        )
        return 0
    for number, (folder, (recipe, _)) in enumerate(zip(runs, accepted, strict=True)):
        lay_out(folder, job.script.stem, recipe)
        write_json(
            folder / "submit" / "job.json", {"name": job.name, "element": number if grid else None}
        )
        control(folder, "stop").unlink(missing_ok=True)  # a person's, of the time before
    write_script(job, script, options.words)
    jobs = hand_over(job, options.chain or 1)
    each = f", {len(grid)} runs" if grid else ""
    print(
        f"submitted: {', '.join(jobs)} ({job.name}), {world} ranks{each}, run directory {run}\n"
        f"  watch   python -m slurm status {run}\n"
        f"  logs    python -m slurm logs {runs[0]} -f     ({runs[0] / 'logs'})\n"
        f"  stop    python -m slurm stop {runs[0]}        (saves; submit again to go on)"
    )
    return 0


def hand_over(job: Job, count: int) -> list[str]:
    """Submit a job, or all of a chain; returns their numbers.

    Raises:
        SlurmError: one is refused; the message names those that are in the queue all the same.
    """
    jobs: list[str] = []
    try:
        for _ in range(count):
            jobs.append(
                cluster.ask("sbatch", "--parsable", str(job.script), check=True).partition(";")[0]
            )
    except SlurmError as error:
        there = f"; submitted all the same: {', '.join(jobs)} of {count}" if jobs else ""
        raise SlurmError(f"{error}{there}") from None
    return jobs


def lay_out(run: Path, name: str, recipe: dict) -> None:
    """Write what a run reads into RUN/submit."""
    for folder in ("submit", "logs", "control"):
        (run / folder).mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(recipe, sort_keys=False)
    (run / "submit" / f"{name}.yaml").write_text(text, encoding="utf-8")


def write_script(job: Job, script: str, words: Sequence[str]) -> None:
    """Write the script, the typed command (of these words), and the copy of the code."""
    job.script.parent.mkdir(parents=True, exist_ok=True)
    job.script.write_text(script, encoding="utf-8")
    command = shlex.join([sys.executable, "-m", "slurm.submit", *words])
    job.script.with_suffix(".command").write_text(command + "\n", encoding="utf-8")
    if job.code is not None:
        copy_code(job.code)


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
    parser.add_argument(
        "--sweep", type=Path, metavar="GRID", help="a run for each combination of a YAML grid"
    )
    parser.add_argument(
        "--no-code-copy",
        dest="copy_code",
        action="store_false",
        help="run the code where it lies, not a copy in the run directory",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the script, write nothing")
    words = list(sys.argv[1:] if argv is None else argv)
    options = parser.parse_intermixed_args(words)
    options.words = words
    if not re.fullmatch(r"[1-9]\d*(-[1-9]\d*)?", options.nodes):
        parser.error(f"--nodes {options.nodes}: a number, or a span like 1-2")
    if options.sweep and options.chain:
        parser.error("--sweep makes one array, whose elements are requeued: without --chain")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    options = parse(argv)
    try:
        site = read_site(options.site)
        if not options.dry_run and not cluster.available():
            raise SubmitError(
                "there is no sbatch here: submit from a login node, or start "
                "`python -m slurm.supervise RUN -- LAUNCHER ...` by hand"
            )
        return submit_runs(options, site)
    except (SiteError, SlurmError, SubmitError) as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
