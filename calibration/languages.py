"""Manuals in the languages Qwen1.5 was announced for: what was really translated of them, in sections.

A translated manual is rarely whole: what nobody translated stands in it in English. A paragraph is kept if the English manual does not have
it, and if it looks like its language: its script, or its most frequent words. A title is kept before a paragraph that is.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from apart import Runs
from prose import fetch

HANDBOOK = ("debian-handbook", "usr/share/doc/debian-handbook/html", "*.html")
GNOME = ("gnome-user-docs", "usr/share/help", "*.page")
GNOME_DEVEL = ("gnome-devel-docs", "usr/share/help", "p*/*.page")  # the parts under CC-BY-SA-3.0
MATE = ("mate-user-guide", "usr/share/help", "*.xml")
DEBMAKE = ("debmake-doc", "usr/share/doc/debmake-doc/html", "*.zh-cn.html")
# English titles and paragraphs that a translation may have left as they are: the folder of the original
ORIGINALS = {"debian-handbook": "en-US"}
PAGES_SKIP = {
    "index.html", "sect.acknowledgments.html", "legal.xml", "legal.html", "glossary.xml", "index.page", "index.zh-cn.html",
}  # fmt: skip

# language: [(manual, folder of the language, first page, every n-th page, parts of page names wanted)]
Plan = list[tuple[tuple[str, str, str], str, int, int, str]]
CALIBRATION: dict[str, Plan] = {
    "ar": [(HANDBOOK, "ar-MA", 0, 4, "[^s]|sect.[^a-c]")],
    "de": [(HANDBOOK, "de-DE", 1, 6, "")],
    "es": [(HANDBOOK, "es-ES", 2, 8, "")],
    "fr": [(HANDBOOK, "fr-FR", 3, 4, "")],
    "id": [(HANDBOOK, "id-ID", 4, 4, "")],
    "it": [(HANDBOOK, "it-IT", 4, 5, "")],
    "ja": [(HANDBOOK, "ja-JP", 1, 6, "")],
    "ko": [(HANDBOOK, "ko-KR", 0, 1, ""), (GNOME_DEVEL, "ko", 0, 1, "")],
    "pt": [(HANDBOOK, "pt-BR", 1, 6, "")],
    "ru": [(HANDBOOK, "ru-RU", 2, 9, "")],
    "th": [(MATE, "th", 0, 1, "gos[abd-s]|goscu")],
    "vi": [(HANDBOOK, "vi-VN", 0, 1, "")],
}
HELDOUT: dict[str, Plan] = {
    "ar": [(HANDBOOK, "ar-MA", 0, 2, "sect.[a-c]")],
    "de": [(GNOME, "de", 0, 6, "")],
    "en": [(GNOME, "C", 1, 6, "")],
    "es": [(GNOME, "es", 2, 6, "")],
    "fr": [(GNOME, "fr", 3, 6, "")],
    "id": [(GNOME, "id", 4, 5, "")],
    "it": [(GNOME, "it", 0, 1, "")],
    "ja": [(GNOME, "ja", 0, 2, "")],
    "ko": [(GNOME, "ko", 0, 6, "")],
    "pt": [(GNOME, "pt_BR", 5, 11, ""), (GNOME, "pt", 0, 11, "")],
    "ru": [(GNOME, "ru", 1, 12, "")],
    "th": [(MATE, "th", 0, 1, "goscaja|gostools")],
    "vi": [(GNOME, "vi", 0, 1, "")],
    "zh": [(DEBMAKE, "", 0, 1, "")],  # for retrieval; zh-test has it whole
}
# English and Chinese have their texts from elsewhere; prompts of retrieval need their sections
RETRIEVAL: dict[str, Plan] = {
    "en": [(HANDBOOK, "en-US", 0, 3, "")],
    "zh": [(HANDBOOK, "zh-CN", 0, 1, ""), (GNOME, "zh_CN", 0, 1, "")],
}
# What a manual says of itself: its licence, or that somebody should write it.
NOISE = re.compile("Creative Commons|GNU Free Doc|GFDL|©|[Cc]opyright|https?://[^ ]{60}")

WORDS = {
    "de": "der die und das ist nicht sie ein eine werden mit zu den auf für im von",
    "en": "the of and to is that for with you this are be it as your in on",
    "es": "el la los las de que en un una para con se es por no del al",
    "fr": "le la les des est une un pour dans vous et du que en sur de à",
    "id": "yang dan untuk dengan di ini dari adalah pada dalam tidak anda ke atau akan dapat",
    "it": "il la di che è un una per con del della i le si non in",
    "pt": "o a os de que um uma para com em do da não se é no na",
}
SCRIPTS = {
    "ar": "[\u0600-\u06ff]",
    "ja": "[\u3040-\u30ff\u4e00-\u9fff]",
    "ko": "[\uac00-\ud7a3]",
    "ru": "[\u0400-\u04ff]",
    "th": "[\u0e00-\u0e7f]",
    "zh": "[\u4e00-\u9fff]",
}


@dataclass
class Section:
    """A title and the paragraphs below it."""

    title: str
    paragraphs: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The paragraphs, one on a line."""
        return "\n".join(self.paragraphs)


def fits(text: str, language: str) -> bool:
    """Whether a paragraph is written in `language`."""
    words = re.findall(r"[^\W\d_]+", text.lower())
    latin = len(re.findall(r"[A-Za-z]+", text))
    if language in SCRIPTS:
        return len(re.findall(SCRIPTS[language], text)) > max(8, 2 * latin)
    if language == "vi":
        accented = [word for word in words if re.search("[à-ỹđ]", word)]
        # no syllable is longer than nghiêng: words grew together where a command lost its spaces
        return len(accented) > 0.4 * len(words) and max(map(len, accented)) <= 7
    known, english = set(WORDS[language].split()), set(WORDS["en"].split())
    found = sum(word in known for word in words)
    foreign = sum(word in english - known for word in words)
    return len(words) >= 4 and found > 2 * foreign and found >= 0.12 * len(words)


def _tag(element: Element) -> str:
    return element.tag.rpartition("}")[2] if isinstance(element.tag, str) else ""


def _kind(element: Element) -> str:
    """title, text, mute, join (a path of menus, or keys pressed together) or inline."""
    tag, style = _tag(element), (element.get("class") or "").split(" ")[0]
    if not tag or element.get("{http://www.w3.org/XML/1998/namespace}lang") == "en":
        return "mute"
    if tag in {"title", "h1", "h2", "h3", "h4", "h5"} or style == "title":
        return "title"
    if tag in {"p", "para", "simpara"} or style == "para":
        return "text"
    muted = {
        "head", "pre", "table", "credit", "license", "desc", "indexterm", "screen", "programlisting", "textobject", "remark", "comment",
        "revhistory", "legalnotice", "copyright", "author", "authorgroup", "othercredit", "titleabbrev", "media", "synopsis", "example",
        "figure", "informalfigure", "formalpara",
    }  # fmt: skip
    if tag in muted or style in {"toc", "docnav", "navheader", "navfooter", "screen", "programlisting"}:
        return "mute"
    return "join" if tag in {"guiseq", "menuchoice", "keyseq", "keycombo"} else "inline"


def _inline(element: Element) -> str:
    """The text of an element without the blocks inside it."""
    kind = _kind(element)
    if kind == "join":
        parts = [" ".join(_inline(child).split()) for child in element if _tag(child) != "shortcut"]
        return ("+" if _tag(element).startswith("key") else " ▸ ").join(filter(None, parts))
    text = element.text or ""
    for child in element:
        text += (_inline(child) if _kind(child) in {"inline", "join"} else " ") + (child.tail or "")
    return text


def _refers(element: Element) -> bool:
    """Whether it has a reference whose text is made when it is shown, so that words are missing here."""
    return any(_tag(e) in {"xref", "link"} and not "".join(e.itertext()).strip() for e in element.iter())


def _blocks(element: Element) -> Iterator[tuple[bool, str]]:
    """(whether it is a title, text) of what stands below an element."""
    for child in element:
        kind = _kind(child)
        if kind == "mute" or (_tag(child) == "title" and child.get("type")):  # a short form of the title, for links
            continue
        if kind == "title" or (kind == "text" and not _refers(child)):
            yield kind == "title", re.sub(r"\s+", " ", _inline(child)).strip()
        yield from _blocks(child)


def page_blocks(page: Path) -> list[tuple[bool, str]]:
    """Titles and paragraphs of one page of XHTML, Mallard or DocBook."""
    root = ElementTree.fromstring(re.sub(r"&(?!#|amp|lt|gt|quot|apos)\w+;", " ", page.read_text(encoding="utf-8")))
    return [block for block in _blocks(root) if block[1]]


def pages(cache: Path, manual: tuple[str, str, str], folder: str) -> list[Path]:
    """The pages of a manual."""
    package, base, pattern = manual
    return [p for p in sorted((fetch(cache, package) / base / folder).rglob(pattern)) if p.name not in PAGES_SKIP]


def sections(cache: Path, language: str, plan: Plan) -> list[Section]:
    """The translated sections of the pages of a plan, no paragraph twice."""
    found: list[Section] = []
    seen: set[str] = set()
    titles: set[str] = set()
    for manual, folder, first, step, wanted in plan:
        original = [] if language == "en" else pages(cache, manual, ORIGINALS.get(manual[0], "C"))
        english = {text for page in original for _, text in page_blocks(page)}
        chosen = [page for page in pages(cache, manual, folder) if re.match(wanted, page.name)]
        for page in chosen[first::step]:
            section = Section("")
            for is_title, text in page_blocks(page):
                if is_title:
                    known = text in english | titles
                    titles.add(text)
                    section = Section("" if known else re.sub(r"^[\dA-Z.]+\.\s+", "", text))
                elif len(text) > 20 and text not in english | seen and fits(text, language) and not NOISE.search(text):
                    seen.add(text)
                    if not section.paragraphs:
                        found.append(section)
                    section.paragraphs.append(text)
    return found


def joined(parts: list[Section]) -> str:
    """Sections as one text."""
    return "\n\n".join("\n\n".join(filter(None, [part.title, *part.paragraphs])) for part in parts) + "\n"


def cut(parts: list[Section], size: int) -> list[Section]:
    """Sections from the beginning, `size` bytes at most."""
    total = 0
    for at, part in enumerate(parts):
        total += len(joined([part]).encode()) + 1
        if total > size:
            return parts[:at]
    return parts


def calibration_sections(cache: Path, language: str) -> list[Section]:
    """What is bundled to calibrate on a language, 150 KB at most."""
    return cut(sections(cache, language, CALIBRATION[language]), 150_000)


def heldout_sections(cache: Path, language: str, known: Runs) -> list[Section]:
    """What is bundled to judge a language, 70 KB at most: no paragraph that shares a run with `known`, the calibration texts."""
    kept: list[Section] = []
    before = ""  # a run may reach across paragraphs
    for part in sections(cache, language, HELDOUT[language]):
        section, start = Section(""), before
        for at, text in enumerate([part.title, *part.paragraphs]):
            if known.shared(f"{before}\n{text}"):
                continue
            before = f"{before}\n{text}"[-200:]
            if at:
                section.paragraphs.append(text)
            else:
                section.title = text
        if section.paragraphs:
            kept.append(section)
        else:
            before = start
    return cut(kept, 70_000)
