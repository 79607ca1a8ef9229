"""One table of names, read both ways: what goes out comes back, and nothing is lost on the way."""

import pytest
import torch

from pretrain.models.key_map import KeyMap

RULES = (
    ("<E>.stem", "<V>.stem.weight"),
    ("<E>.norm.{p}", "<V>.ln.{p}"),
    ("<E>.stages.{s}.down.{p}", "<V>.down{s}.{p}"),
    ("<E>.stages.{s}.blocks.{b}.qkv.{p}", tuple(f"<V>.{{s}}.{{b}}.{part}.{{p}}" for part in "qkv")),
    ("<E>.stages.{s}.blocks.{b}.mlp.{p}", "<V>.{s}.{b}.mlp.{s}.{p}"),
)
DEPTHS = (2, 1, 12)  # of unequal stages, and a number of two digits


def key_map() -> KeyMap:
    return KeyMap(RULES, {"E": "encoders.image", "V": "<W>.tower", "W": "net"}, "tower", "theirs")


def ours() -> dict[str, torch.Tensor]:
    shapes = {"stem": (3,), "norm.weight": (2,), "norm.bias": (2,)}
    for stage, depth in enumerate(DEPTHS):
        for p in ("weight", "bias"):
            shapes[f"stages.{stage}.down.{p}"] = (4,)
            for block in range(depth):
                shapes[f"stages.{stage}.blocks.{block}.qkv.{p}"] = (6, 2)
                shapes[f"stages.{stage}.blocks.{block}.mlp.{p}"] = (2, 2)
    generator = torch.Generator().manual_seed(0)
    return {
        f"encoders.image.{name}": torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
    }


def test_what_goes_out_comes_back():
    state = ours()
    theirs = key_map().to_theirs(state)
    assert len(theirs) == len(state) + 2 * 2 * sum(DEPTHS)  # two more for each of the qkv
    assert theirs["net.tower.2.11.mlp.2.bias"].equal(
        state["encoders.image.stages.2.blocks.11.mlp.bias"]
    )
    assert theirs["net.tower.0.1.k.weight"].equal(
        state["encoders.image.stages.0.blocks.1.qkv.weight"][2:4]
    )
    back = key_map().to_ours(theirs)
    assert back.keys() == state.keys() and all(back[name].equal(state[name]) for name in state)


@pytest.mark.parametrize("direction", ["to_theirs", "to_ours"])
def test_every_tensor_must_have_its_counterpart(direction):
    """Without any one of them, or with one more, nothing is converted and the name is said; but a
    model may have fewer layers."""
    state = ours() if direction == "to_theirs" else key_map().to_theirs(ours())
    for name in state:
        less = {other: tensor for other, tensor in state.items() if other != name}
        with pytest.raises(ValueError, match=f"1 tensors are missing.*{name}"):
            getattr(key_map(), direction)(less)
        with pytest.raises(ValueError, match=f"1 tensors are unknown.*{name}x"):
            getattr(key_map(), direction)(state | {f"{name}x": state[name]})
    last = "stages.2.blocks.11" if direction == "to_theirs" else "2.11."
    fewer = {name: tensor for name, tensor in state.items() if last not in name}
    assert len(getattr(key_map(), direction)(fewer)) < len(getattr(key_map(), direction)(state))


def test_a_word_that_nobody_explains():
    with pytest.raises(ValueError, match=r"<V>\.stem\.weight: nobody says what"):
        KeyMap(RULES, {"E": "encoders.image"})
