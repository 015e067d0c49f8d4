"""Scenarios of tool use for calibration: tools that are invented, with results that are computed or drawn."""

from datetime import date, timedelta

from cases import Case, Draw, Scenario, Step, Tool

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
