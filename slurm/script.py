"""The batch script of a run: header, the site's lines, and the supervisor in its place."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from slurm.site import Site, SiteError


@dataclass(frozen=True)
class Job:
    """What is asked of SLURM for one run."""

    name: str
    run: Path
    nodes: str
    """A number, or a span ("1-2")."""
    time: str | None
    launcher: str
    train: Sequence[str]
    """Module and arguments of the trainer."""
    requeue: bool
    chain: bool
    code: Path | None = None
    """A copy of the code that the job runs."""
    exclude: Sequence[str] = ()
    script: Path | None = None
    """Where the script will lie, for a successor that keeps away from bad nodes."""
    check: str = ""
    """Module that looks at the nodes before the first try of a job; "" = none."""
    elements: int = 0
    """Runs of a sweep: one element of an array each, in RUN/000, RUN/001, ...; 0 = no sweep."""

    @property
    def folder(self) -> Path:
        """The run directory as the script names it."""
        return self.run / "$ELEMENT" if self.elements else self.run


def version_of(text: str) -> tuple[int, int]:
    """`slurm 22.05.8` is (22, 5)."""
    match = re.search(r"(\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def gpu_options(site: Site, version: tuple[int, int]) -> list[str]:
    """How this SLURM is asked for the GPUs of each node: never per task.

    Steps take over what the job has. Before 19.05 there was --gres alone.

    Raises:
        SiteError: 24.11 and newer refuse GPUs per node beside options per task.
    """
    options = re.compile(r"--(gpus|tres)-per-task|--ntasks-per-gpu")
    per_task = [option for option in site.header if options.match(option)]
    if per_task and version >= (24, 11):
        raise SiteError(
            f"site file: header: {per_task[0]}: SLURM {version[0]}.{version[1]:02d} "
            "refuses GPUs per task beside those per node: take it out"
        )
    if not site.gpus_per_node:
        return []
    if site.gres == "gpus-per-node" and not (0, 0) < version < (19, 5):
        return [f"--gpus-per-node={site.gpus_per_node}"]
    kind = site.gres.partition(":")[2]
    return [f"--gres=gpu:{kind + ':' if kind else ''}{site.gpus_per_node}"]


def header(job: Job, site: Site, version: tuple[int, int]) -> list[str]:
    """The options of the batch script, without #SBATCH."""
    tasks = site.ranks if job.launcher == "srun" else 1
    # Of a span that begins with one node SLURM gives only that if it is told of one task for it.
    of_span = "-" in job.nodes and tasks == 1
    options = [
        f"--job-name={job.name}",
        f"--nodes={job.nodes}",
        *([] if of_span else [f"--ntasks-per-node={tasks}"]),
        *gpu_options(site, version),
        f"--output={job.run / ('%3a/logs/job-%A_%a.log' if job.elements else 'logs/job-%j.log')}",
        "--open-mode=append",
        "--wait-all-nodes=1",
        f"--signal=B:USR1@{site.signal_lead_s}",
        "--requeue" if job.requeue else "--no-requeue",
    ]
    if job.elements:
        options.append(f"--array=0-{job.elements - 1}")
    if site.cpus_per_task:
        per = site.cpus_per_task * (1 if job.launcher == "srun" else site.ranks)
        options.append(f"--cpus-per-task={per}")
    if site.exclusive:
        options.append("--exclusive")
    if site.memory is not None:
        options.append(f"--mem={site.memory}")
    if job.time:
        options.append(f"--time={job.time}")
    if job.chain:
        options.append("--dependency=singleton")
    for name in ("partition", "account", "qos", "constraint"):
        if value := getattr(site, name):
            options.append(f"--{name}={value}")
    if away := sorted({*site.exclude, *job.exclude}):
        options.append(f"--exclude={','.join(away)}")
    return options + site.header


def render(job: Job, site: Site, version: tuple[int, int]) -> str:
    """The batch script. Its last line is the supervisor, to which SLURM's signals go."""
    lines = ["#!/bin/bash", *(f"#SBATCH {option}" for option in header(job, site, version)), ""]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in site.environment.items()]
    lines += site.setup
    if job.code is not None:
        folder = shlex.quote(str(job.code))
        lines.append(f'export PYTHONPATH={folder}"${{PYTHONPATH:+:$PYTHONPATH}}"')
        lines.append(f"cd {shlex.quote(str(job.code))}")
    supervise = [
        site.python,
        "-u",
        "-m",
        "slurm.supervise",
        _quoted(str(job.folder)),
        "--launcher",
        job.launcher,
        "--per-node",
        str(site.ranks),
        "--silent-minutes",
        str(site.silent_minutes),
        "--gpus",
        str(site.gpus_per_node),
    ]
    if job.script is not None and not job.elements:
        supervise += ["--script", shlex.quote(str(job.script))]
    if job.elements:
        lines.append('ELEMENT=$(printf %03d "$SLURM_ARRAY_TASK_ID")')
    supervise += ["--check", job.check] if job.check else []
    supervise += ["--requeue"] if job.requeue else []
    supervise += ["--chain", shlex.quote(job.name)] if job.chain else []
    lines.append("exec " + " ".join([*supervise, "--", *map(_quoted, job.train)]))
    return "\n".join(lines) + "\n"


def _quoted(word: str) -> str:
    """For the shell; a variable of the job's own in it stays one."""
    return f'"{word}"' if "$" in word else shlex.quote(word)
