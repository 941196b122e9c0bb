"""Bar charts in SVG, one for each family of work and medium, without other libraries.

A chart has a panel for each row, with a bar for each contender and a scale of its own, because the rows differ by orders of
magnitude. Text and ground follow the reader's light or dark theme.
"""

from html import escape

from .document import Medians, number
from .rows import MEDIA, ROWS

WIDTH, LABEL, VALUE, BAR, GAP = 880, 322, 90, 16, 5
TITLE, PANEL, HEAD, PAD = 26, 22, 34, 18
FAMILIES = {"reads": "Reads", "writes": "Writes", "database": "Databases"}
METRICS = {"value": ("throughput", "more is better"), "p99": ("p99 latency", "less is better"), "cpu": ("CPU of the servers", "less is better")}
# Text is in words beside each bar, so that no one has to tell colours apart.
STYLE = """
 .ground { fill: #ffffff; stroke: #d0d7de } .head { fill: #1f2328; font-weight: 600; font-size: 15px }
 .row { fill: #1f2328; font-weight: 600; font-size: 12.5px } .text { fill: #424a53; font-size: 12px }
 .ours { fill: #1f2328; font-size: 12px; font-weight: 600 } .plyfs { fill: #0a66c2 } .peer { fill: #8c959f } .file { fill: #bf8700 }
 .null { fill: #2da44e } .beside { fill: #b392d8 }
 @media (prefers-color-scheme: dark) {
  .ground { fill: #0d1117; stroke: #30363d } .head, .row, .ours { fill: #e6edf3 } .text { fill: #b1bac4 }
  .plyfs { fill: #4a9eff } .peer { fill: #7d8590 } .file { fill: #d29922 } .null { fill: #3fb950 } .beside { fill: #9a7fd1 }
 }
"""


def unit(row, metric):
    if metric == "p99":
        return "us"
    if metric == "cpu":
        return "s per GiB" if row.large else "s per million"
    return row.unit


def panels(results, medium, rows, metric):
    """For each row that has figures: its title, and label, group and value of each contender."""
    for row in rows:
        medians = Medians(results, medium, row)
        bars = [(one["label"], one["group"], medians.of(name, metric)) for name, one in results.contenders.items()]
        # A file has no servers.
        bars = [bar for bar in bars if bar[2] is not None and not (metric == "cpu" and bar[1] == "file")]
        if bars:
            yield f"{row.title}, {unit(row, metric)}", bars


def text(x, y, style, words, anchor="start"):
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{style}" text-anchor="{anchor}">{escape(words)}</text>'


def chart(title, found):
    """The picture, or None without figures."""
    found = list(found)
    if not found:
        return None
    parts, y = [], PAD + HEAD
    longest = WIDTH - 2 * PAD - LABEL - VALUE
    for name, bars in found:
        parts.append(text(PAD, y + 8, "row", name))
        y += PANEL
        most = max(value for *_, value in bars) or 1
        for label, group, value in bars:
            style = "ours" if group == "plyfs" else "text"
            length = max(1.0, value / most * longest)
            parts.append(text(PAD + LABEL - 8, y + BAR - 4, style, label, "end"))
            parts.append(f'<rect x="{PAD + LABEL}" y="{y}" width="{length:.1f}" height="{BAR}" rx="2" class="{group}"/>')
            parts.append(text(PAD + LABEL + length + 6, y + BAR - 4, style, number(value)))
            y += BAR + GAP
        y += TITLE - PANEL + 12
    height = y + PAD - 8
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" role="img"',
        f' aria-label="{escape(title)}" font-family="system-ui, \'Segoe UI\', \'DejaVu Sans\', sans-serif">',
        f"<style>{STYLE}</style>",
        f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="6" class="ground"/>',
        text(PAD, PAD + 14, "head", title),
    ]
    return "\n".join([*head, *parts, "</svg>"]) + "\n"


def write(results, directory):
    """Writes the charts below `directory`. Returns title, medium and path from there of each."""
    made = []
    for medium, place in MEDIA.items():
        for family, name in FAMILIES.items():
            rows = [row for row in ROWS if row.family == family]
            for metric, (what, better) in METRICS.items():
                title = f"{name}: {what} ({better}). {place}"
                picture = chart(title, panels(results, medium, rows, metric))
                if picture is None:
                    continue
                path = f"images/bench-{family}-{medium}-{metric}.svg"
                (directory / path).parent.mkdir(parents=True, exist_ok=True)
                (directory / path).write_text(picture)
                made.append((title, medium, path))
    return made
