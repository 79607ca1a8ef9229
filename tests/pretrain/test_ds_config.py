"""DeepSpeed configuration: one source of truth, and nothing that DeepSpeed silently ignores."""

import json

import pytest

from pretrain.ds_config import (
    SHIPPED,
    DeepSpeedConfigFault,
    accumulation_steps,
    engine_config,
)
from pretrain.recipe.load import load_recipe
from pretrain.sampler import SamplingSettings
from pretrain.sampler.settings import offload_clashes


@pytest.fixture(autouse=True)
def cpu(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


def config_for(tmp_path, block, *overrides, world=1):
    path = tmp_path / "engine.json"
    path.write_text(block if isinstance(block, str) else json.dumps(block))
    return engine_config(load_recipe("git_digits", [f"deepspeed={path}", *overrides]), world)


def fault_of(tmp_path, block, *overrides) -> str:
    with pytest.raises(DeepSpeedConfigFault) as caught:
        config_for(tmp_path, block, *overrides)
    text = str(caught.value)
    assert all(line.startswith(str(tmp_path / "engine.json")) for line in text.splitlines())
    return text.replace(str(tmp_path / "engine.json"), "FILE")


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_shipped_files_merge_with_the_recipe(stage, precision):
    recipe = load_recipe(
        "git_digits",
        [
            f"deepspeed=zero{stage}",
            f"precision={precision}",
            "tasks.caption.global_batch=48",
            "tasks.caption.micro_batch=4",
            "optimizer.clip_norm=0.5",
        ],
    )
    config = engine_config(recipe, world=3)
    assert config["zero_optimization"]["stage"] == stage
    assert config["train_micro_batch_size_per_gpu"] == 4
    assert config["gradient_accumulation_steps"] == 4
    assert config["gradient_clipping"] == 0.5
    assert config["bf16"] == {"enabled": precision == "bf16"}
    assert config["checkpoint"]["tag_validation"] == "Fail"
    assert config["steps_per_print"] > 10**9
    assert config["zero_allow_untested_optimizer"] is False


def test_the_merged_configuration_is_what_deepspeed_reads():
    from deepspeed.runtime.config import DeepSpeedConfig

    overrides = ["optimizer.kind=sgd", "optimizer.clip_norm=null", "precision=bf16"]
    parsed = DeepSpeedConfig(engine_config(load_recipe("git_digits", overrides), world=1))
    assert parsed.train_micro_batch_size_per_gpu == 32
    assert parsed.gradient_accumulation_steps == 2
    assert parsed.gradient_clipping == 0.0
    assert parsed.bfloat16_config.enabled
    assert parsed.zero_allow_untested_optimizer


@pytest.mark.parametrize(
    ("global_batch", "micro_batch", "world", "steps"),
    [(64, 32, 2, 1), (64, 32, 1, 2), (64, 8, 3, 3), (64, 64, 1, 1), (10, 1, 4, 4), (2, 2, 8, 1)],
)
def test_accumulation_follows_from_batch_and_world(global_batch, micro_batch, world, steps):
    assert accumulation_steps(global_batch, micro_batch, world) == steps


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.json")), ids=lambda path: path.stem)
def test_shipped_files_hold_engine_settings_only(path):
    assert set(json.loads(path.read_text())) <= {"zero_optimization", "checkpoint", "fp16", "aio"}


STAGE2 = {"zero_optimization": {"stage": 2}}


@pytest.mark.parametrize(
    ("key", "value", "owner"),
    [
        ("train_batch_size", 8, "global_batch"),
        ("train_micro_batch_size_per_gpu", 8, "micro_batch"),
        ("gradient_accumulation_steps", 1, "number of ranks"),
        ("gradient_clipping", 1.0, "optimizer.clip_norm"),
        ("optimizer", {"type": "AdamW"}, "optimizer"),
        ("scheduler", {"type": "WarmupLR"}, "schedule"),
        ("bf16", {"enabled": True}, "precision"),
        ("steps_per_print", 10, "logging.every_steps"),
    ],
)
def test_what_the_recipe_decides_is_refused(tmp_path, key, value, owner):
    text = fault_of(tmp_path, {**STAGE2, key: value})
    assert text.startswith(f"FILE: {key}: the recipe decides this (")
    assert owner in text and text.endswith("; remove it from the JSON")


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        (
            {**STAGE2, "wal_clock_breakdown": True},
            "FILE: wal_clock_breakdown: DeepSpeed ignores this key; "
            "did you mean 'wall_clock_breakdown'?",
        ),
        (
            {**STAGE2, "gradient_cliping": 1.0},
            "FILE: gradient_cliping: DeepSpeed ignores this key; did you mean 'gradient_clipping'? "
            "The recipe decides that one (optimizer.clip_norm).",
        ),
        (
            {**STAGE2, "checkpoint": {"tag_validaton": "Fail"}},
            "FILE: checkpoint.tag_validaton: DeepSpeed ignores this key; "
            "did you mean 'tag_validation'?",
        ),
        (
            {"zero_optimization": {"stage": 2, "overlap_com": True}},
            "FILE: zero_optimization.overlap_com: unknown key; did you mean 'overlap_comm'?",
        ),
        (
            {"zero_optimization": {"stage": 2, "reduce_bucket_size": "big"}},
            "FILE: zero_optimization.reduce_bucket_size: Input should be a valid integer, "
            "unable to parse string as an integer, not 'big'",
        ),
    ],
)
def test_unknown_keys_at_every_level(tmp_path, block, expected):
    assert fault_of(tmp_path, block) == expected


@pytest.mark.parametrize(
    "key",
    ["amp", "nebula", "compression_training", "elasticity", "curriculum_learning", "eigenvalue"],
)
def test_removed_features_are_named_with_the_reason(tmp_path, key):
    text = fault_of(tmp_path, {**STAGE2, key: {"enabled": True}})
    assert text.startswith(f"FILE: {key}: ") and "has been removed" in text
    assert "\n" not in text


def test_removed_zero_keys_are_named(tmp_path):
    text = fault_of(tmp_path, {"zero_optimization": {"stage": 3, "mics_shard_size": 2}})
    assert text.startswith("FILE: zero_optimization: ") and "mics_shard_size" in text


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({}, "zero_optimization.stage: required"),
        ({"zero_optimization": {"stage": 4}}, "expected 1, 2 or 3, not 4"),
        ({"zero_optimization": {"stage": 0}}, "0 is refused: checkpoints need the partitions"),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
            "offload_optimizer.device: checkpoints cannot read masters that lie in NVMe files",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            "offload_param.nvme_path: device=nvme needs a folder on the drive",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            "offload_param: weights can only be offloaded at stage 3; remove it",
        ),
        (
            {
                "zero_optimization": {
                    "stage": 3,
                    "offload_optimizer": {"device": "cpu", "ratio": 0.5},
                }
            },
            "offload_optimizer.ratio: needs DeepSpeed's own CPU optimizer; remove it",
        ),
        (
            {"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}},
            "zero_optimization.zenflow: it brings an optimizer of its own; remove it",
        ),
        (
            {**STAGE2, "fp16": {"initial_scale_power": 12}},
            "fp16: these settings have no effect with precision=",
        ),
        ({**STAGE2, "gradient_allreduce_op": "sum"}, "the loop scales losses"),
        ({**STAGE2, "pipeline": {"stages": 2}}, "pipeline parallelism is not supported"),
    ],
)
def test_unsupported_modes_are_refused_with_the_reason(tmp_path, block, words):
    assert words in fault_of(tmp_path, block)


def test_stage_0_with_bf16_names_the_defect(tmp_path):
    text = fault_of(tmp_path, {"zero_optimization": {"stage": 0}}, "precision=bf16")
    assert "one optimizer step on zero gradients" in text and "use stage 1" in text


def test_fp32_accumulation_at_stage_1_in_bf16_is_refused(tmp_path):
    wide = {"data_types": {"grad_accum_dtype": "fp32"}}
    text = fault_of(tmp_path, {"zero_optimization": {"stage": 1}, **wide}, "precision=bf16")
    assert "data_types.grad_accum_dtype" in text and "use stage 2" in text
    assert config_for(tmp_path, {**STAGE2, **wide}, "precision=bf16")["data_types"]


def test_features_switched_off_are_no_fault(tmp_path):
    block = {
        "zero_optimization": {"stage": 3, "offload_param": {"device": "none"}},
        "data_efficiency": {"enabled": False},
    }
    assert config_for(tmp_path, block)["zero_optimization"]["stage"] == 3


@pytest.mark.parametrize(
    "block",
    [
        {"flops_profiler": {"enabled": False, "profile_step": 1, "output_file": None}},
        {"comms_logger": {"enabled": False, "verbose": False}},
        {"wall_clock_breakdown": False, "communication_data_type": "fp32"},
        {"tensorboard": {"enabled": False, "output_path": "x", "job_name": "y"}},
        {"aio": {"block_size": 1048576, "queue_depth": 8, "overlap_events": True}},
        {"activation_checkpointing": {"partition_activations": False}},
        {"timers": {"throughput": {"enabled": False}}},
        {"compile": {"deepcompile": False}},
        {"checkpoint": {"load_universal": False, "writer": {"type": "python"}}},
    ],
    ids=lambda block: next(iter(block)),
)
def test_documented_blocks_pass(tmp_path, block):
    config = config_for(tmp_path, {**STAGE2, **block})
    assert all(config[key] == value for key, value in block.items())


def test_fp16_is_switched_by_the_recipe_and_tuned_by_the_file(tmp_path):
    text = fault_of(tmp_path, {**STAGE2, "fp16": {"enabled": True}})
    assert text.startswith("FILE: fp16.enabled: the recipe decides this (precision); remove it")
    tuned = {**STAGE2, "fp16": {"initial_scale_power": 12}}
    config = config_for(tmp_path, tuned, "precision=fp16")
    assert config["fp16"] == {"initial_scale_power": 12, "enabled": True}
    assert not config["bf16"]["enabled"]


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.json")), ids=lambda path: path.stem)
def test_shipped_files_parse_in_the_installed_deepspeed(path):
    precision = "fp16" if path.stem.endswith("fp16") else "bf16"
    recipe = load_recipe("git_digits", [f"deepspeed={path.stem}", f"precision={precision}"])
    assert engine_config(recipe, world=2)["zero_optimization"]["stage"] in (1, 2, 3)


def test_every_fault_is_reported_at_once(tmp_path):
    block = {
        "zero_optimization": {"stage": 0},
        "fp16": {"enabled": True},
        "pipeline": {"stages": 2},
    }
    assert len(fault_of(tmp_path, block).splitlines()) == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": 1, "a": 2}', "a: given twice"),
        ('{"zero_optimization": {"stage": 2, "stage": 3}}', "stage: given twice"),
        ("{\n  bad\n}", ":2: not valid JSON"),
        ("[]", "expected a JSON object"),
    ],
)
def test_broken_json(tmp_path, text, words):
    assert words in fault_of(tmp_path, text)


def test_unknown_file_and_name():
    with pytest.raises(DeepSpeedConfigFault, match=r"did you mean 'zero2'\?"):
        engine_config(load_recipe("git_digits", ["deepspeed=zero22"]), 1)
    with pytest.raises(DeepSpeedConfigFault, match=r"no such file: .*nowhere\.json"):
        engine_config(load_recipe("git_digits", ["deepspeed=nowhere.json"]), 1)


def test_mixed_steps_and_offload_do_not_go_together():
    mixed, unmixed = SamplingSettings(mode="mixed"), SamplingSettings(mode="iid")
    for stage in (1, 2, 3):
        for key in ("offload_optimizer", "offload_param"):
            settings = {"zero_optimization": {"stage": stage, key: {"device": "cpu"}}}
            (line,) = offload_clashes(mixed, settings)
            assert line.startswith(f"zero_optimization.{key}: DeepSpeed loses gradients of mixed")
            assert offload_clashes(unmixed, settings) == []
    assert offload_clashes(mixed, {"zero_optimization": {"stage": 2}}) == []
    off = {"zero_optimization": {"offload_optimizer": {"device": "none"}}}
    assert offload_clashes(mixed, off) == offload_clashes(mixed, {}) == []


def test_mixed_steps_and_offload_are_refused(tmp_path):
    block = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    text = fault_of(tmp_path, block, "sampling.mode=mixed")
    assert "DeepSpeed loses gradients of mixed steps with it" in text
