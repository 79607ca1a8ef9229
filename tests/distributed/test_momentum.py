"""Momentum targets under ZeRO-1, 2, 3 against plain PyTorch, through checkpoints, and in bf16.

One launch of two ranks and one of a single rank; all cells run in them.
"""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from pretrain.engine.checkpoint.files import newest_whole, read_full_state, read_manifest
from pretrain.engine.zero.momentum_pairs import moving_targets
from tests.distributed.launch import run_ranks, tails
from tests.distributed.momentum_model import POISONED, STEPS, following_model, plain_run
from tests.distributed.momentum_worker import (
    APART,
    CELLS,
    HALF,
    STILL,
    UPDATES,
    WHOLE_STAGES,
)

WEIGHT = "objectives.follow.target_encoder.inner.weight"
FROZEN = "objectives.follow.target_encoder.frozen.weight"
PASSES = "objectives.follow.target_encoder.passes"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder, and the results of `write` (two ranks) and `read` (one)."""
    folder = tmp_path_factory.mktemp("momentum")
    results = []
    for mode, world in (("write", 2), ("read", 1)):
        logs = folder / mode
        codes = run_ranks("tests.distributed.momentum_worker", [mode, folder], world, logs)
        assert codes == [0] * world, tails(logs)
        results.append(json.loads((folder / f"{mode}.json").read_text()))
    return folder, *results


@pytest.fixture(scope="module")
def reference():
    losses, state = plain_run()
    assert [step for step, loss in enumerate(losses) if loss != loss] == [POISONED]
    # What this file measures has to have happened: targets moved, and are not the online weights.
    assert not torch.equal(state[WEIGHT], state["encoders.image.inner.weight"])
    return losses, state


def cells_of(world: int) -> tuple[str, ...]:
    return CELLS if world == 2 else WHOLE_STAGES


MOVING = {target: online for target, (_, online) in moving_targets(following_model()).items()}


@pytest.mark.parametrize(
    ("world", "cell"),
    [(world, cell) for world in (1, 2) for cell in cells_of(world) if "fp32" in cell],
)
def test_targets_are_those_of_plain_pytorch(runs, reference, world, cell):
    """Losses at every step (they see the module's targets), and all weights at the end."""
    folder, *results = runs
    losses, state = reference
    result = results[2 - world][cell]
    assert result["updates"] == STEPS - 1  # the step that was skipped moved nothing
    torch.testing.assert_close(result["losses"], losses, rtol=0, atol=1e-6, equal_nan=True)
    ended = load_file(folder / f"world{world}-{cell}.safetensors")
    for kind in ("master", "module"):
        for name, value in ended.items():
            if name.startswith(f"{kind}."):
                plain = state[name.removeprefix(f"{kind}.")]
                torch.testing.assert_close(
                    value, plain.flatten(), rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
                )
    assert {f"master.{name}" for name in MOVING} <= ended.keys()
    assert {f"module.{name}" for name in state if "output.weight" not in name} <= ended.keys()


@pytest.mark.parametrize(("world", "cell"), [(w, c) for w in (1, 2) for c in cells_of(w)])
def test_targets_start_as_copies(runs, world, cell):
    """In the module, of frozen parameters and of buffers too."""
    started = load_file(runs[0] / f"world{world}-{cell}-started.safetensors")
    for target, online in {**MOVING, FROZEN: "encoders.image.frozen.weight"}.items():
        assert torch.equal(started[target], started[online]), target
    assert started[FROZEN].any()


@pytest.mark.parametrize(("world", "cell"), [(w, c) for w in (1, 2) for c in cells_of(w)])
def test_the_module_shows_the_masters(runs, world, cell):
    ended = load_file(runs[0] / f"world{world}-{cell}.safetensors")
    for name in MOVING:
        master, module = ended[f"master.{name}"], ended[f"module.{name}"]
        assert module.dtype == (torch.bfloat16 if "bf16" in cell else torch.float32)
        assert torch.equal(module, master.to(module.dtype)), name
    assert torch.equal(ended[f"module.{FROZEN}"], ended["module.encoders.image.frozen.weight"])
    # The encoder runs in every step, the target counts nothing by itself.
    assert ended[f"module.{PASSES}"].item() == STEPS


@pytest.mark.parametrize(("world", "cell"), [(w, c) for w in (1, 2) for c in cells_of(w)])
def test_resume_is_bitwise(runs, world, cell):
    result = runs[3 - world][cell]
    assert result["resumed"] == result["losses"][HALF:]
    assert result["same"]


@pytest.mark.parametrize("cell", WHOLE_STAGES)
@pytest.mark.parametrize("source", WHOLE_STAGES)
def test_another_world_and_stage_continue_alike(runs, source, cell):
    folder, wrote, read = runs
    torch.testing.assert_close(
        read[f"{source}-to-{cell}"], wrote[source]["losses"][HALF:], rtol=0, atol=1e-6
    )
    mine = load_file(folder / f"{source}-to-{cell}.safetensors")
    theirs = load_file(folder / f"world2-{source}.safetensors")
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        torch.testing.assert_close(
            value, theirs[name], rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("cell", ["zero2-bf16", "zero3-bf16"])
def test_small_steps_are_not_lost_in_bf16(runs, cell):
    """target = online + momentum**n * (first - online), to the rounding of n float32 steps."""
    found = load_file(runs[0] / f"still-{cell}.safetensors")
    left = STILL**UPDATES
    for name in MOVING:
        before, after = found[f"before.{name}"], found[f"master.{name}"]
        online = found[f"master.{MOVING[name]}"]
        torch.testing.assert_close(after, online + left * (before - online), rtol=0, atol=2e-5)
        module = found[f"module.{name}"]
        assert torch.equal(module, after.bfloat16())
    # The same in bf16: most weights would never move.
    first, moved = (found[f"{kind}.{WEIGHT}"] for kind in ("before", "master"))
    lerped = first.bfloat16().lerp((first + APART).bfloat16(), 1.0 - STILL)
    assert (lerped == first.bfloat16()).float().mean() > 0.9
    assert (moved - first).abs().min() > 0.09 * APART


@pytest.mark.parametrize("cell", CELLS)
def test_ranks_share_one_float32_copy(runs, cell):
    sizes = {name: p.numel() for name, p in following_model().named_parameters()}
    assert runs[1][cell]["pieces"] == sum(sizes[name] for name in MOVING)


@pytest.mark.parametrize("cell", CELLS)
def test_checkpoints_hold_a_target_once(runs, cell):
    folder = newest_whole(runs[0] / f"world2-{cell}")
    about = read_manifest(folder)["parameters"]
    assert {name: entry["follows"] for name, entry in about.items() if "follows" in entry} == MOVING
    assert not any(about[name]["trained"] for name in MOVING)
    with safe_open(folder / "module.safetensors", framework="pt") as file:
        assert set(file.keys()) == {
            FROZEN,
            "objectives.follow.target_encoder.frozen.bias",
            PASSES,
            "encoders.image.frozen.weight",
            "encoders.image.frozen.bias",
            "encoders.image.passes",
        }
    state = read_full_state(folder)
    model = following_model()
    assert state.keys() == model.state_dict().keys()
    model.load_state_dict(state)
    assert all(state[name].dtype == torch.float32 for name in MOVING)
    average = read_full_state(folder, "ema")
    assert average.keys() == state.keys()
    assert all(torch.equal(average[name], state[name]) for name in MOVING)  # have none of their own
    assert not torch.equal(average[MOVING[WEIGHT]], state[MOVING[WEIGHT]])
