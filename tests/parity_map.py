"""From a parity file's loss to the method's term: the only place that knows both namings.

Each entry of a ``parity_terms_*`` module takes a :class:`~parity_case.Case` and returns the file's
outputs by name, and the tensors whose gradients the file stores, by the file's name. Every
hyper-parameter, shape, parameter and random draw comes from the file.
"""

import importlib
from collections.abc import Callable
from pathlib import Path

from parity_case import Case, Outcome

TERMS: dict[str, Callable[[Case], Outcome]] = {}
for _path in sorted(Path(__file__).parent.glob("parity_terms_*.py")):
    TERMS |= importlib.import_module(_path.stem).TERMS
