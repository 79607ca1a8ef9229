"""InternImage as a graph without this project: ONNX in onnxruntime, and torch.export."""

import json
import subprocess
import sys
from types import ModuleType

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import nn

from pretrain.models.init import initialise
from pretrain.models.internimage.internimage import InternImageSettings
from pretrain.models.vit import VitSettings
from tests.pretrain.models.internimage.internimage_models import (
    OfficialModel,
    read_golden,
    settings_of,
    small_encoder,
)
from tests.tools.conftest import full_disk
from tools.convert import export_graph
from tools.convert.__main__ import main
from tools.convert.export_graph import Logits, write_graph

# A process that knows nothing of this project.
_LOAD = """
import json, sys, torch
facts = {"omnipretrain.json": ""}
program = torch.export.load(sys.argv[1], extra_files=facts)
outputs = program.module()(torch.load(sys.argv[2], weights_only=True))
assert not any(name.split(".")[0] in ("pretrain", "tools") for name in sys.modules)
torch.save(list(outputs), sys.argv[3])
print(facts["omnipretrain.json"])
"""


def need_onnx():
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)


def official_file(folder, name: str) -> tuple[list[str], dict[str, torch.Tensor]]:
    """Arguments that name a golden's weights in an official file, and the golden's tensors."""
    tensors, info = read_golden(f"internimage_tiny_{name}")
    state = {key[3:]: t for key, t in tensors.items() if key.startswith("sd.")}
    torch.save({"model": state}, folder / "a.pth")
    settings = settings_of(f"internimage_tiny_{name}", info)
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    size = [str(side) for side in tensors["input"].shape[2:]]
    return [
        "--source",
        str(folder / "a.pth"),
        "--settings",
        str(folder / "settings.yaml"),
        "--image-size",
        *size,
    ], tensors


def run_onnx(file, images: torch.Tensor) -> tuple[list[str], list[torch.Tensor]]:
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    outputs = session.run(None, {"images": images.numpy()})
    return [one.name for one in session.get_outputs()], [torch.from_numpy(o) for o in outputs]


@pytest.mark.parametrize(
    "name",
    [
        "h_smallhead",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("t_nonsquare", "rc")),
    ],
)
def test_official_weights_to_onnx(name, tmp_path, capsys):
    """With norms of all kinds, without middle points, with gates and the projector."""
    need_onnx()
    import onnx

    source, tensors = official_file(tmp_path, name)
    out = tmp_path / "a.onnx"
    assert main(["export-graph", *source, "--out", str(out)]) == 0
    assert "read back and run: largest difference" in capsys.readouterr().err
    images = tensors["input"]
    names, (logits,) = run_onnx(out, images)
    torch.testing.assert_close(logits, tensors["logits"], atol=1e-4, rtol=1e-4)
    assert names == ["logits"]
    model = onnx.load(out)
    assert {(one.domain, one.version) for one in model.opset_import} == {("", 18)}
    assert "GridSample" in {node.op_type for node in model.graph.node} and not model.functions
    shape = model.graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_param or d.dim_value for d in shape] == ["batch", 3, *images.shape[2:]]
    facts = {one.key: json.loads(one.value) for one in model.metadata_props}
    assert facts["image_mean"] == [0.485, 0.456, 0.406] and facts["weights"] == "master"
    assert b"/site-packages/" not in out.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.onnx", "a.pth", "settings.yaml"]


@pytest.mark.slow
def test_maps_for_detectors(tmp_path):
    """From a backbone without a head; large weights lie beside the graph."""
    need_onnx()
    source, tensors = official_file(tmp_path, "postnorm_ls")
    state = torch.load(tmp_path / "a.pth", weights_only=True)["model"]
    backbone = {f"backbone.{n}": t for n, t in state.items() if "head" not in n}
    torch.save({"state_dict": backbone}, tmp_path / "a.pth")
    out = tmp_path / "a.onnx"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_graph, "_EXTERNAL_BYTES", 1000)
        assert main(["export-graph", *source, "--outputs", "maps", "--out", str(out)]) == 0
    assert out.stat().st_size < (tmp_path / "a.onnx.data").stat().st_size
    images = torch.cat([tensors["input"]] * 2)
    names, maps = run_onnx(out, images)
    assert names == [f"stage_{number}" for number in (1, 2, 3, 4)]
    for index, found in enumerate(maps):
        wanted = tensors[f"stage{index}"].permute(0, 3, 1, 2)
        torch.testing.assert_close(found[: len(wanted)], wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("weights", ["ema", pytest.param("master", marks=pytest.mark.slow)])
def test_a_run_to_a_program_of_torch(internimage_run, tmp_path, weights):
    """It runs where this project is not installed, with any batch."""
    from tools.support.trained import open_run

    out = tmp_path / "a.pt2"
    assert (
        main(
            ["export-graph", "--run", str(internimage_run), "--out", str(out), "--weights", weights]
        )
        == 0
    )
    trained = open_run(internimage_run, weights)
    image = trained.recipe.tasks["classify"].data.image
    images = torch.randn(5, 3, image.size, image.size)
    torch.save(images, tmp_path / "images")
    command = [sys.executable, "-c", _LOAD, *("a.pt2", "images", "outputs")]
    facts = subprocess.run(command, cwd=tmp_path, env={}, check=True, capture_output=True).stdout
    (found,) = torch.load(tmp_path / "outputs", weights_only=True)
    head = trained.model.objectives["classify"].head
    with torch.no_grad():
        wanted = head(trained.model.encoders["image"].encode(images, ("pooled",)).pooled)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    facts = json.loads(facts)
    assert facts["outputs"] == ["logits"] and facts["weights"] == weights and facts["step"] == 4
    assert facts["image_mean"] == list(image.mean)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["halo", "shifted_window", "reduced_attention", 40, 64])
def test_other_encoders_classify_too(kind, tmp_path):
    """Mixers of attention, and vision transformers, one with positions of another size: the same
    head reads them."""
    need_onnx()
    if isinstance(kind, int):
        encoder = VitSettings(image_size=kind, patch_size=8, width=16, layers=1, heads=2).build()
        initialise(encoder, 0)
    else:
        encoder = small_encoder(mixer={"type": kind})
    model = Logits(encoder, "mean", nn.Linear(encoder.width, 3)).requires_grad_(False)
    for name in ("a.onnx", "a.pt2"):  # compared when it is written
        assert write_graph(model, ["logits"], (40, 40), {}, tmp_path / name) < 1e-5


@pytest.mark.slow
def test_a_published_size(tmp_path, capsys):
    """InternImage-T at 64 pixels, recognised by its shapes."""
    need_onnx()
    torch.manual_seed(0)
    settings = InternImageSettings(size="T")
    model = OfficialModel(settings.build(), 1000).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".offset." in name or ".mask." in name:
                parameter.normal_(0.0, 0.1)
    save_file(model.official(), tmp_path / "t.safetensors")
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        wanted = model(images)
    for name in ("t.onnx", "t.pt2"):
        out = tmp_path / name
        assert (
            main(
                [
                    "export-graph",
                    "--source",
                    str(tmp_path / "t.safetensors"),
                    "--image-size",
                    "64",
                    "--out",
                    str(out),
                ]
            )
            == 0
        )
        found = (
            run_onnx(out, images)[1]
            if name == "t.onnx"
            else torch.export.load(out).module()(images)
        )
        torch.testing.assert_close(found[0], wanted, atol=1e-4, rtol=1e-4)


# The second one is right for the batch that the graph is traced on.
@pytest.mark.parametrize(
    "factor",
    [
        pytest.param(lambda batch: 1.001, marks=pytest.mark.slow),
        lambda batch: 1.0 + (batch - 2),
    ],
)
def test_a_graph_that_computes_something_else_is_not_written(factor, tmp_path, monkeypatch, capsys):
    source, _ = official_file(tmp_path, "t")
    (standard,) = export_graph.standard_operators().items()
    wrong = {standard[0]: lambda *inputs: factor(inputs[0].shape[0]) * standard[1](*inputs)}
    monkeypatch.setattr(export_graph, "standard_operators", lambda: wrong)
    assert main(["export-graph", *source, "--out", str(tmp_path / "a.pt2")]) == 1
    assert "was not written: its outputs differ" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth", "settings.yaml"]


@pytest.mark.parametrize("name", ["a.pt2", pytest.param("a.onnx", marks=pytest.mark.slow)])
def test_a_full_disk_leaves_nothing(name, tmp_path, capsys):
    if name == "a.onnx":
        need_onnx()
    source, _ = official_file(tmp_path, "t")
    with full_disk(after=50_000):
        assert main(["export-graph", *source, "--out", str(tmp_path / name)]) == 1
    assert "error: [Errno 27] File too large" in " ".join(capsys.readouterr().err.split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth", "settings.yaml"]


def test_what_is_refused(internimage_run, tmp_path, capsys):
    source, _ = official_file(tmp_path, "t")
    of_run = ["--run", str(internimage_run)]
    out = ["--out", str(tmp_path / "a.pt2")]
    for arguments, message in (
        ([*source, "--out", str(tmp_path / "a.pb")], "must end in .onnx or .pt2"),
        ([*source[:4], *out], "--image-size: give height and width"),
        ([*source, "--weights", "target", *out], "--weights target is for --run"),
        ([*source, "--task", "sort", *out], "--task and --encoder are for --run"),
        ([*of_run, "--task", "sort", *out], "classification tasks with --task: classify"),
        ([*of_run, "--outputs", "maps", "--encoder", "eye", *out], "InternImages are: image"),
        ([*of_run, "--settings", "a.yaml", *out], "--settings is for --source"),
        ([*of_run, "--outputs", "maps", "--task", "classify", *out], "--task chooses logits"),
        ([*of_run, "--encoder", "image", *out], "--encoder maps"),
        ([*source[:2], *source[4:], *out], "describe it with --settings"),
    ):
        assert main(["export-graph", *arguments]) == 1
        assert message in " ".join(capsys.readouterr().err.split())
    state = torch.load(tmp_path / "a.pth", weights_only=True)["model"]
    torch.save(
        {"model": {n: t for n, t in state.items() if not n.startswith("head.")}}, tmp_path / "a.pth"
    )
    assert main(["export-graph", *source, *out]) == 1
    assert "no linear layer (head.weight): use --outputs maps" in capsys.readouterr().err


def test_missing_packages_are_named(tmp_path, monkeypatch, capsys):
    source, _ = official_file(tmp_path, "t")
    for package in ("onnx", "onnxruntime"):  # as if only one were missing, whatever is installed
        monkeypatch.setitem(sys.modules, package, ModuleType(package))
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert main(["export-graph", *source, "--out", str(tmp_path / "a.onnx")]) == 1
    assert "not here: pip install onnxscript" in capsys.readouterr().err
    # Before anything is read, which takes minutes of a large checkpoint.
    arguments = ["--run", str(tmp_path / "none"), "--out", str(tmp_path / "a.onnx")]
    assert main(["export-graph", *arguments]) == 1
    assert "not here: pip install onnxscript" in capsys.readouterr().err


def test_a_run_without_a_classification_task(run_dir, tmp_path, capsys):
    arguments = ["--run", str(run_dir), "--out", str(tmp_path / "a.pt2")]
    assert main(["export-graph", *arguments]) == 1
    said = capsys.readouterr().err
    assert "no classification task" in said and "caption (captioning)" in said
    assert "--task" not in said and "--outputs" not in said  # neither would help
