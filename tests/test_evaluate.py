import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdprof.train.evaluate import confusion_matrix, scores


def test_by_hand():
    """Class 0: 2 hits, 1 missed, 1 wrongly claimed: 2/4. Class 1: 1 hit, 1 claimed, 1 missed: 1/3.
    Class 2 is not in the labels: no IoU, and not in the mean."""
    labels = torch.tensor([[0, 0, 0, 1, 1, 255]])
    predicted = torch.tensor([[0, 0, 1, 1, 0, 2]])
    found = scores(confusion_matrix(predicted, labels, 3))
    assert found.per_class == [pytest.approx(0.5), pytest.approx(1 / 3), None]
    assert found.miou == pytest.approx((0.5 + 1 / 3) / 2)


def test_class_predicted_but_absent_only_hurts_the_others():
    labels, predicted = torch.tensor([0, 0, 0, 0]), torch.tensor([0, 0, 0, 1])
    found = scores(confusion_matrix(predicted, labels, 2))
    assert found.per_class == [0.75, None]


def literal_iou(predicted, labels, classes):
    values = []
    for c in range(classes):
        pairs = [(p == c, y == c) for p, y in zip(predicted, labels, strict=True) if y != 255]
        if not any(y for _, y in pairs):
            continue
        values.append(sum(p and y for p, y in pairs) / sum(p or y for p, y in pairs))
    return sum(values) / len(values)


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0, 1, 2, 3, 255])), min_size=1))
def test_against_sets_of_pixels(pairs):
    predicted, labels = zip(*pairs, strict=True)
    confusion = confusion_matrix(torch.tensor(predicted), torch.tensor(labels), 4)
    assert confusion.sum() == sum(y != 255 for y in labels)
    if confusion.sum():
        assert scores(confusion).miou == pytest.approx(literal_iou(predicted, labels, 4))
