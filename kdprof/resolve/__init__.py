"""From a Study to the live objects that it names, or to everything that is wrong with it.

Here names become devices, data sets, networks and steps; nothing here runs a step or writes a file.
"""

from kdprof.resolve.study import ResolvedStudy

__all__ = ["ResolvedStudy"]
