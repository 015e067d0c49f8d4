"""Fetch the packages that bundled texts come from, and reduce their documents to titles and paragraphs."""

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

# registry, package, version
PACKAGES = {
    "debian-handbook": ("deb", "11.20220922"),
    "gnome-user-docs": ("deb", "43.0-2"),
    "gnome-devel-docs": ("deb", "40.3-1"),
    "mate-user-guide": ("deb", "1.26.0-1"),
    "debmake-doc": ("deb", "1.17-7"),
    "golang-1.19-src": ("deb", "1.19.8-2"),
    "golang-github-burntsushi-toml-dev": ("deb", "1.2.0-2"),
    "librust-hashbrown-dev": ("deb", "0.12.3-1"),
    "librust-semver-dev": ("deb", "1.0.14-1"),
    "librust-itertools-dev": ("deb", "0.10.3-1"),
    "lua-penlight": ("deb", "1.13.1-3"),
    "brotli": ("sdist", "1.2.1"),
    "opencc": ("sdist", "1.4.2"),
    "networkx": ("wheel", "3.6.1"),
    "werkzeug": ("wheel", "3.1.9"),
    "requests": ("wheel", "2.34.2"),
    "tomlkit": ("wheel", "0.15.2"),
    "click": ("wheel", "8.5.1"),
    "attrs": ("wheel", "26.1.0"),
    "lodash": ("npm", "4.18.1"),
    "preact": ("npm", "11.2.0"),
    "zod": ("npm", "4.6.7"),
    "immer": ("npm", "11.2.10"),
    "react-native-svg": ("npm", "15.16.1"),
    "bats": ("npm", "1.13.0"),
    "bootstrap": ("npm", "5.3.9"),
    "commander": ("npm", "14.0.3"),
    "redux": ("npm", "5.0.1"),
    "chinese-poetry": ("npm", "2.0.1"),
}


def fetch(cache: Path, name: str) -> Path:
    """Folder with the unpacked package `name`, downloaded into `cache` on first use."""
    kind, version = PACKAGES[name]
    folder = cache / f"{name}-{version}"
    if folder.is_dir():
        return folder
    drop = cache / "archives" / name
    drop.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", ".", f"{name}=={version}"]
    command = {
        "deb": ["apt-get", "-q", "download", f"{name}={version}"],
        "npm": ["npm", "pack", "--silent", f"{name}@{version}"],
        "wheel": [*pip, "--only-binary", ":all:"],
        "sdist": [*pip, "--no-binary", ":all:"],
    }[kind]
    subprocess.run(command, cwd=drop, check=True, stdout=subprocess.DEVNULL)
    (archive,) = drop.iterdir()
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    if kind == "deb":
        subprocess.run(["dpkg-deb", "-x", str(archive), str(partial)], check=True)
    elif kind == "wheel":
        zipfile.ZipFile(archive).extractall(partial)
    else:
        with tarfile.open(archive) as packed:
            packed.extractall(partial, filter="data")
    return partial.rename(folder)


def han(text: str) -> int:
    """Number of Chinese characters."""
    return sum("\u4e00" <= c <= "\u9fff" for c in text)


def mostly_chinese(text: str) -> bool:
    """Whether a paragraph was translated: commands and names may stay in Latin letters."""
    latin = len(re.findall(r"[A-Za-z]+", text))
    return han(text) >= 6 and han(text) > 2 * latin


def paragraphs(blocks: Iterable[str], chinese: bool, seen: set[str]) -> str:
    """The blocks worth keeping, white space collapsed, each once."""
    kept = []
    for block in blocks:
        text = re.sub(r"\s+", " ", block).strip()
        if chinese:
            text = re.sub(
                r"(?<=[\u3000-\u303f\u4e00-\u9fff\uff00-\uffef]) (?=[\u3000-\u303f\u4e00-\u9fff\uff00-\uffef])",
                "",
                text,
            )
        if len(text) < 4 or text in seen or (chinese and not mostly_chinese(text)):
            continue
        seen.add(text)
        kept.append(text)
    return "\n\n".join(kept) + "\n" if kept else ""


class Prose(HTMLParser):
    """Titles and paragraphs of DocBook HTML."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks: list[str] = []
        self.stack: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in {"br", "hr", "img", "link", "meta", "input"}:
            return
        kind = dict(attrs).get("class") or ""
        inside = any(mode != "out" for _, mode in self.stack)
        muted = any(mode == "mute" for _, mode in self.stack)
        mode = "in" if inside else "out"
        if kind.split(" ")[0] in {"toc", "docnav", "navheader", "navfooter", "screen", "programlisting"} or tag in {
            "title",
            "pre",
            "table",
        }:
            mode = "mute"
        elif not muted and (kind == "para" or tag in {"p", "h1", "h2", "h3", "h4", "h5"}):
            mode = "in"
            self.blocks.append("")
        elif muted:
            mode = "mute"
        self.stack.append((tag, mode))

    def handle_endtag(self, tag: str) -> None:
        while self.stack and self.stack.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self.stack and self.stack[-1][1] == "in":
            self.blocks[-1] += data


def html_blocks(page: Path) -> list[str]:
    """Titles and paragraphs of one HTML page."""
    parser = Prose()
    parser.feed(page.read_text(encoding="utf-8"))
    return [block for block in parser.blocks if block.strip()]


def mallard_blocks(page: Path) -> Iterator[str]:
    """Titles and paragraphs of one Mallard page."""
    space = "{http://projectmallard.org/1.0/}"
    for element in ElementTree.parse(page).getroot().iter():
        if element.tag in {space + "title", space + "p"}:
            yield "".join(element.itertext())


def unwrap(text: str) -> str:
    """Paragraphs on one line each."""
    blocks = re.split(r"\n\s*\n", text)
    return "\n\n".join(filter(None, (re.sub(r"\s+", " ", block).strip() for block in blocks))) + "\n"
