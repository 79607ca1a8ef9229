"""The norm that DeepSpeed hands over, by a stand-in of its ZeRO optimizer."""

from types import SimpleNamespace

import pytest
import torch

from pretrain.engine.zero.balance import TaskBalance
from pretrain.engine.zero.gradient_norm import hand_over_gradient_norm
from pretrain.optim.groups import OptimizerSettings
from pretrain.optim.mt_adamw import MTAdamW

RATIOS = {"a": 0.75, "b": 0.25}


class FakeZero:
    """Scales its gradient down by the loss scale, as DeepSpeed does before the inner step."""

    def __init__(self, inner, loss_scale: float = 1.0) -> None:
        self.optimizer, self.loss_scale, self.clip_grad = inner, loss_scale, 0.0

    def unscale_and_clip_grads(self, gradients, scaled_norm) -> None:
        for gradient in gradients:
            gradient.mul_(1.0 / self.loss_scale)

    def step(self) -> None:
        (parameter,) = self.optimizer.param_groups[0]["params"]
        self.unscale_and_clip_grads([parameter.grad], parameter.grad.norm())
        self.optimizer.step()


@pytest.mark.parametrize("scale", [1.0, 2.0**16])
def test_the_norm_is_that_of_unscaled_gradients(scale):
    told = []
    zero = FakeZero(SimpleNamespace(), scale)
    hand_over_gradient_norm(zero, told.append)
    gradient = torch.tensor([3.0, 4.0]) * scale
    zero.unscale_and_clip_grads([gradient], gradient.norm())
    assert told == [5.0] and gradient.tolist() == [3.0, 4.0]


def test_a_loss_scale_does_not_change_mt_adamw():
    """Nor does one that DeepSpeed has just doubled (stage 1 and 2 divide by the new one)."""
    ended = []
    for scale, divided_by in ((1.0, 1.0), (256.0, 256.0), (256.0, 512.0)):
        p = torch.ones(2)
        zero = FakeZero(MTAdamW([p], lr=0.1), divided_by)
        balance = TaskBalance(
            SimpleNamespace(optimizer=zero),
            settings("mt_adamw", clip_norm=None),
            lambda step: RATIOS,
        )
        for step in range(3):
            balance.before_step(step, "ab"[step % 2])
            p.grad = scale * torch.tensor([3.0, -4.0 + step])
            zero.step()
        ended.append(p)
    for p in ended[1:]:
        torch.testing.assert_close(p, ended[0], rtol=1e-6, atol=0)


def test_each_task_is_clipped_by_its_own_norm():
    zero = FakeZero(torch.optim.AdamW([torch.ones(2)]))
    own = settings("adamw", clip_norm=1.0, task_clip_norms={"b": 5.0})
    balance = TaskBalance(SimpleNamespace(optimizer=zero), own, lambda step: RATIOS)
    clips = []
    for step, task in enumerate("aba"):
        balance.before_step(step, task)
        clips.append(zero.clip_grad)
    assert clips == [1.0, 5.0, 1.0]
    only_b = settings("adamw", clip_norm=None, task_clip_norms={"b": 5.0})
    TaskBalance(SimpleNamespace(optimizer=zero), only_b, lambda step: RATIOS).before_step(0, "a")
    assert zero.clip_grad == 0.0


def test_an_engine_without_norms_is_refused():
    zero = FakeZero(MTAdamW([torch.ones(2)]))
    zero.compute_grad_norm = False
    with pytest.raises(ValueError, match="compute_grad_norm"):
        hand_over_gradient_norm(zero, print)


def settings(kind: str, **more) -> OptimizerSettings:
    return OptimizerSettings(kind=kind, **more)
