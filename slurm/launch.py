"""From a launcher's name to its command on the nodes of a job."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

LAUNCHERS = ("srun", "torchrun", "deepspeed")
# Below the ports that systems hand out by themselves (from 32768 on).
_FIRST_PORT, _PORTS = 15_000, 15_000


def port_of(job: int, attempt: int, check: bool = False) -> int:
    """Where ranks meet: another port for each job, each of its tries, and the check before it."""
    return _FIRST_PORT + (job * 16 + 2 * attempt + check) % _PORTS


def job_id(environment: Mapping[str, str]) -> str:
    """What scontrol calls this job; an element of an array by its own name.

    The raw number of the last element is that of the whole array: requeueing it starts all.
    """
    if array := environment.get("SLURM_ARRAY_JOB_ID"):
        return f"{array}_{environment['SLURM_ARRAY_TASK_ID']}"
    return environment.get("SLURM_JOB_ID", "")


def hosts(nodelist: str) -> list[str]:
    """`gpu[07-09,12],login1` are gpu07, gpu08, gpu09, gpu12 and login1."""
    found = []
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodelist):
        heads = [part]
        while any("[" in head for head in heads):
            heads = [one for head in heads for one in _unfold(head)]
        found += heads
    return found


def _unfold(name: str) -> list[str]:
    match = re.search(r"\[([^\]]*)\]", name)
    if match is None:
        return [name]
    before, after, names = name[: match.start()], name[match.end() :], []
    for span in match[1].split(","):
        first, _, last = span.partition("-")
        for number in range(int(first), int(last or first) + 1):
            names.append(f"{before}{number:0{len(first)}d}{after}")
    return names


def command(
    launcher: str,
    train: Sequence[str],
    run: Path,
    nodes: Sequence[str],
    per_node: int,
    port: int,
    log: str,
    python: str,
) -> list[str]:
    """The command that starts `python -m` train on these nodes, `per_node` ranks on each.

    log: file name in RUN/logs of each task's output, with SLURM's %j and %t.

    SLURM owns every process, whatever starts the ranks of a node: nothing needs ssh. Each task sees
    all GPUs that its node gives the job, and no other's: `--gpu-bind=none` would hide from it which
    they are.
    """
    tasks = per_node if launcher == "srun" else 1
    step = [
        "srun",
        f"--nodes={len(nodes)}",
        f"--ntasks={len(nodes) * tasks}",
        f"--ntasks-per-node={tasks}",
        "--distribution=block",
        "--kill-on-bad-exit=1",
        # A step that died with a rebooted node holds its place for minutes: steps may overlap.
        "--overlap",
        "--wait=60",
        f"--nodelist={','.join(nodes)}",
        f"--output={run / 'logs' / log}",
        "--open-mode=append",
    ]
    if launcher == "srun":
        return [*step, python, "-u", "-m", *train]
    if launcher == "torchrun":
        inner = (
            f"exec {python} -m torch.distributed.run --nnodes={len(nodes)} "
            f"--nproc-per-node={per_node} --node-rank=$SLURM_NODEID --master-addr={nodes[0]} "
            f'--master-port={port} -m "$@"'
        )
    elif launcher == "deepspeed":
        hostfile = run / "control" / "hostfile"
        hostfile.parent.mkdir(parents=True, exist_ok=True)
        hostfile.write_text("".join(f"{n} slots={per_node}\n" for n in nodes), encoding="utf-8")
        inner = (
            f"exec {python} -m deepspeed.launcher.runner --no_ssh --node_rank $SLURM_NODEID "
            f'--hostfile "{hostfile}" --master_addr {nodes[0]} --master_port {port} --module "$@"'
        )
    else:
        raise ValueError(f"launcher {launcher!r} is none of {', '.join(LAUNCHERS)}")
    return [*step, "sh", "-c", f"trap '' USR1 USR2; {inner}", "launch", *train]


# Where torchrun, and deepspeed, begin to speak of a rank that has failed.
_REPORT = re.compile(
    r"^E\d{4} .*\] failed \(exitcode: (-?\d+)\)|^\[.*\[launch\.py:\d+:sigkill_handler\]",
    re.MULTILINE,
)


def end_of_ranks(text: str) -> tuple[str, int | None]:
    """From what a launcher and its ranks have said: the last words of a rank, and its exit code,
    which torchrun keeps for itself (it ends with 1); None if nothing tells it."""
    report = _REPORT.search(text)
    lines = text[: report.start() if report else None].strip().splitlines()
    code = int(report[1]) if report and report[1] else None
    return (lines[-1].strip() if lines else ""), code


def environment_of(port: int, nodes: Sequence[str]) -> dict[str, str]:
    """What the ranks find in their environment, unless the site says otherwise."""
    usual = {
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        "NCCL_DEBUG": "WARN",
        "PYTHONFAULTHANDLER": "1",
        "PYTHONUNBUFFERED": "1",
    }
    if cpus := os.environ.get("SLURM_CPUS_PER_TASK"):
        usual["SRUN_CPUS_PER_TASK"] = cpus  # srun 22.05 and newer do not take it over
    return (
        usual
        | os.environ
        | {
            "MASTER_ADDR": nodes[0],
            "MASTER_PORT": str(port),
        }
    )
