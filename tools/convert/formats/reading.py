"""The vision transformer of a file, computed by the file's own names with none of our modules: an
independent reading, which an export is held against where its consumer is not installed."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

_OPENAI = {
    "class": "class_embedding",
    "positions": "positional_embedding",
    "patches": "conv1.weight",
    "before": "ln_pre",
    "after": "ln_post",
    "block": "transformer.resblocks.{}.",
    "norm1": "ln_1",
    "qkv": "attn.in_proj_",
    "out": "attn.out_proj",
    "norm2": "ln_2",
    "up": "mlp.c_fc",
    "down": "mlp.c_proj",
}
_TIMM = {
    "class": "cls_token",
    "positions": "pos_embed",
    "patches": "patch_embed.proj.weight",
    "before": "norm_pre",
    "after": "norm",
    "block": "blocks.{}.",
    "norm1": "norm1",
    "qkv": "attn.qkv.",
    "out": "attn.proj",
    "norm2": "norm2",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
}


def read_tokens(
    state: Mapping[str, Tensor],
    images: Tensor,
    *,
    names: Literal["openai", "timm"],
    heads: int,
    quick: bool,
    start: str = "",
) -> Tensor:
    """Tokens (B, 1 + N, width), behind the last norm if the file has it.

    images: (B, 3, H, W), normalised, of the size that the position table is for; start: what stands
    before the names.
    """
    words = _OPENAI if names == "openai" else _TIMM

    def norm(x: Tensor, name: str) -> Tensor:
        weight, bias = state[f"{start}{name}.weight"], state[f"{start}{name}.bias"]
        return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-5)

    def linear(x: Tensor, name: str, mark: str = ".") -> Tensor:
        return F.linear(x, state[f"{start}{name}{mark}weight"], state[f"{start}{name}{mark}bias"])

    kernel = state[start + words["patches"]]
    x = F.conv2d(images, kernel, stride=kernel.shape[-1]).flatten(2).transpose(1, 2)
    first = state[start + words["class"]].reshape(1, 1, -1).expand(len(x), 1, -1)
    positions = state[start + words["positions"]].reshape(1, -1, x.shape[-1])
    x = norm(torch.cat([first, x], dim=1) + positions, words["before"])
    number = 0
    while f"{start}{words['block'].format(number)}{words['norm1']}.weight" in state:
        block = words["block"].format(number)
        parts = linear(norm(x, block + words["norm1"]), block + words["qkv"], "").chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in parts)
        weights = (query @ key.transpose(2, 3) / query.shape[-1] ** 0.5).softmax(dim=-1)
        x = x + linear((weights @ value).transpose(1, 2).flatten(2), block + words["out"])
        hidden = linear(norm(x, block + words["norm2"]), block + words["up"])
        hidden = hidden * torch.sigmoid(1.702 * hidden) if quick else F.gelu(hidden)
        x = x + linear(hidden, block + words["down"])
        number += 1
    return norm(x, words["after"]) if f"{start}{words['after']}.weight" in state else x


def class_scores(state: Mapping[str, Tensor], tokens: Tensor, args: Mapping[str, Any]) -> Tensor:
    """What timm's head makes of tokens: (B, classes), or the vectors (B, width) without a head."""
    pooled = tokens[:, 0] if args["global_pool"] == "token" else tokens.mean(dim=1)
    if "head.weight" not in state:
        return pooled
    return F.linear(pooled, state["head.weight"], state["head.bias"])
