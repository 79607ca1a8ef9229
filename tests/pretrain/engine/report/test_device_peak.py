"""The peak that MFU is a share of, by the names that drivers give."""

import pytest
import torch

from pretrain.engine.report.device_peak import choose_peak, peak_tflops

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)

# Name, bf16 or fp16, TF32, float32: as data sheets have them, dense.
SHEETS = [
    ("Tesla V100-SXM2-32GB", 125, 15.7, 15.7),
    ("Tesla V100-PCIE-16GB", 112, 14, 14),
    ("Tesla T4", 65, 8.1, 8.1),
    ("NVIDIA A10", 125, 62.5, 31.2),
    ("NVIDIA A30", 165, 82, 10.3),
    ("NVIDIA A40", 149.7, 74.8, 37.4),
    ("A100-SXM4-40GB", 312, 156, 19.5),  # an old driver
    ("NVIDIA A100-SXM4-80GB", 312, 156, 19.5),
    ("NVIDIA A100-PCIE-40GB", 312, 156, 19.5),
    ("NVIDIA A100 80GB PCIe", 312, 156, 19.5),
    ("NVIDIA L4", 121, 60, 30.3),
    ("NVIDIA L40S", 362.05, 183, 91.6),
    ("NVIDIA GeForce RTX 3090", 71, 35.6, 35.6),
    ("NVIDIA GeForce RTX 4090", 165.2, 82.6, 82.6),
    ("NVIDIA RTX 6000 Ada Generation", 364.2, 182.1, 91.1),
    ("NVIDIA H100 80GB HBM3", 989.4, 494.7, 66.9),
    ("NVIDIA H100 PCIe", 756, 378, 51.2),
    ("NVIDIA H100 NVL", 835.5, 417.5, 60),
    ("NVIDIA H200", 989.4, 494.7, 66.9),
    ("NVIDIA H200 NVL", 835.5, 417.5, 60),
    ("NVIDIA GH200 480GB", 989.4, 494.7, 66.9),
    ("NVIDIA GH200 144G HBM3e", 989.4, 494.7, 66.9),
    ("NVIDIA B200", 2250, 1100, 75),
    ("NVIDIA GB200", 2500, 1250, 80),
]


@pytest.mark.parametrize(("name", "half", "tf32", "single"), SHEETS)
def test_data_sheets(name, half, tf32, single):
    near = [pytest.approx(value, rel=0.025) for value in (half, half, tf32, single)]
    assert [
        peak_tflops(name, "bf16"),
        peak_tflops(name, "fp16"),
        peak_tflops(name, "fp32", tf32=True),
        peak_tflops(name, "fp32"),
    ] == near


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA A10G",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA H20",
        "NVIDIA L40",
        "AMD Instinct MI300X",
    ],
)
def test_names_that_only_look_known(name):
    assert peak_tflops(name, "bf16") is None and peak_tflops(name, "fp32") is None


def gpu(monkeypatch, name: str) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)


def test_the_recipe_goes_before_the_table(monkeypatch):
    gpu(monkeypatch, "NVIDIA H200")
    assert choose_peak(500.0, GPU, "bf16") == (
        500.0,
        "MFU refers to 500 TFLOP/s (logging.peak_tflops_per_device)",
    )
    assert choose_peak(None, GPU, "bf16") == (
        989.4,
        "MFU refers to 989.4 TFLOP/s, the dense peak of NVIDIA H200 in bf16",
    )


def test_no_peak_says_what_to_set(monkeypatch):
    gpu(monkeypatch, "NVIDIA Z9")
    peak, said = choose_peak(None, GPU, "bf16")
    assert peak is None and "'NVIDIA Z9'" in said and "logging.peak_tflops_per_device" in said
    assert choose_peak(None, CPU, "bf16") == (None, "")
    assert choose_peak(2.0, CPU, "fp32")[0] == 2.0


@pytest.fixture
def tf32_products():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def test_float32_that_is_multiplied_as_tf32(monkeypatch, tf32_products):
    gpu(monkeypatch, "NVIDIA A100-SXM4-80GB")
    peak, said = choose_peak(None, GPU, "fp32")
    assert peak == 156 and "in TF32" in said
    assert choose_peak(None, GPU, "bf16")[0] == 312
