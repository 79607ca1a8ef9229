"""State of fp16's dynamic loss scale, which a resumed run must go on with."""

FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def loss_scale_state(engine) -> dict[str, float]:
    """What DeepSpeed's scaler has learnt so far (JSON); empty where losses are not scaled."""
    scaler = engine.optimizer.loss_scaler
    return {f: getattr(scaler, f) for f in FIELDS} if getattr(scaler, "dynamic", False) else {}


def restore_loss_scale(engine, state: dict[str, float]) -> None:
    """Put back what `loss_scale_state` gave; nothing to do where losses are not scaled now."""
    scaler = engine.optimizer.loss_scaler
    if getattr(scaler, "dynamic", False):
        for name, value in state.items():
            setattr(scaler, name, value)
