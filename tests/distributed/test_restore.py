"""Checkpoints at every ZeRO stage: bitwise at the same world, to rounding at another."""

import json
import re

import pytest
import torch

from pretrain.engine.checkpoint.files import CheckpointError, newest_whole, read_full_state
from tests.distributed.launch import run_ranks, tails
from tests.distributed.restore_worker import CELLS
from tests.distributed.toy import toy_model


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("restore")
    codes = run_ranks("tests.distributed.restore_worker", ["write", folder], 2, folder)
    assert codes == [0, 0], tails(folder)
    return folder, json.loads((folder / "write_world2.json").read_text())


@pytest.mark.parametrize("cell", [f"zero{s}_{p}" for s, p in CELLS])
def test_resume_is_bitwise(written, cell):
    result = written[1][cell]
    assert result["resumed"] == result["straight"]
    assert result["same_files"]  # written behind the training, byte by byte
    assert result["same_weights"] and result["same_module"]
    assert result["trainer"] == {"ledger": [{"note": "kept"}]}


def test_other_world_and_stage_continue_alike(written):
    folder, results = written
    codes = run_ranks("tests.distributed.restore_worker", ["read", folder], 1, folder / "one")
    assert codes == [0], tails(folder / "one")
    read = json.loads((folder / "read_world1.json").read_text())
    for cell, result in read.items():
        straight = results[cell.split(" -> ")[0]]
        torch.testing.assert_close(
            result["resumed"],
            straight["straight"],
            rtol=1e-6,
            atol=1e-6,
            msg=lambda m, c=cell: f"{c}: {m}",
        )
        for name, values in result["weights"].items():
            expected = torch.tensor(straight["weights"][name])
            torch.testing.assert_close(torch.tensor(values), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_full_state_is_the_model(written, stage):
    """Tied, frozen and unused parameters are all there, under every name."""
    folder = newest_whole(written[0] / f"zero{stage}_fp32")
    state = read_full_state(folder)
    model = toy_model()
    assert set(state) == set(model.state_dict())
    model.load_state_dict(state)
    assert model.objectives["words"].output.weight is model.objectives["words"].words.weight
    tied = state["objectives.words.output.weight"]
    assert torch.equal(tied, state["objectives.words.words.weight"])


def test_damage_is_named(written, tmp_path):
    folder = newest_whole(written[0] / "zero2_fp32")
    for name in ("rank_00001.safetensors", "rank_00000.json", "module.safetensors"):
        path = folder / name
        whole = path.read_bytes()
        damaged = bytearray(whole)
        damaged[len(whole) // 2] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=f"{name} is damaged"):
            read_full_state(folder)
        path.write_bytes(whole[:-1])
        with pytest.raises(CheckpointError, match=f"{name} has .* bytes instead"):
            read_full_state(folder)
        path.write_bytes(whole)
    manifest = folder / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"step": 3', '"step": 4'))
    with pytest.raises(CheckpointError, match="does not match its digest"):
        read_full_state(folder)
    manifest.write_text(text)
    read_full_state(folder)


def test_a_failed_save_leaves_nothing_and_every_rank_knows(written):
    faults = written[1]["faults"]
    assert re.search(
        r"rank 1: CheckpointError: cannot write /.*/\.writing-step_000000008-\w+/"
        r"rank_00001\.safetensors, [\d,]+ bytes \([\d,]+ bytes are free there\): .*File too large",
        faults["full_disk"],
    ), faults["full_disk"]
    behind = faults["full_disk_behind"]
    varies = r"-\w{8}/|[\d,]+ bytes|Error while serializing: |I/O error: "
    assert re.sub(varies, "", behind) == re.sub(varies, "", faults["full_disk"])
    assert re.search(
        r"rank 1: CheckpointError: the writer of /.*/\.writing-step_000000008-\w+ "
        r"\(process \d+\) was ended by SIGKILL",
        faults["killed_behind"],
    )
    assert re.search(r"took longer than failure\.save_minutes", faults["late_behind"])
    assert "another job owns this run" in faults["disowned"]
    assert faults["left_behind"] == ["latest", *faults["kept"]]


def test_retention(written):
    faults = written[1]["faults"]
    assert faults["kept"] == ["step_000000004", "step_000000006", "step_000000007"]
    assert faults["latest"] == "step_000000007"


def test_damaged_checkpoints_are_passed_over(written):
    faults = written[1]["faults"]
    assert faults["after_one"] == "step_000000006"
    assert faults["replaced"] == "step_000000007"
    assert "none of the 3 checkpoints" in faults["after_all"]
    assert faults["empty"] is None
    assert "latest names step_000000007, but no checkpoint is there now" in faults["gone"]
