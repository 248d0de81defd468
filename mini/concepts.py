"""What the small world knows: things with names, glosses and facts, and who may see which view.

The split between training and evaluation is a property of a concept, not of a seed: it follows from
a hash of its identity, so base weights trained once stay clean for every pool built later.

Split rules kept here (each found necessary by measuring nearest neighbours in pixels):
  * the flat and 3D drawings of an emoji share their geometry, so an evaluation concept, which is
    asked about in 3D, is seen in training only as the Noto drawing; an unseen one not at all;
  * a WordNet lemma has one sense and a sense one lemma, and belongs to training or evaluation.
"""

from __future__ import annotations

import json
import re
import sqlite3
from dataclasses import dataclass, field

import xxhash

from mini.fetch import Sources

N_EVALUATION = 600
N_UNSEEN = 150
WORD_EVALUATION_SHARE = 0.3
_COMMON = 2  # times a word's first sense was tagged in WordNet's text corpus

_SKIPPED_GROUPS = ("component", "flags")
_DENIED_EMOJI = {"middle finger", "cigarette", "pile of poo", "bikini"}
_DENIED_WORDS = re.compile(
    r"\b(sex\w*|genital\w*|penis|vagina\w*|nud(e|ity)|breasts?|prostitut\w*|copulat\w*|intercourse"
    r"|rap(e|ist)|lust\w*|erotic\w*|obscen\w*|vulgar|offensive\w*|disparag\w*|derogatory|slurs?"
    r"|slang|ethnic|racial|negro\w*|nazi\w*|slaves?|slavery|excre\w*|f(a)?eces|urin\w*|suicid\w*"
    r"|murder\w*|tortur\w*|whores?|orgasm\w*|semen|sperm|buttocks?|anus|testi(s|cle)\w*|drug"
    r"|narcotic\w*|homosexual\w*|lesbian|gay|jews?|jewish|muslims?|gypsy|terroris\w*|corpses?"
    r"|holocaust|genocid\w*|masturbat\w*|bitch|bastard|sodom\w*|damn|hell|devil|incest)\b"
)
_ROOTS = ("entity", "physical entity", "abstraction", "abstract entity", "object", "whole", "thing")


@dataclass(frozen=True)
class Emoji:
    """One emoji without skin tone. `role` is "train", "evaluation" (Noto only) or "unseen"."""

    hexcode: str
    en: str
    zh: str
    tags: tuple[str, ...]
    tags_zh: tuple[str, ...]
    group: str
    group_zh: str
    subgroup: str
    icons: dict[str, str] = field(hash=False)  # style (noto, flat, 3d) -> name in its package
    role: str = "train"

    @property
    def training_styles(self) -> tuple[str, ...]:
        """Styles training may show; the 3D one belongs to the evaluation sets."""
        allowed = {"train": ("noto", "flat"), "evaluation": ("noto",), "unseen": ()}[self.role]
        return tuple(style for style in allowed if style in self.icons)


@dataclass(frozen=True)
class Country:
    """A member of the United Nations. `code` is lower-case ISO 3166 alpha-2, area in km2."""

    code: str
    en: str
    zh: str
    capital: str
    region: str
    subregion: str
    languages: tuple[str, ...]
    neighbours: tuple[str, ...]
    landlocked: bool
    area: float


@dataclass(frozen=True)
class Word:
    """A common one-word noun in its most frequent sense; `hypernyms` nearest first, no roots."""

    lemma: str
    gloss: str
    hypernyms: tuple[str, ...]
    count: int
    evaluation: bool


@dataclass(frozen=True)
class Element:
    """A chemical element; `group` is its column, 0 for lanthanides and actinides."""

    number: int
    symbol: str
    name: str
    group: int
    period: int
    series: str


@dataclass(frozen=True)
class Concepts:
    """Everything named; a part is empty when its packages are absent."""

    emoji: tuple[Emoji, ...] = ()
    countries: tuple[Country, ...] = ()
    words: tuple[Word, ...] = ()
    elements: tuple[Element, ...] = ()


def load_concepts(sources: Sources) -> Concepts:
    """Read every concept the packages at hand describe, in the packages' order (about 2 s)."""
    return Concepts(
        emoji=_emoji(sources) if sources.has("noto", "flat", "3d", "emojibase") else (),
        countries=_countries(sources) if sources.has("flags", "countries") else (),
        words=_words(sources) if sources.has("wordnet") else (),
        elements=_elements(sources),
    )


def rank(text: str) -> int:
    """A fixed pseudo-random number for an identity: splits made with it never change."""
    return xxhash.xxh3_64_intdigest(text.encode())


def plain(text: str) -> str:
    """The same text with straight quotes and single spaces."""
    return " ".join(text.translate(str.maketrans("’‘“”", "''\"\"")).split())


def _emoji(sources: Sources) -> tuple[Emoji, ...]:
    """Emoji drawn by Noto and named in English and Chinese, roles assigned."""
    names = "en/data.json zh/compact.json en/messages.json zh/messages.json meta/groups.json"
    en, zh, groups, groups_zh, keys = map(
        json.loads, sources.read("emojibase", *(f"package/{name}" for name in names.split()))
    )
    zh = {entry["hexcode"]: entry for entry in zh}
    group_names = [_message(entry["message"]) for entry in groups["groups"]]
    group_names_zh = [entry["message"] for entry in groups_zh["groups"]]
    icons = {style: _icons(sources, style) for style in ("noto", "flat", "3d")}
    found = []
    for entry in en:
        code, label = entry["hexcode"], plain(entry["label"])
        drawn = {s: names[_bare(code)] for s, names in icons.items() if _bare(code) in names}
        group = keys["groups"].get(str(entry.get("group")), "component")
        if (
            group in _SKIPPED_GROUPS
            or ":" in label
            or label in _DENIED_EMOJI
            or "noto" not in drawn
        ):
            continue  # a colon marks near-copies: facing right, families, hair colours
        found.append(
            Emoji(
                hexcode=code,
                en=label,
                zh=plain(zh[code]["label"]),
                tags=_tags(entry, label),
                tags_zh=tuple(zh[code].get("tags", ())),
                group=group_names[entry["group"]],
                group_zh=group_names_zh[entry["group"]],
                subgroup=keys["subgroups"][str(entry["subgroup"])],
                icons=drawn,
            )
        )
    return _with_roles(found)


def _with_roles(found: list[Emoji]) -> tuple[Emoji, ...]:
    """Draw evaluation and unseen concepts from those with all styles that are no gender variant."""
    eligible = [e for e in found if len(e.icons) == 3 and not _gendered(e.hexcode)]
    eligible.sort(key=lambda e: rank(e.hexcode))
    roles = dict.fromkeys((e.hexcode for e in eligible[:N_EVALUATION]), "evaluation")
    unseen = eligible[N_EVALUATION : N_EVALUATION + N_UNSEEN]
    roles |= dict.fromkeys((e.hexcode for e in unseen), "unseen")
    return tuple(Emoji(**{**vars(e), "role": roles.get(e.hexcode, "train")}) for e in found)


def _gendered(hexcode: str) -> bool:
    parts = hexcode.split("-")
    person = parts[0] in ("1F468", "1F469", "1F9D1") and "200D" in parts
    return person or "2640" in parts or "2642" in parts


def _icons(sources: Sources, style: str) -> dict[str, str]:
    """Bare hexcode -> name of the drawing in the style's package."""
    if style == "3d":
        names = [name for name, _ in sources.members(style, lambda n: n.endswith(".webp"))]
        return {_bare(name.rsplit("/", 1)[1][:-5]): name for name in names}
    (raw,) = sources.read(style, "package/chars.json")
    return {_bare(code): name for code, name in json.loads(raw).items()}


def _bare(code: str) -> str:
    """The code without the variation selector, which the packages use differently."""
    return "-".join(part for part in code.upper().split("-") if part != "FE0F")


def _tags(entry: dict, label: str) -> tuple[str, ...]:
    """Tags that are words of their own and add to the label."""
    known = set(label.lower().split())
    return tuple(
        t for t in entry.get("tags", ()) if re.fullmatch("[a-z]{3,}", t) and t not in known
    )


def _message(text: str) -> str:
    return text.replace("&", "and")


def _countries(sources: Sources) -> tuple[Country, ...]:
    """United Nations members that have a capital, neighbours given by name."""
    entries = json.loads(sources.read("countries", "package/dist/countries.json")[0])
    names = {entry["cca3"]: plain(entry["name"]["common"]) for entry in entries}
    return tuple(
        Country(
            code=entry["cca2"].lower(),
            en=names[entry["cca3"]],
            zh=entry["translations"]["zho"]["common"],
            capital=plain(entry["capital"][0]),
            region=entry["region"],
            subregion=entry["subregion"],
            languages=tuple(entry["languages"].values()),
            neighbours=tuple(names[code] for code in entry["borders"]),
            landlocked=entry["landlocked"],
            area=float(entry["area"]),
        )
        for entry in entries
        if entry.get("unMember") and entry.get("capital") and entry["capital"][0]
    )


def _elements(sources: Sources) -> tuple[Element, ...]:
    """The periodic table from mendeleev's database, opened in memory."""
    (raw,) = sources.read("elements", "mendeleev/elements.db")
    database = sqlite3.connect(":memory:")
    database.deserialize(raw)
    rows = database.execute(
        "select atomic_number, symbol, elements.name, coalesce(group_id, 0), period, series.name"
        " from elements join series on series.id = elements.series_id order by atomic_number"
    )
    return tuple(Element(n, s, name.lower(), g, p, r.lower()) for n, s, name, g, p, r in rows)


@dataclass(frozen=True)
class _Synset:
    lemmas: tuple[str, ...]
    parents: tuple[str, ...]  # offsets
    gloss: str


def _words(sources: Sources) -> tuple[Word, ...]:
    """Common one-word nouns, one sense each, one lemma for each sense, screened by a deny list."""
    data, index, counts = (
        raw.decode("latin-1")
        for raw in sources.read(
            "wordnet",
            *(f"usr/share/wordnet/{name}" for name in ("data.noun", "index.noun", "cntlist.rev")),
        )
    )
    synsets = _synsets(data)
    tagged = _first_sense_counts(counts)
    taken: set[str] = set()
    words = []
    senses = [(tagged.get(lemma, 0), lemma, offset) for lemma, offset in _first_senses(index)]
    for count, lemma, offset in sorted(senses, key=lambda sense: (-sense[0], sense[1])):
        if count < _COMMON or offset in taken:
            continue
        gloss, hypernyms = _short_gloss(synsets[offset].gloss), _ancestors(offset, synsets)
        if not hypernyms or not _teachable(lemma, gloss):
            continue  # a place or person has no hypernym here, only a class it is an instance of
        taken.add(offset)
        held_out = rank(lemma) / 2**64 < WORD_EVALUATION_SHARE
        words.append(Word(lemma, gloss, hypernyms, count, held_out))
    return tuple(words)


def _synsets(data: str) -> dict[str, _Synset]:
    """Parse data.noun: `offset file type n (lemma id)* n (pointer offset type pair)* | gloss`."""
    synsets = {}
    for line in data.splitlines():
        if line.startswith(" "):
            continue  # the licence at the top
        head, _, gloss = line.partition(" | ")
        fields = head.split()
        n_lemmas = int(fields[3], 16)
        lemmas = tuple(name.replace("_", " ") for name in fields[4 : 4 + 2 * n_lemmas : 2])
        pointers = fields[5 + 2 * n_lemmas :]
        pairs = zip(pointers[::4], pointers[1::4], strict=False)
        parents = tuple(offset for kind, offset in pairs if kind == "@")  # "@i" marks names
        synsets[fields[0]] = _Synset(lemmas, parents, gloss.strip())
    return synsets


def _first_senses(index: str) -> list[tuple[str, str]]:
    """`(lemma, offset of its first sense)` of one-word nouns that are tagged in running text."""
    pairs = []
    for line in index.splitlines():
        fields = line.split()
        if not re.fullmatch("[a-z]{3,12}", fields[0]):
            continue
        n_senses = int(fields[2])  # as many offsets end the line; before them, how many are tagged
        if int(fields[-n_senses - 1]):
            pairs.append((fields[0], fields[-n_senses]))
    return pairs


def _first_sense_counts(counts: str) -> dict[str, int]:
    """Lemma -> how often its first noun sense (`lemma%1:... 1 count`) was tagged."""
    rows = (line.split() for line in counts.splitlines())
    return {key.split("%")[0]: int(n) for key, sense, n in rows if "%1:" in key and sense == "1"}


def _short_gloss(gloss: str) -> str:
    """The definition alone: no examples, no leading domain, no remarks in brackets."""
    return plain(re.sub(r"\([^)]*\)", "", gloss.split(";")[0]).replace('"', ""))


def _teachable(lemma: str, gloss: str) -> bool:
    words = re.findall(r"[a-z]+", gloss.lower())
    inside = any(word.startswith(lemma[:5]) for word in words)  # gives itself away
    clean = re.fullmatch(r"[A-Za-z0-9 ,'\-]+", gloss) and not _DENIED_WORDS.search(
        f"{lemma} {gloss}".lower()
    )
    return 3 <= len(words) <= 14 and not inside and bool(clean)


def _ancestors(offset: str, synsets: dict[str, _Synset]) -> tuple[str, ...]:
    """First names of all hypernyms, breadth first, without the roots that hold of everything."""
    queue, seen = [offset], {offset}
    for current in queue:
        fresh = [parent for parent in synsets[current].parents if parent not in seen]
        queue += fresh
        seen.update(fresh)
    names = (synsets[parent].lemmas[0] for parent in queue[1:])
    return tuple(dict.fromkeys(name for name in names if name not in _ROOTS))
