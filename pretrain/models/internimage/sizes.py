"""The published InternImages, as fields of `InternImageSettings`.

Drop path is no part of a size: it belongs to a training stage.
"""

from typing import Any

_CONV: dict[str, Any] = {"type": "conv"}
# S to XL norm behind mixer and MLP, scale what a layer adds, and have no norm behind a stage.
_SCALED = {"post_norm": True, "layer_scale": 1e-5, "stage_norm": False, "head": _CONV}
_LARGE_STEPS = {"type": "dcnv3", "offset_scale": 2.0}
_WITH_CENTRE = {"type": "dcnv3", "dw_kernel_size": 5, "center_feature_scale": True}


def _every(step: int, depth: int) -> list[int]:
    return list(range(step - 1, depth, step))


SIZES: dict[str, dict[str, Any]] = {
    "T": {"channels": 64, "depths": [4, 4, 18, 4], "groups": [4, 8, 16, 32], "head": _CONV},
    "S": {"channels": 80, "depths": [4, 4, 21, 4], "groups": [5, 10, 20, 40], **_SCALED},
    "B": {"channels": 112, "depths": [4, 4, 21, 4], "groups": [7, 14, 28, 56], **_SCALED},
    "L": {
        "channels": 160,
        "depths": [5, 5, 22, 5],
        "groups": [10, 20, 40, 80],
        "mixer": _LARGE_STEPS,
        **_SCALED,
    },
    "XL": {
        "channels": 192,
        "depths": [5, 5, 24, 5],
        "groups": [12, 24, 48, 96],
        "mixer": _LARGE_STEPS,
        **_SCALED,
    },
    "H": {
        "channels": 320,
        "depths": [6, 6, 32, 6],
        "groups": [10, 20, 40, 80],
        "mixer": _WITH_CENTRE,
        "res_post_norm": True,
        "post_norm_layers": _every(6, 32),
        "head": {"type": "projector"},
    },
    "G": {
        "channels": 512,
        "depths": [2, 2, 48, 4],
        "groups": [16, 32, 64, 128],
        "mixer": _WITH_CENTRE,
        "post_norm": True,
        "post_norm_layers": _every(6, 48),
        "head": {"type": "projector"},
    },
}
