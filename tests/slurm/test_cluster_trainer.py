"""The trainer itself on a real SLURM: what happens to its job does not show in its losses."""

import pytest

from tests.slurm.conftest import attempts, wait_for
from tests.slurm.trainer_runs import FACTS, TrainerRun, uninterrupted
from tests.tiny_run import pack_scenes

pytestmark = pytest.mark.slurm
NODES = 2


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    pack_scenes(folder)
    return folder


def test_a_run_ends_as_if_nothing_had_happened(emulated, tmp_path, data):
    """Time limit, preemption, a lost node, after which one node must do: a batch of 6 fits neither
    in pairs, in micro-batches of 4."""
    run = TrainerRun(emulated, tmp_path, data, steps=200, checkpoint__every_steps=5,
                     tasks__caption__global_batch=6, tasks__caption__micro_batch=4,
                     tasks__caption__objective__decoder__dropout=0.0)
    (job,) = run.submit("--nodes", "1-2", "--time", "30")
    run.train()
    emulated.ask("scancel", "--batch", "--signal=USR1", job)  # what the time limit's lead sends
    assert run.wait_tries(1)["decision"] == "requeue"
    run.train()
    emulated.ask("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--wrap=true",
                 "--output=/dev/null")
    run.wait_tries(2)
    run.train()
    emulated.do("fail-node", "node2")
    run.finish()
    emulated.wait_state(job, "COMPLETED")

    tries = attempts(run.run)
    assert [a["nodes"] for a in tries] == [["node1", "node2"]] * 3 + [["node1"]], run.story()
    assert [a["decision"] for a in tries] == ["requeue", "requeue", "none", "done"], run.story()
    lines, straight = run.lines(), uninterrupted(run)
    assert [line["step"] for line in lines] == list(range(1, 201))
    alone_from = tries[3]["steps"][0]
    for line, other in zip(lines, straight, strict=True):
        equal = pytest.approx if line["step"] > alone_from else lambda x, **_: x
        for name in FACTS:
            assert line[name] == equal(other[name], rel=1e-5), (line["step"], name)
