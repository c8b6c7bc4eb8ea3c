"""How numbers and untrusted text are written for people: one way, wherever they are shown."""

import unicodedata


def percent(share: float | None) -> str:
    """ "93.5 %" for 0.935; a dash for nothing."""
    return "–" if share is None else f"{100 * share:.1f} %"


def interval(low: float, high: float) -> str:
    """ "89.2–96.2" for 0.892 and 0.962: an interval in percent, without the sign."""
    separator = " to " if low < 0 else "–"
    return f"{100 * low:.1f}{separator}{100 * high:.1f}"


def points(gain: float) -> str:
    """ "+31.5 points" for a difference of 0.315 between two shares."""
    return f"{100 * gain:+.1f} points"


def seconds(value: float | None) -> str:
    """A latency: "0.42 s"."""
    return "–" if value is None else f"{value:.2f} s"


def duration(value: float | None) -> str:
    """A span a person waits for: "8 s", "7 min 12 s", "2 h 05 min"."""
    if value is None:
        return "–"
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def mebibytes(value: float | None) -> str:
    """ "812 MiB", "1.42 GiB"; a dash for nothing measured."""
    if not value:
        return "–"
    return f"{value:.0f} MiB" if value < 1024 else f"{value / 1024:.2f} GiB"


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """ "1 item", "1,200 items"."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def clean(text: str) -> str:
    """`text` on one line without control characters: a model's or a library's words cannot steer a terminal."""
    joined = " ".join(text.split())
    return "".join(c for c in joined if unicodedata.category(c) not in ("Cc", "Cf", "Cs"))


def width(text: str) -> int:
    """Columns that `text` takes in a terminal."""
    from rich.cells import cell_len

    return cell_len(text)


def clip(text: str, columns: int) -> str:
    """`text` cut to `columns` terminal columns, with an ellipsis where something was cut."""
    if width(text) <= columns:
        return text
    while text and width(text) > columns - 1:
        text = text[:-1]
    return text.rstrip() + "…"


def pad(text: str, columns: int) -> str:
    """`text` clipped and filled with spaces to exactly `columns` terminal columns."""
    text = clip(text, columns)
    return text + " " * (columns - width(text))
