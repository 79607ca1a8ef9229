"""config.json of InternImage in transformers, from and to our settings."""

from collections.abc import Mapping
from typing import Any

from pretrain.models.internimage.internimage import (
    ConvHeadSettings,
    InternImageSettings,
    ProjectorSettings,
)
from pretrain.models.internimage.mixer_settings import DCNv3Settings


def settings_of_config(config: Mapping[str, Any]) -> InternImageSettings:
    """Settings of the model that a transformers config.json of InternImage describes.

    Raises:
        ValueError: a model that ours cannot be.
    """
    fixed = {"norm_layer": "LN", "act_layer": "GELU", "cls_scale": 1.5}
    for name, value in fixed.items():
        if config.get(name, value) != value:
            raise ValueError(f"config.json: {name} is {config[name]!r}; ours has {value!r} there")
    if missing := [name for name in ("channels", "depths", "groups") if name not in config]:
        raise ValueError(f"config.json says nothing of {', '.join(missing)}")
    post_norm = bool(config.get("post_norm"))
    centre = bool(config.get("center_feature_scale"))
    ids = config.get("level2_post_norm_block_ids") if config.get("level2_post_norm") else None
    return InternImageSettings(
        channels=config["channels"],
        depths=config["depths"],
        groups=config["groups"],
        mixer=DCNv3Settings(
            dw_kernel_size=config.get("dw_kernel_size"),
            offset_scale=config.get("offset_scale", 1.0),
            center_feature_scale=centre,
            remove_center=bool(config.get("remove_center")),
        ),
        mlp_ratio=config.get("mlp_ratio", 4.0),
        post_norm=post_norm,
        res_post_norm=bool(config.get("res_post_norm")),
        layer_scale=config.get("layer_scale"),
        post_norm_layers=ids or [],
        stage_norm=not post_norm or centre,
        head=ProjectorSettings() if config.get("use_clip_projector") else ConvHeadSettings(),
    )


def config_of_settings(settings: InternImageSettings, classes: int) -> dict[str, Any]:
    """The inverse of `settings_of_config`: config.json for the published transformers code.

    Raises:
        ValueError: that code cannot express the model.
    """
    mixer = settings.mixer
    if not isinstance(mixer, DCNv3Settings) or mixer.kernel_size != 3:
        raise ValueError("the official code has no mixer but DCNv3 of kernel size 3")
    if settings.stage_norm != (not settings.post_norm or mixer.center_feature_scale):
        raise ValueError(
            "the official code has norms behind stages (stage_norm) where there is no post_norm, "
            "or with center_feature_scale, and nowhere else"
        )
    if settings.head is None and classes:
        raise ValueError("the official code has no linear layer without a head (conv or projector)")
    if settings.head not in (None, ConvHeadSettings(), ProjectorSettings()):
        raise ValueError(
            "the official code has no projector but one of width 1024 with 16 heads and 768 outputs"
        )
    return {
        "model_type": "internimage",
        "architectures": ["InternImageModel"],
        "auto_map": {
            "AutoConfig": "configuration_internimage.InternImageConfig",
            "AutoModel": "modeling_internimage.InternImageModel",
            "AutoModelForImageClassification": (
                "modeling_internimage.InternImageModelForImageClassification"
            ),
        },
        "core_op": "DCNv3",
        "channels": settings.channels,
        "depths": settings.depths,
        "groups": settings.groups,
        "num_classes": classes,
        "mlp_ratio": settings.mlp_ratio,
        "drop_rate": 0.0,
        "drop_path_rate": 0.0,
        "drop_path_type": "linear",
        "act_layer": "GELU",
        "norm_layer": "LN",
        "layer_scale": settings.layer_scale,
        "offset_scale": mixer.offset_scale,
        "post_norm": settings.post_norm,
        "res_post_norm": settings.res_post_norm,
        "level2_post_norm": bool(settings.post_norm_layers),
        "level2_post_norm_block_ids": settings.post_norm_layers or None,
        "dw_kernel_size": mixer.dw_kernel_size,
        "center_feature_scale": mixer.center_feature_scale,
        "remove_center": mixer.remove_center,
        "use_clip_projector": isinstance(settings.head, ProjectorSettings),
        "cls_scale": 1.5,
        "with_cp": False,
        "torch_dtype": "float32",
    }
