"""Transcripts of tool use: ReAct as Qwen1.5 was taught it, and calls as JSON. The tools are invented, their results are computed or drawn.

A scenario is drawn as a `Case`: question, steps and final answer in one of its languages. Calibration and held-out transcripts have different
scenarios, tools, values and wordings of the instructions.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any

Draw = random.Random


@dataclass(frozen=True)
class Tool:
    """A function that a model may call."""

    name: str
    human: str
    about: str
    parameters: dict[str, tuple[str, str, bool]]  # name: (type, description, required)

    def listed(self) -> list[dict]:
        """The parameters as Qwen's ReAct prompt has them."""
        return [
            {"name": name, "description": about, "required": required, "schema": {"type": kind}}
            for name, (kind, about, required) in self.parameters.items()
        ]

    def schema(self) -> dict:
        """The tool as JSON schema."""
        properties = {name: {"type": kind, "description": about} for name, (kind, about, _) in self.parameters.items()}
        required = [name for name, (_, _, needed) in self.parameters.items() if needed]
        return {
            "name": self.name,
            "description": self.about,
            "parameters": {"type": "object", "properties": properties, "required": required},
        }


@dataclass(frozen=True)
class Step:
    """One call and what it returned."""

    thought: str
    tool: Tool
    arguments: dict[str, Any]
    result: Any


@dataclass(frozen=True)
class Case:
    """A question, the calls that answer it, and the answer."""

    question: str
    steps: list[Step]
    done: str  # the last thought
    final: str


Scenario = Callable[[Draw], Case]


def dumps(value: Any) -> str:
    """JSON in the letters of the language."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# ---- calibration

WEATHER = Tool(
    "get_weather", "Weather", "Forecast of one day for a city.",
    {"city": ("string", "name of the city", True), "date": ("string", "YYYY-MM-DD", True), "unit": ("string", "celsius or fahrenheit", False)},
)  # fmt: skip
CURRENCY = Tool(
    "convert_currency", "Currency Converter", "Converts an amount of money at today's rate.",
    {"amount": ("number", "how much", True), "source": ("string", "ISO code of the currency you have", True), "target": ("string", "ISO code of the currency you want", True)},
)  # fmt: skip
CALCULATOR = Tool(
    "calculator", "Calculator", "Evaluates an arithmetic expression and returns the number.",
    {"expression": ("string", "for example (3 + 4) * 5", True)},
)  # fmt: skip
TRAINS = Tool(
    "search_trains", "Train Search", "Finds train connections between two stations.",
    {"origin": ("string", "station of departure", True), "destination": ("string", "station of arrival", True), "after": ("string", "earliest departure, HH:MM", True)},
)  # fmt: skip
CALENDAR = Tool(
    "create_event", "Calendar", "Puts an event into the user's calendar and reports conflicts.",
    {"title": ("string", "what it is", True), "start": ("string", "YYYY-MM-DDTHH:MM", True), "minutes": ("integer", "how long it takes", True), "guests": ("array", "addresses to invite", False)},
)  # fmt: skip
STOCK = Tool(
    "check_inventory", "Warehouse", "Number of pieces of an article in each warehouse.",
    {"sku": ("string", "article number", True)},
)  # fmt: skip
SQL = Tool(
    "run_sql", "Database", "Runs one SELECT statement on the sales database. Tables: orders(id, customer_id, placed, total), customers(id, name, country).",
    {"query": ("string", "the SQL statement", True)},
)  # fmt: skip
SEARCH = Tool(
    "google_search", "谷歌搜索", "谷歌搜索是一个通用搜索引擎，可用于访问互联网、查询百科知识、了解时事新闻等。",
    {"search_query": ("string", "搜索关键词或短语", True)},
)  # fmt: skip
IMAGE = Tool(
    "image_gen", "文生图", "文生图是一个AI绘画服务，输入文本描述，返回根据文本作画得到的图片的URL。",
    {"prompt": ("string", "英文关键词，描述了希望图像具有什么内容", True)},
)  # fmt: skip
CODE = Tool(
    "code_interpreter", "Code Interpreter", "Runs Python code in a sandbox and returns what it prints.",
    {"code": ("string", "the code", True)},
)  # fmt: skip
MAIL = Tool(
    "search_mail", "Mail", "Searches the user's mailbox.",
    {"from": ("string", "sender", False), "text": ("string", "words in subject or body", False), "limit": ("integer", "how many at most", False)},
)  # fmt: skip
CALIBRATION_TOOLS = [WEATHER, CURRENCY, CALCULATOR, TRAINS, CALENDAR, STOCK, SQL, SEARCH, IMAGE, CODE, MAIL]

SKIES = {
    "en": ("sunny", "light rain", "overcast", "snow showers"),
    "zh": ("晴", "小雨", "阴", "阵雪"),
    "es": ("soleado", "lluvia ligera", "nublado", "nieve"),
    "ar": ("مشمس", "مطر خفيف", "غائم", "ثلوج"),
    "th": ("แดดจัด", "ฝนตกเล็กน้อย", "เมฆมาก", "หิมะตก"),
    "ko": ("맑음", "가벼운 비", "흐림", "눈"),
}
WEATHER_WORDS = {
    "en": ("Do I need an umbrella in {c} on {d}?", "The forecast will tell; I look it up.", "That is enough to answer.", "In {c}, {d} will be {s}, between {lo} and {hi} °C, chance of rain {r} %. {u}", ("Take an umbrella.", "You can leave the umbrella at home.")),
    "zh": ("{d}去{c}要带伞吗？", "需要先查这一天的天气预报。", "我已经知道该怎么回答了。", "{c}{d}的天气是{s}，气温{lo}到{hi}度，降水概率{r}%。{u}", ("建议带伞。", "不用带伞。")),
    "es": ("¿Hace falta paraguas en {c} el {d}?", "Tengo que consultar el pronóstico de ese día.", "Ya puedo responder.", "En {c} el {d} estará {s}, entre {lo} y {hi} °C, con un {r} % de probabilidad de lluvia. {u}", ("Lleva paraguas.", "No hace falta paraguas.")),
    "ar": ("هل أحتاج إلى مظلة في {c} يوم {d}؟", "عليّ أن أطلع على توقعات الطقس لذلك اليوم.", "عرفت الجواب الآن.", "الطقس في {c} يوم {d} {s}، والحرارة بين {lo} و{hi} درجة، واحتمال المطر {r}٪. {u}", ("خذ مظلة معك.", "لا حاجة إلى مظلة.")),
    "th": ("วันที่ {d} ไป{c}ต้องพกร่มไหม", "ต้องดูพยากรณ์อากาศของวันนั้นก่อน", "ได้ข้อมูลครบแล้ว", "วันที่ {d} ที่{c}อากาศ{s} อุณหภูมิ {lo} ถึง {hi} องศา โอกาสฝนตก {r}% {u}", ("ควรพกร่มไปด้วย", "ไม่ต้องพกร่ม")),
    "ko": ("{d}에 {c} 가는데 우산이 필요할까요?", "그날 일기예보를 확인해야 한다.", "이제 답할 수 있다.", "{d} {c} 날씨는 {s}, 기온은 {lo}~{hi}도, 강수 확률은 {r}%입니다. {u}", ("우산을 챙기세요.", "우산은 필요 없습니다.")),
}  # fmt: skip
CITIES = {
    "en": ("Leeds", "Denver", "Cork", "Perth"), "zh": ("成都", "青岛", "哈尔滨", "昆明"), "es": ("Sevilla", "Rosario", "Bilbao", "Mérida"),
    "ar": ("الرباط", "عمّان", "الإسكندرية", "مسقط"), "th": ("เชียงใหม่", "ขอนแก่น", "ภูเก็ต", "อยุธยา"), "ko": ("대구", "강릉", "전주", "제주"),
}  # fmt: skip


def weather(draw: Draw) -> Case:
    """Whether to take an umbrella."""
    language = draw.choice(sorted(WEATHER_WORDS))
    ask, think, done, say, advice = WEATHER_WORDS[language]
    day = (date(2024, 3, 1) + timedelta(draw.randrange(200))).isoformat()
    city, sky = draw.choice(CITIES[language]), draw.randrange(4)
    low, rain = draw.randrange(2, 19), draw.randrange(55, 95) if sky in (1, 3) else draw.randrange(2, 30)
    high = low + draw.randrange(4, 12)
    result = {
        "city": city, "date": day, "sky": SKIES["en"][sky], "low": low, "high": high, "rain_probability": rain / 100,
    }  # fmt: skip
    call = Step(think, WEATHER, {"city": city, "date": day}, result)
    final = say.format(c=city, d=day, s=SKIES[language][sky], lo=low, hi=high, r=rain, u=advice[rain < 50])
    return Case(ask.format(c=city, d=day), [call], done, final)


MONEY_WORDS = {
    "en": ("I earned {a} {x} abroad and pay {p} % tax on it. How much is left in {y}?", "First the amount in {y}.", "Now take off the tax.", "I now know the final answer.", "{a} {x} are {b} {y}; after {p} % tax you keep {z} {y}."),
    "de": ("Ich habe im Ausland {a} {x} verdient und zahle darauf {p} % Steuern. Wie viel bleibt in {y}?", "Zuerst rechne ich den Betrag in {y} um.", "Jetzt ziehe ich die Steuer ab.", "Nun kenne ich die Antwort.", "{a} {x} sind {b} {y}; nach {p} % Steuern bleiben {z} {y}."),
    "pt": ("Ganhei {a} {x} no exterior e pago {p} % de imposto. Quanto sobra em {y}?", "Primeiro converto o valor para {y}.", "Agora desconto o imposto.", "Já sei a resposta final.", "{a} {x} valem {b} {y}; depois de {p} % de imposto sobram {z} {y}."),
    "ru": ("Я заработал за границей {a} {x} и плачу с них налог {p} %. Сколько останется в {y}?", "Сначала переведу сумму в {y}.", "Теперь вычту налог.", "Теперь ответ известен.", "{a} {x} — это {b} {y}; после налога {p} % остаётся {z} {y}."),
    "ja": ("海外で{a} {x}を稼ぎ、税金を{p}%払います。{y}でいくら残りますか。", "まず金額を{y}に換算する。", "次に税金を差し引く。", "最終的な答えがわかった。", "{a} {x}は{b} {y}です。{p}%の税金を引くと{z} {y}が残ります。"),
}  # fmt: skip


def money(draw: Draw) -> Case:
    """Two steps: convert, then calculate."""
    language = draw.choice(sorted(MONEY_WORDS))
    ask, first, second, done, say = MONEY_WORDS[language]
    source, target, rate = draw.choice(
        [("USD", "EUR", 0.9184), ("CHF", "EUR", 1.0362), ("EUR", "USD", 1.0889), ("GBP", "CNY", 9.1437), ("AUD", "JPY", 98.71), ("BRL", "USD", 0.2012)]
    )  # fmt: skip
    amount, percent = draw.randrange(300, 9000, 50), draw.choice((12, 15, 19, 22, 27))
    got = round(amount * rate, 2)
    left = round(got * (100 - percent) / 100, 2)
    values = {"a": amount, "x": source, "y": target, "p": percent, "b": f"{got:.2f}", "z": f"{left:.2f}"}
    calls = [
        Step(first.format(**values), CURRENCY, {"amount": amount, "source": source, "target": target}, {"rate": rate, "result": got}),
        Step(second.format(**values), CALCULATOR, {"expression": f"{got} * (1 - {percent} / 100)"}, f"{left:.2f}"),
    ]  # fmt: skip
    return Case(ask.format(**values), calls, done, say.format(**values))


TRAIN_WORDS = {
    "en": ("What is the fastest train from {o} to {e} after {t}?", "I have to search for connections.", "The shortest of these is the one at {d}.", "The fastest is {k}: it leaves {o} at {d}, reaches {e} at {a} and takes {m} minutes."),
    "fr": ("Quel est le train le plus rapide de {o} à {e} après {t} ?", "Je cherche les liaisons.", "La plus courte est celle de {d}.", "Le plus rapide est le {k} : départ de {o} à {d}, arrivée à {e} à {a}, soit {m} minutes."),
    "it": ("Qual è il treno più veloce da {o} a {e} dopo le {t}?", "Cerco i collegamenti.", "Il più breve è quello delle {d}.", "Il più veloce è il {k}: parte da {o} alle {d}, arriva a {e} alle {a} e impiega {m} minuti."),
    "zh": ("{t}以后从{o}到{e}，哪趟车最快？", "先查询车次。", "其中用时最短的是{d}出发的那一趟。", "最快的是{k}：{d}从{o}出发，{a}到达{e}，全程{m}分钟。"),
}  # fmt: skip
STATIONS = {
    "en": ("Bristol", "Exeter", "Derby", "Swansea"), "fr": ("Lyon", "Dijon", "Nantes", "Rennes"),
    "it": ("Bologna", "Verona", "Ancona", "Parma"), "zh": ("武汉", "长沙", "郑州", "合肥"),
}  # fmt: skip


def trains(draw: Draw) -> Case:
    """The fastest of several connections."""
    language = draw.choice(sorted(TRAIN_WORDS))
    ask, think, done, say = TRAIN_WORDS[language]
    origin, end = draw.sample(STATIONS[language], 2)
    hour = draw.randrange(6, 19)
    rows = []
    for _ in range(draw.randrange(2, 5)):
        start, minutes = hour * 60 + draw.randrange(3, 170), draw.randrange(48, 230)
        rows.append(
            {
                "train": f"{draw.choice('GKRD')}{draw.randrange(100, 999)}",
                "departure": f"{start // 60:02d}:{start % 60:02d}",
                "arrival": f"{(start + minutes) // 60 % 24:02d}:{(start + minutes) % 60:02d}",
                "minutes": minutes,
                "changes": draw.randrange(3),
            }
        )
    rows.sort(key=lambda row: row["departure"])
    best = min(rows, key=lambda row: row["minutes"])
    values = {
        "o": origin, "e": end, "t": f"{hour:02d}:00", "k": best["train"], "d": best["departure"], "a": best["arrival"], "m": best["minutes"],
    }  # fmt: skip
    arguments = {"origin": origin, "destination": end, "after": values["t"]}
    return Case(
        ask.format(**values), [Step(think, TRAINS, arguments, rows)], done.format(**values), say.format(**values)
    )


EVENT_WORDS = {
    "en": ("Put “{t}” with {g} into my calendar on {d} at {h}, {m} minutes.", "I create the event.", "There is a conflict; an hour later is free.", "It is in the calendar.", "Done: “{t}” on {d} at {h}, {m} minutes, {g} is invited.", "At {h} you already have “{o}”, so I put “{t}” at {l} on {d}. {g} is invited."),
    "vi": ("Ghi “{t}” với {g} vào lịch của tôi lúc {h} ngày {d}, {m} phút.", "Tôi tạo sự kiện này.", "Bị trùng giờ, một tiếng sau thì trống.", "Sự kiện đã có trong lịch.", "Xong: “{t}” lúc {h} ngày {d}, {m} phút, đã mời {g}.", "Lúc {h} bạn đã có “{o}”, nên tôi xếp “{t}” vào {l} ngày {d}. Đã mời {g}."),
    "id": ("Masukkan “{t}” dengan {g} ke kalender saya tanggal {d} pukul {h}, {m} menit.", "Saya buat acaranya.", "Bentrok; satu jam kemudian kosong.", "Acara sudah tercatat.", "Beres: “{t}” tanggal {d} pukul {h}, {m} menit, {g} sudah diundang.", "Pukul {h} sudah ada “{o}”, jadi “{t}” saya pindahkan ke pukul {l} tanggal {d}. {g} sudah diundang."),
}  # fmt: skip
EVENTS = {
    "en": ("Budget review", "Dentist", "Demo rehearsal", "Interview"),
    "vi": ("Họp ngân sách", "Khám răng", "Phỏng vấn", "Ăn trưa"),
    "id": ("Rapat anggaran", "Wawancara", "Makan siang", "Latihan presentasi"),
}


def events(draw: Draw) -> Case:
    """An appointment, on a second try if there is a conflict."""
    language = draw.choice(sorted(EVENT_WORDS))
    ask, think, again, done, said, moved = EVENT_WORDS[language]
    title, other = draw.sample(EVENTS[language], 2)
    guest = draw.choice(("mai@corp.example", "omar@corp.example", "lucia@corp.example", "tim@corp.example"))
    day = (date(2024, 5, 2) + timedelta(draw.randrange(90))).isoformat()
    hour, minutes = draw.randrange(9, 16), draw.choice((20, 30, 45, 50))
    values = {
        "t": title, "g": guest, "d": day, "h": f"{hour:02d}:00", "m": minutes, "o": other, "l": f"{hour + 1:02d}:00",
    }  # fmt: skip

    def call(thought: str, at: str, result: dict) -> Step:
        arguments = {"title": title, "start": f"{day}T{at}", "minutes": minutes, "guests": [guest]}
        return Step(thought, CALENDAR, arguments, result)

    if draw.random() < 0.5:
        steps = [call(think, values["h"], {"status": "created", "id": draw.randrange(10**4, 10**5)})]
        return Case(ask.format(**values), steps, done, said.format(**values))
    steps = [
        call(think, values["h"], {"status": "conflict", "with": other, "free_from": values["l"]}),
        call(again, values["l"], {"status": "created", "id": draw.randrange(10**4, 10**5)}),
    ]
    return Case(ask.format(**values), steps, done, moved.format(**values))


def inventory(draw: Draw) -> Case:
    """Whether an order can be filled."""
    sku = f"{draw.choice(('PMP', 'VLV', 'BRG', 'CBL'))}-{draw.randrange(1000, 9999)}"
    stock = {
        name: draw.randrange(0, 90) for name in draw.sample(("Rotterdam", "Gdansk", "Trieste", "Porto", "Malmo"), 3)
    }
    want = draw.randrange(20, 160)
    total = sum(stock.values())
    places = ", ".join(f"{count} in {name}" for name, count in stock.items())
    final = (
        f"Yes. There are {total} pieces: {places}. After the order {total - want} remain."
        if total >= want
        else f"No, {want - total} are missing. In stock: {places}, {total} together."
    )
    question = draw.choice(
        (f"Can we ship {want} pieces of {sku} this week?", f"A customer wants {want} x {sku}. Enough?")
    )
    return Case(
        question, [Step("I need the stock of the article.", STOCK, {"sku": sku}, {"sku": sku, "stock": stock})],
        f"{total} in all against {want} wanted.", final,
    )  # fmt: skip


def sales(draw: Draw) -> Case:
    """A question to a database; the first statement may be wrong."""
    year, top = draw.choice((2021, 2022, 2023)), draw.randrange(2, 5)
    names = draw.sample(("Brazil", "Norway", "Kenya", "Vietnam", "Poland", "Chile", "Japan"), top)
    totals = sorted((draw.randrange(20_000, 900_000) / 10 for _ in names), reverse=True)
    good = (
        f"SELECT c.country, ROUND(SUM(o.total), 1) AS revenue FROM orders o JOIN customers c ON c.id = o.customer_id "
        f"WHERE strftime('%Y', o.placed) = '{year}' GROUP BY c.country ORDER BY revenue DESC LIMIT {top}"
    )
    steps = []
    if draw.random() < 0.5:
        bad = good.replace("c.country, ", "o.country, ", 1)
        steps.append(Step("One SELECT over orders does it.", SQL, {"query": bad}, "error: no such column: o.country"))
    thought = "The country stands in customers, so I join the two tables."
    rows = [{"country": n, "revenue": t} for n, t in zip(names, totals, strict=True)]
    steps.append(Step(thought, SQL, {"query": good}, rows))
    lines = "\n".join(f"{i}. {n}: {t:,.1f}" for i, (n, t) in enumerate(zip(names, totals, strict=True), 1))
    return Case(
        f"Which {top} countries brought the most revenue in {year}?", steps, "I now know the final answer",
        f"Revenue in {year}, highest first:\n\n{lines}",
    )  # fmt: skip


FACTS = [
    ("二十四节气里，清明之后是哪个节气？", "清明之后的节气", "二十四节气依次为……春分、清明、谷雨、立夏……谷雨是春季的最后一个节气。", "清明之后是谷雨，它是春季的最后一个节气。", "spring rain, terraced tea fields, mist, ink painting"),
    ("长江的发源地在哪里？", "长江 发源地", "长江发源于青藏高原唐古拉山脉各拉丹冬峰西南侧，全长约6300千米。", "长江发源于青藏高原的唐古拉山脉各拉丹冬峰西南侧。", "glacier source of a great river, Tibetan plateau, morning light"),
    ("活字印刷术是谁发明的？", "活字印刷术 发明人", "据《梦溪笔谈》记载，北宋庆历年间毕昇发明了胶泥活字印刷术。", "活字印刷术是北宋的毕昇在庆历年间发明的，见于《梦溪笔谈》。", "craftsman arranging clay movable type, Song dynasty workshop"),
    ("赵州桥建于哪个朝代？", "赵州桥 建造 朝代", "赵州桥又称安济桥，位于河北赵县，由隋代匠师李春设计建造，是一座单孔敞肩石拱桥。", "赵州桥建于隋代，由李春设计建造。", "ancient stone arch bridge over a quiet river, autumn"),
]  # fmt: skip


def lookup(draw: Draw) -> Case:
    """A search, and a picture of what was found."""
    question, query, result, answer, prompt = draw.choice(FACTS)
    steps = [Step("我应该使用谷歌搜索查找答案。", SEARCH, {"search_query": query}, result)]
    if draw.random() < 0.6:
        url = f"https://pictures.example/{draw.randrange(10**6, 10**7)}.png"
        steps.append(Step("还要画一张图，我用文生图来完成。", IMAGE, {"prompt": prompt}, {"image_url": url}))
        return Case(
            f"{question}再画一张与答案有关的图。",
            steps,
            "我已经知道答案，图也画好了。",
            f"{answer}图片在这里：![图片]({url})",
        )
    return Case(question, steps, "我已经知道答案了。", answer)


def program(draw: Draw) -> Case:
    """Python code, run."""
    kind = draw.randrange(3)
    if kind == 0:
        top = draw.randrange(200, 2000)
        found = [n for n in range(2, top) if all(n % k for k in range(2, int(n**0.5) + 1))]
        code = f"n = {top}\nprimes = [p for p in range(2, n) if all(p % k for k in range(2, int(p ** 0.5) + 1))]\nprint(len(primes), primes[-1])"
        question, output = (
            f"How many primes are there below {top}, and which is the largest?",
            f"{len(found)} {found[-1]}",
        )
        final = f"There are {len(found)} primes below {top}; the largest is {found[-1]}."
    elif kind == 1:
        values = [draw.randrange(10, 99) for _ in range(draw.randrange(5, 12))]
        mean = sum(values) / len(values)
        spread = (sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5
        code = f"import statistics\nx = {values}\nprint(round(statistics.mean(x), 2), round(statistics.stdev(x), 2))"
        question = f"Mean and sample standard deviation of {', '.join(map(str, values))}?"
        output, final = (
            f"{mean:.2f} {spread:.2f}",
            f"The mean is {mean:.2f}, the sample standard deviation {spread:.2f}.",
        )
    else:
        start = date(2024, draw.randrange(1, 13), draw.randrange(1, 29))
        days = draw.randrange(40, 400)
        end = start + timedelta(days)
        code = f"from datetime import date, timedelta\nd = date({start.year}, {start.month}, {start.day}) + timedelta({days})\nprint(d, d.strftime('%A'))"
        question, output = f"Which weekday is it {days} days after {start}?", f"{end} {end.strftime('%A')}"
        final = f"{days} days after {start} is {end}, a {end.strftime('%A')}."
    return Case(
        question,
        [Step("A few lines of Python settle this.", CODE, {"code": code}, output)],
        "The output has the answer.",
        final,
    )


def mailbox(draw: Draw) -> Case:
    """Something is not found at first."""
    shop = draw.choice(("Holzmann Tools", "Green Bike Co", "Nordic Lamps", "Papeterie Vert"))
    order, price = draw.randrange(10**5, 10**6), draw.randrange(15, 400) + 0.9
    day = (date(2024, 2, 1) + timedelta(draw.randrange(60))).isoformat()
    steps = [
        Step(f"I look for messages of {shop}.", MAIL, {"from": shop, "text": "invoice", "limit": 5}, []),
        Step("Nothing. The message may not come from the shop itself, so I search the text.", MAIL, {"text": shop, "limit": 5},
             [{"from": "billing@payments.example", "date": day, "subject": f"Your receipt {order}", "body": f"You paid {price:.2f} EUR to {shop}. Delivery in 3 to 5 days."}]),
    ]  # fmt: skip
    return Case(
        f"How much did I pay to {shop}, and when?", steps, "The receipt came from the payment service.",
        f"You paid {price:.2f} EUR to {shop}; the receipt, number {order}, is of {day} and came from the payment service.",
    )  # fmt: skip


CALIBRATION: list[Scenario] = [weather, money, trains, events, inventory, sales, lookup, program, mailbox]

# ---- held out

AIR = Tool("air_quality", "Air Monitor", "Latest readings of a measuring station.", {"station": ("string", "place of the station", True)})  # fmt: skip
PARCEL = Tool("track_parcel", "Parcel Tracking", "Events of a shipment, newest last.", {"tracking_code": ("string", "code on the label", True)})  # fmt: skip
LIBRARY = Tool(
    "catalogue_lookup", "Library Catalogue", "Copies of a title and when each is due back.",
    {"work": ("string", "the title or a part of it", True), "author": ("string", "family name", False)},
)  # fmt: skip
ROUTE = Tool(
    "walking_route", "Route Planner", "Distance in metres on foot between two places.",
    {"begin": ("string", "where to begin", True), "goal": ("string", "where to go", True)},
)  # fmt: skip
GREP = Tool(
    "grep_log", "Log Search", "Lines of a service's log that match a pattern.",
    {"service": ("string", "name of the service", True), "pattern": ("string", "regular expression", True)},
)  # fmt: skip
NUTRITION = Tool(
    "nutrition_facts", "食物营养", "查询每百克食物的热量和蛋白质。", {"food": ("string", "食物名称", True)}
)
HELDOUT_TOOLS = [AIR, PARCEL, LIBRARY, ROUTE, GREP, NUTRITION]

AIR_WORDS = {
    "fr": ("Puis-je courir dehors à {p} ce matin ?", "Je regarde les mesures de la station.", "Les valeurs parlent d’elles-mêmes.", ("À {p}, les particules fines sont à {v} µg/m³ : l’air est bon, tu peux courir.", "À {p}, on mesure {v} µg/m³ de particules fines : mieux vaut courir un autre jour.")),
    "ar": ("هل الهواء نظيف في {p} الآن؟", "أقرأ قياسات المحطة أولاً.", "القراءة واضحة.", ("نعم، تركيز الجسيمات الدقيقة في {p} {v} ميكروغرام فقط.", "لا، بلغ تركيز الجسيمات الدقيقة في {p} {v} ميكروغراماً.")),
    "th": ("ตอนนี้ฝุ่นที่{p}เป็นอย่างไรบ้าง", "อ่านค่าจากสถานีตรวจวัด", "ทราบค่าแล้ว", ("ฝุ่นละเอียดที่{p}วัดได้ {v} ไมโครกรัม อากาศดี", "ฝุ่นละเอียดที่{p}วัดได้ {v} ไมโครกรัม ควรสวมหน้ากาก")),
    "vi": ("Không khí ở {p} sáng nay thế nào?", "Xem số đo của trạm.", "Số đo đã rõ.", ("Bụi mịn ở {p} là {v} µg/m³, không khí tốt.", "Bụi mịn ở {p} lên tới {v} µg/m³, nên đeo khẩu trang.")),
}  # fmt: skip
PLACES = {
    "fr": ("Grenoble", "Lille"), "ar": ("تونس", "بيروت"), "th": ("ลำปาง", "สระบุรี"), "vi": ("Huế", "Cần Thơ"),
}  # fmt: skip


def air(draw: Draw) -> Case:
    """Whether the air is clean."""
    language = draw.choice(sorted(AIR_WORDS))
    ask, think, done, say = AIR_WORDS[language]
    place, value = draw.choice(PLACES[language]), draw.choice((4, 9, 12, 61, 88, 140))
    result = {
        "station": place, "pm2_5": value, "no2": draw.randrange(5, 60), "hour": f"{draw.randrange(6, 10)}:00",
    }  # fmt: skip
    return Case(
        ask.format(p=place),
        [Step(think, AIR, {"station": place}, result)],
        done,
        say[value > 50].format(p=place, v=value),
    )


PARCEL_WORDS = {
    "en": ("My parcel {k} should have come yesterday. Where is it?", "Track it.", "The last event explains the delay.", "It has been at {w} since {d}, where it waits for customs. It is not lost, but it needs your invoice: upload it with the code {k}."),
    "es": ("¿Dónde está mi paquete {k}? Tenía que llegar ayer.", "Miro el seguimiento.", "El último suceso explica el retraso.", "Está en {w} desde el {d}, retenido en la aduana. Falta la factura: súbela con el código {k}."),
    "ru": ("Где моя посылка {k}? Она должна была прийти вчера.", "Смотрю, где она.", "Последняя запись объясняет задержку.", "Она с {d} лежит на таможне ({w}). Нужен счёт: загрузите его, указав код {k}."),
    "it": ("Dov’è il mio pacco {k}? Doveva arrivare ieri.", "Guardo la spedizione.", "L’ultimo evento spiega il ritardo.", "È fermo in dogana a {w} dal {d}. Manca la fattura: caricala con il codice {k}."),
}  # fmt: skip


def parcel(draw: Draw) -> Case:
    """Why a parcel is late."""
    ask, think, done, say = PARCEL_WORDS[draw.choice(sorted(PARCEL_WORDS))]
    code = f"{draw.choice(('LX', 'RR', 'CE'))}{draw.randrange(10**8, 10**9)}{draw.choice(('DE', 'SG', 'NL'))}"
    day, place = date(2023, 10, draw.randrange(3, 25)), draw.choice(("Leipzig", "Liège", "Memphis"))
    log = [
        {"on": str(day - timedelta(4)), "event": "accepted"},
        {"on": str(day - timedelta(2)), "event": "departed"},
        {"on": str(day), "event": "held: commercial invoice missing", "facility": place},
    ]
    values = {"k": code, "d": day, "w": place}
    return Case(ask.format(**values), [Step(think, PARCEL, {"tracking_code": code}, log)], done, say.format(**values))


LIBRARY_WORDS = {
    "de": ("Ist „{t}“ von {a} gerade ausleihbar?", "Ich sehe im Katalog nach.", "Der Bestand ist klar.", ("Ja, ein Exemplar steht im Regal {s}.", "Zurzeit nicht; das nächste Exemplar kommt am {d} zurück.")),
    "ja": ("{a}の『{t}』は今借りられる？", "蔵書を調べる。", "状況がわかった。", ("はい、{s}の棚に一冊あります。", "今は貸出中で、{d}に返却される予定です。")),
    "ko": ("{a}의 『{t}』 지금 빌릴 수 있어?", "장서 목록을 찾아본다.", "대출 상태를 알았다.", ("네, {s} 서가에 한 권 있어요.", "지금은 대출 중이고 {d}에 반납될 예정이에요.")),
    "pt": ("Dá para pegar emprestado “{t}”, de {a}, hoje?", "Vejo no catálogo.", "A situação dos exemplares está clara.", ("Sim, há um exemplar na estante {s}.", "Agora não; o próximo exemplar volta em {d}.")),
}  # fmt: skip
BOOKS = {
    "de": (("Der Schimmelreiter", "Storm"), ("Effi Briest", "Fontane")), "ja": (("こころ", "夏目漱石"), ("羅生門", "芥川龍之介")),
    "ko": (("무정", "이광수"), ("메밀꽃 필 무렵", "이효석")), "pt": (("Dom Casmurro", "Machado"), ("Os Maias", "Eça")),
}  # fmt: skip


def library(draw: Draw) -> Case:
    """Whether a book can be borrowed."""
    language = draw.choice(sorted(LIBRARY_WORDS))
    ask, think, done, say = LIBRARY_WORDS[language]
    title, author = draw.choice(BOOKS[language])
    shelf, out = f"{draw.choice('ABCD')}{draw.randrange(10, 60)}", draw.random() < 0.5
    day = str(date(2023, 11, draw.randrange(2, 28)))
    copies = [{"copy": 1, "due": day}, {"copy": 2, "due": "2023-12-20"} if out else {"copy": 2, "shelf": shelf}]
    values = {"t": title, "a": author, "s": shelf, "d": day}
    call = Step(think, LIBRARY, {"work": title, "author": author}, copies)
    return Case(ask.format(**values), [call], done, say[out].format(**values))


def route(draw: Draw) -> Case:
    """A round of three places, one call each."""
    stops = draw.sample(
        ("the castle", "the fish market", "the ferry pier", "the botanical garden", "the clock tower"), 3
    )
    legs = [draw.randrange(300, 2600, 10) for _ in stops]
    pairs = list(zip(stops, [*stops[1:], stops[0]], strict=True))
    steps = [
        Step(
            f"Leg {i} of the round.",
            ROUTE,
            {"begin": a, "goal": b},
            {"metres": legs[i - 1], "minutes": round(legs[i - 1] / 80)},
        )
        for i, (a, b) in enumerate(pairs, 1)
    ]
    total = sum(legs)
    return Case(
        f"We walk from {stops[0]} to {stops[1]}, on to {stops[2]} and back. How far is that?", steps,
        f"{' + '.join(map(str, legs))} = {total}",
        f"{total / 1000:.2f} km altogether, roughly {round(total / 80)} minutes without stops; the longest leg has {max(legs)} m.",
    )  # fmt: skip


def logs(draw: Draw) -> Case:
    """What broke a service."""
    service, port = draw.choice(("billing", "thumbnailer", "gateway")), draw.choice((5432, 6379, 9092))
    what = {5432: "PostgreSQL", 6379: "Redis", 9092: "Kafka"}[port]
    clock, count = f"{draw.randrange(0, 24):02d}:{draw.randrange(10, 50)}", draw.randrange(3, 60)
    lines = "\n".join(
        f"{clock}:{s:02d} ERROR dial tcp 10.2.0.{draw.randrange(4, 40)}:{port}: connection refused" for s in (7, 19, 38)
    )
    steps = [
        Step("Errors first.", GREP, {"service": service, "pattern": "ERROR"}, lines),
        Step(f"All of them hit port {port}. Did it recover?", GREP, {"service": service, "pattern": "reconnected"}, f"{clock}:59 INFO reconnected after {count} tries"),
    ]  # fmt: skip
    return Case(
        f"{service} had an outage tonight. Find the cause.", steps, "Both searches agree.",
        f"{what} (port {port}) refused connections from {clock}. {service} itself was fine and reconnected within the same minute, after {count} tries.",
    )  # fmt: skip


FOODS = {"豆腐": (81, 8), "燕麦": (338, 10), "鸡胸肉": (118, 24), "红薯": (61, 1), "核桃": (646, 15)}


def nutrition(draw: Draw) -> Case:
    """Calories of a meal."""
    foods = draw.sample(sorted(FOODS), 2)
    grams = [draw.choice((50, 120, 150, 200)) for _ in foods]
    steps = [
        Step(f"查一下{food}。", NUTRITION, {"food": food}, {"food": food, "kcal": FOODS[food][0], "protein_g": FOODS[food][1]})
        for food in foods
    ]  # fmt: skip
    energy = [FOODS[food][0] * g / 100 for food, g in zip(foods, grams, strict=True)]
    protein = sum(FOODS[food][1] * g / 100 for food, g in zip(foods, grams, strict=True))
    return Case(
        f"我中午吃了{grams[0]}克{foods[0]}和{grams[1]}克{foods[1]}，一共多少热量、多少蛋白质？", steps,
        f"热量 {energy[0]:g} + {energy[1]:g}，蛋白质合计 {protein:g} 克。", f"热量共{sum(energy):g}千卡，蛋白质共{protein:g}克。",
    )  # fmt: skip


HELDOUT: list[Scenario] = [air, parcel, library, route, logs, nutrition]

# ---- how a case is written down

REACT = """Answer the following questions as best you can. You have access to the following APIs:

{tools}

Use the following format:

Question: the input question you must answer
Thought: you should always think about what to do
Action: the action to take, should be one of [{names}]
Action Input: the input to the action
Observation: the result of the action
... (this Thought/Action/Action Input/Observation can be repeated zero or more times)
Thought: I now know the final answer
Final Answer: the final answer to the original input question

Begin!

Question: {question}"""
REACT_TOOL = "{name}: Call this tool to interact with the {human} API. What is the {human} API useful for? {about} Parameters: {parameters} Format the arguments as a JSON object."
OTHER_REACT = """Solve what the user asks; these helpers may be called:

{tools}

Write in this order, one item a line.
Question: what is asked
Thought: a short consideration
Action: exactly one of [{names}]
Action Input: arguments, a JSON object
Observation: filled in by the helper
(go on with Thought, Action, Action Input and Observation until nothing is missing)
Thought: why the result suffices
Final Answer: the reply

Question: {question}"""
OTHER_TOOL = "- {name} ({human}). {about} Arguments: {parameters}"
JSON_SYSTEM = """You can call functions. To call one, reply with a JSON object {"name": ..., "arguments": {...}} and nothing else. When you have what you need, reply to the user in plain text.

Functions:
"""
OTHER_JSON = """Functions below are at your disposal.
A reply that is a list [{"function": ..., "parameters": {...}}] is executed and its output comes back; any other reply goes to the user.

"""


def react(case: Case, tools: list[Tool], heldout: bool) -> list[dict]:
    """One answer with all its steps, the observations among them."""
    line = OTHER_TOOL if heldout else REACT_TOOL
    described = "\n\n".join(
        line.format(name=t.name, human=t.human, about=t.about, parameters=dumps(t.listed())) for t in tools
    )
    prompt = (OTHER_REACT if heldout else REACT).format(
        tools=described, names=", ".join(t.name for t in tools), question=case.question
    )
    text = ""
    for step in case.steps:
        text += f"Thought: {step.thought}\nAction: {step.tool.name}\nAction Input: {dumps(step.arguments)}\nObservation: {dumps(step.result)}\n"
    text += f"Thought: {case.done}\nFinal Answer: {case.final}"
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]


def calls(case: Case, tools: list[Tool], heldout: bool) -> list[dict]:
    """Calls and results as turns of JSON."""
    listed = [t.schema() for t in tools]
    system = OTHER_JSON + dumps(listed) if heldout else JSON_SYSTEM + "\n".join(map(dumps, listed))
    messages = [{"role": "system", "content": system}, {"role": "user", "content": case.question}]
    for step in case.steps:
        call: Any = {"name": step.tool.name, "arguments": step.arguments}
        if heldout:
            call = [{"function": step.tool.name, "parameters": step.arguments}]
        result = {"output": step.result} if heldout else {"name": step.tool.name, "result": step.result}
        messages += [{"role": "assistant", "content": dumps(call)}, {"role": "user", "content": dumps(result)}]
    return [*messages, {"role": "assistant", "content": case.final}]


def chats(heldout: bool, count: int) -> list[dict]:
    """`count` transcripts, two of three in ReAct, no question twice."""
    draw = random.Random("tools, held out" if heldout else "tools")
    scenarios, tools = (HELDOUT, HELDOUT_TOOLS) if heldout else (CALIBRATION, CALIBRATION_TOOLS)
    found: list[dict] = []
    asked: set[str] = set()
    while len(found) < count:
        case = scenarios[len(found) % len(scenarios)](draw)
        if case.question in asked:
            case = draw.choice(scenarios)(draw)
            if case.question in asked:
                continue
        asked.add(case.question)
        used = list({step.tool.name: step.tool for step in case.steps}.values())
        offered = used + [t for t in draw.sample(tools, draw.randrange(3)) if t not in used]
        draw.shuffle(offered)
        form = react if draw.random() < 0.67 else calls
        found.append({"messages": form(case, offered, heldout)})
    return found
