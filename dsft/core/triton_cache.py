"""Where Triton keeps the kernels it has compiled."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

from dsft.core.errors import describe_os_error
from dsft.core.notices import Notify
from dsft.core.paths import triton_cache_dir
from dsft.core.private_folder import make_private_folder


def place_triton_cache(on_notice: Notify) -> None:
    """Let Triton keep what it compiles in dsft's cache folder, not in the user's home; where that is set, it counts.

    These files are run, so a folder that others could put some into is not used: this process has one of its own then.

    Args:
        on_notice: Receives why nothing is kept.

    Raises:
        OSError: There is no place for temporary files either.
    """
    if "TRITON_CACHE_DIR" in os.environ:
        return
    folder = triton_cache_dir()
    try:
        make_private_folder(folder)
    except OSError as error:
        on_notice(f"What Triton compiles is not kept in {folder}: {describe_os_error(error)}.")
        folder = Path(tempfile.mkdtemp(prefix="dsft-triton-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["TRITON_CACHE_DIR"] = str(folder)
