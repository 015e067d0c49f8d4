"""Questions whose answers can be marked: facts hidden in long documents, tool calls, small programs. All are held out.

Each row is a chat of a question and a right answer, with what a marker needs:

    retrieval  fact, a sentence to be hidden; the answer is a number or a name that stands in it and nowhere else
    tools      calls, each of which is right as the first; pieces, the right answer cut where arguments begin and end: the even ones are structure
    code       function, the name that the program must define

The tools are those of `tools_heldout.py` with other values. Facts are alike but for their places, so that one distracts from the others.
"""

import json
import random
from collections.abc import Iterator
from typing import Any

import tools_heldout as scenarios
from cases import Case
from tools import calls, react

FACTS, CALLS = 20, 64  # facts in each of two languages
PLACES = {
    "en": ("Harbour Street", "Mill Lane", "Cedar Court", "North Quay", "Abbey Row", "Chapel Hill", "Tanner Yard", "Orchard Road", "Weir Close", "Lantern Square"),
    "zh": ("临江路", "梧桐巷", "北码头", "石桥街", "钟楼后院", "松树岭", "老磨坊", "果园路", "灯塔广场", "南渡口"),
}  # fmt: skip
THINGS = {"en": ("locker", "garden gate"), "zh": ("储物柜", "花园门")}
KEEPERS = {
    "en": ("Ottilie Brandt", "Ruben Castell", "Ingrid Vossler", "Marek Dolan", "Beatrix Hume", "Anselm Pryor", "Lucinda Frey", "Tobias Wren", "Philippa Noor", "Casimir Lund"),
    "zh": ("欧阳澄", "慕容岚", "司徒远", "诸葛宁", "上官霖", "夏侯芷", "皇甫砚", "公孙棠", "令狐峤", "尉迟朔"),
}  # fmt: skip
WORDS = {
    "en": {
        "code": ("The code of the {t} at {p} is {v}.", "What is the code of the {t} at {p}?"),
        "keeper": ("The key of the {t} at {p} is kept by {v}.", "Who keeps the key of the {t} at {p}?"),
    },
    "zh": {
        "code": ("{p}{t}的密码是{v}。", "{p}{t}的密码是多少？"),
        "keeper": ("{p}{t}的钥匙由{v}保管。", "{p}{t}的钥匙由谁保管？"),
    },
}


def chat(question: str, answer: str, **more: Any) -> dict:
    """A row."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **more}


def retrieval(language: str) -> Iterator[dict]:
    """Facts about the same places and things; codes and keepers take turns."""
    draw = random.Random(f"facts, {language}")
    codes = draw.sample(range(10_000, 100_000), FACTS)
    rows = [(place, thing) for thing in THINGS[language] for place in PLACES[language]]
    for index, (place, thing) in enumerate(rows):
        kind = ("code", "keeper")[index % 2]
        fact, question = WORDS[language][kind]
        value = str(codes[index]) if kind == "code" else KEEPERS[language][index // 2]
        fact = fact.format(t=thing, p=place, v=value)
        question = question.format(t=thing, p=place)
        yield chat(f"{fact}\n\n{question}", value, task="retrieval", language=language, fact=fact)


# Arguments that follow from the question. What `tools_heldout.logs` searches for does not.
SCENARIOS = (scenarios.parcel, scenarios.route, scenarios.nutrition, scenarios.library, scenarios.air)


def value_pieces(arguments: dict[str, Any]) -> list[str]:
    """A JSON object of texts cut at the ends of its values."""
    pieces, between = [], "{"
    for name, value in arguments.items():
        pieces += [f'{between}"{name}": "', json.dumps(value, ensure_ascii=False)[1:-1]]
        between = '", '
    return [*pieces, '"}']


def call(draw: random.Random, case: Case) -> dict:
    """The first call of a case among two to four tools, in ReAct or as JSON."""
    used = list({step.tool.name: step.tool for step in case.steps}.values())
    others = [tool for tool in scenarios.HELDOUT_TOOLS if tool not in used]
    offered = used + draw.sample(others, draw.randrange(1, 4))
    draw.shuffle(offered)
    step, right = case.steps[0], [{"name": step.tool.name, "arguments": step.arguments} for step in case.steps]
    first, *values = value_pieces(step.arguments)
    if draw.random() < 0.67:
        (asked, _) = react(case, offered, heldout=True)
        pieces = ["Thought: ", step.thought, f"\nAction: {step.tool.name}\nAction Input: {first}", *values]
        pieces[-1] += "\nObservation:"
        messages = [asked]
    else:
        messages = calls(case, offered, heldout=True)[:2]
        pieces = [f'[{{"function": "{step.tool.name}", "parameters": {first}', *values]
        pieces[-1] += "}]"
    answer = {"role": "assistant", "content": "".join(pieces)}
    return {"messages": [*messages, answer], "task": "tools", "calls": right, "pieces": pieces}


def tool_calls() -> Iterator[dict]:
    """No question twice."""
    draw, asked = random.Random("behaviour, tools"), set[str]()
    while len(asked) < CALLS:
        case = SCENARIOS[len(asked) % len(SCENARIOS)](draw)
        if case.question in asked:
            case = scenarios.parcel(draw)
        if case.question not in asked:
            asked.add(case.question)
            yield call(draw, case)


ASK = {
    "en": "Write a Python function `{name}({parameters})` that {task}. Reply with one block of code and nothing else.",
    "zh": "写一个 Python 函数 `{name}({parameters})`，{task}。只回复一个代码块，不要别的内容。",
}
# name, parameters, what it does in English and in Chinese, body
PROGRAMS = (
    ("count_vowels", "text", "counts the vowels of a text", "数出文本里的元音字母", 'return sum(letter in "aeiou" for letter in text.lower())'),
    ("running_total", "numbers", "returns the list of partial sums", "返回各个前缀和组成的列表", "total, found = 0, []\nfor number in numbers:\n    total += number\n    found.append(total)\nreturn found"),
    ("is_leap_year", "year", "tells whether a year of the Gregorian calendar is a leap year", "判断公历某一年是不是闰年", "return year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)"),
    ("flatten", "nested", "turns a list of lists into one list", "把列表的列表展开成一个列表", "return [item for row in nested for item in row]"),
    ("word_lengths", "sentence", "maps each word of a sentence to its length", "返回句子中每个单词与其长度的字典", "return {word: len(word) for word in sentence.split()}"),
    ("second_largest", "numbers", "returns the second largest of the distinct numbers, or None", "返回不重复数字中第二大的，没有就返回 None", "ordered = sorted(set(numbers))\nreturn ordered[-2] if len(ordered) > 1 else None"),
    ("greatest_divisor", "a, b", "computes the greatest common divisor by Euclid's algorithm", "用辗转相除法求最大公约数", "while b:\n    a, b = b, a % b\nreturn a"),
    ("reverse_words", "sentence", "reverses the order of the words in a sentence", "把句子里单词的顺序倒过来", 'return " ".join(reversed(sentence.split()))'),
    ("transpose", "matrix", "transposes a matrix given as a list of rows", "转置用行列表表示的矩阵", "return [list(column) for column in zip(*matrix)]"),
    ("celsius", "fahrenheit", "converts degrees Fahrenheit into degrees Celsius", "把华氏度换算成摄氏度", "return (fahrenheit - 32) * 5 / 9"),
    ("is_palindrome", "text", "tells whether a text reads the same backwards, letters only", "判断只看字母时文本是不是回文", "letters = [letter.lower() for letter in text if letter.isalpha()]\nreturn letters == letters[::-1]"),
    ("neighbours", "items, size", "yields every run of neighbouring items of some length", "依次产出列表里相邻若干项的每一段", "for start in range(len(items) - size + 1):\n    yield items[start : start + size]"),
    ("merge_sorted", "left, right", "merges two sorted lists into one", "合并两个有序列表", "found = []\nwhile left and right:\n    found.append(left.pop(0) if left[0] <= right[0] else right.pop(0))\nreturn found + left + right"),
    ("parse_pairs", "text", 'reads "a=1;b=2" into a dictionary of integers', '把 "a=1;b=2" 读成整数字典', 'return {key: int(value) for key, value in (pair.split("=") for pair in text.split(";"))}'),
    ("binary_search", "ordered, wanted", "returns the index of a value in a sorted list, or -1", "返回某个值在有序列表中的下标，没有就返回 -1", "low, high = 0, len(ordered) - 1\nwhile low <= high:\n    middle = (low + high) // 2\n    if ordered[middle] == wanted:\n        return middle\n    if ordered[middle] < wanted:\n        low = middle + 1\n    else:\n        high = middle - 1\nreturn -1"),
    ("median", "numbers", "returns the median of a list that is not empty", "返回非空列表的中位数", "ordered, half = sorted(numbers), len(numbers) // 2\nif len(ordered) % 2:\n    return ordered[half]\nreturn (ordered[half - 1] + ordered[half]) / 2"),
    ("group_by_first", "words", "groups words by their first letter", "按首字母给单词分组", "groups = {}\nfor word in words:\n    groups.setdefault(word[0], []).append(word)\nreturn groups"),
    ("roman", "number", "writes a number from 1 to 39 in Roman numerals", "把 1 到 39 的数写成罗马数字", 'signs = ((10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I"))\ntext = ""\nfor value, sign in signs:\n    while number >= value:\n        text, number = text + sign, number - value\nreturn text'),
    ("primes_below", "limit", "lists the primes below a limit with a sieve", "用筛法列出小于上限的素数", "prime = [True] * limit\nfor n in range(2, limit):\n    for multiple in range(n * n, limit, n):\n        prime[multiple] = False\nreturn [n for n in range(2, limit) if prime[n]]"),
    ("caesar", "text, shift", "shifts every small letter of a text by some places in the alphabet", "把文本里每个小写字母在字母表中移动若干位", 'return "".join(chr((ord(c) - 97 + shift) % 26 + 97) if c.islower() else c for c in text)'),
    ("safe_divide", "a, b", "divides two numbers and returns None where that is impossible", "做除法，除不了时返回 None", "try:\n    return a / b\nexcept ZeroDivisionError:\n    return None"),
    ("hamming", "a, b", "counts the positions at which two texts of one length differ", "数出两个等长文本不同的位置", "return sum(x != y for x, y in zip(a, b))"),
    ("deduplicate", "items", "removes repeated items and keeps the order", "去掉重复的元素并保持顺序", "seen, kept = set(), []\nfor item in items:\n    if item not in seen:\n        seen.add(item)\n        kept.append(item)\nreturn kept"),
    ("collatz_steps", "n", "counts the steps of the Collatz sequence down to 1", "数出考拉兹序列到 1 的步数", "steps = 0\nwhile n != 1:\n    n = n // 2 if n % 2 == 0 else 3 * n + 1\n    steps += 1\nreturn steps"),
)  # fmt: skip


def programs() -> Iterator[dict]:
    """Every function in English and in Chinese."""
    for name, parameters, english, chinese, body in PROGRAMS:
        lines = "".join(f"    {line}\n" for line in body.split("\n"))
        answer = f"```python\ndef {name}({parameters}):\n{lines}```"
        for language, task in (("en", english), ("zh", chinese)):
            question = ASK[language].format(name=name, parameters=parameters, task=task)
            yield chat(question, answer, task="code", function=name)


def rows() -> list[dict]:
    """All of them, in a fixed order."""
    return [*retrieval("en"), *retrieval("zh"), *tool_calls(), *programs()]
