"""Facts hidden in a text and asked after it, in another order: rows that teach a model to look back, and show how far it does.

A document is the ids of a text with facts at random places, as the first turn of a chat; questions and answers are its other turns
(`qquant.calibration.behaviour` puts held-out facts into long documents in the same way). Places and people are made of syllables, things are
others than the held-out ones.
"""

import gzip
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

HELDOUT = Path(__file__).resolve().parents[2] / "calibration/heldout"
ORDERS = {
    "en": ("Answer each question from this text with the number or the name alone.", "Answer from the text above, as briefly as possible.", "Use the text."),
    "zh": ("请根据这段文字回答每个问题，只说数字或姓名。", "请按上文回答，尽量简短。"),
}  # fmt: skip
# a fact and its question; {v} is a number where the first letter of its key is n, a name where it is p
WORDS = {
    "en": (
        ("n", "The code of the {t} at {p} is {v}.", "What is the code of the {t} at {p}?"),
        ("p", "The key of the {t} at {p} is kept by {v}.", "Who keeps the key of the {t} at {p}?"),
        ("n", "The {t} at {p} has the number {v}.", "Which number has the {t} at {p}?"),
        ("p", "{v} looks after the {t} at {p}.", "Who looks after the {t} at {p}?"),
    ),
    "zh": (
        ("n", "{p}{t}的密码是{v}。", "{p}{t}的密码是多少？"),
        ("p", "{p}{t}的钥匙由{v}保管。", "{p}{t}的钥匙由谁保管？"),
        ("n", "{p}{t}的编号是{v}。", "{p}{t}的编号是多少？"),
        ("p", "{v}负责看管{p}{t}。", "谁负责看管{p}{t}？"),
    ),
}
THINGS = {
    "en": ["cabinet", "cellar door", "boat shed", "greenhouse", "side entrance", "safe", "toolbox", "parking gate", "mailbox", "attic", "pump room", "archive"],
    "zh": ["保险箱", "地下室", "船坞", "温室", "侧门", "工具箱", "车库", "信箱", "阁楼", "泵房", "档案室", "大门"],
}  # fmt: skip
ROADS = [
    "Street",
    "Lane",
    "Court",
    "Quay",
    "Row",
    "Hill",
    "Yard",
    "Road",
    "Close",
    "Square",
    "Bridge",
    "Park",
    "Avenue",
    "Terrace",
    "Gate",
]
ROADS_ZH = ["路", "巷", "码头", "街", "后院", "岭", "磨坊", "广场", "渡口", "桥", "湾", "胡同"]
STARTS, MIDDLES, ENDS = ["B", "Br", "C", "D", "F", "G", "H", "K", "L", "M", "N", "P", "R", "S", "T", "V", "W", "St", "Th", "Gr"], ["a", "e", "i", "o", "u", "ai", "ea", "ou", "er", "an", "el", "or", "in"], ["n", "r", "l", "m", "s", "d", "ck", "ston", "by", "field", "ford", "man", "rick", "den", "low", "mer", "ley"]  # fmt: skip
FAMILY, GIVEN = (
    "王李张刘陈杨赵黄周吴徐孙胡朱高林何郭马罗梁宋郑谢韩唐冯于董萧程曹袁邓许傅沈曾彭吕",
    "伟芳娜敏静丽强磊军洋勇艳杰娟涛明超秀霞平刚桂英华玉萍红玲芬燕彬凤洁梅琳松兰竹云雪峰海波",
)
GROUND = "青白金玉龙凤云春秋东西南北长安平新古双石泉柳桃梅竹松莲月星"
Spans = list[tuple[int, int]]


def read_tokenizer(data: Path) -> Tokenizer:
    """The tokenizer of a folder of training data."""
    return Tokenizer.from_file(str(data / "tokenizer.json"))


def name(draw: random.Random) -> str:
    """A word of two syllables that means nothing."""
    return (draw.choice(STARTS) + draw.choice(MIDDLES) + draw.choice(("", draw.choice("lnrst") + draw.choice(MIDDLES))) + draw.choice(ENDS)).capitalize()  # fmt: skip


class Facts:
    """Documents with hidden facts, as ids of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def ids(self, text: str) -> list[int]:
        """Ids of a text, special tokens in it read as such."""
        found: list[int] = self.tokenizer.encode(text).ids
        return found

    def facts(self, language: str, count: int, draw: random.Random) -> Iterator[tuple[str, str, str]]:
        """(fact, question, answer), no place with the same thing twice. Half of the documents have few things and one wording, so that facts are alike."""
        things = draw.sample(THINGS[language], draw.choice((2, 12)))
        wordings = draw.sample(WORDS[language], draw.choice((2, 4)))
        digits = draw.choice((4, 5, 5, 6))
        seen = set()
        while len(seen) < count:
            if language == "en":
                place, person = f"{name(draw)} {draw.choice(ROADS)}", f"{name(draw)} {name(draw)}"
            else:
                place = "".join(draw.sample(GROUND, 2)) + draw.choice(ROADS_ZH)
                person = draw.choice(FAMILY) + "".join(draw.sample(GIVEN, draw.choice((1, 2))))
            kind, fact, question = draw.choice(wordings)
            thing = draw.choice(things)
            value = str(draw.randrange(10 ** (digits - 1), 10**digits)) if kind == "n" else person
            if (place, thing) not in seen:
                seen.add((place, thing))
                yield fact.format(t=thing, p=place, v=value), question.format(t=thing, p=place), value

    def document(self, language: str, text: np.ndarray, length: int, draw: random.Random) -> tuple[np.ndarray, Spans]:
        """(`length` ids, where the answers stand in them): as much of `text` as fits between the facts and the questions."""
        count = draw.randint(min(20, max(1, length // 400)), min(64, max(2, length // 90)))
        while (made := self._document(language, text, length, count, draw)) is None:
            count //= 2
        return made

    def _document(
        self, language: str, text: np.ndarray, length: int, count: int, draw: random.Random
    ) -> tuple[np.ndarray, Spans] | None:
        facts = list(self.facts(language, count, draw))
        needles = [self.ids(f"\n\n{fact}\n\n") for fact, _, _ in facts]
        draw.shuffle(facts)
        head = self.ids("<|im_start|>system\nYou are a helpful assistant<|im_end|>\n<|im_start|>user\n")
        tail: list[int] = []
        spans: Spans = []
        for at, (_, question, answer) in enumerate(facts):
            opening = f"\n\n{draw.choice(ORDERS[language])}\n\n" if not at else "<|im_end|>\n<|im_start|>user\n"
            tail += self.ids(f"{opening}{question}<|im_end|>\n<|im_start|>assistant\n")
            said = self.ids(answer)
            spans.append((len(tail), len(tail) + len(said)))
            tail += said
        room = length - len(head) - len(tail) - sum(map(len, needles))
        if room < 0 < count:
            return None
        places = sorted(draw.randrange(room + 1) for _ in needles)
        ids, read = list(head), 0
        for place, needle in zip(places, needles, strict=True):
            ids += [*text[read:place].tolist(), *needle]
            read = place
        ids += text[read:room].tolist()
        before = len(ids)
        return np.array([*ids, *tail], np.int64), [(before + a, before + b) for a, b in spans]


def heldout(tokenizer: Tokenizer) -> dict[str, Sequence[int]]:
    """Ids of every held-out text of the repository but the questions of behaviour-test; chats one after the other."""
    found = {}
    for file in sorted(HELDOUT.iterdir()):
        content = file.read_bytes()
        text = (gzip.decompress(content) if file.suffix == ".gz" else content).decode()
        if file.name == "behaviour-test.jsonl":
            continue
        if file.suffix == ".jsonl":
            chats = [json.loads(line)["messages"] for line in text.splitlines()]
            text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for chat in chats for m in chat)
        found[file.name.split(".")[0]] = tokenizer.encode(text).ids
    return found
