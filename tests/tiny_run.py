"""A recipe and data small enough that a start costs more than its training."""

from pathlib import Path

import yaml

from data_pipeline.samples.tokenizer import train_byte_level_bpe
from data_pipeline.shards.packer import ShardWriter
from tools.make_shards.scenes import make_scene, scene_members


def pack_scenes(folder: Path, train: int = 60, heldout: int = 10, size: int = 32) -> None:
    """Shards of digit scenes under `folder`/train and /heldout, and a tokenizer."""
    captions = []
    for split, count in (("train", train), ("heldout", heldout)):
        with ShardWriter(str(folder / split), split, max_samples=25) as writer:
            for index in range(count):
                scene = make_scene(index, split=split, size=size)
                captions += scene.captions
                writer.write(f"{index:06d}", scene_members(scene))
    train_byte_level_bpe(captions, 300).save(folder / "tokenizer")


def tiny_recipe(data: Path, run_dir: Path, **changes) -> dict:
    """A GIT of a few thousand parameters on 32-pixel scenes, with dropout and augmentation on."""
    recipe = {
        "name": "tiny",
        "seed": 3,
        "steps": 12,
        "run_dir": str(run_dir),
        "precision": "fp32",
        "deepspeed": "zero2",
        "threads_per_rank": 1,
        "tokenizer": {"path": str(data / "tokenizer")},
        "model": {
            "encoders": {
                "image": {
                    "type": "vit",
                    "image_size": 32,
                    "patch_size": 8,
                    "width": 32,
                    "layers": 2,
                    "heads": 2,
                }
            }
        },
        "tasks": {
            "caption": {
                "global_batch": 8,
                "micro_batch": 2,
                "objective": {
                    "type": "captioning",
                    "max_new_tokens": 8,
                    "decoder": {
                        "width": 32,
                        "layers": 2,
                        "heads": 2,
                        "mlp_width": 64,
                        "max_positions": 32,
                        "dropout": 0.1,
                    },
                },
                "data": {
                    "shards": [str(data / "train")],
                    "caption_source": "json:captions",
                    "captions_per_image": 2,
                    "text_length": 24,
                    "image": {
                        "size": 32,
                        "mode": "random_resized_crop",
                        "scale": [0.8, 1.0],
                        "flip_probability": 0.5,
                    },
                },
                "evaluation": {"shards": [str(data / "heldout")]},
            }
        },
        "optimizer": {"kind": "adamw", "lr": 1e-3, "weight_decay": 0.05, "clip_norm": 1.0},
        "schedule": {"kind": "cosine", "warmup_steps": 3},
        "loader": {"workers": 1},
        "checkpoint": {"every_steps": 4, "keep_last": 2},
        "logging": {"every_steps": 1, "tensorboard": False},
    }
    return _with_changes(recipe, changes)


def three_tasks(data: Path, run_dir: Path, **changes) -> dict:
    """`tiny_recipe` with classification and contrast beside captioning; dropout is off."""
    recipe = tiny_recipe(data, run_dir, tasks__caption__objective__decoder__dropout=0.0)
    recipe["model"]["encoders"]["text"] = {
        "type": "text",
        "width": 32,
        "layers": 1,
        "heads": 2,
        "max_positions": 24,
    }
    caption = recipe["tasks"]["caption"]
    shared = {"shards": caption["data"]["shards"], "image": caption["data"]["image"]}
    evaluation = caption["evaluation"]
    recipe["tasks"]["classify"] = {
        "global_batch": 8,
        "micro_batch": 2,
        "objective": {"type": "classification"},
        "data": {**shared, "classes": 10},
        "evaluation": evaluation,
    }
    recipe["tasks"]["contrast"] = {
        "global_batch": 8,
        "micro_batch": 2,
        "objective": {"type": "contrastive", "width": 16},
        "data": {**shared, "caption_source": "json:captions", "text_length": 24},
        "evaluation": evaluation,
    }
    return _with_changes(recipe, changes)


def _with_changes(recipe: dict, changes: dict) -> dict:
    """Set values by paths with double underscores, in place."""
    for path, value in changes.items():
        node = recipe
        *parents, leaf = path.split("__")
        for key in parents:
            node = node[key]
        node[leaf] = value
    return recipe


def write_recipe(path: Path, recipe: dict) -> Path:
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path
