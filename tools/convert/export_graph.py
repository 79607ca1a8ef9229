"""Write an image model as a graph that runs without this project: ONNX, or torch's ExportedProgram.

Both take `images` (B, 3, H, W) float32, normalised, for any B and one H and W. DCNv3 becomes
standard operators (`models/operators/dcnv3_standard.py`). What is written is read back, run, and
compared with the model before it gets its name.
"""

import contextlib
import importlib
import io
import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data_pipeline.files import sync_file
from pretrain.models.operators.dcnv3_standard import standard_operators
from pretrain.objectives.image_tokens import Pool, image_vectors

Run = Callable[[Tensor], Sequence[Tensor]]
"""Images to outputs, by what was written."""

TOLERANCE = 1e-4
"""Of an output, in units of its largest number, or of 1 if that is smaller."""

_ABOUT = "omnipretrain.json"
# Operators that TensorRT, OpenVINO and onnxruntime know; GridSample came with 16.
_OPSET = 18
# A protobuf message ends at 2 GiB: larger weights lie in a file of their own.
_EXTERNAL_BYTES = 1_800_000_000


class Logits(nn.Module):
    """Images (B, 3, H, W) -> logits (B, classes)."""

    def __init__(self, encoder: nn.Module, pool: Pool, head: nn.Linear) -> None:
        super().__init__()
        self.encoder, self.pool, self.head = encoder, pool, head

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """images: (B, 3, H, W), normalised."""
        return (self.head(image_vectors(self.encoder, images, self.pool, None)),)


class Maps(nn.Module):
    """Images (B, 3, H, W) -> a map (B, C_i, H_i, W_i) of each stage, as detectors take them."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """images: (B, 3, H, W), normalised."""
        maps = self.encoder.encode(images, ("maps",)).maps
        return tuple(x.permute(0, 3, 1, 2).contiguous() for x in maps)


def write_graph(
    model: nn.Module,
    names: Sequence[str],
    size: tuple[int, int],
    about: Mapping[str, Any],
    out: Path,
) -> float:
    """Write `model` as `out` (.onnx or .pt2; large ONNX weights as `out`.data), if it runs alike.

    Args:
        model: float32; its forward pass makes a tuple of tensors of images (B, 3, H, W).
        names: of its outputs.
        size: H and W.
        about: facts that the file shall hold, by name; JSON.

    Returns:
        The largest difference between outputs of the model and of the file, as `TOLERANCE`.

    Raises:
        ValueError: another suffix, packages for ONNX are missing, a model that cannot be exported,
            or one whose graph computes something else; then nothing is written.
    """
    require_writer(out)
    save, run = _KINDS[out.suffix]
    model.eval()
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.parent / f".{out.name}.{os.getpid()}"
    temporary.mkdir()
    try:
        with torch.no_grad(), _quiet():
            save(_trace(model, size), names, about, temporary / out.name)
            difference = _difference(model, run(temporary / out.name), size)
        if not difference <= TOLERANCE:
            raise ValueError(
                f"{out} was not written: its outputs differ from the model's by {difference:.1e} "
                f"of their largest number, more than {TOLERANCE:g}"
            )
        # Weights beside a graph come first: a graph that has its name is whole.
        for file in sorted(temporary.iterdir(), key=lambda file: file.name == out.name):
            sync_file(file)
            os.replace(file, out.parent / file.name)
    finally:
        shutil.rmtree(temporary)
    return difference


def require_writer(out: Path) -> None:
    """Raise ValueError for another suffix, and where packages for ONNX are missing."""
    if out.suffix not in _KINDS:
        raise ValueError(f"--out {out}: the file must end in {' or '.join(_KINDS)}")
    if out.suffix == ".onnx":
        _need_onnx()


def _trace(model: nn.Module, size: tuple[int, int]) -> torch.export.ExportedProgram:
    """The model as a graph of standard operators, for any batch."""
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(
        model, (torch.zeros(2, 3, *size),), dynamic_shapes={"images": {0: batch}}
    ).run_decompositions(standard_operators())
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # says where our files lay
        if node.op == "call_function" and getattr(node.target, "namespace", "") == "omnipretrain":
            raise ValueError(f"{node.target} has no form in standard operators")
    return program


def _difference(model: nn.Module, run: Run, size: tuple[int, int]) -> float:
    """See `TOLERANCE`; over random images, one and three at a time."""
    found = 0.0
    generator = torch.Generator().manual_seed(0)
    for batch in (1, 3):
        images = torch.randn(batch, 3, *size, generator=generator)
        for ours, theirs in zip(model(images), run(images), strict=True):
            if ours.shape != theirs.shape:
                raise ValueError(f"an output {tuple(ours.shape)} came out as {tuple(theirs.shape)}")
            gap = (ours - theirs).abs().max() / ours.abs().max().clamp(min=1.0)
            found = max(found, gap.item() if gap.isfinite() else float("inf"))
    return found


# ---- torch ---------------------------------------------------------------------------------------


def _save_program(
    program: torch.export.ExportedProgram,
    names: Sequence[str],
    about: Mapping[str, Any],
    file: Path,
) -> None:
    facts = {**about, "outputs": list(names)}
    # Through memory: torch's writer of files ends the process where a disk is full.
    whole = io.BytesIO()
    torch.export.save(program, whole, extra_files={_ABOUT: json.dumps(facts)})
    file.write_bytes(whole.getbuffer())


def _run_program(file: Path) -> Run:
    return torch.export.load(file).module()


# ---- ONNX ----------------------------------------------------------------------------------------


def _need_onnx() -> None:
    missing = []
    for package in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(package)
        except ImportError:
            missing.append(package)
    if missing:
        raise ValueError(f"ONNX needs packages that are not here: pip install {' '.join(missing)}")


def _save_onnx(
    program: torch.export.ExportedProgram,
    names: Sequence[str],
    about: Mapping[str, Any],
    file: Path,
) -> None:
    exported = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=_OPSET,
        input_names=["images"],
        output_names=list(names),
        verbose=False,
    )
    model = exported.model
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.shape = type(value.shape)(["batch", *list(value.shape)[1:]])
    for part in (model, model.graph, *model.graph, *_values(model.graph)):
        part.metadata_props.clear()  # torch's notes on where each operator came from
    model.metadata_props.update({name: json.dumps(fact) for name, fact in about.items()})
    model.producer_name, model.producer_version = "omnipretrain", None
    weights = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    exported.save(file, external_data=weights > _EXTERNAL_BYTES)


def _values(graph) -> Iterator[Any]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def _run_onnx(file: Path) -> Run:
    import onnx
    import onnxruntime

    onnx.checker.check_model(str(file), full_check=True)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> list[Tensor]:
        found: list[np.ndarray] = session.run(None, {"images": images.numpy()})
        return [torch.from_numpy(array) for array in found]

    return run


_KINDS = {".onnx": (_save_onnx, _run_onnx), ".pt2": (_save_program, _run_program)}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on packages that it could use and on its own past."""
    log = logging.getLogger("torch.onnx")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        log.setLevel(before)
