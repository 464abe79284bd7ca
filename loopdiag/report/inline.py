"""Figures of matplotlib as SVG that stands inside an HTML page."""

from __future__ import annotations

import re
from xml.etree import ElementTree

_SVG, _LINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}href"
WIDE = 300  # points; such figures are scrolled on a phone, not shrunk
_REFERS = re.compile(r"url\(#([^)]+)\)")
# The page sets the font, and its policy forbids the rest, which says nothing that the page does not.
_NOT_KEPT = {f"{_SVG}metadata", f"{_SVG}style"}


def inline(svg: bytes, prefix: str, title: str) -> str:
    """An SVG file as an element of a page that allows no inline styles.

    What matplotlib says in `style` becomes attributes, and ids begin with the prefix, so that several figures do not
    share any.

    Args:
        svg: As `Figure.savefig` writes it.
        prefix: Of the ids, unique in the page.
        title: What the figure shows, for those who do not see it.
    """
    root = ElementTree.fromstring(svg)
    for parent in list(root.iter()):
        for child in [child for child in parent if child.tag in _NOT_KEPT]:
            parent.remove(child)
    for element in root.iter():
        for part in element.attrib.pop("style", "").split(";"):
            name, _, value = (each.strip() for each in part.partition(":"))
            if name and name != "font-family":
                element.set(name, value)
        for name, value in element.attrib.items():
            element.set(name, _REFERS.sub(rf"url(#{prefix}-\1)", value))
        if "id" in element.attrib:
            element.set("id", f"{prefix}-{element.get('id')}")
        if _LINK in element.attrib:
            target = element.attrib.pop(_LINK)
            element.set("href", f"#{prefix}-{target[1:]}" if target.startswith("#") else target)
        if element.get("d"):
            element.set("d", " ".join(element.get("d", "").split()))
        element.text, element.tail = ((text or "").strip() and text for text in (element.text, element.tail))
        element.tag = element.tag.removeprefix(_SVG)
    _, _, width, height = root.get("viewBox", "").split()
    root.attrib = {"viewBox": root.get("viewBox", ""), "width": width, "height": height, "role": "img"}
    root.set("aria-label", title)
    root.set("class", "wide" if float(width) > WIDE else "narrow")
    return ElementTree.tostring(root, encoding="unicode")
