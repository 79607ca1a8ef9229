"""Optimizers and DeepSpeed settings that the workers of several tests start their engines with."""

from pretrain.optim.groups import OptimizerSettings

SEED = 5
SGD = OptimizerSettings(kind="sgd", lr=0.5, weight_decay=0.0, clip_norm=None)
ADAMW = OptimizerSettings(
    kind="adamw", lr=1e-2, weight_decay=0.05, clip_norm=0.5, lr_multipliers={"objectives.*": 2.0}
)


def deepspeed_config(
    stage: int, precision: str, settings: OptimizerSettings, micro_steps: int = 1
) -> dict:
    """A complete configuration; small parameters are partitioned too."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": micro_steps,
        "gradient_clipping": settings.clip_norm or 0.0,
        "bf16": {"enabled": precision == "bf16"},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 20},
    }
