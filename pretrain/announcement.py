"""What a run says before its first step: what it trains, on what, and what may go wrong."""

import logging
from collections.abc import Sequence
from pathlib import Path

from pretrain.engine.checkpoint.free_space import checkpoint_bytes, space_warning
from pretrain.engine.launch.distributed import Ranks
from pretrain.idle_ranks import idle_ranks
from pretrain.recipe import checks as recipe_checks
from pretrain.recipe.recipe import Recipe
from pretrain.resume_rules import Turn

log = logging.getLogger("omnipretrain.train")


def announce(
    recipe: Recipe,
    ranks: Ranks,
    engine,
    passed_over: Sequence[str],
    turn: Turn,
    restored: Path | None,
) -> None:
    """Say it to the log.

    Args:
        passed_over: what was wrong with checkpoints that were not restored.
        turn: what differs from the run so far.
        restored: the checkpoint from which the run goes on.
    """
    for problem in passed_over:
        log.warning("checkpoint %s", problem)
    size = checkpoint_bytes(engine.module, recipe.optimizer.kind, recipe.ema is not None)
    if ranks.leads and (short := space_warning(Path(recipe.run_dir), size)):
        log.warning("%s", short)
    turn.tell()
    for warning in [*recipe_checks.warnings(recipe), *idle_ranks(recipe, ranks.world)]:
        log.warning("%s", warning)
    parameters = list(engine.module.parameters())
    count = sum(getattr(p, "ds_numel", p.numel()) for p in parameters)
    trained = sum(getattr(p, "ds_numel", p.numel()) for p in parameters if p.requires_grad)
    log.info(
        "%s: %.1f M parameters%s, ZeRO-%d, %s, %d process(es) on %s%s; %s",
        recipe.name,
        count / 1e6,
        f" ({trained / 1e6:.1f} M trained)" if trained < count else "",
        engine.zero_optimization_stage(),
        recipe.precision,
        ranks.world,
        ranks.device.type,
        ", deterministic" if recipe.deterministic else "",
        f"resumed from {restored.name}" if restored else "from the start",
    )
