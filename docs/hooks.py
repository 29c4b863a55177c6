"""For MkDocs: files of the repository that a page links to, pictures and examples, become files of the site.

A link such as `../examples/sft.py` works where the page is read in the repository. In the site that file lies under
`files/`, and the link is rewritten. Pages (`.md`) outside of docs/ are not pages of the site, and remain broken links.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
#: The target of a link or picture, in Markdown or HTML, without its anchor.
LINK = re.compile(r"""(?:(?<=\]\()|(?<=src=")|(?<=href="))(?P<target>\.\./[^)"#\s]+)""")


def file_outside(target: str, page: str) -> str | None:
    """The path in the repository that a link of docs/`page` leads to; None if it is not a file outside of docs/."""
    path = os.path.normpath(os.path.join("docs", os.path.dirname(page), target))
    outside = not path.startswith(("..", "docs" + os.sep)) and not path.endswith(".md")
    return path if outside and (ROOT / path).is_file() else None


def on_files(files: Any, config: Any) -> Any:
    """Adds the files that pages link to."""
    for page in [file for file in files if file.is_documentation_page()]:
        for match in LINK.finditer(page.content_string):
            path = file_outside(match["target"], page.src_uri)
            uri = f"files/{path}"
            if path is not None and files.get_file_from_path(uri) is None:
                files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Rewrites the links to them."""

    def rewritten(match: re.Match[str]) -> str:
        path = file_outside(match["target"], page.file.src_uri)
        if path is None:
            return match["target"]
        return os.path.relpath(f"files/{path}", os.path.dirname(page.file.src_uri) or ".")

    return LINK.sub(rewritten, markdown)
