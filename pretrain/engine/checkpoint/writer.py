"""The process of a rank that writes snapshots (`snapshot`) to the disk while training goes on."""

import hashlib
import mmap
import os
import sys
from pathlib import Path

from pretrain.engine.checkpoint.files import cannot_write
from pretrain.engine.launch.child_process import serve

_AT_ONCE = 1 << 22


def write_pieces(
    memory: memoryview, pieces: list[list], folder: Path
) -> dict[str, dict[str, int | str]]:
    """Write parts of the memory as files, and force them to the disk.

    Args:
        pieces: [name, start, stop] of each file.

    Returns:
        name -> size and hash, for the manifest.

    Raises:
        CheckpointError: with the file, its size and the room that there is.
    """
    entries = {}
    for name, start, stop in pieces:
        path = folder / name
        digest = hashlib.sha256()
        try:
            if path.parent != folder:
                path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "wb", buffering=0) as file:
                for begin in range(start, stop, _AT_ONCE):
                    part = memory[begin : min(begin + _AT_ONCE, stop)]
                    digest.update(part)
                    while part:
                        part = part[file.write(part) :]
                os.fsync(file.fileno())
        except OSError as error:
            why = f"{error.strerror} (os error {error.errno})"
            raise cannot_write(path, stop - start, why) from None
        entries[name] = {"bytes": stop - start, "sha256": digest.hexdigest()}
    return entries


def main(argv: list[str]) -> None:
    """Serve the process `argv[0]`, with its memory behind the descriptor `argv[1]`."""
    descriptor = int(argv[1])

    def handle(request: dict) -> dict:
        try:
            # Not closed: its parts may still be in the stack of an error.
            memory = memoryview(mmap.mmap(descriptor, request["size"], prot=mmap.PROT_READ))
            return {"files": write_pieces(memory, request["pieces"], Path(request["folder"]))}
        except Exception as error:
            return {"error": str(error)}

    serve(int(argv[0]), handle)


if __name__ == "__main__":
    main(sys.argv[1:])
