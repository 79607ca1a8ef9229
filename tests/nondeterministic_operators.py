"""What torch has no deterministic form of on GPUs, and raises for under
`use_deterministic_algorithms(True)`; and a watch that finds it in a run without a GPU.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

# As the documentation of `use_deterministic_algorithms` lists them -> operators of ATen, backward
# passes where only these raise. NLLLoss: that of maps alone; one label an image is deterministic.
DOCUMENTED = {
    "torch.nn.AvgPool3d": ["avg_pool3d_backward"],
    "torch.nn.AdaptiveAvgPool2d": ["_adaptive_avg_pool2d_backward"],
    "torch.nn.AdaptiveAvgPool3d": ["_adaptive_avg_pool3d_backward"],
    "torch.nn.MaxPool3d": ["max_pool3d_with_indices_backward"],
    "torch.nn.AdaptiveMaxPool2d": ["adaptive_max_pool2d_backward"],
    "torch.nn.FractionalMaxPool2d": ["fractional_max_pool2d_backward"],
    "torch.nn.FractionalMaxPool3d": ["fractional_max_pool3d_backward"],
    "torch.nn.MaxUnpool1d": ["max_unpool2d"],
    "torch.nn.MaxUnpool2d": ["max_unpool2d"],
    "torch.nn.MaxUnpool3d": ["max_unpool3d"],
    "torch.nn.functional.interpolate": [
        "upsample_linear1d_backward",
        "upsample_bilinear2d_backward",
        "upsample_bicubic2d_backward",
        "upsample_trilinear3d_backward",
    ],
    "torch.nn.ReflectionPad1d": ["reflection_pad1d_backward"],
    "torch.nn.ReflectionPad2d": ["reflection_pad2d_backward"],
    "torch.nn.ReflectionPad3d": ["reflection_pad3d_backward"],
    "torch.nn.NLLLoss": ["nll_loss2d_forward", "nll_loss2d_backward"],
    "torch.nn.CTCLoss": ["_ctc_loss_backward"],
    "torch.nn.EmbeddingBag": ["_embedding_bag_backward", "_embedding_bag_dense_backward"],
    "torch.Tensor.put_": ["put", "put_"],
    "torch.histc": ["histc"],
    "torch.bincount": ["bincount"],
    "torch.median": ["median", "nanmedian"],
    "torch.nn.functional.grid_sample": ["grid_sampler_2d_backward", "grid_sampler_3d_backward"],
    "torch.cumsum": ["cumsum", "cumsum_"],
    "torch.Tensor.scatter_reduce": ["scatter_reduce", "scatter_reduce_"],
    "torch.Tensor.resize_": [],  # of quantised tensors, which we have none of
}
# In torch's sources alone: these raise too, or add atomically without a word.
UNDOCUMENTED = [
    "kthvalue",
    "adaptive_max_pool3d_backward",
    "_upsample_bilinear2d_aa_backward",
    "_upsample_bicubic2d_aa_backward",
]
# CPUs add these up in parallel if they are large. Of our own runs they promise bits without a flag.
ON_CPUS = ["index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put"]

NAMES = frozenset([name for names in DOCUMENTED.values() for name in names] + UNDOCUMENTED)


@contextlib.contextmanager
def watched_order() -> Iterator[set[str]]:
    """Within, collects operators whose order of addition is not fixed, on GPUs or on CPUs."""
    found: set[str] = set()
    with _Operators(found):
        yield found


class _Operators(TorchDispatchMode):
    def __init__(self, found: set[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "aten" and _unordered(func, args, kwargs):
            self.found.add(str(func))
        return func(*args, **kwargs)


def _unordered(func: Any, args: tuple, kwargs: dict) -> bool:
    name = func.overloadpacket.__name__
    if name in ON_CPUS:
        return (len(args) > 3 and args[3]) or kwargs.get("accumulate", False)
    if name in ("cumsum", "cumsum_"):  # of integers, any order gives the same
        return (kwargs.get("dtype") or args[0].dtype).is_floating_point
    if name == "bincount":
        return len(args) > 1 or "weights" in kwargs
    if name in ("scatter_reduce", "scatter_reduce_"):
        return args[4] == "prod"
    if name in ("median", "nanmedian"):
        return func._overloadname != "default"  # with indices
    return name in NAMES
