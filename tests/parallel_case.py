"""What the processes of a group compute, in the tests of data-parallel training."""

import functools
import json
from pathlib import Path

import torch
from builders import Alone, Mimic, tiny_batch, tiny_step
from torch import nn

from kdprof.distributed.data_parallel import _SyncBatchNormOnCpu, synchronize_norms
from kdprof.distributed.ranks import Place, Ranks
from kdprof.method import Method

STEPS, BATCH = 6, 8


class Judged(Method):
    """With a second optimiser, and an extra of its own with batch norm."""

    taps = ("logits", "head")
    weights = {"fool": 0.1, "head": 1.0}
    auxiliary_weights = {"judge": 1.0}

    def build(self, student, teacher):
        self.judge = nn.Conv2d(student.num_classes, 1, 3)
        channels = student.channels["head"], teacher.channels["head"]
        self.adapt = nn.Sequential(nn.Conv2d(*channels, 1), nn.BatchNorm2d(channels[1]))

    def auxiliary(self):
        return self.judge

    def auxiliary_optimizer(self, parameters):
        return torch.optim.Adam(parameters, lr=1e-2)

    def forward(self, student, teacher, labels):
        head = (self.adapt(student.head) - teacher.head).square().mean()
        return {"fool": -self.judge(student.logits).mean(), "head": head}

    def auxiliary_forward(self, student, teacher, labels):
        # Means over images: of the whole batch, they are the mean of the shares' means.
        judged = self.judge(student.logits), self.judge(teacher.logits)
        return {"judge": judged[0].sigmoid().mean() - judged[1].sigmoid().mean()}


METHODS = {"alone": Alone, "mimic": Mimic, "judged": Judged}


def share(batch, rank: int, size: int):
    each = BATCH // size
    return [values[rank * each : (rank + 1) * each] for values in batch]


def batch_of(index: int):
    images, labels = tiny_batch(index, batch=BATCH)
    labels[BATCH // 2 :, :9] = 255  # the ranks differ in void pixels
    return images, labels


def train(name: str, ranks: Ranks | None, **settings):
    """Return the losses of some steps, and a sum over each trained tensor."""
    settings = {"batch": BATCH, "gpus": ranks.size if ranks else 1, "dropout": 0.0, **settings}
    step = tiny_step(METHODS[name], ranks=ranks, **settings)
    losses = []
    for index in range(STEPS):
        batch = batch_of(index)
        if ranks:
            batch = share(batch, ranks.rank, ranks.size)
        losses.append({name: value.item() for name, value in step(*batch, index).items()})
    state = step.state_dict()
    sums = {k: v.double().abs().sum().item() for k, v in state["student"].items()}
    sums |= {k: v.double().abs().sum().item() for k, v in state["method"].items()}
    return {"losses": losses, "sums": sums}


def trajectories(ranks):
    found = {name: train(name, ranks) for name in METHODS}
    found["apart"] = train("alone", ranks, sync_batchnorm=False)
    torch.compile = functools.partial(torch.compile, backend="eager")  # traced only: fast
    found["compiled"] = train("mimic", ranks, compile="default")
    return found


def norm(ranks):
    """Forward, backward and statistics of a batch norm over the shares of one batch."""
    torch.manual_seed(0)
    x, weight = torch.randn(4, 3, 5, 5) * 2 + 1, torch.randn(4, 3, 5, 5)
    mine = x[2 * ranks.rank : 2 * ranks.rank + 2].clone().requires_grad_()
    module = nn.Sequential(nn.BatchNorm2d(3))
    nn.init.normal_(module[0].weight)
    before = module[0].weight
    synchronize_norms(module, ranks)
    assert type(module[0]) is _SyncBatchNormOnCpu
    assert module[0].weight is before
    made = module(mine)
    (made * weight[2 * ranks.rank : 2 * ranks.rank + 2]).sum().backward()
    state = {key: value.tolist() for key, value in module.state_dict().items()}
    return {"made": made.tolist(), "gradient": mine.grad.tolist(), "state": state}


def orders(ranks):
    """Everything that rank 0 can say, as the other one hears it."""
    from kdprof.distributed.ranks import StepOrder

    said = [StepOrder(3, 10**7, 0.1, True), {"do": "feed", "step": 1}, {"do": "end"}]
    state = {"weights": torch.arange(5.0), "nested": {"count": 3, "names": ["a", "b"]}}
    if ranks.leads:
        for order in said:
            ranks.send(order)
        got = ranks.share(state)
    else:
        heard = [ranks.receive() for _ in said]
        assert heard == said
        assert isinstance(heard[0], StepOrder)
        got = ranks.share()
    assert torch.equal(got["weights"], state["weights"])
    return {"nested": got["nested"], "pids": len(ranks.pids)}


def run(rank: int, size: int, folder: Path, case: str) -> None:
    """Be one process of a group and write what it found as JSON to FOLDER/found-RANK.

    Args:
        case: the name of a function of this file.
    """
    torch.set_num_threads(1)
    ranks = Ranks(Place(rank, size, f"file://{folder / 'rendezvous'}"), "cpu")
    found = globals()[case](ranks)
    (folder / f"found-{rank}").write_text(json.dumps(found))
    ranks.leave()
