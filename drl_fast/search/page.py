"""One self-contained page of hits: each one's frames, with the words above the frames that they chose."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from ..atomic_write import write_atomically
from ..validation import printable
from .retriever import Hit, Match

NAME = "index.html"
LEGEND = "Words stand above the frames that they chose; one in a stronger colour counts more."
STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --ink: #16181d; --soft: #626a76; --line: #dfe3e9;
  --accent: 22 88 180; --on-accent: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --page: #101318; --card: #191d24; --ink: #e9ecf1; --soft: #98a1ae; --line: #2b313b; --accent: 120 178 255;
    --on-accent: #0d1117; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.45 system-ui, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 28px 20px 48px; }
h1 { margin: 0 0 4px; font-size: clamp(22px, 4vw, 32px); line-height: 1.2; overflow-wrap: anywhere; }
p { margin: 0; color: var(--soft); font-size: 14px; overflow-wrap: anywhere; }
ol { list-style: none; margin: 24px 0 0; padding: 0; display: grid; gap: 16px; }
li { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 14px 16px 16px; }
header { display: flex; flex-wrap: wrap; align-items: baseline; gap: 2px 14px; margin-bottom: 10px; }
h2 { margin: 0; font-size: 17px; overflow-wrap: anywhere; }
.rank { color: var(--soft); font-weight: 400; }
.span { color: rgb(var(--accent)); font-variant-numeric: tabular-nums; font-weight: 600; }
.score { margin-left: auto; color: var(--soft); font-variant-numeric: tabular-nums; font-size: 14px; }
.strip { display: grid; grid-template-columns: repeat(auto-fill, minmax(82px, 1fr)); gap: 10px 6px; }
figure { margin: 0; min-width: 0; display: flex; flex-direction: column; justify-content: flex-end; }
.words { display: flex; flex-wrap: wrap; justify-content: center; gap: 3px; padding-bottom: 4px; }
.word { font-size: 12px; line-height: 1.3; padding: 1px 5px; border-radius: 5px; max-width: 100%;
  hyphens: auto; overflow-wrap: anywhere; background: rgb(var(--accent) / calc(.14 + .86 * var(--shade))); }
.dark { color: var(--on-accent); }
.none { background: none; border: 1px solid var(--line); color: var(--soft); }
img { display: block; width: 100%; aspect-ratio: 1; object-fit: cover; border-radius: 6px; background: var(--line);
  opacity: .42; }
.chosen img { opacity: 1; outline: 2px solid rgb(var(--accent)); outline-offset: -2px; }
figcaption { padding-top: 2px; text-align: center; color: var(--soft); font-size: 11px;
  font-variant-numeric: tabular-nums; }
.unmatched { justify-content: flex-start; padding: 0 0 8px; align-items: baseline; }
@media (max-width: 520px) {
  main { padding: 18px 12px 32px; }
  li { padding: 12px; }
  .strip { grid-template-columns: repeat(4, 1fr); }
  .word { padding: 1px 4px; font-size: 11px; }
  .score { margin-left: 0; }
}
"""


def clock(seconds: float) -> str:
    """Write a time as m:ss, or h:mm:ss; tenths where the seconds are not whole."""
    tenths = round(seconds * 10)
    minutes, rest = divmod(tenths, 600)
    hours, minutes = divmod(minutes, 60)
    whole = f"{rest // 10:02}" + (f".{rest % 10}" if rest % 10 else "")
    return f"{hours}:{minutes:02}:{whole}" if hours else f"{minutes}:{whole}"


def write(folder: Path, query: str, hits: Sequence[Hit], model: str) -> Path:
    """Write the page; it needs no network and no other file, except to play a hit's video. Return its path.

    Args:
        hits: with thumbnails.
        model: a description of the model.

    Raises:
        OSError: a folder that cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / NAME
    text = render(query, hits, model)
    write_atomically(path, lambda name: Path(name).write_text(text, encoding="utf-8"))
    return path


def render(query: str, hits: Sequence[Hit], model: str) -> str:
    """Return the page as HTML."""
    found = f"{len(hits)} {'hit' if len(hits) == 1 else 'hits'}"
    rows = "\n".join(_hit(rank, hit) for rank, hit in enumerate(hits, start=1))
    legend = LEGEND if any(hit.matches for hit in hits) else ""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_text(query)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>{_text(query)}</h1>
<p>{found}, by {_text(model)}. {legend}</p>
<ol>
{rows}
</ol>
</main>
</body>
</html>
"""


def _hit(rank: int, hit: Hit) -> str:
    most = max((match.weight for match in hit.matches), default=0.0) or 1.0
    frames = "".join(
        _frame(time, picture, [match for match in hit.matches if match.frame == number], most, bool(hit.matches))
        for number, (time, picture) in enumerate(zip(hit.times, hit.thumbnails, strict=True))
    )
    unmatched = "".join(_word(match, most) for match in hit.matches if match.frame < 0)
    none = f'<div class="words unmatched"><p>chose no frame:</p>{unmatched}</div>' if unmatched else ""
    # Browsers play a video's part between two times (W3C, Media Fragments URI).
    link = escape(f"{hit.path.absolute().as_uri()}#t={hit.start:.3f},{hit.end:.3f}")
    return f"""<li>
<header>
<h2><span class="rank">{rank}.</span> {_text(hit.video)}</h2>
<a class="span" href="{link}">{clock(hit.start)} &ndash; {clock(hit.end)}</a>
<span class="score">score {hit.score:.3f}</span>
</header>
{none}<div class="strip">{frames}</div>
<p style="padding-top:8px">{_text(str(hit.path))}</p>
</li>"""


def _frame(time: float, picture: bytes, words: Sequence[Match], most: float, matched: bool) -> str:
    chips = f'<div class="words">{"".join(_word(match, most) for match in words)}</div>' if words else ""
    data = base64.b64encode(picture).decode()
    chosen = ' class="chosen"' if words or not matched else ""
    return (
        f'<figure{chosen}>{chips}<img src="data:image/jpeg;base64,{data}" alt="frame at {clock(time)}">'
        f"<figcaption>{clock(time)}</figcaption></figure>"
    )


def _word(match: Match, most: float) -> str:
    shade = match.weight / most
    # Text on a strong colour needs the other brightness.
    kind = "word none" if match.frame < 0 else "word dark" if shade > 0.5 else "word"
    return f'<span class="{kind}" style="--shade:{shade:.2f}">{_text(match.word)}</span>'


def _text(text: str) -> str:
    return escape(printable(text))
