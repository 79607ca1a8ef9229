"""Small InternImages for tests: from golden files, and from plain numbers."""

import json
from dataclasses import dataclass

import torch
from safetensors import safe_open
from torch import Tensor, nn

from pretrain.models.init import initialise
from pretrain.models.internimage.internimage import InternImage, InternImageSettings
from tests.pretrain.models.git.git_models import GOLDENS

SMALL_PROJECTOR = {"type": "projector", "width": 64, "heads": 4, "output": 48}

PUBLISHED = {
    # size: parameters with 1000 classes, tensors of the state dict
    "T": (29_918_424, 633),
    "S": (50_079_880, 751),
    "B": (97_461_832, 751),
    "L": (223_334_810, 839),
    "XL": (334_819_780, 883),
    "H": (1_089_636_760, 1357),
    "G": (3_076_373_352, 1295),
}


def read_golden(name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of NAME.safetensors, or of NAME.part1.safetensors and so on."""
    tensors: dict[str, Tensor] = {}
    info: dict[str, str] = {}
    files = sorted(GOLDENS.glob(f"{name}.part*.safetensors")) or [GOLDENS / f"{name}.safetensors"]
    for path in files:
        with safe_open(path, framework="pt") as file:
            info.update(file.metadata() or {})
            tensors.update({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
    return tensors, info


class Pooled(nn.Module):
    """An encoder of which the head's vector is wanted, as tools for whole modules take it."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.encoder.encode(images, ("pooled",)).pooled


class OfficialModel(nn.Module):
    """Encoder and linear head under the official names, as one model."""

    def __init__(self, encoder: InternImage, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.pooled_width, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encoder.encode(images, ("pooled",)).pooled)

    def official(self) -> dict[str, Tensor]:
        """The state dict under the official names."""
        return {n.removeprefix("encoder."): t for n, t in self.state_dict().items()}

    def load_official(self, state: dict[str, Tensor]) -> None:
        assert self.official().keys() == state.keys()
        self.load_state_dict({n: state[n.removeprefix("encoder.")] for n in self.state_dict()})


@dataclass
class Golden:
    """One reference case: the model with its weights in eval mode, and what it shall compute."""

    model: OfficialModel
    tensors: dict[str, Tensor]
    norms: dict[str, float]
    """Official parameter name -> norm of its gradient."""

    @classmethod
    def load(cls, name: str) -> "Golden":
        tensors, info = read_golden(name)
        state = {k[3:]: t for k, t in tensors.items() if k.startswith("sd.")}
        state = {k: t.float() if t.dtype is torch.bfloat16 else t for k, t in state.items()}
        model = OfficialModel(settings_of(name, info).build(), int(info["num_classes"]))
        model.load_official(state)
        order = info["param_grad_norms_order"].split(",")
        norms = dict(zip(order, tensors["param_grad_norms"].tolist(), strict=True))
        return cls(model.eval(), tensors, norms)


def settings_of(name: str, info: dict[str, str]) -> InternImageSettings:
    """The settings that a golden file's metadata describe in official terms."""
    flag = {
        key: info.get(key) == "True"
        for key in (
            "post_norm",
            "res_post_norm",
            "center_feature_scale",
            "remove_center",
            "use_clip_projector",
        )
    }
    projector = SMALL_PROJECTOR if name.endswith("smallhead") else {"type": "projector"}
    return InternImageSettings(
        channels=int(info["channels"]),
        depths=tuple(json.loads(info["depths"])),
        groups=tuple(json.loads(info["groups"])),
        mixer={
            "dw_kernel_size": int(info.get("dw_kernel_size", 3)),
            "offset_scale": float(info["offset_scale"]),
            "center_feature_scale": flag["center_feature_scale"],
            "remove_center": flag["remove_center"],
        },
        post_norm=flag["post_norm"],
        res_post_norm=flag["res_post_norm"],
        layer_scale=None if info["layer_scale"] == "None" else float(info["layer_scale"]),
        post_norm_layers=tuple(json.loads(info.get("level2_post_norm_block_ids", "[]"))),
        stage_norm=not flag["post_norm"] or flag["center_feature_scale"],
        head=projector if flag["use_clip_projector"] else {"type": "conv"},
    )


def small_settings(**changes) -> InternImageSettings:
    """An InternImage of four small stages, 128 channels in the last."""
    return InternImageSettings(
        **{"channels": 16, "depths": (1, 1, 2, 1), "groups": (1, 2, 4, 8), **changes}
    )


def small_encoder(seed: int = 0, **changes) -> InternImage:
    """`small_settings` built and initialised, with offsets and masks that are not all equal."""
    encoder = small_settings(**changes).build()
    initialise(encoder, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if ".offset." in name or ".mask." in name:
                parameter.normal_(0.0, 0.3, generator=generator)
    return encoder
