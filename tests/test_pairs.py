"""The relations of images to each other, pair by pair: against rows of the whole map, and the
kernels for a GPU against torch's operators."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from devices import needs_gpu
from hypothesis import given, settings
from hypothesis import strategies as st
from method_inputs import set_block
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from kdprof.hardware.blocks import counted_for
from kdprof.measure.counting.operators import operator_of
from kdprof.method import NetworkInfo, Taps
from kdprof.methods import _pair_kernels, _pairs, _relations
from kdprof.resized import tiles

few = settings(max_examples=12, deadline=None, derandomize=True)
needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="the package triton is not installed"
)


def vectors(images, positions, channels, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(images, positions, channels, generator=generator, dtype=dtype)
    return F.normalize(made, dim=2)


def maps(pairs, positions, seed=0):
    """Return the similarities of student and teacher, within +-10."""
    generator = torch.Generator().manual_seed(seed)
    shape = (pairs, positions, positions)
    return [20 * torch.rand(shape, generator=generator) - 10 for _ in range(2)]


def value_and_gradient(compute, student, *rest):
    student = student.clone().requires_grad_()
    value = compute(student, *rest)
    return value.detach(), torch.autograd.grad(3 * value, student)[0]


# The form by pairs.


@few
@given(
    st.integers(1, 4), st.integers(1, 3), st.integers(1, 7), st.sampled_from([1, 60, 2**20]),
    st.sampled_from([0.05, 0.1, 1.0]), st.integers(0, 2**16),
)  # fmt: skip
def test_pairs_are_the_rows_of_each_group(group, groups, positions, block, temperature, seed):
    """Any number of images and groups; one map in memory at a time, or several, or all."""
    student = vectors(group * groups, positions, 3, seed)
    teacher = vectors(group * groups, positions, 5, seed + 1)

    def by_rows(student, teacher):
        return sum(
            _relations.relation_kl(s.flatten(0, 1), t.flatten(0, 1), temperature, parts=group)
            for s, t in zip(student.split(group), teacher.split(group), strict=True)
        )

    with pytest.MonkeyPatch.context() as patch:
        set_block(patch, block)
        found = value_and_gradient(_pairs.pair_kl, student, teacher, temperature, group)
    torch.testing.assert_close(found, value_and_gradient(by_rows, student, teacher))


def test_gradient_of_pairs():
    student, teacher = vectors(4, 3, 3).requires_grad_(), vectors(4, 3, 5, 1)
    assert torch.autograd.gradcheck(lambda s: _pairs.pair_kl(s, teacher, 0.5, 2), [student])


def test_pairs_hold_as_far_as_the_least_temperature():
    """Student and teacher disagree as far as they can; float32 against float64."""
    teacher = vectors(2, 6, 4)
    student = -teacher
    exact = _relations.relation_kl(
        student.flatten(0, 1), teacher.flatten(0, 1), _pairs.LEAST_TEMPERATURE, parts=2
    )
    found = _pairs.pair_kl(student.float(), teacher.float(), _pairs.LEAST_TEMPERATURE, 2)
    assert found.item() == pytest.approx(exact.item(), rel=1e-5)


def test_vectors_of_length_0_are_alike_to_all():
    """A dead image: all its similarities are 0 in both networks, so only others' rows differ."""
    student, teacher = (torch.cat([vectors(1, 4, 3), torch.zeros(1, 4, 3)]) for _ in range(2))
    student = student.roll(1, 1)
    value, gradient = value_and_gradient(_pairs.pair_kl, student, teacher, 0.1, 2)
    alone = value_and_gradient(_pairs.pair_kl, student[:1], teacher[:1], 0.1, 1)
    torch.testing.assert_close(value, alone[0])
    assert gradient.isfinite().all()


@pytest.mark.parametrize("form", ["one block", "pairs", "rows"])
def test_groups_are_batches_of_their_own(monkeypatch, form):
    if form != "one block":
        monkeypatch.setattr(_relations, "SMALL", 2**40)
    temperature = 0.01 if form == "rows" else 0.1
    student, teacher = vectors(6, 5, 3), vectors(6, 5, 4, 1)
    for group in (1, 2, 3, 6):
        together = value_and_gradient(
            _relations.batch_relation, student, teacher, temperature, group
        )
        apart = [
            value_and_gradient(_relations.batch_relation, s, t, temperature)
            for s, t in zip(student.split(group), teacher.split(group), strict=True)
        ]
        values, gradients = zip(*apart, strict=True)
        torch.testing.assert_close(together[0], torch.stack(values).mean())
        torch.testing.assert_close(together[1], torch.cat(gradients) / len(apart))


@pytest.mark.parametrize(
    ("positions", "temperature", "block", "by_pairs"),
    [
        (30, 0.1, 2**20, False),
        (30, 0.1, 2000, True),
        (30, 0.01, 2000, False),
        (60, 0.1, 2000, False),
    ],
    ids=["one small map", "pairs", "cold", "a pair is too large"],
)
def test_the_form_follows_size_and_heat(monkeypatch, positions, temperature, block, by_pairs):
    set_block(monkeypatch, block)
    taken = []
    monkeypatch.setattr(_relations, "pair_kl", lambda s, *rest: taken.append(s) or s.sum())
    student, teacher = vectors(2, positions, 3), vectors(2, positions, 4)
    _relations.batch_relation(student, teacher, temperature)
    assert bool(taken) == by_pairs


@pytest.mark.parametrize("both", [True, False])
def test_the_slope_is_the_derivative_of_the_divergence(both):
    student, teacher = (m.double() for m in maps(2, 5))
    leaf = student.clone().requires_grad_()
    expected = sum(
        F.kl_div(leaf.log_softmax(dim), teacher.log_softmax(dim), log_target=True, reduction="sum")
        for dim in ((2, 1) if both else (2,))
    )
    slope = torch.autograd.grad(expected, leaf)[0]
    sums = _pairs.compare_maps(student, teacher, both)
    torch.testing.assert_close(student, slope)
    torch.testing.assert_close(_pairs._divergence(torch.cat(list(sums if both else sums[:1]), 1)),
                               expected.detach())  # fmt: skip


# The kernels.


@needs_triton
def test_kernels_do_what_the_operators_do():
    script = Path(__file__).with_name("interpreted_kernels.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 4


def test_the_kernels_are_called_as_operators_of_torch():
    """Their schemas, their shapes on fake tensors, and the whole form with them: torch's operators
    stand in for the kernels on the CPU, which has none of its own."""

    @_pair_kernels.tile_sums.register_kernel("cpu")
    def tile_sums(student, teacher):
        pairs, positions, _ = student.shape
        sums = student.new_zeros(2, 3, pairs, -(-positions // _pair_kernels.TILE), positions)
        sums[:, :, :, 0] = _pairs.compare_maps(student.clone(), teacher.clone(), True)
        return sums

    @_pair_kernels.write_slope.register_kernel("cpu")
    def write_slope(student, teacher, sums, both):
        _pairs.compare_maps(student, teacher.clone(), both)

    student, teacher = maps(2, 70)
    torch.library.opcheck(torch.ops.kdprof.pair_tile_sums.default, (student, teacher))
    sums = tile_sums(student, teacher).sum(3)
    torch.library.opcheck(torch.ops.kdprof.pair_slope_.default, (student, teacher, sums, True))
    student, teacher = vectors(6, 5, 3), vectors(6, 5, 4, 1)
    expected = value_and_gradient(_pairs.pair_kl, student, teacher, 0.1, 3)
    with counted_for("cuda"):
        found = value_and_gradient(_pairs.pair_kl, student, teacher, 0.1, 3)
    torch.testing.assert_close(found, expected)


@pytest.mark.gpu
@needs_gpu
def test_memory_of_the_published_size_on_a_gpu():
    """Two blocks of maps, 1 GiB, and vectors, where both whole maps would need 34 GB."""
    student, teacher = (vectors(8, 8192, c, 0, torch.float32).cuda() for c in (128, 512))
    student.requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _relations.batch_relation(student, teacher, 0.1).backward()
    assert torch.cuda.max_memory_allocated() - before <= 2 * 2**30


@pytest.mark.gpu
@needs_gpu
@needs_triton
def test_a_gpu_gives_what_the_cpu_gives():
    """With its kernels and its blocks; 70 positions do not fill their tiles."""
    student, teacher = (vectors(4, 70, c, c, torch.float32) for c in (6, 9))
    expected = value_and_gradient(_pairs.pair_kl, student, teacher, 0.1, 2)
    found = value_and_gradient(_pairs.pair_kl, student.cuda(), teacher.cuda(), 0.1, 2)
    torch.testing.assert_close([f.cpu() for f in found], list(expected), rtol=1e-4, atol=1e-5)
    again = value_and_gradient(_pairs.pair_kl, student.cuda(), teacher.cuda(), 0.1, 2)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_a_compiler_traces_a_gpus_choice_in_one_graph(monkeypatch):
    """Whether Triton works is known by then: how it is found out cannot be traced."""
    tiles.why_no_triton()
    monkeypatch.setattr(_pairs, "by_kernels", lambda tensor: not tiles.why_no_triton())
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    given = [vectors(4, 5, channels, dtype=torch.float32) for channels in (3, 4)]
    torch._dynamo.reset()
    compiled = torch.compile(_pairs.pair_kl, backend=backend, dynamic=False)
    torch.testing.assert_close(compiled(*given, 0.1, 2), _pairs.pair_kl(*given, 0.1, 2))
    assert len(graphs) == 1


# What a GPU would do, counted.


class Work(TorchDispatchMode):
    """Adds up the operators of what runs, and the bytes that they move."""

    def __init__(self):
        super().__init__()
        self.operators, self.bytes, self.names = 0, 0.0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        made, operator = func(*args, **kwargs), operator_of(func)
        if operator.kind is not None and not operator.composite:
            work = operator.work(args, kwargs, made)
            self.operators += 1
            self.bytes += work.bytes_read + work.bytes_written
            self.names.add(operator.name)
        return made


def work_of(name, device_type, images=8, grid=(64, 128), **setting) -> Work:
    """Count an objective of the published size, forward and backward."""
    from kdprof.discovery import find_method

    channels = {"student": (128, 512), "teacher": (512, 2048)}
    infos = {
        who: NetworkInfo(who, 19, {"logits": 19, "head": head, "c5": c5}, {})
        for who, (head, c5) in channels.items()
    }
    with FakeTensorMode() as mode, counted_for(device_type):
        method = find_method(name).cls(**setting)
        method.build(*infos.values())
        student, teacher = (
            Taps(
                **{
                    tap: torch.empty(images, info.channels[tap], *grid, requires_grad=leaf)
                    for tap in method.student_taps()
                }
            )
            for info, leaf in zip(infos.values(), (True, False), strict=True)
        )
        labels = torch.zeros(images, *(8 * side for side in grid), dtype=torch.long)
        with Work() as work:
            terms = method.train()(student, teacher, labels)
            sum(method.weights[k] * v for k, v in terms.items()).backward()
            if method.auxiliary() is not None:
                sum(method.auxiliary_forward(student.detach(), teacher, labels).values()).backward()
    assert mode
    return work


TEACHER_AND_STUDENT = 650
"""Operators of kd's step without its objective: PSPNet-R101 and R18."""


@pytest.mark.parametrize(
    "name",
    ["cirkd", "cirkd:minibatch", "cirkd:memory", "cirkdv2", "af_dcd", "af_dcd:enhanced", "ifvd",
     "skd", "skd:cirkd"],
)  # fmt: skip
def test_few_operators_on_a_gpu_at_the_published_size(name):
    assert work_of(name, "cuda").operators <= 1500 - TEACHER_AND_STUDENT


def test_bytes_of_the_relations_on_a_gpu_at_the_published_size():
    """8 images are 36 maps of 8192 x 8192 for each network. The student's is read or written 8
    times (product, sums, slope twice, two products), the teacher's 3 times."""
    work = work_of("cirkd:minibatch", "cuda")
    assert {"kdprof.pair_tile_sums", "kdprof.pair_slope_"} <= work.names
    assert 36 * 8192**2 * 4 * 9 <= work.bytes <= 100e9
    assert work_of("cirkd", "cuda").bytes <= 200e9


def test_a_group_of_2_has_a_third_of_the_pairs():
    whole, groups = (work_of("cirkd:minibatch", "cuda", images_per_group=g) for g in (0, 2))
    assert groups.bytes == pytest.approx(whole.bytes * 12 / 36, rel=0.1)


def test_a_count_for_a_cpu_has_no_kernels():
    work = work_of("cirkd:minibatch", "cpu", images=2, grid=(16, 32))
    assert not any(name.startswith("kdprof.") for name in work.names)
