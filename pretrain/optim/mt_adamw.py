"""MT-AdamW: AdamW for steps of one task each (Uni-Perceiver v2, section 4.4: Task-Balanced
Gradient Normalization).

For a step of task k with sampling ratio s and importance omega, N the norm of the whole gradient:

    g = omega * gradient / N                         (0 when N is 0)
    m = b1 * m + (1 - b1) * c * g                    c = 1 / s, at most `max_compensation`
    v = b2 * v + (1 - b2) * c * g**2                 c once, not squared
    p = p * (1 - lr * decay) - lr * m' / (sqrt(v') + eps)         m', v': bias-corrected as in Adam

The paper writes its betas as the weight of the new gradient: its beta is 1 - b here.

One pass of torch's fused AdamW does all of it, without temporary memory. That kernel would give v
the square of what it gives m, c * g, so what is stored as `exp_avg_sq` is V = v / w, with

    w = b2 * w + (1 - b2) / c                        `mean_ratio`, a number: the running mean of 1/c
    V = b * V + (1 - b) * (c * g)**2                 b = b2 * w_before / w_after

(multiply by w_after to see that this is the rule for v). The kernel is told b, and that infinitely
many steps lie behind it, which switches its own bias correction off; ours, and sqrt(v), which is
sqrt(V * w), go into the lr, eps and decay that it is given. N / (omega * c) is its gradient scale.

What follows from the rule: a loss scale and per-task loss weights cancel; every moment decays in
every step, so a parameter that a task does not use needs a gradient of zero, not None (ZeRO does
that); m estimates the *sum* over tasks, so steps grow with their number, and betas[1] = 0.95 is
safer than 0.999 when a task is rare.
"""

from collections.abc import Callable, Iterable, Mapping
from math import sqrt
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw


class MTAdamW(torch.optim.Optimizer):
    """Element-wise given N, so right on ZeRO's flat partitions, however often `step()` is called.

    Args:
        params: tensors or groups of them; groups may set lr, betas, eps, weight_decay.
        omega: task -> importance (> 0); 1 for tasks that are not named.
        max_compensation: cap on 1 / s; None = no cap.
        normalise, compensate, bias_correction: switch off parts of the rule, to see what each does.

    Attributes:
        gradient_norm: N of the coming engine step, a 0-dim tensor or number: of the gradients that
            `step()` will see, over all parameters of all ranks. `begin_step` forgets it.
    """

    scalars_on_host = True  # state beside the moments is plain numbers (engine.checkpoint asks)

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        omega: Mapping[str, float] | None = None,
        max_compensation: float | None = None,
        normalise: bool = True,
        compensate: bool = True,
        bias_correction: bool = True,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )
        self.omega = dict(omega or {})
        self.max_compensation = max_compensation
        self.normalise = normalise
        self.compensate = compensate
        self.bias_correction = bias_correction
        self.gradient_norm: Tensor | float | None = None
        self._task_omega, self._compensation = 1.0, 1.0

    def begin_step(self, task: str, ratio: float) -> None:
        """Say what the coming step is; before the first `step()` of each engine step.

        Args:
            task: name of its task.
            ratio: s, the share of steps that this task has at present, in (0, 1].
        """
        if not 0.0 < ratio <= 1.0:
            raise ValueError(f"the sampling ratio of task {task} must lie in (0, 1], not {ratio}")
        self.gradient_norm = None
        self._task_omega = self.omega.get(task, 1.0)
        self._compensation = 1.0 / ratio if self.compensate else 1.0
        if self.max_compensation is not None:
            self._compensation = min(self._compensation, self.max_compensation)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every tensor of the present groups that has a gradient, which is overwritten.

        Raises:
            RuntimeError: `gradient_norm` is not set for this step.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.normalise and self.gradient_norm is None:
            raise RuntimeError(
                "MTAdamW needs gradient_norm, the norm of the whole gradient, before step(); under "
                "ZeRO pretrain.engine.zero.balance.TaskBalance sets it"
            )
        for group in self.param_groups:
            # Tensors that have seen the same steps share their scalars, and one call.
            alike: dict[tuple, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    before = self._count(group, p)
                    alike.setdefault((*before, p.device, p.dtype), []).append(p)
            for (step, ratio_before, *_), tensors in alike.items():
                self._update(group, tensors, step, ratio_before)
        return loss

    def _count(self, group: dict, p: Tensor) -> tuple[float, float]:
        """Advance the numbers of a tensor's state; returns its step and its `mean_ratio` before."""
        state = self.state[p]
        if not state:
            state["step"], state["mean_ratio"] = 0.0, 1.0 / self._compensation
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        before, beta = state["mean_ratio"], group["betas"][1]
        state["step"] += 1.0
        state["mean_ratio"] = beta * before + (1 - beta) / self._compensation
        return state["step"], before

    def _update(self, group: dict, tensors: list[Tensor], step: float, before: float) -> None:
        states = [self.state[p] for p in tensors]
        first, root = self.corrections(group, states[0])
        gradients, scale = self._scaled([p.grad for p in tensors])
        adamw(
            tensors,
            gradients,
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            [torch.full((), float("inf"), device=p.device) for p in tensors],
            fused=True,
            grad_scale=scale,
            amsgrad=False,
            maximize=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1] * before / states[0]["mean_ratio"],
            lr=group["lr"] * root / first,
            eps=group["eps"] * root,
            weight_decay=group["weight_decay"] * first / root,
        )

    def _scaled(self, gradients: list[Tensor]) -> tuple[list[Tensor], Tensor | None]:
        """c * g as (tensors, what the kernel divides them by)."""
        factor = self._task_omega * self._compensation
        device, dtype = gradients[0].device, gradients[0].dtype
        norm = self.gradient_norm if self.normalise else 1.0
        norm = torch.as_tensor(norm, dtype=torch.promote_types(dtype, torch.float32), device=device)
        # Without a gradient there is nothing to divide; no branch, so that no device has to wait.
        scale = torch.where(norm > 0, norm, 1.0) / factor
        if dtype == torch.float64:  # the kernel reads its scale in single precision
            torch._foreach_div_(gradients, scale)
            return gradients, None
        return gradients, scale

    def corrections(self, group: dict, state: dict) -> tuple[float, float]:
        """(a, r) of a tensor: its last step was -lr * m / a / (sqrt(V) / r + eps), and decay."""
        first = second = 1.0
        if self.bias_correction:
            first, second = (1.0 - beta ** state["step"] for beta in group["betas"])
        return first, sqrt(second / state["mean_ratio"])

    def second_moment(self, p: Tensor) -> Tensor:
        """v of the rule, a new tensor."""
        return self.state[p]["exp_avg_sq"] * self.state[p]["mean_ratio"]
