"""Make docs/atlas.md and the README's table again from the records in reports/reference.

    python benchmarks/atlas_pages.py [--count]

With ``--count`` the steps of all methods are first counted again, at the full size of Cityscapes
(512x1024, batch 8, bf16); this needs no GPU and takes under a minute.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

# -P and PYTHONSAFEPATH leave the folder of a script out of the path.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from reference_parts.plan import FULL

from kdprof.discovery import builtin_methods
from kdprof.errors import KdprofError
from kdprof.progress import Progress
from kdprof.records import Atlas
from kdprof.reports import atlas
from kdprof.reports.atlas_page import (
    COUNTED,
    page,
    read_references,
    readme_table,
    with_table,
)
from kdprof.store import write_together
from kdprof.workflow import Workflow

ROOT = Path(__file__).resolve().parent.parent
REFERENCES = ROOT / "reports" / "reference"
SETTING, PRECISION = FULL.settings[0], FULL.precisions[0]


def builtin_names() -> list[str]:
    return [name for name, found in builtin_methods().items() if found.origin == "built-in"]


def count(names: Sequence[str]) -> Atlas:
    """Count the steps of methods at the atlas's first setting.

    Raises:
        KdprofError: a step cannot be counted.
    """
    overrides = {"methods": list(names), "step.precision": PRECISION}
    with tempfile.TemporaryDirectory() as out:
        workflow = Workflow.open(SETTING.preset, overrides, Path(out), Progress(None))
        counted = workflow.count(modules=False)
    if counted.failures:
        raise KdprofError(counted.summary())
    setting = atlas.setting_of(SETTING.name, counted.costs)
    versions = counted.costs[0].versions
    return Atlas(kind="counted", device=None, versions=versions, settings=[setting])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", action="store_true", help="count the steps again first")
    try:
        if parser.parse_args().count:
            atlas.write(REFERENCES / COUNTED, count(builtin_names()))
        references = read_references(REFERENCES)
        readme = ROOT / "README.md"
        table = with_table(readme.read_text(), readme_table(references))
        write_together({ROOT / "docs" / "atlas.md": page(references), readme: table})
    except KdprofError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
