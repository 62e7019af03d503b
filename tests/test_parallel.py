"""One run in several processes: gloo on the CPU stands for NCCL on GPUs."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import parallel_case
import pytest
import torch
from processes import Command, side_by_side
from small_study import small_study, small_toml
from torch import nn

from kdprof.distributed.data_parallel import leaves_of
from kdprof.distributed.ranks import lost_contact
from kdprof.errors import UserError
from kdprof.hardware.several_gpus import SeveralGpus
from kdprof.launch.group import in_group
from kdprof.resolve import ResolvedStudy
from kdprof.store import RunFolder, Store
from kdprof.train import checkpoint

TOGETHER = {"step__gpus": 2, "step__batch": 4, "measure__in_process": False}
CLOSE = {"rel": 2e-4, "abs": 1e-6}
"""Sums over a batch in another order differ by rounding, which training makes larger: between one
process and two, after six steps."""


def group(case: str, folder: Path, size: int = 2) -> list:
    side_by_side(parallel_case.run, *((rank, size, folder, case) for rank in range(size)))
    return [json.loads((folder / f"found-{rank}").read_text()) for rank in range(size)]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return group("trajectories", tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("name", parallel_case.METHODS)
def test_two_processes_train_as_one_with_the_same_global_batch(two, name):
    alone = parallel_case.train(parallel_case.METHODS[name], None)
    assert_same_training(alone, two, name)


def assert_same_training(alone, two, name):
    for rank in two:
        for ours, theirs in zip(alone["losses"], rank[name]["losses"], strict=True):
            assert theirs == pytest.approx(ours, **CLOSE)
        assert rank[name]["sums"] == pytest.approx(alone["sums"], **CLOSE)
    assert two[0][name] == two[1][name]
    assert alone["losses"][0] != pytest.approx(alone["losses"][-1], **CLOSE)


def test_two_processes_clip_the_gradients_of_the_whole_batch(two):
    alone = parallel_case.train(parallel_case.Mimic, None, **parallel_case.ADAMW)
    assert_same_training(alone, two, "adamw")
    unclipped = parallel_case.ADAMW | {"max_gradient_norm": None}
    other = parallel_case.train(parallel_case.Mimic, None, **unclipped)
    assert other["losses"][-1] != pytest.approx(alone["losses"][-1], **CLOSE)


@pytest.mark.parametrize("name", parallel_case.COUPLED)
def test_one_process_with_groups_trains_as_processes_with_a_group_each(two, name):
    """What couples the images of a device, on two devices with 4 images and on one with 8."""
    alone = parallel_case.train_coupled(name, None, parallel_case.BATCH // 2)
    assert_same_training(alone, two, name)
    whole = parallel_case.train_coupled(name, None)
    assert whole["losses"][0] != pytest.approx(alone["losses"][0], **CLOSE)


def test_batch_norm_of_each_process_alone_is_another_training(two):
    """What the test above would not notice if it compared nothing."""
    last = two[0]["alone"]["losses"][-1]
    assert two[0]["apart"]["losses"][-1] != pytest.approx(last, **CLOSE)
    apart = [rank["apart"] for rank in two]
    assert apart[0]["losses"] == apart[1]["losses"]
    trained = {k: v for k, v in apart[0]["sums"].items() if "running" not in k}
    assert trained.items() <= apart[1]["sums"].items()
    assert apart[0]["sums"] != apart[1]["sums"]  # statistics are each one's own


def test_a_compiled_step_is_data_parallel_too(two):
    for ours, theirs in zip(two[0]["mimic"]["losses"], two[0]["compiled"]["losses"], strict=True):
        assert theirs == pytest.approx(ours, **CLOSE)


def test_synchronised_batch_norm_is_batch_norm_over_all_shares(tmp_path):
    ranks = group("norm", tmp_path)
    torch.manual_seed(0)
    x, weight = (torch.randn(4, 3, 5, 5) * 2 + 1).requires_grad_(), torch.randn(4, 3, 5, 5)
    x = x.detach().requires_grad_()
    whole = nn.BatchNorm2d(3)
    nn.init.normal_(whole.weight)
    made = whole(x)
    (made * weight).sum().backward()
    for key, expected in (("made", made), ("gradient", x.grad)):
        found = torch.cat([torch.tensor(rank[key]) for rank in ranks])
        torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-5)
    for name, value in whole.state_dict().items():
        found = torch.tensor(ranks[1]["state"][f"0.{name}"])
        torch.testing.assert_close(found.to(value.dtype), value, rtol=1e-5, atol=1e-5)


def test_orders_and_states_arrive_as_they_were_sent(tmp_path):
    assert (
        group("orders", tmp_path) == [{"nested": {"count": 3, "names": ["a", "b"]}, "pids": 2}] * 2
    )


@pytest.mark.parametrize("gpus", [2, 4])
def test_shares_together_are_the_batch_of_one_process(gpus):
    def batches(ranks: int, rank: int):
        study = ResolvedStudy(
            small_study(step__batch=4, step__gpus=ranks, measure__in_process=False)
        )
        return study.data.batches("student", 3, rank)

    whole = batches(1, 0)
    shares = [batches(gpus, rank) for rank in range(gpus)]
    for index in (0, 1, 5):  # the third crosses an epoch: there are 6 images
        images, labels = zip(*(share.batch(index) for share in shares), strict=True)
        expected = whole.batch(index)
        assert torch.equal(torch.cat(images), expected[0])
        assert torch.equal(torch.cat(labels), expected[1])


def test_leaves_are_what_outputs_depend_on():
    used, unused, frozen = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)
    out = frozen(used(torch.zeros(1, 2))) + 0 * unused(torch.zeros(1, 2)).detach()
    assert leaves_of([out]) == set(used.parameters())
    assert leaves_of([used.weight]) == {used.weight}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step__gpus": 3}, "a batch of 4 cannot be shared equally by 3 GPUs; use a multiple of 3"),
        ({"measure__in_process": True}, r"leave measure.in_process \(--in-process\) out"),
        ({"step__gpus": 4, "step__sync_batchnorm": False}, "cannot train on batch 1"),
    ],
)
def test_what_cannot_be_shared_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        ResolvedStudy(small_study(**{**TOGETHER, **changes}))


def test_more_gpus_than_there_are_and_a_certain_one_are_refused(monkeypatch):
    study = ResolvedStudy(small_study(**TOGETHER))
    monkeypatch.setattr("kdprof.resolve.study.find_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match=r"step.gpus = 2: this machine has 1; use fewer"):
        study._find_device()
    study.plain = study.plain.model_copy(update={"device": "cuda:0"})
    with pytest.raises(UserError, match="takes the first 2 GPUs, not cuda:0"):
        study._find_device()


def test_torchrun_and_the_study_must_agree(monkeypatch):
    variables = {"RANK": 0, "WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 4, "TORCHELASTIC_RUN_ID": "x"}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match=r"started 4 processes, the study has step.gpus = 2"):
        in_group(small_study(**TOGETHER), lambda ranks: None)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="must be in one machine"):
        in_group(small_study(**TOGETHER), lambda ranks: None)


def test_only_a_lost_connection_is_one():
    assert lost_contact(RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer"))
    assert lost_contact(torch.distributed.DistBackendError("NCCL communicator was aborted"))
    assert not lost_contact(RuntimeError("The size of tensor a (3) must match"))
    assert not lost_contact(ValueError("connection closed"))


class OneGpu:
    """A GPU that tells what it is asked to."""

    def __init__(self, name="NVIDIA X", joules=1.0, problem=None):
        self.name, self.joules, self.problem = name, joules, problem

    def state(self):
        return {"seen": self.problem, "throttle_reasons": []}

    during = state

    def problems(self, before, during, after):
        told = {reading["seen"] for reading in (before, *during, after)}
        return [problem for problem in told if problem]

    def cause(self, before, after):
        return after["seen"]

    def energy_meter(self):
        return self

    source, reason, period_s = "counter", None, 0.1

    def read_j(self):
        return self.joules

    power_w = read_j


def test_several_gpus_are_one_device_whose_slowest_part_counts():
    gpus = SeveralGpus([OneGpu(), OneGpu(problem="throttled"), OneGpu()])
    assert gpus.name == "3 x NVIDIA X"
    state = gpus.state()
    assert [other["seen"] for other in state["other_gpus"]] == ["throttled", None]
    assert gpus.problems(state, [], state) == ["cuda:1: throttled"]
    assert gpus.problems(state, [gpus.during()], state) == ["cuda:1: throttled"]
    assert gpus.cause(state, state) == "throttled"
    assert gpus.energy_meter().read_j() == 3.0
    assert gpus.energy_meter().power_w() == 3.0
    assert gpus.energy_meter().period_s == 0.1
    silent = SeveralGpus([OneGpu(), OneGpu(joules=None)]).energy_meter()
    assert silent.read_j() is None
    with pytest.raises(UserError, match="would mix NVIDIA X and NVIDIA Y"):
        SeveralGpus([OneGpu(), OneGpu("NVIDIA Y")])


# The command line, whole


def start(folder: Path, out: Path, *options: str, **changes) -> Command:
    study = small_toml(folder, **{**TOGETHER, "training__checkpoint_every_s": 0.01, **changes})
    return Command("train", "--study", study, "--out", out, *options)


def rank_1_of(process: Command) -> int:
    """Return the pid of the other rank that an agent started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return next(
        int(pid) for pid in children if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()
    )


def wait_for_iterations(folder: RunFolder, count: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        run = folder.read_run()
        if run is not None and run.iterations_done >= count:
            return
        time.sleep(0.01)
    raise TimeoutError(folder.path)


def trained_weights(folder: RunFolder) -> dict:
    state, damage = checkpoint.load(folder)
    assert damage is None
    return state["step"]["student"]


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """Costs, a teacher and kd, trained by two processes without a break."""
    folder = tmp_path_factory.mktemp("together")
    out = folder / "out"
    done = start(folder, out, "--no-control", methods=["kd"], budgets=["30"]).end()
    assert done.returncode == 0, done.stderr
    assert "1 runs trained" in done.stdout
    return folder, Store(out)


@pytest.mark.slow
def test_a_run_of_two_processes_says_so_and_books_both(together):
    _, store = together
    cost = next(cost for cost in store.costs() if cost.method == "kd")
    run = store.runs()[0]
    assert run.gpus == cost.gpus == 2
    assert run.device.startswith("2 x ")
    assert run.flop == pytest.approx(30 * 2 * cost.flop.total)
    assert cost.flop_per_iteration() == 2 * cost.flop.total
    assert {o.kind for o in cost.operations if o.name.startswith("c10d.")} == {"communication"}


@pytest.mark.slow
def test_killed_and_stopped_it_is_the_training_without_a_break(together, tmp_path):
    """One rank is killed: torchrun starts both again. Ctrl-C: the same command goes on."""
    folder, store = together
    out = tmp_path / "out"
    shutil.copytree(store.root / "costs", out / "costs")
    options = {"methods": ["kd"], "budgets": ["30"]}
    run = Store(out).run_folder("kd", "30", 0)
    process = start(folder, out, "--no-control", **options)
    wait_for_iterations(run, 3)
    os.kill(rank_1_of(process), signal.SIGKILL)
    killed_at = run.read_run().iterations_done
    wait_for_iterations(run, killed_at + 3)
    process.send_signal(signal.SIGINT)
    stopped = process.end()
    assert stopped.returncode == 130, stopped.stderr
    assert "all 2 processes start again" in stopped.stderr
    assert "run the same command again to continue" in stopped.stderr
    assert killed_at + 3 <= run.read_run().iterations_done < 30
    assert start(folder, out, "--no-control", **options).end().returncode == 0
    assert run.read_run().finished
    expected = trained_weights(store.run_folder("kd", "30", 0))
    torch.testing.assert_close(trained_weights(run), expected, rtol=0, atol=0)
    assert run.read_run().miou == store.runs()[0].miou


RAISES = '''
from kdprof.method import Method

class Raises(Method):
    """Raises on rank 0 alone, in the middle of a step."""
    taps = ("logits",)
    weights = {"term": 1.0}

    def forward(self, student, teacher, labels):
        import torch.distributed as dist
        self.calls = getattr(self, "calls", 0) + 1
        if self.training and dist.is_initialized() and dist.get_rank() == 0 and self.calls > 4:
            raise ValueError("wrong on rank 0")
        return {"term": student.logits.square().mean()}
'''


@pytest.mark.slow
def test_a_method_that_raises_on_one_rank_does_not_keep_the_others_from_being_made(
    together, tmp_path
):
    method = tmp_path / "mine.py"
    method.write_text(RAISES)
    spec, changes = f"{method}:Raises", {"measure__max_time_s": 0.01}
    out = tmp_path / "out"
    shutil.copytree(together[1].root / "costs", out / "costs")
    changes |= {"methods": [spec, "none"], "budgets": ["5"]}
    done = start(tmp_path, out, "--no-control", **changes).end()
    assert done.returncode == 1, done.stderr
    assert "wrong on rank 0" in done.stderr.splitlines()[-1]
    assert [run.method for run in Store(out).runs() if run.finished] == ["none"]
