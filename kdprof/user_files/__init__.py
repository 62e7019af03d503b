"""Users' Python files: one rule for importing them, and what they depend on.

Here a path becomes a module and its sources. Nothing here knows what the module is for.
"""

from kdprof.user_files.loading import import_file, import_function
from kdprof.user_files.naming import NamedInFile, named_in_file
from kdprof.user_files.sources import (
    ask_again,
    content_hash,
    following,
    source_hash,
    sources_of,
    version_of,
)

__all__ = [
    "NamedInFile",
    "ask_again",
    "content_hash",
    "following",
    "import_file",
    "import_function",
    "named_in_file",
    "source_hash",
    "sources_of",
    "version_of",
]
