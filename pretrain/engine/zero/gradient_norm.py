"""The norm of the whole gradient, and its clipping, inside a DeepSpeed ZeRO optimizer.

DeepSpeed 0.19.8, stages 1, 2 and 3, offloaded or not: `step()` reduces the gradients, computes
their global norm, leaves if it is not finite, and then for each group (stage 3: sub-group) calls
`unscale_and_clip_grads(gradients, scaled norm)` and the inner optimizer. So that call is where the
norm is known in time, at no cost; and it reads `clip_grad` afresh.
"""

from collections.abc import Callable

from torch import Tensor


def hand_over_gradient_norm(zero, receive: Callable[[Tensor], None]) -> None:
    """Call `receive(norm)` before every call of the inner optimizer's `step()`.

    The norm (0-dim) is that of the gradients which the inner optimizer will see if clipping is off:
    over all parameters and ranks, accumulation and loss scale taken out.

    Args:
        zero: `engine.optimizer`, a ZeRO optimizer.

    Raises:
        ValueError: this DeepSpeed, or its settings, do not offer the norm.
    """
    if not hasattr(zero, "unscale_and_clip_grads") or not getattr(zero, "compute_grad_norm", True):
        raise ValueError(
            f"{type(zero).__name__} does not compute gradient norms, which optimizer.kind=mt_adamw "
            "needs: remove zero_optimization.compute_grad_norm from the DeepSpeed JSON, or install "
            "the DeepSpeed version that pyproject.toml names"
        )
    unscale_and_clip = zero.unscale_and_clip_grads

    def unscale_and_tell(gradients, scaled_norm) -> None:
        unscale_and_clip(gradients, scaled_norm)
        # The scale as it is now: what the gradients have just been divided by. With a dynamic scale
        # it may be another one than a moment ago.
        receive(scaled_norm / zero.loss_scale)

    zero.unscale_and_clip_grads = unscale_and_tell


def set_clip_norm(zero, norm: float | None) -> None:
    """Clip the gradients of the coming steps to a global norm; None = do not."""
    zero.clip_grad = norm or 0.0
