"""Data sets on disk or synthetic, random augmentation, batches, the loader.

Here files become batches on a device. Nothing here knows a network, a method or a budget.
"""

from kdprof.data.augment import Augmentation, fitted_size
from kdprof.data.base import DataOnDisk, SegmentationData
from kdprof.data.batches import ENDLESS, PREFETCHED, Batches, evaluation_batches
from kdprof.data.cache import cache_folder, decoded
from kdprof.data.content import content_of, file_sizes
from kdprof.data.dataset import fit_of, open_data, require_files, title_of, uses_placeholders
from kdprof.data.decoded import Decoded
from kdprof.data.degenerate import Findings, examine_files, examine_labels
from kdprof.data.feeder import Feeder
from kdprof.data.files import PairedImages

__all__ = [
    "ENDLESS",
    "PREFETCHED",
    "Augmentation",
    "Batches",
    "DataOnDisk",
    "Decoded",
    "Feeder",
    "Findings",
    "PairedImages",
    "SegmentationData",
    "cache_folder",
    "content_of",
    "decoded",
    "evaluation_batches",
    "examine_files",
    "examine_labels",
    "file_sizes",
    "fit_of",
    "fitted_size",
    "open_data",
    "require_files",
    "title_of",
    "uses_placeholders",
]
