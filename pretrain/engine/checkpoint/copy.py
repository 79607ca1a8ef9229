"""Copies of committed checkpoints at another place, named by a URL of any fsspec driver; no torch.

    <url>/
        run.json                  which run they are of
        latest                    name of the newest copy, moved last
        step_000000300/           the files of the checkpoint; its manifest comes last

A folder without its manifest is no copy. What was sent is compared with the manifest on the way,
and what has arrived by its size and by the checksum that the store gives; where it gives none that
can be compared, it is read back.
"""

import base64
import hashlib
import json
import re
import secrets
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

import fsspec

from data_pipeline.files import sync_file, sync_folder, write_atomically
from data_pipeline.storage.locations import without_secrets
from pretrain.engine.checkpoint.files import (
    MANIFEST,
    CheckpointError,
    checkpoint_name,
    list_checkpoints,
    read_manifest,
)
from pretrain.engine.checkpoint.retention import kept_of, step_of
from pretrain.engine.launch.child_process import serve

RUN_FILE, LATEST = "run.json", "latest"
_AT_ONCE = 1 << 22
_HEX_MD5 = re.compile(r'^"?([0-9a-f]{32})"?$')


class FarCheckpoints:
    """The copies under a URL.

    Raises:
        CheckpointError: fsspec cannot open the URL.
    """

    def __init__(self, url: str) -> None:
        try:
            self.fs, root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise CheckpointError(f"cannot open {without_secrets(url)}: {error}") from None
        self.root, self.url = root.rstrip("/"), without_secrets(url)
        self._sent: set[tuple[str, str]] = set()

    # ---- there ---------------------------------------------------------------------------------

    def copy(self, folder: Path, run_id: str) -> None:
        """Copy a checkpoint and see that it has arrived, unless it is there already. `latest` names
        it then, or a newer copy of a checkpoint that lies beside it.

        Raises:
            CheckpointError: the folder is of another run, or something else has arrived.
            OSError and errors of the driver: the store cannot be reached or written.
        """
        self._claim(run_id)
        manifest, sealed = read_manifest(folder), (folder / MANIFEST).read_bytes()
        far = f"{self.root}/{folder.name}"
        if self._content(f"{far}/{MANIFEST}") != sealed:
            self._forget(far)
            for name, entry in manifest["files"].items():
                path = f"{far}/{name}"
                if (path, entry["sha256"]) not in self._sent:
                    self._send(folder / name, path, entry)
                    self._sent.add((path, entry["sha256"]))
            self._write(f"{far}/{MANIFEST}", sealed)
        self._sent.clear()
        named, beside = self.newest(), map(step_of, list_checkpoints(folder.parent))
        if named is None or named < step_of(folder) or named not in beside:
            self._write(f"{self.root}/{LATEST}", f"{folder.name}\n".encode())

    def _claim(self, run_id: str) -> None:
        path = f"{self.root}/{RUN_FILE}"
        found = self._content(path)
        if found is None:
            if self.steps():
                raise CheckpointError(
                    f"{self.url} holds checkpoints without {RUN_FILE}: choose "
                    "an empty folder as checkpoint.copy_to"
                )
            self._write(path, json.dumps({"run": run_id}).encode())
        elif json.loads(found).get("run") != run_id:
            raise CheckpointError(
                f"{self.url} holds the copies of another run: give each run a folder of its own "
                "(checkpoint.copy_to)"
            )

    def _send(self, source: Path, path: str, entry: dict) -> None:
        sha, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
        self._make_parent(path)
        with open(source, "rb") as file, self.fs.open(path, "wb") as out:
            while block := file.read(_AT_ONCE):
                sha.update(block)
                md5.update(block)
                out.write(block)
        if sha.hexdigest() != entry["sha256"]:
            raise CheckpointError(f"{source} is damaged: its SHA-256 differs from the manifest's")
        info = self._info(path)
        if info["size"] != entry["bytes"]:
            raise CheckpointError(
                f"{path} has {info['size']:,} bytes at {self.url} instead of {entry['bytes']:,}"
            )
        if _md5_of(info) == md5.hexdigest():
            return
        back = hashlib.sha256()
        with self.fs.open(path, "rb") as file:
            while block := file.read(_AT_ONCE):
                back.update(block)
        if back.hexdigest() != entry["sha256"]:
            raise CheckpointError(f"{path} has arrived damaged at {self.url}")

    def retire(
        self, keep_last: int, keep_every_steps: int | None, newest: int, local: Iterable[int]
    ) -> None:
        """Remove copies that retention does not keep, and what is left of unfinished ones.

        Those after step `newest` stay: the run has gone back, and may need them no more or again.

        local: steps whose checkpoints the run still has.
        """
        there = [step for step in self.steps() if step <= newest]
        whole = [step for step in there if self._content(self._manifest_of(step)) is not None]
        kept = kept_of(whole, keep_last, keep_every_steps) | (set(local) & set(whole))
        for step in there:
            if step not in kept:
                self._forget(f"{self.root}/{checkpoint_name(step)}")

    def steps(self) -> list[int]:
        """Steps of all copies, whole or not, newest first."""
        self.fs.invalidate_cache()
        try:
            names = [
                str(path).rstrip("/").rpartition("/")[2]
                for path in self.fs.ls(self.root, detail=False)
            ]
        except FileNotFoundError:
            return []
        return sorted(
            (int(m[1]) for n in names if (m := re.match(r"step_(\d{9,})$", n))), reverse=True
        )

    def _forget(self, far: str) -> None:
        """Its manifest first: what is left in a crash is no copy."""
        self.fs.invalidate_cache()
        if self.fs.exists(f"{far}/{MANIFEST}"):
            self.fs.rm_file(f"{far}/{MANIFEST}")
            self._sent.clear()
        if not self._sent and self.fs.exists(far):
            self.fs.rm(far, recursive=True)
        self.fs.invalidate_cache()

    # ---- and back ------------------------------------------------------------------------------

    def newest(self) -> int | None:
        """The step of the newest copy, by `latest`; None if there is none."""
        named = (self._content(f"{self.root}/{LATEST}") or b"").decode().strip()
        return int(named.removeprefix("step_")) if named else None

    def fetch(self, step: int, run_dir: Path) -> Path:
        """Bring a copy back into `run_dir`, where the run can be resumed then.

        Its recipe and tokenizer are laid into a run directory that has none.

        Raises:
            CheckpointError: it is there already, is no whole copy, or has arrived damaged.
        """
        root = run_dir / "checkpoints"
        final = root / checkpoint_name(step)
        if final.exists():
            raise CheckpointError(f"{final} is there already: move it away first")
        sealed = self._content(self._manifest_of(step))
        if sealed is None:
            steps = ", ".join(map(str, sorted(self.steps()))) or "none"
            raise CheckpointError(
                f"{self.url} holds no whole copy of step {step}: there are {steps}"
            )
        temporary = root / f".writing-{final.name}-{secrets.token_hex(4)}"
        temporary.mkdir(parents=True)
        try:
            (temporary / MANIFEST).write_bytes(sealed)
            for name, entry in read_manifest(temporary)["files"].items():
                self._receive(f"{self.root}/{final.name}/{name}", temporary / name, entry)
            sync_file(temporary / MANIFEST)
            sync_folder(temporary)
            temporary.rename(final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        self._complete(run_dir, final)
        return final

    def _receive(self, path: str, to: Path, entry: dict) -> None:
        digest = hashlib.sha256()
        to.parent.mkdir(parents=True, exist_ok=True)
        with self.fs.open(path, "rb") as file, open(to, "wb") as out:
            while block := file.read(_AT_ONCE):
                digest.update(block)
                out.write(block)
        sync_file(to)
        if to.stat().st_size != entry["bytes"] or digest.hexdigest() != entry["sha256"]:
            raise CheckpointError(
                f"{path} at {self.url} is damaged: its size or SHA-256 differs "
                "from the manifest's; fetch another step"
            )

    def _complete(self, run_dir: Path, checkpoint: Path) -> None:
        root = checkpoint.parent
        if list_checkpoints(root)[0] == checkpoint:
            write_atomically(root / LATEST, [f"{checkpoint.name}\n".encode()])
        found = self._content(f"{self.root}/{RUN_FILE}")
        if found is not None and not (root / RUN_FILE).exists():
            write_atomically(root / RUN_FILE, [found])
        if not (run_dir / "recipe.yaml").exists() and (checkpoint / "recipe.yaml").exists():
            if (checkpoint / "tokenizer").is_dir() and not (run_dir / "tokenizer").exists():
                shutil.copytree(checkpoint / "tokenizer", run_dir / "tokenizer")
            write_atomically(run_dir / "recipe.yaml", [(checkpoint / "recipe.yaml").read_bytes()])

    # ---- the store -----------------------------------------------------------------------------

    def _manifest_of(self, step: int) -> str:
        return f"{self.root}/{checkpoint_name(step)}/{MANIFEST}"

    def _info(self, path: str) -> dict:
        self.fs.invalidate_cache()
        return self.fs.info(path)

    def _content(self, path: str) -> bytes | None:
        """A small file; None if it is not there."""
        self.fs.invalidate_cache()
        try:
            return self.fs.cat_file(path)
        except FileNotFoundError:
            return None

    def _write(self, path: str, content: bytes) -> None:
        """A small file, read back."""
        self._make_parent(path)
        with self.fs.open(path, "wb") as out:
            out.write(content)
        if self._content(path) != content:
            raise CheckpointError(f"{path} has arrived damaged at {self.url}")

    def _make_parent(self, path: str) -> None:
        self.fs.makedirs(path.rpartition("/")[0], exist_ok=True)


def _md5_of(info: dict) -> str | None:
    """A file's MD5 as its store gives it. Tags of other kinds are of no use, and do no harm: what
    does not equal the MD5 of what was sent is read back."""
    for name in ("md5Hash", "content_md5"):
        value = info.get(name)
        if isinstance(value, str):
            value = base64.b64decode(value)
        if isinstance(value, bytes | bytearray):
            return bytes(value).hex()
    match = _HEX_MD5.match(str(info.get("ETag", "")))
    return match[1] if match else None


def run_id_of(root: Path) -> str:
    """What tells the run of these checkpoints from others, at the far side too."""
    path = root / RUN_FILE
    if not path.exists():
        write_atomically(path, [json.dumps({"run": secrets.token_hex(16)}).encode()])
    return json.loads(path.read_bytes())["run"]


def main(argv: list[str]) -> None:
    """Serve the process `argv[0]`: a request names a checkpoint, the answer is empty or an error.
    The URL comes with it, not by the command line, which all users of a machine can read."""
    far: dict[str, FarCheckpoints] = {}

    def handle(request: dict) -> dict:
        try:
            url, folder = request["url"], Path(request["folder"])
            if url not in far:
                far[url] = FarCheckpoints(url)
            store = far[url]
            store.copy(folder, request["run"])
            local = map(step_of, list_checkpoints(folder.parent))
            store.retire(request["keep_last"], request["keep_every_steps"], step_of(folder), local)
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}
        return {}

    serve(int(argv[0]), handle)


if __name__ == "__main__":
    main(sys.argv[1:])
