"""Scenarios of tool use that are held out: other tools than in calibration, and other values."""

from datetime import date, timedelta

from cases import Case, Draw, Scenario, Step, Tool

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
