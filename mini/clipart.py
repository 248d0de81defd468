"""Open Clip Art: which drawings are used, and what their authors said of them."""

from __future__ import annotations

import html
import re
from collections import Counter
from dataclasses import dataclass, replace

from mini.concepts import plain, rank
from mini.fetch import Sources

CATEGORIES = {  # folder -> the word used for it in questions
    "animals": "animals",
    "buildings": "buildings",
    "computer": "computers",
    "education": "education",
    "electronics": "electronics",
    "food": "food",
    "geography": "geography",
    "office": "office",
    "plants": "plants",
    "recreation": "recreation",
    "science": "science",
    "signs_and_symbols": "signs",
    "tools": "tools",
    "transportation": "transportation",
}
_DROPPED = {  # subfolders: whole series of look-alikes, or unsuitable
    *("alcohol", "arrows", "bodypart", "callouts", "cardbacks", "cards", "clothing", "connectors"),
    *("duplicates", "etiquette-theme", "examples", "flags", "flat-theme", "jigsaw", "led"),
    *("lemon-theme", "map_symbols", "pantyhose", "pirates", "stickmen", "themes", "weapons"),
}
_DENIED = re.compile(
    r"\b(nud[eio]\w*|naked|sexy?|woman|donna|girl|ragazza|signorina|body|skull|teschio|gallows|gun"
    r"|pistol\w*|grenade|granata|rifle|weapon\w*|bomb\w*|drunk|beer|wine|smok\w*|cigar\w*|hitler|nazi|swastika"
    r"|dead|kill\w*|blood|condom|marijuana|cannabis|drug\w*|bikini|breast|torture|chav)\b"
)
_NO_KEYWORDS = {  # how the library files its drawings, not what they show
    *("hash", "unsorted", "clip art", "clipart", "icons", "icon", "mapsym", "computer icon"),
    "signs and symbols",
}
_MAX_BYTES = 400_000  # beyond it, drawings take seconds to rasterise and are photographs traced
_SAME_TITLE = 3  # titles used more often name a collection, not a drawing: left empty
EVALUATION_SHARE = 0.16


@dataclass(frozen=True)
class ClipArt:
    """One drawing: `path` inside svg/, its category, the author's title (or "") and keywords."""

    path: str
    category: str
    title: str
    keywords: tuple[str, ...]
    svg: bytes
    evaluation: bool


def load_clipart(sources: Sources) -> list[ClipArt]:
    """Suitable drawings with a title of their own or two keywords, by path (3 s, 70 MB)."""
    found = []
    for name, svg in sources.members("clipart", _suitable):
        if len(svg) > _MAX_BYTES:
            continue
        path = name.split("/svg/", 1)[1]
        text = svg.decode("utf-8", errors="replace")
        title, keywords = describe(text)
        if not _DENIED.search(f"{title} {path} {' '.join(keywords)}".lower().replace("_", " ")):
            held_out = rank(path) / 2**64 < EVALUATION_SHARE
            category = CATEGORIES[path.split("/")[0]]
            found.append(ClipArt(path, category, title, keywords, svg, held_out))
    uses = Counter(art.title for art in found)
    own = [replace(art, title="") if uses[art.title] > _SAME_TITLE else art for art in found]
    return sorted((a for a in own if a.title or len(a.keywords) > 1), key=lambda a: a.path)


def describe(svg: str) -> tuple[str, tuple[str, ...]]:
    """The author's title and keywords as ordinary words; an unusable title is empty."""
    work = re.search(r"<(?:cc:)?Work\b.*?</(?:cc:)?Work>", svg, re.DOTALL)
    metadata = work.group(0) if work else ""
    title = re.search(r"<dc:title[^>]*>([^<]*)</dc:title>", metadata)
    keywords = re.findall(r"<rdf:li[^>]*>([^<]*)</rdf:li>", metadata)
    return _title(title.group(1) if title else ""), _keywords(keywords)


def _suitable(name: str) -> bool:
    if not name.endswith(".svg") or "/svg/" not in name:
        return False
    folders = name.split("/svg/", 1)[1].split("/")[:-1]
    return bool(folders) and folders[0] in CATEGORIES and not _DROPPED.intersection(folders)


def _title(raw: str) -> str:
    text = plain(html.unescape(raw))
    text = re.sub(r"(?i)^(clip ?art by [^-]*-|the )\s*", "", text)
    text = re.sub(r"\([^)]*\)|[\d_]+|\.svg$", " ", text).strip(" -.,!?:#")
    text = plain(text).lower()
    usable = re.fullmatch(r"[a-z][a-z' ,\-]{2,39}", text) and len(text.split()) <= 6
    generic = re.search(
        r"clip ?art|icons?\b|theme|collection|submission|sibmission|symbols?$", text
    )
    return text if usable and not generic else ""


def _keywords(raw: list[str]) -> tuple[str, ...]:
    words = (plain(html.unescape(word)).lower().replace("_", " ") for word in raw)
    skipped = {
        "hash",
        "unsorted",
        "clip art",
        "clipart",
        "icons",
        "icon",
        "mapsym",
        "computer icon",
        "signs and symbols",
    }
    kept = (w for w in words if re.fullmatch(r"[a-z][a-z ]{2,19}", w) and w not in skipped)
    return tuple(dict.fromkeys(kept))[:5]
