"""Hand models over to other tools, and take theirs.

    python -m tools.convert export --run runs/git_base --list
    python -m tools.convert export --run runs/git_base --to timm --out exports/timm
    python -m tools.convert export-git --run runs/git_base --out exports/git_base
    python -m tools.convert import clip-vit-base-patch16/ --only 'encoders.image.*' \\
        --out clip.safetensors > settings.yaml
    python -m tools.convert import-git git-base/ --out git_base.safetensors > settings.yaml
    python -m tools.convert import-internimage internimage_t_1k_224.pth --out t.safetensors
    python -m tools.convert export-internimage --run runs/t --out t.pth
    python -m tools.convert import-encoder roberta-base/ --encoder text --out text.safetensors
    python -m tools.convert export-graph --run runs/t --out t.onnx
    python -m tools.convert export-graph --source internimage_t_1k_224.pth --image-size 224 \\
        --out t.pt2
    python -m tools.convert export-weights --run runs/m3i --only 'encoders.*' --out m3i.safetensors

`export` writes any format that the run can be; with --list it says which those are. The commands
that are named after a format are the same. `export-git` writes a folder for transformers'
GitForCausalLM and AutoProcessor, reads it back with them, and compares their scores with ours.
`import` sees what it is given and is the same as `import-clip` (CLIP of OpenAI, open_clip,
transformers and timm), `import-git`, `import-internimage` or `import-encoder` (BERT, RoBERTa, Swin
and ResNet from a folder of transformers), whose options it takes. `import-git`
writes GIT weights of transformers or of the original repository under our names, for the recipe's
`initial_weights`, and prints the settings that a recipe needs for them. The next two do the same
for InternImage, from and to the official code, its detectors, and transformers. `export-graph`
writes a model that runs without this project, as ONNX or for torch.export.load, and compares its
outputs with ours. `export-weights` writes what a run has learned for `initial_weights` of another
recipe of ours. Exit codes: 0 done (and verified); 1 an error, or an export whose scores differ; 2
wrong usage.
"""

import argparse
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from data_pipeline.console import parse_in_any_order, write_utf8
from data_pipeline.files import give_usual_access, sync_file, temporary_name
from data_pipeline.storage.errors import ShardError
from pretrain.engine.checkpoint.files import CheckpointError
from pretrain.recipe.overlay import to_yaml
from tools.convert.arguments import (
    add_clip,
    add_encoder,
    add_export,
    add_graph,
    add_import,
    add_internimage,
    add_weight_files,
)
from tools.support.arguments import add_run, add_weights

if TYPE_CHECKING:  # --help and wrong arguments do without torch
    from tools.convert.import_git import Imported
    from tools.convert.record import ExportRecord, Verification

console = Console(stderr=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    write_utf8()
    words = list(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        options = parse_in_any_order(_parser(), _named(words))
        return options.run(options, console)
    except (CheckpointError, ShardError, OSError, ValueError) as error:
        _say(f"error: {error}", style="red")
        return 1


def _named(words: list[str]) -> list[str]:
    """The command line with the command of the format in the place of `import`."""
    if not words or words[0] != "import" or {"-h", "--help"} & set(words):
        return words
    from tools.convert.recognise import FORMATS, command_for

    commands = _commands(_parser())
    probe = commands["import"]
    # Every option of any format, so that a value of one is not taken for the source.
    for command in FORMATS.values():
        for action in commands[command]._actions:
            new = [o for o in action.option_strings if o not in probe._option_string_actions]
            if new and len(new) == len(action.option_strings):
                probe.add_argument(*new, nargs=action.nargs, dest=f"any_{action.dest}")
    asked = probe.parse_intermixed_args(words[1:])
    rest = [str(asked.source), *_without_from(words[1:], str(asked.source))]
    return [command_for(asked), *rest]


def _without_from(words: list[str], source: str) -> list[str]:
    """The options without the source and without --from."""
    kept = list(words)
    kept.remove(source)
    for place, word in enumerate(kept):
        if word == "--from":
            return kept[:place] + kept[place + 2 :]
        if word.startswith("--from="):
            return kept[:place] + kept[place + 1 :]
    return kept


def _commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Name -> parser of each command."""
    return next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction)).choices


# ---- export ------------------------------------------------------------------------------------


def _export_git(options: argparse.Namespace, _: Console) -> int:
    # transformers takes seconds to import, and `import-git` does without it.
    from tools.convert.export_git import write_git
    from tools.convert.verify import verify
    from tools.support.trained import open_captioner

    out = options.out.resolve()
    _check_replaceable(out)
    with console.status("reading the checkpoint"):
        captioner = open_captioner(options.run_dir, options.task, options.weights)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(out)
    temporary.mkdir()
    try:
        with console.status("writing the export"):
            record = write_git(captioner, temporary, options.image_size)
        with console.status("reading it back with transformers"):
            verification = verify(captioner, temporary, record)
        record = record.model_copy(update={"verification": verification})
        record.write(temporary)
        _publish(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return _report(out, record, verification)


def _check_replaceable(out: Path) -> None:
    """Only an empty place or an earlier export may be overwritten."""
    from tools.convert.record import ExportRecord

    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not out.is_dir():
        raise ValueError(f"{out} is a file; choose another --out")
    try:
        ExportRecord.read(out)
    except ValueError as error:
        raise ValueError(
            f"{out} is not empty and holds no export that could be replaced ({error}); choose "
            "another --out"
        ) from None


def _publish(temporary: Path, out: Path) -> None:
    """Move a finished folder to its place, where an earlier export may lie."""
    for file in temporary.iterdir():
        give_usual_access(file)
        sync_file(file)
    if not out.exists():
        os.rename(temporary, out)
        return
    # A folder with files cannot be replaced in one rename: for a moment `out` is absent.
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old.", dir=out.parent))
    os.rename(out, old)
    try:
        os.rename(temporary, out)
    except OSError:
        os.rename(old, out)
        raise
    shutil.rmtree(old)


def _report(out: Path, record: "ExportRecord", verification: "Verification") -> int:
    from tools.convert.record import RECORD

    averaged = ", averaged weights" if record.weights == "ema" else ""
    _say(f"{out}: recipe {record.recipe}, step {record.step}, task {record.task}{averaged}")
    _say(
        f"read back by transformers {verification.transformers}; "
        "largest difference of log-probabilities:"
    )
    for kind, difference in verification.differences.items():
        _say(f"  {kind}: {difference:.1e}")
    if verification.preprocessing:
        _say(
            "held-out images through the exported image processor: they differ from ours by "
            f"{verification.preprocessing['mean']:.2g} levels of 255 on average, at most "
            f"{verification.preprocessing['largest']:.0f}"
        )
    else:
        _say("no held-out sample could be read: verified on random images only")
    for note in record.notes:
        _say(f"note: {note}")
    if verification.passed:
        _say(f"verified: all differences are at most {verification.tolerance:g}", style="green")
        return 0
    _say(
        f"NOT VERIFIED: a difference exceeds {verification.tolerance:g}. The folder is kept for "
        f"inspection ({RECORD} says so); do not hand it on",
        style="red",
    )
    return 1


# ---- import ------------------------------------------------------------------------------------


def _import_git(options: argparse.Namespace, _: Console) -> int:
    from tools.convert.import_git import import_weights, read_source
    from tools.support.weight_files import save_tensors

    source = read_source(options.source)
    imported = import_weights(
        source,
        options.format,
        options.encoder,
        options.task,
        options.encoder_heads,
        options.decoder_heads,
    )
    save_tensors(imported.tensors, options.out, imported.format)
    count = sum(tensor.numel() for tensor in imported.tensors.values())
    _say(
        f"{options.out}: {len(imported.tensors)} tensors, {count / 1e6:,.1f} M values, from the "
        f"{imported.format} format"
    )
    for note in imported.notes:
        _say(f"assumed: {note}")
    _say(
        f"the tokenizer must have {imported.vocab_size:,} entries (largest id + 1); settings for "
        "a recipe:"
    )
    print(_settings(options, source.path.parent, imported), end="")
    return 0


def _settings(options: argparse.Namespace, folder: Path, imported: "Imported") -> str:
    """The part of a recipe that describes this model."""
    vit = imported.vit.model_dump(include=set(_ENCODER_SHAPE))
    shape = imported.decoder.model_dump(include=set(_DECODER_SHAPE))
    task = {"objective": {"type": "captioning", "encoder": options.encoder, "decoder": shape}}
    if frames := imported.decoder.frames:
        shape["frames"] = frames
        task["data"] = {"frames": frames}
    recipe = {
        "initial_weights": str(options.out),
        "model": {"encoders": {options.encoder: vit}},
        "tasks": {options.task: task},
    }
    if any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
        recipe["tokenizer"] = {"path": str(folder)}
    return to_yaml(recipe)


# Other settings of the towers say how to train, not what the weights are.
_ENCODER_SHAPE = (
    "type",
    "image_size",
    "patch_size",
    "width",
    "layers",
    "heads",
    "mlp_ratio",
    "activation",
)
_DECODER_SHAPE = (
    "width",
    "layers",
    "heads",
    "mlp_width",
    "max_positions",
    "dropout",
    "tied_output",
    "embedding_norm_eps",
)


# ---- command line ------------------------------------------------------------------------------


def _say(text: str, style: str | None = None) -> None:
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    text = "a run's captioner as a folder for transformers"
    export = commands.add_parser("export-git", help=text, description=text)
    export.set_defaults(run=_export_git)
    add_run(export)
    export.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder to write; an earlier export there is replaced",
    )
    export.add_argument("--task", help="captioning task, if the run has several")
    add_weights(export, targets=False)
    export.add_argument(
        "--image-size",
        type=int,
        metavar="PIXELS",
        help="side of the images; default: as the recipe evaluates",
    )
    text = "GIT weights of others under our names"
    take = commands.add_parser("import-git", help=text, description=text)
    take.set_defaults(run=_import_git)
    take.add_argument(
        "source", type=Path, help="transformers folder, .safetensors file, or .pt / .bin file"
    )
    take.add_argument("--out", type=Path, required=True, metavar="FILE.safetensors")
    take.add_argument("--format", choices=("auto", "original", "transformers"), default="auto")
    take.add_argument(
        "--encoder",
        default="image",
        metavar="NAME",
        help="its name in model.encoders (default %(default)s)",
    )
    take.add_argument(
        "--task", default="caption", metavar="NAME", help="its name in tasks (default %(default)s)"
    )
    for tower in ("encoder", "decoder"):
        take.add_argument(
            f"--{tower}-heads",
            type=int,
            metavar="N",
            help=f"attention heads of the {tower}, which weights alone do not show",
        )
    add_export(commands)
    add_import(commands)
    add_clip(commands)
    add_encoder(commands)
    add_internimage(commands)
    add_graph(commands)
    add_weight_files(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
