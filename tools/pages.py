"""Tables that a command measures or computes, in a page between two marks."""

import re


def filled(page: str, text: str, start: str, end: str = "<!-- end -->") -> str:
    """The page with this text between the line `start` and the next line `end`.

    Raises ValueError unless the page has one such place.
    """
    marks = rf"({re.escape(start)}\n).*?(\n{re.escape(end)})"
    page, count = re.subn(marks, lambda m: m[1] + text + m[2], page, flags=re.S)
    if count != 1:
        raise ValueError(f"the page has {count} places from {start} to {end}, not 1")
    return page
