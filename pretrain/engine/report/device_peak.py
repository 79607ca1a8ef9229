"""What a GPU could compute at most, which model FLOP utilisation (MFU) is a share of.

Dense TFLOP/s of NVIDIA's data sheets and white papers at boost clock, without the doubling by
structured sparsity that they like to print, and with sums in float32: GeForce boards take twice the
time for those, and torch has no others. One GPU of a GB200 or GH200, not the whole module.
"""

import re
from typing import NamedTuple

import torch


class _Peak(NamedTuple):
    half: float
    """Products of bfloat16 (where there is any) and float16 on tensor cores."""
    single: float
    """float32, on ordinary cores."""
    has_tf32: bool = True
    """Tensor cores take TF32, at half the speed of the 16-bit types in every generation so far."""


# The whole name as the driver gives it, less the maker's: a slice of a GPU (MIG) or a laptop's has
# more words, and computes less. One chip has several peaks: boards differ in power and clock.
_PEAKS = {
    r"V100-SXM[23]-\d+GB": _Peak(125, 15.7, has_tf32=False),
    r"V100-PCIE-\d+GB": _Peak(112, 14, has_tf32=False),
    r"T4": _Peak(65, 8.1, has_tf32=False),
    r"A10": _Peak(125, 31.2),
    r"A30": _Peak(165, 10.3),
    r"A40": _Peak(149.7, 37.4),
    r"A100-(SXM4|PCIE)-\d+GB|A100 80GB PCIe": _Peak(312, 19.5),
    r"GeForce RTX 3090": _Peak(71, 35.6),
    r"GeForce RTX 4090": _Peak(165.2, 82.6),
    r"RTX 6000 Ada Generation": _Peak(364.2, 91.1),
    r"L4": _Peak(121, 30.3),
    r"L40S": _Peak(362, 91.6),
    r"H100 80GB HBM3": _Peak(989.4, 66.9),  # SXM
    r"H100 PCIe": _Peak(756, 51.2),
    r"H100 NVL|H200 NVL": _Peak(835.5, 60),
    r"H200|GH200 \d+GB?( HBM3e)?": _Peak(989.4, 66.9),
    r"B200": _Peak(2250, 75),
    r"GB200": _Peak(2500, 80),
}


def peak_tflops(name: str, precision: str, tf32: bool = False) -> float | None:
    """Dense peak of one GPU in TFLOP/s; None if it is not in the table.

    Args:
        name: as `torch.cuda.get_device_name` gives it.
        precision: bf16, fp16 or fp32.
        tf32: float32 is multiplied as TF32 (`torch.backends.cuda.matmul.allow_tf32`).
    """
    model = re.sub(r"^(NVIDIA|Tesla) ", "", name)
    peak = next((peak for names, peak in _PEAKS.items() if re.fullmatch(names, model)), None)
    if peak is None or precision != "fp32":
        return peak and peak.half
    return peak.half / 2 if tf32 and peak.has_tf32 else peak.single


def choose_peak(
    given: float | None, device: torch.device, precision: str
) -> tuple[float | None, str]:
    """The peak that MFU refers to, in TFLOP/s, and a line for the log ("" if there is no GPU).

    Args:
        given: the recipe's `logging.peak_tflops_per_device`, which goes before the table.
        device: of this rank.
        precision: of the run.
    """
    if given is not None:
        return given, f"MFU refers to {given:g} TFLOP/s (logging.peak_tflops_per_device)"
    if device.type != "cuda":
        return None, ""
    name = torch.cuda.get_device_name(device)
    tf32 = torch.backends.cuda.matmul.allow_tf32
    peak = peak_tflops(name, precision, tf32)
    if peak is None:
        return None, (
            f"the peak of {name!r} is not known: no MFU in the metrics; to have it, set "
            "logging.peak_tflops_per_device to its dense TFLOP/s"
        )
    said = "TF32" if precision == "fp32" and tf32 else precision
    return peak, f"MFU refers to {peak:g} TFLOP/s, the dense peak of {name} in {said}"
