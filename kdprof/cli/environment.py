"""What the commands need of the system around them, whatever it is set to."""

from __future__ import annotations

import errno
import os
import pwd

MENDS = {
    errno.ENOSPC: "the disk is full; free space there, or choose another folder (--out, TMPDIR)",
    errno.EDQUOT: "the quota is used up; free space, or choose another folder (--out, TMPDIR)",
    errno.EFBIG: "files may not become so large here (ulimit -f); raise the limit",
    errno.EROFS: "it lies on a read-only file system; choose another folder (--out, TMPDIR)",
    errno.EACCES: "it may not be used by this account; change its permissions, or choose another",
    errno.ENOTDIR: "a part of its path is a file, not a folder; choose another",
    errno.EISDIR: "it is a folder; choose another name",
    errno.EEXIST: "something else has its name; move that, or choose another",
    errno.ELOOP: "its links form a loop; repair them",
    errno.ENOENT: "it is not there, or a link leads nowhere; repair that",
    errno.ENAMETOOLONG: "its name is too long for this file system; choose a shorter one",
    errno.EMFILE: "too many files are open; raise the limit with ulimit -n",
    errno.EPIPE: "who reads the output has stopped reading",
}
"""What a user can do about an error of the system."""


def settle() -> None:
    """Set what torch and matplotlib read from the environment so that they can be used here.

    A notebook's backend cannot draw into files, and torch asks for the name of an account where
    there may be none.
    """
    os.environ["MPLBACKEND"] = "agg"
    if not {"LOGNAME", "USER", "LNAME", "USERNAME"} & {k for k, v in os.environ.items() if v}:
        try:
            pwd.getpwuid(os.getuid())
        except KeyError:
            os.environ["USER"] = f"uid-{os.getuid()}"


def explained(error: OSError) -> str:
    """Return an error of the system in one line, with the file and the mend."""
    file = f"{str(error.filename)[:200]}: " if error.filename else ""
    reason = error.strerror or str(error)
    if "temporary directory" in reason:
        return f"{reason}: set TMPDIR to a folder that has space and can be written to"
    mend = MENDS.get(error.errno or 0, "run 'kdprof --debug ...' for details")
    return f"{file}{reason}: {mend}"
