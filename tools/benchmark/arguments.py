"""Arguments of the benchmarks, apart from these: each imports libraries that take seconds."""

import argparse
from collections.abc import Callable
from pathlib import Path

_TYPES = ("float32", "bfloat16")


def _data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--images", type=Path, help="folder of JPEGs, or of shards; default: made-up photographs"
    )
    parser.add_argument("--samples", type=int, help="images per repetition (1,920; --long: 9,600)")
    parser.add_argument(
        "--tiny-samples", type=int, help="images of 32 pixels (4,000; --long: 20,000)"
    )
    parser.add_argument("--size", type=int, default=224, help="output pixels")


def _checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", type=Path, help="on the disk to write to (default: TMPDIR)")
    parser.add_argument("--width", type=int, default=768, help="channels of encoder and decoder")
    parser.add_argument("--zero", type=int, choices=(1, 2, 3), default=2, help="ZeRO stage")
    parser.set_defaults(batch=1, micro_steps=1, tasks=1, steps=1)


def _dcnv3(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="CPU threads")
    parser.add_argument("--types", nargs="+", default=list(_TYPES), choices=_TYPES)
    parser.add_argument(
        "--depths", type=int, nargs="+", default=[16, 32], help="channels of a group"
    )
    parser.add_argument(
        "--scale", type=float, default=1.0, help="height and width of the shapes times this"
    )


def _decode(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--images", type=Path, help="folder of JPEGs, or of shards; default: made-up photographs"
    )
    parser.add_argument("--count", type=int, default=12, help="made-up photographs")
    parser.add_argument("--megapixels", type=float, default=6.0, help="of the made-up photographs")
    parser.add_argument(
        "--bits-per-pixel",
        type=float,
        default=1.5,
        help="of the made-up photographs, as near as JPEG qualities of 50 and more come to it",
    )
    parser.add_argument("--crops", type=int, default=48, help="images per repetition")
    parser.add_argument("--size", type=int, default=224, help="output pixels")
    parser.add_argument("--least-scale", type=float, default=0.35, help="least share of the area")


def _deform_attn(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="CPU threads")
    parser.add_argument("--images", type=int, default=2, help="images of a batch")


def _engine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps per repetition")
    parser.add_argument("--width", type=int, default=128, help="channels of encoder and decoder")
    parser.add_argument("--batch", type=int, default=16, help="images per micro-batch")
    parser.add_argument("--micro-steps", type=int, default=2, help="micro-batches per step")
    parser.add_argument("--zero", type=int, choices=(1, 2, 3), default=3, help="ZeRO stage")
    parser.add_argument("--tasks", type=int, choices=(1, 2), default=2, help="tasks in turn")
    parser.add_argument("--log-every", type=int, default=10, help="steps between metrics")


def _git(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=int, default=1, help="images per step")
    parser.add_argument(
        "--captions", type=int, nargs="+", default=[1, 5], help="captions per image, one case each"
    )
    parser.add_argument("--text-length", type=int, default=40, help="tokens of a caption")
    parser.add_argument("--image-size", type=int, default=224, help="side of the images in pixels")
    parser.add_argument(
        "--layers", type=int, nargs=2, default=[12, 6], help="of the encoder and of the decoder"
    )
    parser.add_argument("--vocabulary", type=int, default=30522, help="words")
    parser.add_argument("--threads", type=int, default=1, help="threads of either side")


def _gpu(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cuda", help="cpu only shows that it runs")
    parser.add_argument("--batch", type=int, default=64, help="images for the kernels")
    parser.add_argument(
        "--models",
        nargs="*",
        default=["T:128", "B:64", "H:16"],
        help="size:batch of the models to train",
    )
    parser.add_argument("--image", type=int, default=224, help="pixels of the models' images")
    parser.add_argument("--copy-mib", type=int, default=1024, help="size of the copy")


def _kernels(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpu", choices=("H100", "A100"), default="H100")
    parser.add_argument("--all", action="store_true", help="every candidate, not only the best")


def _memory(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=int, default=8, help="processes (default %(default)s)")
    parser.add_argument(
        "--rows", type=int, default=10**8, help="samples of the data set (default %(default)s)"
    )
    parser.add_argument("--batch", type=int, default=64, help="(default %(default)s)")
    parser.add_argument(
        "--steps", type=int, default=600, help="of each epoch, at most (default %(default)s)"
    )


def _optimizer(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--elements", type=int, default=2**23, help="elements of each tensor")
    parser.add_argument("--tensors", type=int, default=3, help="flat tensors, one per group")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--device", help="default: a GPU if there is one, else cpu")


def _remote(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--images", type=Path, help="folder of JPEGs, or of shards; default: made-up photographs"
    )
    parser.add_argument("--samples", type=int, default=6400, help="images in the shards")
    parser.add_argument("--steps", type=int, default=40, help="batches per repetition")
    parser.add_argument("--step-s", type=float, default=0.2, help="seconds that a step takes")
    parser.add_argument("--delay-s", type=float, default=0.05, help="of each answer, in seconds")


ARGUMENTS: dict[str, Callable[[argparse.ArgumentParser], None]] = {
    "checkpoint": _checkpoint,
    "data": _data,
    "dcnv3": _dcnv3,
    "decode": _decode,
    "deform_attn": _deform_attn,
    "engine": _engine,
    "git": _git,
    "gpu": _gpu,
    "kernels": _kernels,
    "memory": _memory,
    "optimizer": _optimizer,
    "remote": _remote,
}
