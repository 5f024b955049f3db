"""What the pages of a run and of a comparison share: templates, embedded pictures, files that appear at once."""

import base64
from pathlib import Path

import jinja2

TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)
DASH = "\N{EN DASH}"


def embedded(picture: Path) -> str:
    """A data URL of a PNG."""
    return "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode("ascii")


def write_atomically(path: Path, text: str) -> Path:
    """Write UTF-8 text to a temporary file beside `path` and rename it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
    return path
