"""Data sets on disk, or drawn; random augmentation; batches."""

from kdprof.data.augment import Augmentation
from kdprof.data.batches import PREFETCHED, Batches, evaluation_batches
from kdprof.data.dataset import SegmentationData, open_data
from kdprof.data.decoded import Decoded

__all__ = [
    "PREFETCHED",
    "Augmentation",
    "Batches",
    "Decoded",
    "SegmentationData",
    "evaluation_batches",
    "open_data",
]
