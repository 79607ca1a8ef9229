"""The engine's backward pass, of graphs that ZeRO handles rightly and nothing else."""

from collections.abc import Hashable

from torch import Tensor


class UnsafeGraph(RuntimeError):
    """A loss whose gradients DeepSpeed would lose, or that has none."""


def run_backward(engine, loss: Tensor, task: str, kind: Hashable = 0) -> None:
    """Backward pass of a share of a task's loss, without a division by micro-steps.

    The first graph of each kind is looked through: a walk over 10,000 nodes takes 20 ms, and later
    ones come from the same code.

    Args:
        kind: which of the task's graphs this is: a pass of a micro-batch, the last one of a step.

    Raises:
        UnsafeGraph: reentrant checkpointing, which under ZeRO-3 gives wrong gradients without a
            word where a module runs twice (by 5 % in DeepSpeed 0.19.8), and stops under ZeRO-2; or
            no trained parameter.
    """
    if not loss.requires_grad:
        raise UnsafeGraph(
            f"tasks.{task}: no trained parameter has a part in its loss: shorten optimizer.frozen, "
            "or remove the task"
        )
    seen = vars(engine).setdefault("graphs_seen", set())
    if (task, kind) not in seen:
        if has_reentrant_checkpoint(loss):
            raise UnsafeGraph(
                f"tasks.{task}: the model recomputes activations with reentrant checkpointing, "
                "which loses gradients under ZeRO: call torch.utils.checkpoint.checkpoint with "
                "use_reentrant=False"
            )
        seen.add((task, kind))
    engine.backward(loss, scale_wrt_gas=False)


def has_reentrant_checkpoint(loss: Tensor) -> bool:
    """Whether torch's (or DeepSpeed's) reentrant checkpointing has a node in the graph."""
    waiting, met = [loss.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in met:
            continue
        met.add(node)
        if node.name() == "CheckpointFunctionBackward":
            return True
        waiting += [following for following, _ in node.next_functions]
    return False
