"""Encoders of transformers from a local folder into a recipe: the printed settings fit the file."""

import pytest
import torch
import yaml
from safetensors.torch import load_file

from pretrain.models.init import initialise, load_weights
from pretrain.models.multitask import MultiTaskModel
from pretrain.recipe.kinds import ENCODERS
from tests.pretrain.models.backbones.test_backbones import theirs
from tests.pretrain.models.bert.test_bert import context, oracle
from tools.convert.__main__ import main


@pytest.mark.parametrize("kind", ["swin", "resnet", "roberta", "bert"])
def test_a_folder_becomes_initial_weights_and_settings(kind, tmp_path, capsys):
    model = theirs(kind) if kind in ("swin", "resnet") else oracle(kind)
    model.save_pretrained(tmp_path / "model")
    out = tmp_path / "out.safetensors"
    assert main(["import", str(tmp_path / "model"), "--encoder", "e", "--out", str(out)]) == 0
    recipe = yaml.safe_load(capsys.readouterr().out)
    assert recipe["initial_weights"] == str(out)
    fields = recipe["model"]["encoders"]["e"]
    (settings,) = (one for one in ENCODERS if one.model_fields["type"].default == fields["type"])
    encoder = settings.model_validate(fields).build(context())
    whole = MultiTaskModel({"e": encoder}, {})
    initialise(whole, 0)
    assert load_weights(whole, out) == []
    state = whole.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in load_file(out).items())


def test_other_folders_are_refused(tmp_path, capsys):
    out = str(tmp_path / "out.safetensors")
    assert main(["import-encoder", str(tmp_path), "--out", out]) == 1
    (tmp_path / "config.json").write_text('{"model_type": "vit"}', encoding="utf-8")
    assert main(["import-encoder", str(tmp_path), "--out", out]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "give the folder that `save_pretrained` of transformers wrote" in said
    assert "model_type is 'vit', and not one of bert, roberta, swin, resnet" in said
