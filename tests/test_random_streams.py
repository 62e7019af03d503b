"""Random numbers are functions of their address."""

from hypothesis import given, settings
from hypothesis import strategies as st

from kdprof.data import Augmentation
from kdprof.data.random_streams import Stream, generator

same_every_time = settings(derandomize=True, deadline=None, max_examples=60)


@same_every_time
@given(st.integers(0, 2**40), st.integers(0, 2**40), st.integers(0, 1000))
def test_draws_are_functions_of_their_address(seed, batch, slot):
    augmentation = Augmentation((8, 8))
    first = augmentation.draw(seed, batch, slot)
    others = [(seed + 1, batch, slot), (seed, batch + 1, slot), (seed, batch, slot + 1)]
    assert all(augmentation.draw(*other) != first for other in others)
    assert augmentation.draw(seed, batch, slot) == first


def test_streams_are_apart():
    """Among them the addresses that numpy's zero padding would make one."""
    addresses = [(stream, *tail) for stream in Stream for tail in [(1, 2), (2, 1), (3, 4)]]
    addresses += [(Stream.AUGMENTATION, 1, 2, 3), (Stream.AUGMENTATION, 1, 3, 2)]
    drawn = [generator(*address).random() for address in addresses]
    assert len(set(drawn)) == len(drawn)
    assert drawn == [generator(*address).random() for address in addresses]
