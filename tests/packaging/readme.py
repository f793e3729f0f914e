"""The README's code, as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

_TEXT = (Path(__file__).resolve().parents[2] / "README.md").read_text()
_SECTION = _TEXT.partition("\n## As a library\n")[2].partition("\n## ")[0]
VERIFYING, FETCHING = re.findall(r"^```python\n(.*?)^```$", _SECTION, re.MULTILINE | re.DOTALL)
