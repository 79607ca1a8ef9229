"""Formats that a run can be exported to, by name; for `export` of a recipe and for the exporter."""

from typing import Literal, get_args

Exported = Literal[
    "safetensors",
    "dcp",
    "transformers",
    "timm",
    "clip",
    "uniformerv2",
    "internimage",
    "mmdet",
    "bevformer",
    "m3i-raw",
    "onnx",
    "torch",
]
EXPORTS: tuple[str, ...] = get_args(Exported)
