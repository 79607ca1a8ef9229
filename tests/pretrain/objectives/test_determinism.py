"""Steps and evaluations of all objectives add up in a fixed order, on GPUs under torch's switch.

Seen without a GPU: no operator runs that torch has no deterministic form of. And on the CPU: the
switch changes no bit, also if all memory that is not written yet holds not-a-numbers.
"""

import re

import pytest
import torch
import torch.nn.functional as F

from pretrain.engine.zero.zero import to_device
from pretrain.models.init import initialise
from pretrain.models.operators import dcnv3_torch, ms_deform_attn_torch
from pretrain.objectives.objective import EvaluationContext
from tests.nondeterministic_operators import DOCUMENTED, NAMES, ON_CPUS, watched_order
from tests.pretrain.models.git.git_models import Words, small_batch, small_model
from tests.pretrain.objectives.m3i.m3i_models import m3i_batch, m3i_model
from tests.pretrain.objectives.pair_models import pair_batch, pair_model
from tests.pretrain.objectives.test_on_a_device import CASES


@pytest.fixture
def switched_on():
    """Into which state `be_deterministic` brings torch, but with the memory filled."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def test_the_list_names_what_torch_documents():
    text = torch.use_deterministic_algorithms.__doc__
    throws = text.split("operations will throw a", 1)[1].split("In addition", 1)[0]
    documented = set(re.findall(r"^\s*\* :\w+:`(torch[\w.]+)`", throws, re.MULTILINE))
    assert len(documented) > 20 and documented <= set(DOCUMENTED)
    for name in [*NAMES, *ON_CPUS]:
        assert getattr(torch.ops.aten, name)


class Step:
    """A step of a case that can be repeated: from the same weights and buffers."""

    def __init__(self, case: str, device: torch.device, dtype: torch.dtype) -> None:
        build, self.task, make_batch = CASES[case]
        self.model, batch = build(), make_batch()
        initialise(self.model, 0)
        with torch.no_grad():  # masks and offsets of zero would hide a wrong order
            for parameter in self.model.parameters():
                parameter.add_(torch.randn(parameter.shape), alpha=0.02)
        self.model.to(device, dtype)
        self.start = {name: value.clone() for name, value in self.model.state_dict().items()}
        objective = self.model.objectives[self.task]
        self.totals = {
            name: torch.tensor(float(count), device=device)
            for name, count in objective.counts(batch).items()
        }
        self.batch = to_device({**batch, **objective.prepare(batch)}, device)

    def run(self) -> dict[str, torch.Tensor]:
        """Loss and gradients by name."""
        self.model.load_state_dict(self.start)
        self.model.zero_grad()
        loss = self.model(self.task, "undivided", self.batch, self.totals)["loss"]
        loss.backward()
        gradients = {
            n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None
        }
        assert len(gradients) > 10
        return {"loss": loss.detach()} | gradients


def different(one: dict, other: dict) -> list[str]:
    return [name for name in one if not torch.equal(one[name], other[name])]


@pytest.mark.parametrize("case", CASES)
def test_a_step_has_a_fixed_order(case, request):
    step = Step(case, torch.device("cpu"), torch.float32)
    plain = step.run()
    request.getfixturevalue("switched_on")
    with watched_order() as found:
        fixed = step.run()
    assert not found
    assert not different(plain, fixed)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_a_gpu_repeats_its_bits(case, dtype, switched_on, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    step = Step(case, torch.device("cuda"), dtype)
    first = step.run()
    for _ in range(3):
        assert not different(first, step.run())


EVALUATIONS = {
    "captioning": (
        small_model,
        "caption",
        lambda: small_batch() | {"captions": [["w3 w4"]] * 3},
        Words(),
    ),
    "classification": (pair_model, "classify", lambda: pair_batch(12), None),
    "contrast": (pair_model, "contrast", lambda: pair_batch(12), None),
    "M3I": (m3i_model, "m3i", lambda: m3i_batch(8), None),
}


@pytest.mark.parametrize("case", EVALUATIONS)
def test_an_evaluation_has_a_fixed_order(case, switched_on):
    build, task, make_batch, words = EVALUATIONS[case]
    model = build()
    with watched_order() as found:
        values, _ = model.objectives[task].evaluate(
            model.encoders, [make_batch()], EvaluationContext(torch.device("cpu"), words)
        )
    assert not found
    assert values["images"] > 0


def test_the_operators_in_plain_pytorch_have_a_fixed_order(switched_on):
    """What GPUs without Triton take. (Triton's own: tests/pretrain/models/operators.)"""
    value, gradient = torch.randn(1, 4, 4, 8), torch.randn(1, 4, 4, 8)
    window = dcnv3_torch.Window((3, 3), (1, 1), (1, 1), (1, 1), 2, 1.0, False)
    inputs = torch.randn(1, 4, 4, 36), torch.rand(1, 4, 4, 18)
    places, weights = torch.rand(1, 5, 2, 1, 3, 2), torch.rand(1, 5, 2, 1, 3)
    with watched_order() as found:
        dcnv3_torch.backward(gradient, value, *inputs, window)
        ms_deform_attn_torch.backward(
            torch.randn(1, 5, 8), value.view(1, 16, 2, 4), places, weights, ((4,), (4,))
        )
    assert not found


def test_the_watch_sees_what_has_no_fixed_order():
    x = torch.randn(1, 2, 4, 4, requires_grad=True)
    rows, columns = torch.tensor([0, 0]), torch.tensor([1, 1])
    calls = {
        "upsample_bicubic2d_backward": lambda: F.interpolate(x, 8, mode="bicubic").sum().backward(),
        "_upsample_bilinear2d_aa_backward": lambda: (
            F.interpolate(x, 8, mode="bilinear", antialias=True).sum().backward()
        ),
        "_adaptive_avg_pool2d_backward": lambda: F.adaptive_avg_pool2d(x, 3).sum().backward(),
        "grid_sampler_2d_backward": lambda: (
            F.grid_sample(x, torch.zeros(1, 3, 3, 2), align_corners=False).sum().backward()
        ),
        "cumsum": lambda: x.cumsum(1),
        "median": lambda: x.median(1),
        "bincount": lambda: rows.bincount(torch.ones(2)),
        "put_": lambda: torch.zeros(4).put_(rows, torch.ones(2), accumulate=True),
        "index_put": lambda: x[0, 0][rows, columns].sum().backward(),
    }
    for name, call in calls.items():
        with watched_order() as found:
            call()
        assert len(found) == 1 and name in found.pop(), name
    with watched_order() as found:
        rows.cumsum(0), rows.bincount(), x.median(), rows.index_put((rows,), columns)
        F.interpolate(x, 8, mode="bicubic", antialias=True)
    assert not found
