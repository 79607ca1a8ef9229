"""What the names of shards stand for: folders, globs and brace expressions, here or on servers."""

import glob
import itertools
import os
from collections.abc import Iterable

import braceexpand

from data_pipeline.shards import manifest as manifests
from data_pipeline.shards.index import SUFFIX
from data_pipeline.storage.errors import ShardError
from data_pipeline.storage.locations import (
    base_name,
    folder_of,
    inside,
    is_url,
    scheme,
    without_secrets,
)
from data_pipeline.storage.remote import UrlStorage

Specs = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]


def expand_specs(specs: Specs, storage: UrlStorage | None = None) -> list[str]:
    """Turn folders, globs, brace expressions and URLs into paths of tars, in order; duplicates are
    kept. Errors: as `Catalogue.expand`.
    """
    return Catalogue(storage or UrlStorage()).expand(specs)


class Catalogue:
    """Expands names of shards; keeps the manifests that it has read."""

    def __init__(self, storage: UrlStorage) -> None:
        self.storage = storage
        self._manifests: dict[str, manifests.Manifest | None] = {}
        self._refusals: dict[str, PermissionError] = {}
        self._records: dict[str, dict[str, manifests.ShardRecord]] = {}

    def expand(self, specs: Specs) -> list[str]:
        """Paths and URLs of tars, in order; duplicates are kept.

        Raises:
            FileNotFoundError: one matches nothing.
            ShardError: a folder is not finished, or a server cannot be asked in this way.
            PermissionError, TransientReadError: from servers.
        """
        if isinstance(specs, str | os.PathLike):
            specs = [specs]
        paths: list[str] = []
        for spec in map(os.fspath, specs):
            if spec.startswith("pipe:"):
                raise ShardError(
                    f"{spec.split()[0]} ...: the output of a command has no addresses; read it as "
                    "a stream (data.stream)"
                )
            paths += self._expand_url(spec) if is_url(spec) else self._expand_path(spec)
        return paths

    def record(self, path: str) -> manifests.ShardRecord | None:
        """What the manifest in the folder of a shard says about it; None if there is none."""
        folder = folder_of(path)
        manifest = self.manifest(folder)
        if manifest is None:
            return None
        if folder not in self._records:
            self._records[folder] = {record.name: record for record in manifest.shards}
        return self._records[folder].get(base_name(path))

    def manifest(self, folder: str) -> manifests.Manifest | None:
        """The manifest of a folder, read once; None without one. Errors: ShardError."""
        folder = folder if is_url(folder) else os.path.normpath(folder or ".")
        if folder not in self._manifests:
            self._manifests[folder] = self._load(folder)
        return self._manifests[folder]

    def _load(self, folder: str) -> manifests.Manifest | None:
        try:
            if not is_url(folder):
                return manifests.Manifest.load(folder)
            url = inside(folder, manifests.FILE_NAME)
            state = self.storage.state(url)
            text = self.storage.read(url, 0, state.size, state)
            return manifests.Manifest.parse(text, without_secrets(url))
        except FileNotFoundError:
            return None
        except PermissionError as error:
            if is_url(folder):  # some stores refuse what is not there
                self._refusals[folder] = error
                self.storage.refusing.add(without_secrets(folder))
                return None
            raise

    def _expand_path(self, spec: str) -> list[str]:
        path = os.path.expanduser(spec)
        patterns = [path] if os.path.exists(path) else braceexpand.braceexpand(path)
        paths: list[str] = []
        for path in itertools.chain.from_iterable(_glob(pattern, spec) for pattern in patterns):
            paths += self._in_folder(path) if os.path.isdir(path) else [path]
        return paths

    def _in_folder(self, folder: str) -> list[str]:
        if os.path.exists(os.path.join(folder, manifests.PLAN_NAME)):
            raise ShardError(f"{folder}: its packing is not finished: run the same command again")
        manifest = self.manifest(folder)
        if manifest is not None:
            return [os.path.join(folder, record.name) for record in manifest.shards]
        found = sorted(glob.glob(os.path.join(glob.escape(folder), "*.tar")))
        if not found:
            inner = sorted(glob.glob(os.path.join(glob.escape(folder), "*", manifests.FILE_NAME)))
            splits = ", ".join(os.path.dirname(path) for path in inner[:4])
            raise FileNotFoundError(
                f"{folder}: holds neither a manifest.json nor a *.tar"
                + (f"; packed shards lie in {splits}" if splits else "")
            )
        return found

    def _expand_url(self, spec: str) -> list[str]:
        urls: list[str] = []
        for url in braceexpand.braceexpand(spec):
            if "*" in base_name(url):
                urls += self._list(url)
            elif base_name(url).endswith(".tar"):
                urls.append(url)
            else:
                urls += self._in_remote_folder(url)
        return urls

    def _in_remote_folder(self, url: str) -> list[str]:
        shown = without_secrets(url)
        if base_name(url).endswith((".gz", ".tgz", ".zst", ".xz", ".bz2")):
            raise ShardError(
                f"{shown}: is compressed, so single samples cannot be read: unpack it, or read it "
                "as a stream (data.stream)"
            )
        manifest = self.manifest(url)
        if manifest is not None:
            return [inside(url, record.name) for record in manifest.shards]
        if scheme(url) in ("http", "https"):
            if url in self._refusals:
                raise self._refusals[url]
            raise FileNotFoundError(
                f"{shown}: is no .tar and holds no manifest.json, and web servers cannot be "
                "listed: name the shards, for example with {00000..00099}.tar"
            )
        try:
            unfinished = self.storage.glob(inside(url, manifests.PLAN_NAME))
            found = [] if unfinished else self._list(inside(url, "*.tar"))
        except (PermissionError, FileNotFoundError) as error:
            if url in self._refusals:
                raise self._refusals[url] from error
            raise
        if unfinished:
            raise ShardError(
                f"{shown}: its packing was not finished when it was uploaded: finish it, and "
                "upload it again"
            )
        return found

    def _list(self, pattern: str) -> list[str]:
        shown = without_secrets(pattern)
        if scheme(pattern) in ("http", "https"):
            raise ShardError(
                f"{shown}: web servers cannot be listed: name the shards, for example with "
                "{00000..00099}.tar"
            )
        found = self.storage.glob(pattern)
        found = [url for url in found if not url.endswith(SUFFIX)]
        if not found:
            raise FileNotFoundError(f"{shown}: no file matches")
        return found


def _glob(pattern: str, spec: str) -> list[str]:
    if os.path.exists(pattern) or not glob.has_magic(pattern):
        return [pattern]
    found = sorted(path for path in glob.glob(pattern) if not path.endswith(SUFFIX))
    if not found:
        raise FileNotFoundError(f"{spec}: no file matches")
    return found
