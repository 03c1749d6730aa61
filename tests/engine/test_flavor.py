import subprocess
import sys

import pytest

from ringexport.engine.flavor import FLAVORS, TrtFlavor, find_module, open_tensorrt
from ringexport.errors import BackendUnavailableError


def test_a_missing_flavour_says_how_to_get_it() -> None:
    flavor = TrtFlavor(name="other", modules=("no_such_trt",), cross_builds=False, hint="get it")
    with pytest.raises(BackendUnavailableError, match="other is not installed") as caught:
        open_tensorrt(flavor)
    assert caught.value.hint == "get it"


@pytest.mark.trt
def test_libraries_that_were_loaded_too_early_are_refused() -> None:
    if find_module(FLAVORS["tensorrt-rtx"]) != "tensorrt_rtx_bindings":
        pytest.skip("this is about the wheels without the tensorrt_rtx package")
    code = (
        "import tensorrt_rtx_libs\n"
        "from ringexport.engine.flavor import FLAVORS, open_tensorrt\n"
        "open_tensorrt(FLAVORS['tensorrt-rtx'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "imported before ringexport opened it" in done.stderr


def test_no_module_is_imported_early() -> None:
    code = (
        "import sys, ringexport.engine.build, ringexport.runtime.backends.trt\n"
        "print([name for name in sys.modules if 'tensorrt' in name and 'ringexport' not in name])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
