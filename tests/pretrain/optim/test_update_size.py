"""Update sizes read from the moments against the steps that were really taken."""

import pytest
import torch

from pretrain.optim import update_size
from pretrain.optim.mt_adamw import MTAdamW


@pytest.mark.parametrize("kind", ["adamw", "mt_adamw"])
@pytest.mark.parametrize("steps", [1, 7])
def test_equals_the_distance_between_weights(kind, steps, monkeypatch):
    monkeypatch.setattr(update_size, "CHUNK", 7)  # several pieces, the last one short
    generator = torch.Generator().manual_seed(steps)
    p = torch.randn(50, generator=generator, dtype=torch.float64)
    cls = MTAdamW if kind == "mt_adamw" else torch.optim.AdamW
    optimizer = cls([p], lr=1e-3, betas=(0.9, 0.95), eps=1e-3, weight_decay=0.0)
    for step in range(steps):
        p.grad = torch.randn(50, generator=generator, dtype=torch.float64)
        if kind == "mt_adamw":
            optimizer.begin_step("ab"[step % 2], (0.8, 0.2)[step % 2])
            optimizer.gradient_norm = p.grad.norm()
        before = p.clone()
        optimizer.step()
    found = update_size.sum_of_squared_steps(
        optimizer, optimizer.param_groups[0], optimizer.state[p]
    )
    assert found.item() == pytest.approx(((p - before) / 1e-3).square().sum().item(), rel=1e-9)


def test_memory_is_bounded_by_the_chunk():
    """Tensors that a step's size is read from are not copied as a whole."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if torch.is_tensor(out) and out.untyped_storage().data_ptr() not in kept:
                largest = max(largest, out.numel())
            return out

    p = torch.randn(3 * update_size.CHUNK + 5)
    p.grad = torch.ones_like(p)
    optimizer = torch.optim.AdamW([p], fused=True)
    optimizer.step()
    kept = {t.untyped_storage().data_ptr() for t in optimizer.state[p].values()}
    with Watch():
        update_size.sum_of_squared_steps(optimizer, optimizer.param_groups[0], optimizer.state[p])
    assert 0 < largest <= update_size.CHUNK
