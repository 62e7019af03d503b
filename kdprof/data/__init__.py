"""Data sets on disk, or drawn; random augmentation; batches."""

from kdprof.data.augment import Augmentation, fitted_size
from kdprof.data.batches import PREFETCHED, Batches, evaluation_batches
from kdprof.data.cache import decoded, default_folder
from kdprof.data.dataset import (
    DataOnDisk,
    SegmentationData,
    fit_of,
    is_drawn,
    open_data,
    require_files,
)
from kdprof.data.feeder import Feeder

__all__ = [
    "PREFETCHED",
    "Augmentation",
    "Batches",
    "DataOnDisk",
    "Feeder",
    "SegmentationData",
    "decoded",
    "default_folder",
    "evaluation_batches",
    "fit_of",
    "fitted_size",
    "is_drawn",
    "open_data",
    "require_files",
]
