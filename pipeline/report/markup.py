"""HTML that cannot be spoilt by what it shows: text and attributes are escaped where elements are made."""

import html

_VOID = {"img", "meta", "line", "rect", "polyline", "br"}  # elements without an end tag, or closed in themselves


class Markup(str):
    """Text that is HTML already. Everything else is escaped."""

    __slots__ = ()


def element(name: str, /, *inside: str, **attributes: str | float | bool | None) -> Markup:
    """`<name attributes>inside</name>`.

    Attributes: a trailing underscore falls away, other underscores become hyphens; None and False are left out, True
    stands alone. What is inside is escaped unless it is Markup.
    """
    told = "".join(_attribute(key, value) for key, value in attributes.items())
    if name in _VOID:
        return Markup(f"<{name}{told}/>")
    return Markup(f"<{name}{told}>{join(*inside)}</{name}>")


def join(*parts: str) -> Markup:
    """All parts one after another, escaped unless they are Markup."""
    return Markup("".join(part if isinstance(part, Markup) else html.escape(part) for part in parts))


def _attribute(key: str, value: str | float | bool | None) -> str:
    if value is None or value is False:
        return ""
    name = key.rstrip("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{html.escape(str(value))}"'
