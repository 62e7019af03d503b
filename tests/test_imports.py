"""How timm is imported."""

import gc
import importlib
import importlib.util
import subprocess
import sys

import pytest

from kdprof.imports import UNUSED, quick_import


@pytest.mark.parametrize("collects", [True, False])
def test_the_collector_rests_while_something_is_imported(collects):
    was = gc.isenabled()
    (gc.enable if collects else gc.disable)()
    try:
        with pytest.raises(ImportError, match="no_such_module"), quick_import():
            importlib.import_module("no_such_module" if not gc.isenabled() else "gc")
        assert gc.isenabled() == collects
    finally:
        (gc.enable if was else gc.disable)()


def test_networks_are_built_without_wandb_which_can_be_imported_later():
    if importlib.util.find_spec(UNUSED) is None:
        pytest.skip(f"{UNUSED} is not installed")
    code = (
        "import sys, kdprof.models\n"
        f"assert '{UNUSED}' not in sys.modules\n"
        f"import {UNUSED}\n"
        f"assert {UNUSED}.__version__\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
