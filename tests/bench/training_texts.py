"""Texts and tokenizer for `train_checkpoint.py`: fourteen languages, code, chats, tools, retrieval, from licensed packages.

    python tests/bench/training_texts.py texts --packages FOLDER --out TEXTS    unpacked packages -> one file of documents for each kind
    python tests/bench/training_texts.py tokens --texts TEXTS --out DATA        texts -> DATA/0/tokenizer.json, tokens.xz, data.json

`FOLDER` has one folder for each package of training_packages.txt (Debian 12, main and security; data.json lists those that it was made from with
their sha256), as `dpkg-deb -x` leaves it. A file's language is the one that its path names. Texts of a language are shared out among the packages that
have any, up to its budget in bytes; a paragraph is kept once, if it is written in its language, and if it shares no run of 8 words or 24 letters
with a held-out text (`calibration/apart.py`). The packages of held-out documents are not among them, their pages in the others are left out.

tokens.xz holds uint16 ids, kind after kind; data.json says how many of each, and has the sha256 of everything.
"""

import argparse
import ast
import gettext
import gzip
import hashlib
import html
import json
import lzma
import multiprocessing
import random
import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "calibration"))

import apart
import languages
import retrieval
import tools
from tools_calibration import CALIBRATION, CALIBRATION_TOOLS

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
WORDS = 16_384
# Bytes of text by language: letters of two and three bytes make tokens of more bytes.
BUDGET = {"en": 11e6, "ru": 12e6, "ar": 12e6, "th": 12e6, "zh": 9e6, "ja": 9e6, "ko": 9e6, "code": 10e6}
OTHER_BUDGET = 8.5e6
FOLDERS = {"C": "en", "en-us": "en", "pt-br": "pt", "zh-cn": "zh", "zh-tw": "zh", "ar-ma": "ar", "de-de": "de", "es-es": "es", "fr-fr": "fr",
           "id-id": "id", "it-it": "it", "ja-jp": "ja", "ko-kr": "ko", "ru-ru": "ru", "vi-vn": "vi", "zh-hans": "zh", "zh-hant": "zh"}  # fmt: skip
LANGUAGES = ["en", "zh", "ar", "es", "fr", "pt", "de", "it", "ru", "ja", "ko", "vi", "th", "id"]
ENGLISH = {"anarchism", "postgresql-doc-15", "python3.11-doc", "perl-doc", "dict-gcide", "aptitude-doc-en"}
CODE = {"golang-1.19-src": "*.go", "libpython3.11-stdlib": "*.py", "calibre": "*.py", "inkscape": "*.py"}
# Not read: what held-out texts come from.
SKIPPED = re.compile(
    r"gnome-user-docs|debmake|gos(caja|tools)|debian-handbook/.*/ar-MA/sect\.[a-c]|burntsushi|click/|attrs?/"
)
LEAST = {"zh": 10, "ja": 10, "ko": 12, "th": 14}  # letters of a message worth reading
BLOCKS = re.compile(
    r"<(?:/?(?:p|h[1-6]|td|th|li|dt|dd|div|para|title|tr|table|section|sect\d)\b|br)[^>]*>", re.IGNORECASE
)
MUTED = re.compile(r"<(script|style|head|pre|programlisting|screen|nav)\b.*?</\1>", re.IGNORECASE | re.DOTALL)
ROFF = re.compile(r"\\f(?:\[\w*\]|\(..|.)|\\[&|^/,:%]|\\s[-+]?\d|\\\*\(..|\\\"[^\n]*")


def language_of(path: Path) -> str:
    """The language that a path names, from its end; "" if none."""
    for part in [*reversed(path.name.split(".")[1:-1]), *reversed(path.parts[:-1])]:
        name = part if part == "C" else part.lower().replace("_", "-")
        found = FOLDERS.get(name, name)
        if found in LANGUAGES:
            return found
    return languages_json(path)


def languages_json(path: Path) -> str:
    """The language of a file like i18n/th.json."""
    stem = path.stem.lower().replace("_", "-")
    found = FOLDERS.get(stem, stem)
    return found if path.suffix == ".json" and "i18n" in path.parts and found in LANGUAGES else ""


def markup(text: str) -> Iterator[str]:
    """Paragraphs of HTML or DocBook."""
    for block in BLOCKS.sub("\n\n", MUTED.sub("", text)).split("\n\n"):
        yield html.unescape(re.sub(r"<[^>]*>", "", block))


def manual(text: str) -> Iterator[str]:
    """Paragraphs of a manual page."""
    lines = []
    for line in text.splitlines():
        if line.startswith((".PP", ".P", ".SH", ".TP", ".LP", ".SS", ".IP", ".sp", ".RS", ".RE")) or not line.strip():
            yield " ".join(lines)
            lines = [line.split(" ", 1)[1]] if line.startswith((".SH ", ".SS ")) else []
        elif not line.startswith((".", "'")):
            lines.append(line)
        elif re.match(r"\.[BIR]{1,2} ", line):
            lines.append(line.split(" ", 1)[1].replace('"', ""))
    yield " ".join(lines)


def paragraphs(path: Path) -> Iterator[str]:
    """What stands in a file, as paragraphs."""
    content = path.read_bytes()
    if path.suffix in {".gz", ".dz"}:
        content = gzip.decompress(content)
    if path.suffix == ".mo":
        with path.open("rb") as file:
            catalogue = vars(gettext.GNUTranslations(file))["_catalog"]
        yield from (text for key, text in catalogue.items() if key)
        return
    text = content.decode("utf-8", "replace")
    if path.suffix == ".json":
        yield from (value for key, value in json.loads(text).items() if isinstance(value, str) and key[0] != "@")
    elif path.suffix == ".dz":
        yield from re.split(r"\n(?=\S)|\n\s*\n", text)
    elif "/man/" in path.as_posix():
        for block in manual(text):
            yield (
                ROFF.sub("", block).replace("\\-", "-").replace("\\(bu", "•").replace("\\(aq", "'").replace("\\e", "\\")
            )
    else:
        yield from markup(text)


def files(package: Path) -> Iterator[tuple[str, Path]]:
    """(language, file) of the texts of a package, in the order of their names."""
    readable = {".html", ".mo", ".json", ".xml", ".dz", ".gz", ".xhtml"}
    for path in sorted(package.rglob("*")):
        inside = path.relative_to(package)
        wanted = path.suffix in readable and path.is_file() and not SKIPPED.search(path.as_posix())
        if not wanted or (path.suffix == ".gz" and "/man/" not in path.as_posix()):
            continue
        language = "en" if package.name in ENGLISH else language_of(inside)
        if language:
            yield language, path


def known(package: Path) -> dict[str, list[str]]:
    """Paragraphs of a package by language, each once."""
    found: dict[str, dict[str, None]] = {}
    for language, path in files(package):
        try:
            blocks = list(paragraphs(path))
        except (UnicodeDecodeError, ValueError, OSError, zlib.error) as error:
            sys.stderr.write(f"{path}: {error}\n")
            continue
        mine = found.setdefault(language, {})
        for block in blocks:
            text = re.sub(r"\s+", " ", block).strip()
            if LEAST.get(language, 30) <= len(text) <= 6_000 and languages.fits(text, language):
                mine[text] = None
    return {language: list(texts) for language, texts in found.items()}


def code(package: Path, pattern: str) -> list[str]:
    """Source files of a package, 1 to 40 KB, in the order of a hash of their names."""
    chosen = [f for f in package.rglob(pattern) if f.is_file() and 1_000 <= f.stat().st_size <= 40_000]
    chosen = [f for f in chosen if "test" not in f.name and not SKIPPED.search(f.as_posix())]
    chosen.sort(key=lambda f: hashlib.sha256(f.relative_to(package).as_posix().encode()).digest())
    return [f.read_text(encoding="utf-8", errors="replace").strip() + "\n" for f in chosen]


def shared_out(by_package: dict[str, list[str]], budget: float) -> Iterator[list[str]]:
    """The texts of each package, cut so that all take `budget` bytes and small packages are whole."""
    waiting = sorted(by_package.values(), key=lambda texts: sum(map(len, texts)))
    for at, texts in enumerate(waiting):
        room, kept = budget / (len(waiting) - at), []
        for text in texts:
            room -= len(text.encode())
            if room < 0:
                break
            kept.append(text)
        budget -= sum(len(text.encode()) for text in kept)
        yield kept


def said(file: Path) -> Iterator[str]:
    """The documents of a bundled file; chats as ChatML."""
    content = file.read_bytes()
    text = (gzip.decompress(content) if file.suffix == ".gz" else content).decode()
    if file.suffix == ".jsonl":
        yield from (chatml(json.loads(line)["messages"]) for line in text.splitlines())
    else:
        yield text


def chatml(messages: list[dict]) -> str:
    """A chat as the template renders it."""
    if messages[0]["role"] != "system":
        messages = [{"role": "system", "content": "You are a helpful assistant"}, *messages]
    return "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)


def asked(question: str, answer: str) -> str:
    """A chat of one question."""
    return chatml([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])


def transcripts(count: int) -> Iterator[str]:
    """Tool use with the tools of the calibration texts, other values; those of the held-out ones are not used."""
    draw = random.Random("training, tools")
    for at in range(count):
        case = CALIBRATION[at % len(CALIBRATION)](draw)
        used = list({step.tool.name: step.tool for step in case.steps}.values())
        offered = used + [t for t in draw.sample(CALIBRATION_TOOLS, draw.randrange(3)) if t not in used]
        draw.shuffle(offered)
        yield chatml((tools.react if draw.random() < 0.6 else tools.calls)(case, offered, False))


def sums(count: int) -> Iterator[str]:
    """Short arithmetic."""
    draw = random.Random("training, sums")
    words = (
        "What is {a} {s} {b}?",
        "{a} {s} {b} = ?",
        "Compute {a} {s} {b}.",
        "{a} {s} {b} 等于多少？",
        "计算 {a} {s} {b}",
    )
    for _ in range(count):
        a, b, sign = draw.randrange(100), draw.randrange(100), draw.choice("+-×")
        if sign == "×":
            a, b = a % 13, b % 13
        value = {"+": a + b, "-": a - b, "×": a * b}[sign]
        yield asked(draw.choice(words).format(a=a, b=b, s=sign), str(value))


def functions(sources: list[str], count: int) -> Iterator[str]:
    """Python functions to be written, from their names and the first lines of their docstrings."""
    draw = random.Random("training, functions")
    found = []
    for source in sources:
        try:
            nodes = ast.parse(source).body
        except SyntaxError:
            continue
        for node in nodes:
            line = (ast.get_docstring(node) or "").split("\n")[0] if isinstance(node, ast.FunctionDef) else ""
            if line and len(line) > 15 and (written := ast.get_source_segment(source, node)) and len(written) < 900:
                bare = ast.unparse(ast.FunctionDef(**{**vars(node), "body": node.body[1:] or [ast.Pass()]}))
                found.append((f"Define `{node.name}` in Python: {line} Show only the code.", f"```python\n{bare}\n```"))
    for question, answer in draw.sample(found, min(count, len(found))):
        yield asked(question, answer)


def passages(cache: Path, count: int) -> Iterator[str]:
    """Retrieval among passages, from the pages that the calibration prompts are made of."""
    for language in LANGUAGES:
        plan = languages.RETRIEVAL.get(language) or languages.CALIBRATION[language]
        parts = languages.sections(cache, language, [one for one in plan if "gnome-user" not in one[0][0]])
        yield from (chatml(chat["messages"]) for chat in retrieval.chats(parts, language, False, count))


def heldout_runs() -> apart.Runs:
    """The runs of all held-out texts."""
    found = apart.Runs()
    for file in sorted((ROOT / "calibration/heldout").iterdir()):
        for text in said(file):
            found.add(re.sub(r"<\|im_\w+\|>", "\n", text))
    return found


def write_texts(options: argparse.Namespace) -> None:
    """`texts`: OUT/KIND.jsonl, a document a line: what one package has in a language, or one chat, or one source file."""
    options.out.mkdir(parents=True, exist_ok=True)
    by_kind: dict[str, dict[str, list[str]]] = {kind: {} for kind in [*LANGUAGES, "code"]}
    packages = sorted(options.packages.iterdir())
    with multiprocessing.Pool(2) as pool:
        for package, found in zip(packages, pool.imap(known, packages), strict=True):
            for language, texts in found.items():
                by_kind[language][package.name] = texts
            if package.name in CODE:
                by_kind["code"][package.name] = code(package, CODE[package.name])
            sys.stderr.write(f"{package.name} { {one: len(texts) for one, texts in found.items()} }\n")
    judging = heldout_runs()
    for kind, by_package in by_kind.items():
        seen: set[str] = set()
        documents = []
        for texts in shared_out(by_package, BUDGET.get(kind, OTHER_BUDGET)):
            fresh = [t for t in texts if t not in seen and not judging.shared(t)]
            seen.update(fresh)
            documents += fresh if kind == "code" else ["\n\n".join(fresh)]
        dump(options.out, kind, documents)
    sources = [text for name in ("libpython3.11-stdlib", "calibre") for text in by_kind["code"].get(name, ())]
    made = {
        "chat": [t for f in sorted((ROOT / "calibration/corpora").glob("*.jsonl")) for t in said(f)],
        "bundled": [t for f in sorted((ROOT / "calibration/corpora").glob("*.gz")) for t in said(f)],
        "tools": list(transcripts(2_500)),
        "sums": list(sums(12_000)),
        "programs": list(functions(sources, 3_000)),
        "passages": list(passages(options.cache, 70)),
    }
    for kind, documents in made.items():
        dump(options.out, kind, [t for t in documents if kind in {"sums", "bundled"} or not judging.shared(t)])


def dump(folder: Path, kind: str, documents: list[str]) -> None:
    """One file of documents."""
    (folder / f"{kind}.jsonl").write_text("".join(json.dumps(d, ensure_ascii=False) + "\n" for d in documents))
    sys.stderr.write(f"{kind}: {len(documents)} documents, {sum(len(d.encode()) for d in documents):,} bytes\n")


def bpe(samples: Iterator[str], words: int = WORDS) -> Tokenizer:
    """A byte-level BPE of Qwen's kind: NFC, its splitting rule, its three special tokens last."""
    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=words - len(SPECIAL), initial_alphabet=alphabet, min_frequency=2, show_progress=False
    )
    made.train_from_iterator(samples, trainer)
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    if made.get_vocab_size() != words:
        raise SystemExit(f"{made.get_vocab_size()} tokens; too little text for {words}")
    return made


def documents(folder: Path) -> dict[str, list[str]]:
    """The texts that `texts` wrote, by kind."""
    return {f.stem: [json.loads(line) for line in f.open(encoding="utf-8")] for f in sorted(folder.glob("*.jsonl"))}


def excerpts(by_kind: dict[str, list[str]], size: int) -> Iterator[str]:
    """Pieces of every kind for the tokenizer, `size` letters in all at most, spread over its documents."""
    for texts in by_kind.values():
        share = size // len(by_kind) / max(1, sum(map(len, texts)))
        for text in texts:
            for start in range(0, len(text), 20_000):
                plain = re.sub(r"<\|\w+\|>", "\n", text[start : start + 20_000])
                yield plain[: int(len(plain) * min(1, share)) + 1]


def write_tokens(options: argparse.Namespace) -> None:
    """`tokens`: OUT/0/tokenizer.json, and in OUT/0, OUT/1, ... tokens.xz and data.json with a part of every kind each."""
    by_kind = documents(options.texts)
    folders = [options.out / str(part) for part in range(options.parts)]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    file = folders[0] / "tokenizer.json"
    bpe(excerpts(by_kind, options.sample), options.words).save(str(file))
    tokenizer = Tokenizer.from_file(str(file))
    end = tokenizer.token_to_id("<|endoftext|>")
    cut: dict[str, list[np.ndarray]] = {}
    for kind, texts in by_kind.items():
        ids = [np.array([*tokenizer.encode(text).ids, end], np.uint16) for text in texts if text.strip()]
        cut[kind] = np.array_split(np.concatenate(ids), options.parts)
        sys.stderr.write(f"{kind}: {sum(map(len, cut[kind])):,} tokens\n")
    packages = sorted(options.packages.glob("*.deb")) if options.packages else []
    listed = {
        f.name.rsplit("_", 1)[0].replace("%3a", ":"): hashlib.sha256(f.read_bytes()).hexdigest() for f in packages
    }
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 0, "lp": 1, "pb": 1, "dict_size": 1 << 26}]
    for part, folder in enumerate(folders):
        content = np.concatenate([pieces[part] for pieces in cut.values()]).tobytes()
        (folder / "tokens.xz").write_bytes(lzma.compress(content, filters=filters))
        about = {
            "tokens": {kind: len(pieces[part]) for kind, pieces in cut.items()},
            "sha256": hashlib.sha256(content).hexdigest(),
            "tokenizer": hashlib.sha256(file.read_bytes()).hexdigest(),
            "packages": listed,
        }
        (folder / "data.json").write_text(json.dumps(about, indent=1) + "\n")
        size = (folder / "tokens.xz").stat().st_size
        sys.stderr.write(f"{folder}: {len(content) // 2:,} tokens, {size:,} bytes packed, sha256 {about['sha256']}\n")


def main() -> None:
    """Texts, or tokens."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    texts = commands.add_parser("texts")
    texts.add_argument("--packages", type=Path, required=True, help="unpacked, a folder each")
    texts.add_argument("--cache", type=Path, required=True, help="as of calibration/make_corpora.py")
    texts.set_defaults(run=write_texts)
    tokens = commands.add_parser("tokens")
    tokens.add_argument("--texts", type=Path, required=True)
    tokens.add_argument("--packages", type=Path, help="the .deb files, to be listed")
    tokens.add_argument("--sample", type=int, default=16_000_000, help="letters that the tokenizer is made from")
    tokens.add_argument("--parts", type=int, default=1, help="folders to share the tokens out to")
    tokens.add_argument("--words", type=int, default=WORDS)
    tokens.set_defaults(run=write_tokens)
    for command in (texts, tokens):
        command.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
