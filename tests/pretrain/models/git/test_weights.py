"""Foreign weights to ours and back."""

import pytest
import torch

from pretrain.models.git.weights import detect_format, export_git, import_git
from tests.pretrain.models.git.git_models import Golden, small_model


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("git_caption", "transformers"),
        ("git_caption_untied", "transformers"),
        ("git_orig_caption", "original"),
        ("git_video3", "transformers"),
        ("git_orig_video3", "original"),
    ],
)
def test_there_and_back(name: str, kind: str) -> None:
    foreign = Golden.load(name).part("w")
    assert detect_format(foreign) == kind
    ours = import_git(foreign, encoder="eye", task="say")
    assert {".".join(key.split(".")[:2]) for key in ours} == {"encoders.eye", "objectives.say"}
    assert ("objectives.say.decoder.output.weight" in ours) == (name == "git_caption_untied")
    back = export_git(ours, kind, encoder="eye", task="say")
    dropped = {"image_encoder.proj"} & foreign.keys()
    assert back.keys() == foreign.keys() - dropped
    assert all(torch.equal(back[key], foreign[key]) for key in back)


@pytest.mark.parametrize("name", ["git_orig_caption", "git_orig_video3"])
def test_table_agrees_with_the_reference_key_map(name: str) -> None:
    golden = Golden.load(name)
    original = golden.part("w")
    transformers = export_git(import_git(original), "transformers")
    for source, targets in golden.info["key_map_to_transformers"].items():
        rows = original[source].chunk(len(targets))
        for (target, operation), expected in zip(targets, rows, strict=True):
            assert torch.equal(transformers.pop(target), expected), (source, target, operation)
    # Tied files may leave the output matrix out of the map; nothing else may remain.
    assert transformers.keys() <= {"output.weight"}


def test_released_files_are_read() -> None:
    golden = Golden.load("git_orig_caption").part("w")
    wrapped = {f"module.{key}": tensor for key, tensor in golden.items()}
    wrapped["module.image_encoder.proj"] = torch.zeros(64, 16)
    expected = import_git(golden)
    assert import_git(wrapped).keys() == expected.keys()
    old = Golden.load("git_caption").part("w")
    expected = import_git(old)
    old["git.embeddings.position_ids"] = torch.arange(64)[None]
    old["git.image_encoder.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    del old["output.weight"]  # tied files may hold the matrix once
    assert import_git(old).keys() == expected.keys()


def test_vectors_of_frames_under_both_spellings_and_in_their_order() -> None:
    golden = Golden.load("git_video3").part("w")
    expected = import_git(golden)["objectives.caption.decoder.temporal.vectors"]
    assert expected.shape == (3, 1, 32)
    old = {name.replace("temporal", "temperal"): tensor for name, tensor in golden.items()}
    assert torch.equal(import_git(old)["objectives.caption.decoder.temporal.vectors"], expected)
    # As a safetensors file lists its names: 10 before 2.
    many = {
        f"git.img_temporal_embedding.{i}": torch.full((1, 1, 32), i)
        for i in sorted(range(12), key=str)
    }
    found = import_git(golden | many)["objectives.caption.decoder.temporal.vectors"]
    assert found[:, 0, 0].tolist() == list(range(12))
    del golden["git.img_temporal_embedding.1"]
    with pytest.raises(ValueError, match=r"temporal embeddings of frames \[0, 2\]"):
        import_git(golden)


@pytest.mark.parametrize("name", ["git_caption", "git_orig_caption"])
def test_every_missing_or_unknown_tensor_is_named(name: str) -> None:
    state = Golden.load(name).part("w")
    tied = {"git.embeddings.word_embeddings.weight", "textual.embedding.words.weight"}
    for key in state:
        if key in {"output.weight", "textual.output.weight", "image_encoder.proj"}:
            continue
        rest = {k: v for k, v in state.items() if k != key}
        with pytest.raises(ValueError, match="missing") as error:
            import_git(rest)
        assert key in str(error.value) or key in tied
    with pytest.raises(ValueError, match=r"1 tensors are unknown \(textual\.extra\)"):
        import_git(state | {"textual.extra": torch.zeros(1)})


def test_a_gap_in_the_layers_is_an_error() -> None:
    state = Golden.load("git_caption").part("w")
    gap = {k: v for k, v in state.items() if not k.startswith("git.encoder.layer.1.")}
    with pytest.raises(ValueError, match=r"16 tensors are missing \(git\.encoder\.layer\.1"):
        import_git(gap)


def test_export_is_strict_and_leaves_other_tasks_out() -> None:
    tensors = {name: p.detach() for name, p in small_model().named_parameters()}
    expected = export_git(tensors, "transformers").keys()
    crowd = tensors | {"objectives.classify.head.weight": torch.zeros(2, 2)}
    assert export_git(crowd, "transformers").keys() == expected
    with pytest.raises(ValueError, match="encoder 'eye' and task 'say'; the checkpoint has enc"):
        export_git(tensors, "transformers", encoder="eye", task="say")
    extra = {"encoders.image.adapter.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"unknown \(encoders\.image\.adapter\.weight\)"):
        export_git(tensors | extra, "original")


def test_what_is_no_git_model() -> None:
    with pytest.raises(ValueError, match=r"not weights of GIT.*backbone\.conv"):
        import_git({"backbone.conv": torch.zeros(1)})
