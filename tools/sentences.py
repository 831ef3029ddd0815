"""Write real English sentences, one a line: cut from the documentation topics that ship with Python.

    python tools/sentences.py FILE [COUNT]
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from pydoc_data.topics import topics

SHORTEST, LONGEST = 40, 400


def sentences(count: int) -> list[str]:
    """Return the first ``count`` sentences of running text, in the order of the topics."""
    found: list[str] = []
    for name in sorted(topics):
        for paragraph in re.split(r"\n\s*\n", topics[name]):
            # indented paragraphs are code and grammar
            if paragraph.startswith((" ", "\t")) or "::" in paragraph:
                continue
            text = " ".join(paragraph.replace("*", "").split())
            found += [s for s in re.split(r"(?<=[.!?]) ", text) if SHORTEST <= len(s) <= LONGEST and s[0].isupper()]
    return list(dict.fromkeys(found))[:count]


if __name__ == "__main__":
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 64
    Path(sys.argv[1]).write_text("\n".join(sentences(count)) + "\n", encoding="utf-8")
