"""Parts that all report pages share: the base template, its style sheet and script, escaping and embedded data."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from ..results.result_rows import to_jsonable
from . import plot_style


class FigureBlock(NamedTuple):
    """A figure and its caption."""

    svg: Markup
    text: str


def render_page(
    name: str, *, data: Mapping[str, Any] | None = None, filters: Mapping[str, Callable[..., Any]] | None = None,
    **values: Any,
) -> str:  # fmt: skip
    """Renders ``templates/<name>.html.j2`` with the shared style and script, and those of the page where it has any.

    All values are escaped, and a missing value raises an error. The Content-Security-Policy of the page allows this one
    script and no external resource, whatever a name in the data contains.

    Args:
        name: of the page: "report", "diagnosis", "look", "questions" or "search".
        data: embedded as JSON in the element with the id ``data_id`` of the template.
        filters: additional Jinja filters.
        **values: variables of the template.
    """
    environment = Environment(
        loader=PackageLoader("equipoise.report", "templates"),
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"bound": bound, "breakable": breakable, **(filters or {})}
    script = _asset("base.js") + _asset(f"{name}.js")
    return environment.get_template(f"{name}.html.j2").render(
        style=_asset("base.css") + _asset(f"{name}.css"),
        light={variable: light for light, (variable, _) in plot_style.THEME.items()},
        dark=dict(plot_style.THEME.values()),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data=None if data is None else embedded(data),
        **values,
    )


def bound(text: str) -> str:
    """Replaces the spaces inside a quantity by no-break spaces: before units, around ± and after "p =".

    Example:
        >>> bound("66.2 ± 1.8 % on 5 seeds, p < 0.001").split(" ")
        ['66.2\\xa0±\\xa01.8\\xa0%', 'on', '5\\xa0seeds,', 'p\\xa0<\\xa00.001']
    """
    return re.sub(
        r"(?<=\d) (?=%|±|points|seed|run)|(?<=±) | (?=[=<] )|(?<=epoch) (?=\d)|(?<=[=<]) ", "\N{NO-BREAK SPACE}", text
    )


def breakable(name: str) -> Markup:
    """Allows line breaks in a long name after each dot and underscore.

    Example:
        >>> print(breakable("train.batch_size"))
        train.<wbr>batch_<wbr>size
    """
    return Markup(re.sub(r"([._+])(?=.)", r"\1<wbr>", str(escape(name))))


def embedded(content: Mapping[str, Any]) -> Markup:
    """The content as JSON, escaped so that no string in it can close the script element.

    Example:
        >>> print(embedded({"method": "</script><!--"}))
        {"method":"\\u003c/script\\u003e\\u003c!--"}
    """
    text = json.dumps(to_jsonable(content), separators=(",", ":"), allow_nan=False)
    for letter in "<>&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return Markup(text)


def flatten_settings(part: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as rows (key, value).

    Example:
        >>> flatten_settings({"optimizer": {"lr": 0.001}, "seeds": [0, 1]})
        [('optimizer.lr', '0.001'), ('seeds', '0, 1')]
    """
    rows = []
    for key, value in part.items():
        if isinstance(value, Mapping) and value:
            rows += flatten_settings(value, f"{prefix}{key}.")
        elif isinstance(value, (list, tuple)):
            rows.append((f"{prefix}{key}", ", ".join(map(_setting, value)) or "–"))
        else:
            rows.append((f"{prefix}{key}", "–" if value is None else _setting(value)))
    return rows


def _setting(value: Any) -> str:
    """A value as text; numbers with at most six significant digits."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _asset(name: str) -> Markup:
    """The content of a packaged file, empty where the page has no such file."""
    path = files("equipoise.report") / "templates" / name
    return Markup(path.read_text(encoding="utf-8") if path.is_file() else "")
