"""Templates, and the page around them: autoescape is on, so that all that comes from a run or a data set stays text."""

from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from ..adapters.strategies import STRATEGIES
from ..hub.markup import Markdown, code, markdown, visible

_LOADER = PackageLoader("vlm_peft.report")
_KEPT: dict[str, Any] = {
    "undefined": StrictUndefined,
    "trim_blocks": True,
    "lstrip_blocks": True,
    "keep_trailing_newline": True,
}
_HTML = Environment(
    loader=_LOADER,
    autoescape=True,
    finalize=lambda value: value if isinstance(value, Markup) else visible(value),
    **_KEPT,
)
# Markdown has no autoescape of its own: what is written out goes through `markdown` instead.
_MARKDOWN = Environment(loader=_LOADER, autoescape=False, finalize=markdown, **_KEPT)
_MARKDOWN.filters |= {"code": code, "listed": lambda values: Markdown(", ".join(map(markdown, values)))}


def render(template: str, **values: Any) -> str:
    """Return a template of this room, filled; values are escaped for HTML or, in `*.md.jinja`, for Markdown."""
    environment = _MARKDOWN if template.endswith(".md.jinja") else _HTML
    return environment.get_template(template).render(**values)


def text(value: Any) -> str:
    """Return a value as escaped text, see `visible`."""
    return str(escape(visible(value)))


def page(title: str, body: str) -> str:
    """Return a whole HTML page, with a body that is HTML already, that loads nothing from anywhere."""
    return render("page.html.jinja", title=title, body=Markup(body))


def description(pairs: Mapping[str, Any]) -> str:
    """Return names and values as a description list, without those that are None or empty."""
    return render("description.html.jinja", pairs=pairs)


def loads_with(summary: Mapping[str, Any]) -> str:
    """The method of `VisionQwen` that loads the folder of a run.

    Args:
        summary (`Mapping`): Of `run_summary.json`.
    """
    strategy = STRATEGIES.get(str(summary.get("strategy")))
    return "from_pretrained" if strategy is not None and strategy.trains_decoder else "from_adapter"
