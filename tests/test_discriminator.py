"""The discriminator that several methods train, and the game between it and the student."""

import pytest
import torch
import torch.nn.functional as F
from method_inputs import CLASSES, NAMES, draw, make, weighted

from kdprof.discovery import find_method
from kdprof.methods._discriminator import (
    AdversarialMethod,
    Adversary,
    Discriminator,
    SpectralConv,
)

ADVERSARIAL = [name for name in NAMES if issubclass(find_method(name).cls, AdversarialMethod)]


def test_discriminator_is_the_published_one():
    """3.19 M parameters at 19 classes; 64x64 is the smallest grid with a score of its own."""
    judge = Discriminator(19)
    assert sum(p.numel() for p in judge.parameters()) == 3_191_721
    assert judge(torch.randn(2, 19, 64, 64)).shape == (2, 1, 1, 1)
    assert judge(torch.randn(1, 19, 64, 128)).shape == (1, 1, 1, 5)
    assert judge(torch.randn(1, 19, 9, 70)).shape == (1, 1, 1, 1)


def test_padding_is_told_once():
    adversary, notes = Adversary(CLASSES, "hinge"), []
    for grid in ((64, 64), (9, 70), (9, 70)):
        adversary.generator_loss(*torch.randn(2, 2, CLASSES, *grid), notes)
    (note,) = notes
    assert "9x70" in note


def test_padding_is_zeros_after_the_norm():
    """Below and beside the logits, where they leave the norm's statistics alone."""
    judge, logits = Discriminator(CLASSES).train(), torch.randn(2, CLASSES, 12, 16)
    seen = []
    judge.body.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    judge(logits)
    (padded,) = seen
    assert padded.shape == (2, CLASSES, 64, 64)
    assert padded.count_nonzero() == padded[:, :, :12, :16].count_nonzero()
    torch.testing.assert_close(padded.sum((0, 2, 3)), torch.zeros(CLASSES), atol=1e-3, rtol=0)


def test_power_iteration_finds_the_largest_singular_value():
    layer = SpectralConv(3, 8).eval()
    for _ in range(100):
        layer(torch.zeros(1, 3, 8, 8))
    matrix = layer.weight.detach().flatten(1)
    torch.testing.assert_close(
        torch.dot(layer.u, matrix @ layer.v), torch.linalg.svdvals(matrix)[0]
    )


def test_the_gradient_passes_through_the_weight_and_not_through_the_singular_vectors():
    """W / (u^T W v), differentiated by torch with u and v fixed."""
    layer, x = SpectralConv(3, 5, kernel=2).double(), torch.randn(2, 3, 5, 6).double()
    made = layer(x)
    u, v = layer.u, layer.v
    slope = torch.randn_like(made)
    weight = layer.weight.detach().requires_grad_()
    sigma = torch.dot(u, weight.flatten(1) @ v)
    expected = F.conv2d(x, weight / sigma, layer.bias, layer.stride, layer.pad)
    torch.testing.assert_close(made, expected)
    ours, theirs = (
        torch.autograd.grad(m, w, slope)[0] for m, w in ((made, layer.weight), (expected, weight))
    )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_the_game(name):
    """The student's term leaves the discriminator alone; its own term leaves the student alone."""
    method = make(name)
    student, teacher, labels = draw(method)
    weighted(method, method(student, teacher, labels)).backward()
    parameters = list(method.auxiliary().parameters())
    assert all(p.grad is None and p.requires_grad for p in parameters)
    assert not {id(p) for p in parameters} & {id(p) for p in method.extra_parameters()}
    before = student.logits.grad.clone()
    terms = method.auxiliary_forward(student.detach(), teacher, labels)
    assert terms.keys() == method.auxiliary_weights.keys()
    sum(method.auxiliary_weights[n] * term for n, term in terms.items()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in parameters)
    assert torch.equal(before, student.logits.grad)
    (group,) = method.auxiliary_optimizer(iter(parameters)).param_groups
    assert group["lr"] == 4e-4
    # SKD's own script trains its discriminator with SGD, the others with Adam.
    sgd = {"momentum": 0.9} if name == "skd" else {"betas": (0.9, 0.99)}
    assert sgd.items() <= group.items()


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_both_sides_of_the_game_score_the_same_logits(name):
    """On a coarser grid than the teacher's too: the student is judged as it was told apart."""
    method = make(name)
    student, teacher, labels = draw(method, grid=(5, 6), teacher_grid=(10, 12))
    scored = []
    judge = next(m for m in method.modules() if isinstance(m, Discriminator))
    judge.register_forward_pre_hook(lambda _, inputs: scored.append(inputs[0].detach()))
    method(student, teacher, labels)
    method.auxiliary_forward(student.detach(), teacher, labels)
    torch.testing.assert_close(scored[0], scored[1])
    assert scored[0].shape[-2:] == (10, 12)
