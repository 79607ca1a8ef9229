"""What is peculiar to a cluster, in one small YAML file (see sites/example.yaml)."""

import difflib
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import get_type_hints

import yaml


class SiteError(RuntimeError):
    """A site file is wrong; the message names the file, the key and what is allowed."""


@dataclass(frozen=True)
class Site:
    """How jobs are submitted here. None and empty values are left out of the job."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: list[str] = field(default_factory=list)
    """Nodes to keep away from."""
    gpus_per_node: int = 8
    """0: a cluster without GPUs; `ranks_per_node` then says how many ranks a node runs."""
    ranks_per_node: int | None = None
    """Ranks on each node; None: one for each GPU."""
    cpus_per_task: int | None = None
    gres: str = "gpus-per-node"
    """How GPUs are asked for: gpus-per-node, or gres (--gres=gpu:N), or gres:TYPE."""
    exclusive: bool = True
    memory: str | None = "0"
    """--mem; "0" is all of a node."""
    signal_lead_s: int = 600
    """So long before the time limit the run is asked to stop: at least twice its longest step and
    save together. SLURM may be a minute early."""
    silent_minutes: float = 45.0
    """A run without a heartbeat for so long is ended and started again."""
    node_check: bool = True
    """Before the first try of a job every rank computes something, and all add it up."""
    setup: list[str] = field(default_factory=list)
    """Shell lines before the start: modules, a virtual environment."""
    python: str = "python3"
    """The Python of the job, after `setup`; with a container prefix if need be."""
    environment: dict[str, str] = field(default_factory=dict)
    local_folders: list[str] = field(default_factory=lambda: ["/tmp", "/dev/shm", "/var/tmp"])
    """Folders that each node has for itself: no run directory may lie there."""
    header: list[str] = field(default_factory=list)
    """Further #SBATCH options, without the word."""

    @property
    def ranks(self) -> int:
        """Ranks of a node."""
        return self.ranks_per_node or max(self.gpus_per_node, 1)


def read_site(path: Path | None) -> Site:
    """The site file, or the one that OMNIPRETRAIN_SITE names, or the defaults.

    Raises:
        SiteError: it cannot be read, or a key or a value is not as it should be.
    """
    path = path or (Path(named) if (named := os.environ.get("OMNIPRETRAIN_SITE")) else None)
    if path is None:
        return Site()
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        raise SiteError(f"{path}: {error}") from None
    if not isinstance(found, dict):
        raise SiteError(f"{path}: expected `key: value` lines")
    names, hints = [f.name for f in fields(Site)], get_type_hints(Site)
    for key, value in found.items():
        if key not in names:
            near = difflib.get_close_matches(str(key), names, 1)
            hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(names)}"
            raise SiteError(f"{path}: unknown key {key!r}{hint}")
        if not _fits(value, hints[key]):
            raise SiteError(f"{path}: {key}: {value!r} is not {_words(hints[key])}")
    found |= {"environment": {k: str(v) for k, v in (found.get("environment") or {}).items()}}
    return Site(**found)


def _fits(value: object, hint: object) -> bool:
    text = str(hint)
    if value is None:
        return "None" in text
    if text.startswith("list"):
        return isinstance(value, list) and all(isinstance(v, str) for v in value)
    if text.startswith("dict"):
        return isinstance(value, dict)
    kinds = {"int": int, "float": int | float, "str": str, "bool": bool}
    wanted = [kind for name, kind in kinds.items() if name in text.replace("<class '", " ")]
    return any(isinstance(value, kind) for kind in wanted) and (
        bool in wanted or not isinstance(value, bool)
    )


def _words(hint: object) -> str:
    text = str(hint)
    for start, words in (("list", "a list of texts"), ("dict", "a mapping")):
        if text.startswith(start):
            return words
    if "int" in text or "float" in text:
        return "a number"
    return "true or false" if "bool" in text else "a text"
