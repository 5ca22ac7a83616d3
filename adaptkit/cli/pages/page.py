"""HTML pages and Markdown summaries, from the templates in this folder.

Everything that a template prints is made visible and, in HTML, escaped, since tensor names come from untrusted files;
only ``Markup`` is printed as it is. As a second defence, a content security policy allows only the page's own script,
by its hash, and no network requests.
"""

import base64
import hashlib
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from adaptkit import __version__
from adaptkit.cli.output import counted, percent, shape, size
from adaptkit.cli.repositories import as_repositories


def render(template: str, **values: Any) -> str:
    """Return a page.

    Args:
        template: name of a file in this folder.
        values: what it shows, by name.
    """
    return _templates().get_template(template).render(**values)


def visible(value: str) -> str:
    """Replace invisible characters (controls, text directions, unpaired surrogates) by escape sequences."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in value)


@cache
def _templates() -> Environment:
    from adaptkit.cli.pages.heat_maps import starred

    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=lambda name: name is not None and name.endswith(".html"),
        finalize=_shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    filters = {"breakable": _breakable, "in_markdown": _in_markdown, "starred": starred, "shape": shape}
    made.filters.update(filters | {"counted": counted, "percent": percent, "size": size})
    script = made.get_template("page.js").render()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    made.globals.update(version=__version__, script=Markup(script), script_hash=digest)
    return made


def _shown(value: Any) -> Any:
    return as_repositories(visible(value)) if isinstance(value, str) and not isinstance(value, Markup) else value


def _breakable(value: str) -> Markup:
    """Allow lines to break after the dots of a name."""
    return Markup(".<wbr>").join(map(escape, _shown(value).split(".")))


def _in_markdown(text: str) -> str:
    """Escape text so that it stays in its table cell and is not interpreted as markup."""
    plain = " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|")
    return plain.replace("<", "&lt;").replace("[", "\\[").replace("@", "&#64;")
