"""Building TFDS data sets in silence: one line of ours instead of progress bars, prints and log lines."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps TFDS from writing to the terminal; its errors are raised as ever."""
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def prepare(builder: Any) -> Path:
    """Builds a data set as ArrayRecord files unless it is there, and returns its folder.

    TFDS writes to a temporary folder and renames it, so a stopped build leaves nothing, and of two processes
    that build the same data one wins.
    """
    import tensorflow_datasets as tfds

    with quiet():
        if builder.is_prepared():
            return Path(builder.data_dir)
        config = f"/{builder.builder_config.name}" if builder.builder_config else ""
        print(f"preparing {builder.name}{config} (once)", file=sys.stderr, flush=True)
        try:
            builder.download_and_prepare(
                file_format="array_record",
                download_config=tfds.download.DownloadConfig(try_download_gcs=False),
            )
        except OSError:
            # Another process may have finished between our look and our rename.
            if not builder.is_prepared():
                raise
    return Path(builder.data_dir)
