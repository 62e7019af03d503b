"""What the processes of a group compute, in the tests of data-parallel training."""

import functools
import json
from pathlib import Path

import torch
from builders import Alone, Mimic, tiny_batch, tiny_step
from torch import nn

from kdprof.discovery import find_method
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


ADAMW = {
    "optimizer": "adamw", "learning_rate": 0.01, "eps": 1e-3, "no_weight_decay": ["biases"],
    "learning_rate_factors": {"head": 10.0}, "max_gradient_norm": 0.5,
}  # fmt: skip
METHODS = {"alone": Alone, "mimic": Mimic, "judged": Judged}

# Memories that keep all that is ever stored and are compared with whole: then nothing depends on
# what a device draws.
MEMORIES = {
    "pixel_memory": 1000, "pixel_contrast": 3000, "pixel_updates": 20, "own_pixels": True,
    "region_memory": 60, "region_contrast": 180,
}  # fmt: skip
CHANNELS = {
    "channel_memory": 1000, "channel_contrast": 1000, "channel_updates": 160,
    "channel_positions": 2,
}  # fmt: skip
COUPLED = {
    "cirkd": MEMORIES, "cirkd:minibatch": {}, "cirkdv2": MEMORIES | CHANNELS, "dist": {}, "pkd": {},
    "skd:plain": {},
}  # fmt: skip
"""Methods that couple the images of a device, with settings."""


def share(batch, rank: int, size: int):
    each = BATCH // size
    return [values[rank * each : (rank + 1) * each] for values in batch]


def batch_of(index: int):
    images, labels = tiny_batch(index, batch=BATCH)
    labels[BATCH // 2 :, :9] = 255  # the ranks differ in void pixels
    return images, labels


def train_coupled(name: str, ranks: Ranks | None, images_per_group: int = 0):
    """Train a coupled method for two steps: in more of them cirkdv2 makes rounding errors grow."""
    cls, settings = find_method(name).cls, COUPLED[name]
    method = functools.partial(cls, images_per_group=images_per_group, **settings)
    return train(method, ranks, steps=2)


def train(method, ranks: Ranks | None, steps: int = STEPS, **settings):
    """Return the losses of some steps, and a sum over each trained tensor."""
    settings = {"batch": BATCH, "gpus": ranks.size if ranks else 1, "dropout": 0.0, **settings}
    step = tiny_step(method, ranks=ranks, **settings)
    losses = []
    for index in range(steps):
        batch = batch_of(index)
        if ranks:
            batch = share(batch, ranks.rank, ranks.size)
        losses.append({name: value.item() for name, value in step(*batch, index).items()})
    state = step.state_dict()
    sums = {k: v.double().abs().sum().item() for k, v in state["student"].items()}
    sums |= {k: v.double().abs().sum().item() for k, v in state["method"].items()}
    return {"losses": losses, "sums": sums}


def trajectories(ranks):
    found = {name: train(method, ranks) for name, method in METHODS.items()}
    found["apart"] = train(Alone, ranks, sync_batchnorm=False)
    found["adamw"] = train(Mimic, ranks, **ADAMW)
    found |= {name: train_coupled(name, ranks) for name in COUPLED}
    torch.compile = functools.partial(torch.compile, backend="eager")  # traced only: fast
    found["compiled"] = train(Mimic, ranks, compile="default")
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
