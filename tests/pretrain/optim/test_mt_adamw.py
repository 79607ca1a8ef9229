"""MT-AdamW against an independent float64 implementation of the published rule, and its promises.

The goldens come from the rule of Uni-Perceiver v2 written in numpy; their makers checked them
against explicit sums and torch.optim.AdamW.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from pretrain.optim.mt_adamw import MTAdamW

GOLDENS = sorted((Path(__file__).parents[2] / "goldens").glob("mt_adamw_*.safetensors"))


def read_golden(path: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["hyper"]), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118


def optimizer_for(hyper: dict, golden: dict, parameters: dict) -> MTAdamW:
    groups = [
        {
            "params": [p],
            "name": name,
            "weight_decay": hyper["weight_decay"] if name in hyper["decayed"] else 0.0,
        }
        for name, p in parameters.items()
    ]
    return MTAdamW(
        groups,
        betas=(hyper["beta1"], hyper["beta2"]),
        eps=hyper["eps"],
        omega={str(k): w for k, w in enumerate(golden["omega"].tolist())},
        normalise=hyper["normalise"],
        compensate=hyper["compensate"],
        bias_correction=hyper["bias_corr"],
    )


def test_all_goldens_are_here():
    assert len(GOLDENS) == 11


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
def test_equals_golden(path, dtype):
    hyper, golden = read_golden(path)
    rtol, atol = (1e-10, 1e-14) if dtype == torch.float64 else (2e-5, 1e-7)
    parameters = {name: golden[f"init.{name}"].to(dtype) for name in hyper["groups"]}
    optimizer = optimizer_for(hyper, golden, parameters)
    for step, task in enumerate(golden["task_id"].tolist()):
        for group in optimizer.param_groups:
            group["lr"] = golden[f"lr.{hyper['groups'][group['name']]}"][step].item()
        for name, p in parameters.items():
            here = hyper["missing"] == "zero" or golden[f"grad_present.{name}"][step]
            p.grad = golden[f"grad.{name}"][step].to(dtype).reshape(p.shape) if here else None
        optimizer.begin_step(str(task), golden["sampling_ratio"][task].item())
        optimizer.gradient_norm = golden["grad_norm"][step]
        optimizer.step()
        for name, p in parameters.items():
            mine = {"param": p}
            if optimizer.state[p]:
                mine["exp_avg"] = optimizer.state[p]["exp_avg"]
                mine["exp_avg_sq"] = optimizer.second_moment(p)
            for kind, tensor in mine.items():
                expected = golden[f"{kind}.{name}"]
                # A moment of un-normalised gradients may be a small rest of large ones.
                largest = max(1.0, expected.abs().max().item())
                torch.testing.assert_close(
                    tensor,
                    expected[step].to(dtype).reshape(p.shape),
                    rtol=rtol,
                    atol=atol * largest,
                )


def trained(scales=(1.0,) * 12, split: bool = False, **settings) -> torch.Tensor:
    """Twelve steps of two tasks on 40 numbers in two groups; gradients times `scales`."""
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(40, generator=generator)
    pieces = [p[:15], p[15:]]
    groups = [{"params": [piece], "lr": lr} for piece, lr in zip(pieces, (1e-2, 3e-2), strict=True)]
    optimizer = MTAdamW(groups, weight_decay=0.1, omega={"b": 0.5}, **settings)
    for step, scale in enumerate(scales):
        gradient = scale * torch.randn(40, generator=generator)
        pieces[0].grad, pieces[1].grad = gradient[:15].clone(), gradient[15:].clone()
        task, ratio = (("a", 0.75), ("b", 0.25))[step % 3 == 2]
        optimizer.begin_step(task, ratio)
        optimizer.gradient_norm = gradient.norm()
        if not split:
            optimizer.step()
            continue
        every = optimizer.param_groups  # what ZeRO does: one call for each group
        for group in every:
            optimizer.param_groups = [group]
            optimizer.step()
        optimizer.param_groups = every
    return p


def test_constant_factors_on_the_gradient_cancel():
    """A loss scale, a loss weight of one task, or one odd step."""
    plain = trained()
    for scales in (
        [1024.0] * 12,
        [1e-3 if s % 3 == 2 else 1.0 for s in range(12)],
        [1.0] * 5 + [1e6] + [1.0] * 6,
    ):
        torch.testing.assert_close(trained(scales), plain, rtol=1e-5, atol=1e-6)


def test_one_call_for_each_group_is_the_same():
    assert torch.equal(trained(split=True), trained())


def test_compensation_is_capped():
    capped, free = trained(max_compensation=2.0), trained()
    assert not torch.allclose(capped, free)
    assert torch.equal(trained(max_compensation=4.0), free)  # 1/0.25: the cap is not reached


def test_a_single_task_is_adamw_on_normalised_gradients():
    generator = torch.Generator().manual_seed(1)
    ours = torch.randn(30, generator=generator)
    theirs = ours.clone()
    mine = MTAdamW([ours], lr=0.01, weight_decay=0.1)
    reference = torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.1)
    for _ in range(10):
        gradient = torch.randn(30, generator=generator)
        ours.grad, theirs.grad = gradient.clone(), gradient / gradient.norm()
        mine.begin_step("only", 1.0)
        mine.gradient_norm = gradient.norm()
        mine.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_a_norm_of_another_step_is_not_used():
    p = torch.ones(3)
    optimizer = MTAdamW([p])
    optimizer.begin_step("a", 0.5)
    optimizer.gradient_norm = 1.0
    p.grad = torch.ones(3)
    optimizer.step()
    optimizer.begin_step("a", 0.5)
    with pytest.raises(RuntimeError, match="gradient_norm"):
        optimizer.step()
    with pytest.raises(ValueError, match=r"task a must lie in \(0, 1\], not 0"):
        optimizer.begin_step("a", 0.0)


def test_state_dict_brings_the_optimizer_back_bitwise():
    generator = torch.Generator().manual_seed(2)
    p = torch.randn(20, generator=generator)
    gradients = torch.randn(6, 20, generator=generator)

    def go_on(optimizer, tensor, steps):
        for step in steps:
            tensor.grad = gradients[step].clone()
            optimizer.begin_step("ab"[step % 2], (0.9, 0.1)[step % 2])
            optimizer.gradient_norm = gradients[step].norm()
            optimizer.step()

    one = MTAdamW([p], lr=0.1)
    go_on(one, p, range(3))
    twin = p.clone()
    two = MTAdamW([twin], lr=0.1)
    two.load_state_dict(json_like(one.state_dict()))
    go_on(one, p, range(3, 6))
    go_on(two, twin, range(3, 6))
    assert torch.equal(p, twin)


def json_like(state: dict) -> dict:
    """Tensors copied, numbers through text, as a checkpoint keeps them."""
    return {
        "param_groups": state["param_groups"],
        "state": {
            key: {
                k: v.clone() if torch.is_tensor(v) else json.loads(json.dumps(v))
                for k, v in values.items()
            }
            for key, values in state["state"].items()
        },
    }
