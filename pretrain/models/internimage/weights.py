"""InternImage weights of others, to our names and back. Names and shapes only: no files.

Our encoder has the official names, so what differs is what stands before and around them: prefixes
of the ways in which the models were trained, and two renamings of transformers.
"""

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pretrain.models.internimage.internimage import InternImageSettings
from pretrain.models.internimage.mixer_settings import DCNv3Settings
from pretrain.models.internimage.sizes import SIZES

Target = Literal["official", "detection", "bevformer", "transformers", "m3i"]
_DETECTORS = {"detection": "backbone.", "bevformer": "img_backbone."}  # before the names

_LAYER_SCALE, _GAMMA = re.compile(r"\.layer_scale([12])$"), re.compile(r"\.gamma([12])$")
# The official loader of M3I weights writes this name, its model has `fc_norm.0`: a loader that is
# not strict then loses the norm.
_BARE_NORM = re.compile(r"^fc_norm\.(weight|bias)$")
_OFFSET_OR_MASK = re.compile(r"levels\.([0-3])\.blocks\.\d+\.dcn\.(offset|mask)\.")
_M3I_NAMES = {"clip.classifier_ln.": "fc_norm.0.", "clip.classifier.": "head."}


class Unwrapped(NamedTuple):
    """Weights under the official names of the classification model."""

    tensors: dict[str, Tensor]
    notes: list[str]
    """What was found around the names, and left out for it."""


def unwrap(state: Mapping[str, Tensor]) -> Unwrapped:
    """Take off what training has put around the official names.

    Known are `module.` (data-parallel training), `backbone.` (detectors), `model.` and layer_scale
    (transformers), `student.` beside a teacher, and the M3I run, which has `dcnv3.` beside a
    momentum copy `mm_dcnv3.` and a classifier under `clip.`.

    Raises:
        ValueError: a detector of two composed backbones.
    """
    tensors, notes = dict(state), []
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): t for name, t in tensors.items()}
    if any(name.startswith("backbone.cb_modules.") for name in tensors):
        raise ValueError("these are two composed backbones of a detector (CB-InternImage), not one")
    if any(name.startswith("student.") for name in tensors):
        tensors = _keep_under("student.", tensors, notes)
        tensors = {n: t for n, t in tensors.items() if not n.startswith("student_proj")}
    if any("mask_token" in name for name in tensors):
        tensors = _of_m3i(tensors, notes)
    for prefix in ("img_backbone.", "backbone.", "model."):
        if any(name.startswith(prefix) for name in tensors):
            tensors = _keep_under(prefix, tensors, notes)
    return Unwrapped(
        {
            _BARE_NORM.sub(r"fc_norm.0.\1", _LAYER_SCALE.sub(r".gamma\1", name)): tensor
            for name, tensor in tensors.items()
        },
        notes,
    )


def _keep_under(prefix: str, tensors: dict[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    kept = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    left = len(tensors) - len(kept)
    notes.append(f"the weights under `{prefix}`" + (f"; {left} others left out" if left else ""))
    return kept


def _of_m3i(tensors: dict[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    """The online branch: backbone, projector, and the classifier behind them."""
    kept = {}
    for name, tensor in tensors.items():
        renamed = next((n for n in _M3I_NAMES if name.startswith(n)), None)
        if renamed is not None:
            kept[_M3I_NAMES[renamed] + name.removeprefix(renamed)] = tensor
        elif "mm_dcnv3" not in name and ("dcnv3" in name or "clip_projector" in name):
            kept[name.removeprefix("dcnv3.")] = tensor
    notes.append(
        f"the online branch of an M3I run with its classifier; {len(tensors) - len(kept)} others "
        "left out"
    )
    return kept


def restore_dots(tensors: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """Names as moving averages of the official DeepSpeed trainer have them, without any dots, to
    `names`. Those that it does not know stay as they are."""
    known = {name.replace(".", ""): name for name in names}
    return {known.get(name, name): tensor for name, tensor in tensors.items()}


def recognise_size(tensors: Mapping[str, Tensor]) -> str | None:
    """Which published model the official names and shapes are those of, if they are any's."""
    stem = tensors.get("patch_embed.conv2.weight", tensors.get("patch_embedconv2weight"))
    if stem is None:
        return None
    depths = [0, 0, 0, 0]
    for name in tensors:
        if found := re.match(r"levels\.?([0-3])\.?blocks\.?(\d+)\D", name):
            stage, layer = map(int, found.groups())
            depths[stage] = max(depths[stage], layer + 1)
    for size, known in SIZES.items():
        if (known["channels"], known["depths"]) == (len(stem), depths):
            return size
    return None


def cut_centers(
    tensors: Mapping[str, Tensor], settings: InternImageSettings
) -> tuple[dict[str, Tensor], str | None]:
    """For a model with `remove_center`: weights of one that has the middle point, without it.

    The middle point's rows of the linear layers for offsets and masks are cut out, as the official
    loader does; the softmax over the other points then gives them larger weights, so that the model
    has to be trained further.

    Returns the tensors, under the official names, and a note if rows were cut. Weights that have no
    middle point already, and models that want it, are left as they are.

    Raises:
        ValueError: the model wants a middle point that the weights do not have.
    """
    mixer = settings.mixer
    if not isinstance(mixer, DCNv3Settings):
        return dict(tensors), None
    points = mixer.kernel_size**2
    kept = [point for point in range(points) if point != points // 2]
    found, cut, without = dict(tensors), 0, []
    for name, tensor in tensors.items():
        if not (match := _OFFSET_OR_MASK.match(name)):
            continue
        groups, each = settings.groups[int(match[1])], {"offset": 2, "mask": 1}[match[2]]
        if len(tensor) == groups * len(kept) * each:
            without.append(name)
        elif mixer.remove_center and len(tensor) == groups * points * each:
            found[name] = tensor.unflatten(0, (groups, points, each))[:, kept].flatten(0, 2)
            cut += 1
    if without and not mixer.remove_center:
        raise ValueError(
            f"these weights were trained without the middle point of the kernel ({without[0]} has "
            f"{len(tensors[without[0]])} rows), and what it would have learned cannot be made up: "
            "set mixer.remove_center: true"
        )
    if not cut:
        return found, None
    return found, (
        f"{cut} tensors for offsets and masks without the rows of the middle point, which the "
        "model (remove_center) does not have; it computes something else until it is trained on"
    )


def official_shapes(settings: InternImageSettings, classes: int | None) -> dict[str, tuple]:
    """Official name -> shape of every tensor; classes: rows of the linear layer, none: no layer."""
    with torch.device("meta"):
        encoder = settings.build()
    shapes = {name: tuple(tensor.shape) for name, tensor in encoder.state_dict().items()}
    if classes is not None:
        width = encoder.width if settings.head is None else encoder.pooled_width
        shapes |= {"head.weight": (classes, width), "head.bias": (classes,)}
    return shapes


def import_internimage(
    tensors: Mapping[str, Tensor],
    settings: InternImageSettings,
    encoder: str = "image",
    task: str = "classify",
    leave_out: Sequence[str] = (),
) -> dict[str, Tensor]:
    """Weights under the official names (`unwrap`) to ours.

    encoder, task: names of the encoder and the classification task in the recipe.
    leave_out: patterns over official names of tensors that are not taken, and may be missing.

    Returns name -> tensor as in the model's state dict, float32 where it floats.

    Raises:
        ValueError: tensors are missing or unknown and not left out, have other shapes, hold what
            is no finite number, or a pattern matches nothing.
    """
    head = tensors.get("head.weight")
    expected = official_shapes(settings, None if head is None else len(head))
    everything = expected.keys() | tensors.keys()
    for pattern in leave_out:
        if not any(fnmatchcase(name, pattern) for name in everything):
            raise ValueError(f"--leave-out {pattern!r} matches no tensor")
    left_out = {n for n in everything if any(fnmatchcase(n, p) for p in leave_out)}
    _check_complete(tensors, {n: s for n, s in expected.items() if n not in left_out}, left_out)
    taken = {name: tensor for name, tensor in tensors.items() if name not in left_out}
    if broken := sorted(name for name, tensor in taken.items() if not tensor.isfinite().all()):
        raise ValueError(
            f"{len(broken)} tensors hold NaN or infinite numbers, among them {broken[0]}: the "
            "training that they come from has diverged, or the file is damaged"
        )
    return {
        _our_name(name, encoder, task): tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in taken.items()
    }


def _our_name(name: str, encoder: str, task: str) -> str:
    return f"objectives.{task}.{name}" if name.startswith("head.") else f"encoders.{encoder}.{name}"


def _check_complete(
    tensors: Mapping[str, Tensor], expected: Mapping[str, tuple], left_out: set[str]
) -> None:
    missing = sorted(expected.keys() - tensors.keys())
    unknown = sorted(tensors.keys() - expected.keys() - left_out)
    other = [
        f"{name} {tuple(tensors[name].shape)} in place of {shape}"
        for name, shape in sorted(expected.items())
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    complaints = [
        f"{len(names)} {what} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"
        for names, what in (
            (missing, "are missing"),
            (unknown, "are unknown"),
            (other, "have another shape"),
        )
        if names
    ]
    if complaints:
        raise ValueError(
            f"of the tensors {'; '.join(complaints)}; those that shall not be taken, or may be "
            "missing, must be named (--leave-out PATTERN)"
        )


def export_internimage(
    tensors: Mapping[str, Tensor],
    target: Target,
    encoder: str = "image",
    task: str | None = "classify",
) -> dict[str, Tensor]:
    """Our weights under foreign names: the inverse of `unwrap` and `import_internimage`.

    tensors: a model's state dict; other encoders and tasks are left out.
    target: `m3i` is the layout of raw M3I checkpoints, of an M3I task.
    task: whose linear layer goes along; none: none does. `detection` and `bevformer`
        never have heads.

    Raises:
        ValueError: there is no such encoder or task, or with `m3i` no M3I task with classes.
    """
    start = f"encoders.{encoder}."
    official = {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
    if not official:
        names = sorted({".".join(name.split(".")[:2]) for name in tensors})
        raise ValueError(f"there is no encoder {encoder!r}; the model has {', '.join(names)}")
    if target in _DETECTORS:
        return {
            f"{_DETECTORS[target]}{name}": tensor
            for name, tensor in official.items()
            if name.startswith(("patch_embed.", "levels."))
        }
    if task is not None:
        for part in ("weight", "bias"):
            name = f"objectives.{task}.head.{part}"
            if name not in tensors:
                raise ValueError(f"task {task!r} has no linear layer ({name})")
            official[f"head.{part}"] = tensors[name]
    if target == "official":
        return official
    if target == "m3i":
        return _to_m3i(tensors, official, task)
    return {
        "model." + _GAMMA.sub(r".layer_scale\1", name): tensor for name, tensor in official.items()
    }


def _to_m3i(
    tensors: Mapping[str, Tensor], official: Mapping[str, Tensor], task: str | None
) -> dict[str, Tensor]:
    """The raw layout, whose loader looks at the first name and for the classifier.

    Of the momentum copy the backbone and the maps of the projector go along; that loader would take
    its `clip_projector` for the online one.
    """
    mask_token = tensors.get(f"objectives.{task}.predictor.mask_token")
    if mask_token is None or "head.weight" not in official:
        raise ValueError(
            f"the raw layout of M3I wants mask token and classifier, which task {task!r} has not: "
            "name an m3i task that learns classes (--task), or one that learns none and --classes "
            "N, which writes zeros, or take --format official, which needs none"
        )
    found = {"mask_token": mask_token}
    names = {new: old for old, new in _M3I_NAMES.items()}
    for name, tensor in official.items():
        renamed = next((new for new in names if name.startswith(new)), None)
        if renamed is not None:
            found[names[renamed] + name.removeprefix(renamed)] = tensor
        elif name.startswith(("dcnv3_head_", "clip_projector.")):
            found[name] = tensor
        else:
            found[f"dcnv3.{name}"] = tensor
    start = f"objectives.{task}.target.encoder."
    for name, tensor in tensors.items():
        own = name.removeprefix(start)
        if own != name and own.startswith("dcnv3_head_"):
            found[f"mm_{own}"] = tensor
        elif own != name and own.startswith(("patch_embed.", "levels.")):
            found[f"mm_dcnv3.{own}"] = tensor
    return found
