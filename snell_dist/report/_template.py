"""The templates of the pages: the HTML, style and scripts of this folder, joined into one file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from snell_dist.config import UserError

if TYPE_CHECKING:
    import jinja2

FOLDER = Path(__file__).parent


def template(name: str) -> jinja2.Template:
    """A page's template; what it is given is text, never markup. UserError where the library is missing."""
    try:
        import jinja2
    except ImportError:
        raise UserError("report: jinja2 is not installed: pip install 'snell_dist[report]'") from None
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER, encoding="utf-8"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(name)
