"""Prompts of retrieval: numbered passages, a question, an answer taken from them, or that they have none.

Questions are made from what the passages are: the title of one, a sentence of one, all their titles. So every answer is right by
construction, and is in the passage's own words. The calibration prompts have other wordings than the held-out ones.
"""

import json
import random
import re
from dataclasses import dataclass

from languages import Section


@dataclass(frozen=True)
class Words:
    """How a prompt is worded in one language; {t} a title, {s} a sentence, {n} a number."""

    intro: str
    label: str
    ask: tuple[str, str]
    none: str
    follow: str  # which passage has this sentence, and what follows it
    followed: str
    titles: str
    quote: str  # reply with JSON of the passage's number and the first sentence of it


C, H = {}, {}
C["en"] = Words(
    "Answer the question from the passages below and give the number of the passage in brackets. If they do not answer it, say so.",
    "Passage {n}",
    ("What do the passages say about “{t}”?", "I need to know about this: {t}. What is written there?"),
    "None of the passages deals with “{t}”. They are about other things: {o}.",
    "Which passage contains the sentence “{s}”, and how does it continue?",
    "It is in passage {n}, which continues: “{s}”",
    "Give each passage a title, one per line.",
    'Which passage is about “{t}”? Reply with JSON only: {{"passage": its number, "quote": its first sentence}}.',
)
H["en"] = Words(
    "Use nothing but the excerpts. Cite the excerpt you rely on, like [1]. When the excerpts leave the question open, tell the user.",
    "[{n}]",
    ("Can you tell me something on “{t}”?", "How does this work: {t}?"),
    "The excerpts leave that open: they treat {o}, but not “{t}”.",
    "Where do I find “{s}”, and what comes after it?",
    "In excerpt [{n}]. After it comes: “{s}”",
    "Write one heading for every excerpt.",
    'Find the excerpt on “{t}” and return an object with the keys "source" (number) and "text" (how it begins), nothing else.',
)
C["zh"] = Words(
    "请根据下面的段落回答问题，并在括号里注明段落编号。如果段落里没有答案，请直说。", "段落 {n}",
    ("这些段落关于“{t}”说了什么？", "我想了解{t}，文中是怎么写的？"),
    "这些段落没有谈到“{t}”，它们讲的是：{o}。",
    "“{s}”这句话出自哪个段落？后面接着写了什么？", "出自段落 {n}，后面写道：“{s}”",
    "请给每个段落起一个标题，每行一个。", '哪个段落讲的是“{t}”？只用 JSON 回答：{{"passage": 编号, "quote": 该段第一句}}。',
)  # fmt: skip
H["zh"] = Words(
    "只能使用以下资料作答，用 [1] 这样的形式标明出处；资料未涉及时要告诉用户。", "资料[{n}]",
    ("能介绍一下“{t}”吗？", "{t}是怎么回事？"), "资料里只讲到{o}，没有涉及“{t}”。",
    "在哪份资料里能找到“{s}”？它之后是什么内容？", "在资料[{n}]里，之后的内容是：“{s}”",
    "为每份资料写一个小标题。", '找出介绍“{t}”的资料，只返回含有 "source"（编号）和 "text"（开头一句）的对象。',
)  # fmt: skip
C["de"] = Words(
    "Beantworte die Frage anhand der folgenden Abschnitte und nenne die Nummer des Abschnitts in Klammern. Steht die Antwort nicht darin, sage das.",
    "Abschnitt {n}", ("Was steht in den Abschnitten über „{t}“?", "Ich möchte etwas wissen über: {t}. Was ist dazu geschrieben?"),
    "Keiner der Abschnitte behandelt „{t}“. Es geht in ihnen um: {o}.",
    "In welchem Abschnitt steht der Satz „{s}“, und wie geht es weiter?", "In Abschnitt {n}; weiter heißt es dort: „{s}“",
    "Gib jedem Abschnitt einen Titel, einen je Zeile.",
    'Welcher Abschnitt handelt von „{t}“? Antworte nur mit JSON: {{"passage": Nummer, "quote": erster Satz}}.',
)  # fmt: skip
H["de"] = Words(
    "Stütze dich allein auf die Textstellen und belege mit [1], [2] usw. Bleibt die Frage offen, teile es mit.", "[{n}]",
    ("Kannst du mir „{t}“ erklären?", "Worum geht es bei: {t}?"), "Dazu geben die Textstellen nichts her: Sie erklären {o}, aber nicht „{t}“.",
    "Wo finde ich „{s}“ und was kommt danach?", "Textstelle [{n}]. Danach kommt: „{s}“", "Schreibe zu jeder Textstelle eine Überschrift.",
    'Suche die Textstelle zu „{t}“ und gib nur ein Objekt mit "source" (Nummer) und "text" (Anfang) zurück.',
)  # fmt: skip
C["es"] = Words(
    "Responde a la pregunta con los pasajes siguientes e indica el número del pasaje entre corchetes. Si no contienen la respuesta, dilo.",
    "Pasaje {n}", ("¿Qué dicen los pasajes sobre «{t}»?", "Necesito saber esto: {t}. ¿Qué está escrito?"),
    "Ningún pasaje trata de «{t}». Tratan de otras cosas: {o}.",
    "¿En qué pasaje está la frase «{s}» y cómo continúa?", "Está en el pasaje {n}, que continúa así: «{s}»",
    "Pon un título a cada pasaje, uno por línea.", '¿Qué pasaje trata de «{t}»? Contesta solo con JSON: {{"passage": número, "quote": primera frase}}.',
)  # fmt: skip
H["es"] = Words(
    "Básate únicamente en los fragmentos y cita la fuente como [1]. Cuando no aclaren la duda, avisa al usuario.", "[{n}]",
    ("¿Me explicas «{t}»?", "¿Cómo funciona esto: {t}?"), "Los fragmentos no lo aclaran: hablan de {o}, pero no de «{t}».",
    "¿Dónde aparece «{s}» y qué viene después?", "En el fragmento [{n}]. Después viene: «{s}»", "Escribe un encabezado para cada fragmento.",
    'Busca el fragmento sobre «{t}» y devuelve únicamente un objeto con "source" (número) y "text" (comienzo).',
)  # fmt: skip
C["fr"] = Words(
    "Réponds à la question à partir des passages ci-dessous et donne le numéro du passage entre crochets. S’ils n’y répondent pas, dis-le.",
    "Passage {n}", ("Que disent les passages au sujet de « {t} » ?", "Je voudrais savoir ceci : {t}. Qu’est-ce qui est écrit ?"),
    "Aucun passage ne traite de « {t} ». Ils parlent d’autre chose : {o}.",
    "Quel passage contient la phrase « {s} » et comment se poursuit-il ?", "C’est le passage {n}, qui se poursuit ainsi : « {s} »",
    "Donne un titre à chaque passage, un par ligne.", 'Quel passage traite de « {t} » ? Réponds uniquement en JSON : {{"passage": numéro, "quote": première phrase}}.',
)  # fmt: skip
H["fr"] = Words(
    "Sers-toi seulement des extraits et indique ta source sous la forme [1]. Si les extraits laissent la question ouverte, préviens l’utilisateur.", "[{n}]",
    ("Peux-tu m’expliquer « {t} » ?", "Comment cela marche-t-il : {t} ?"), "Les extraits n’en parlent pas : il y est question de {o}, pas de « {t} ».",
    "Où se trouve « {s} » et qu’est-ce qui vient après ?", "Dans l’extrait [{n}]. Après vient : « {s} »", "Rédige un intitulé pour chacun des extraits.",
    'Cherche l’extrait sur « {t} » et renvoie seulement un objet avec "source" (numéro) et "text" (début).',
)  # fmt: skip
C["it"] = Words(
    "Rispondi alla domanda usando i brani qui sotto e indica il numero del brano tra parentesi. Se non c’è la risposta, dillo.",
    "Brano {n}", ("Che cosa dicono i brani a proposito di «{t}»?", "Vorrei sapere questo: {t}. Che cosa c’è scritto?"),
    "Nessun brano tratta di «{t}». Parlano d’altro: {o}.",
    "Quale brano contiene la frase «{s}» e come prosegue?", "È nel brano {n}, che prosegue così: «{s}»",
    "Dai un titolo a ogni brano, uno per riga.", 'Quale brano tratta di «{t}»? Rispondi solo con JSON: {{"passage": numero, "quote": prima frase}}.',
)  # fmt: skip
H["it"] = Words(
    "Attieniti soltanto agli estratti e cita la fonte come [1]. Se lasciano aperta la questione, avvisa l’utente.", "[{n}]",
    ("Mi spieghi «{t}»?", "Come funziona questa cosa: {t}?"), "Gli estratti non lo chiariscono: spiegano {o}, ma non «{t}».",
    "Dove trovo «{s}» e che cosa viene dopo?", "Nell’estratto [{n}]. Dopo viene: «{s}»", "Scrivi un’intestazione per ciascun estratto.",
    'Cerca l’estratto su «{t}» e restituisci soltanto un oggetto con "source" (numero) e "text" (inizio).',
)  # fmt: skip
C["pt"] = Words(
    "Responda à pergunta com base nos trechos abaixo e indique o número do trecho entre colchetes. Se a resposta não estiver neles, diga isso.",
    "Trecho {n}", ("O que os trechos dizem sobre “{t}”?", "Preciso saber isto: {t}. O que está escrito?"),
    "Nenhum trecho trata de “{t}”. Eles falam de outras coisas: {o}.",
    "Em qual trecho está a frase “{s}” e como ele continua?", "Está no trecho {n}, que continua assim: “{s}”",
    "Dê um título a cada trecho, um por linha.", 'Qual trecho trata de “{t}”? Responda somente com JSON: {{"passage": número, "quote": primeira frase}}.',
)  # fmt: skip
H["pt"] = Words(
    "Use apenas os excertos e cite a fonte como [1]. Quando eles não esclarecerem a dúvida, avise o usuário.", "[{n}]",
    ("Pode me explicar “{t}”?", "Como funciona isto: {t}?"), "Os excertos não esclarecem isso: explicam {o}, mas não “{t}”.",
    "Onde encontro “{s}” e o que vem depois?", "No excerto [{n}]. Depois vem: “{s}”", "Escreva um cabeçalho para cada um dos excertos.",
    'Procure o excerto sobre “{t}” e devolva apenas um objeto com "source" (número) e "text" (início).',
)  # fmt: skip
C["ru"] = Words(
    "Ответь на вопрос по приведённым ниже отрывкам и укажи номер отрывка в скобках. Если ответа в них нет, так и скажи.",
    "Отрывок {n}", ("Что говорится в отрывках о теме «{t}»?", "Мне нужно узнать вот что: {t}. Что об этом написано?"),
    "Ни в одном отрывке нет ничего о теме «{t}». В них речь о другом: {o}.",
    "В каком отрывке есть предложение «{s}» и что там дальше?", "Это отрывок {n}, дальше в нём сказано: «{s}»",
    "Дай каждому отрывку заголовок, по одному на строке.", 'Какой отрывок посвящён теме «{t}»? Ответь только в формате JSON: {{"passage": номер, "quote": первое предложение}}.',
)  # fmt: skip
H["ru"] = Words(
    "Опирайся только на фрагменты и ссылайся на них в виде [1]. Если фрагменты не дают ответа, сообщи об этом пользователю.", "[{n}]",
    ("Можешь объяснить: «{t}»?", "Как это устроено: {t}?"), "Фрагменты этого не объясняют: они рассказывают про {o}, но не про «{t}».",
    "Где находится «{s}» и что идёт после?", "Во фрагменте [{n}]. После идёт: «{s}»", "Напиши подзаголовок к каждому фрагменту.",
    'Найди фрагмент про «{t}» и верни только объект с ключами "source" (номер) и "text" (начало).',
)  # fmt: skip
C["ja"] = Words(
    "次の文章をもとに質問に答え、文章の番号を括弧に入れて示してください。答えが書かれていない場合は、そう述べてください。",
    "文章 {n}", ("「{t}」について、文章には何と書かれていますか。", "{t}について知りたいのですが、どう書かれていますか。"),
    "「{t}」を扱った文章はありません。書かれているのは次のことです: {o}。",
    "「{s}」という文はどの文章にあり、その続きは何ですか。", "文章 {n} にあり、続きは次のとおりです: 「{s}」",
    "それぞれの文章に題を付け、一行に一つずつ書いてください。", '「{t}」を扱っているのはどの文章ですか。JSON だけで答えてください: {{"passage": 番号, "quote": 最初の文}}',
)  # fmt: skip
H["ja"] = Words(
    "資料だけを使い、[1] のように出典を付けること。資料から分からないときは、利用者にそう伝えること。", "資料[{n}]",
    ("「{t}」を説明してもらえますか？", "{t}とはどういうことですか？"), "資料からは分かりません。{o}の説明はありますが、「{t}」の説明はありません。",
    "「{s}」はどこに載っていて、次に何が来ますか？", "資料[{n}]です。次に来るのは「{s}」です。", "各資料の見出しを書いて。",
    '「{t}」の資料を探し、"source"（番号）と "text"（書き出し）を持つオブジェクトだけを返して。',
)  # fmt: skip
C["ko"] = Words(
    "아래 글을 바탕으로 질문에 답하고, 글의 번호를 괄호 안에 적으세요. 글에 답이 없으면 없다고 말하세요.",
    "글 {n}", ("글에서는 “{t}”에 대해 뭐라고 합니까?", "{t}에 대해 알고 싶습니다. 뭐라고 적혀 있나요?"),
    "“{t}”을(를) 다룬 글은 없습니다. 글의 내용은 다음과 같습니다: {o}.",
    "“{s}”라는 문장은 몇 번 글에 있고, 그다음은 어떻게 이어집니까?", "글 {n}에 있으며 이렇게 이어집니다: “{s}”",
    "글마다 제목을 붙여 한 줄에 하나씩 쓰세요.", '“{t}”을(를) 다룬 글은 무엇입니까? JSON으로만 답하세요: {{"passage": 번호, "quote": 첫 문장}}',
)  # fmt: skip
H["ko"] = Words(
    "자료만 이용하고 [1]처럼 출처를 밝혀 줘. 자료로 알 수 없는 것은 사용자에게 알려 줘.", "자료 [{n}]",
    ("“{t}”을(를) 설명해 줄래?", "{t}, 이건 어떻게 하는 거야?"), "자료로는 알 수 없어요. {o}은(는) 설명하지만 “{t}”은(는) 나오지 않아요.",
    "“{s}”은(는) 어디에 나오고 뒤에 무슨 말이 와?", "자료 [{n}]에 나오고, 뒤에 오는 말은 “{s}”예요.", "자료 하나하나에 소제목을 달아 줘.",
    '“{t}”에 관한 자료를 찾아 "source"(번호)와 "text"(시작 부분)만 담은 객체를 돌려줘.',
)  # fmt: skip
C["ar"] = Words(
    "أجب عن السؤال بالاعتماد على المقاطع التالية واذكر رقم المقطع بين قوسين. إن لم تجد الجواب فيها فقل ذلك.",
    "المقطع {n}", ("ماذا تقول المقاطع عن «{t}»؟", "أريد أن أعرف عن هذا: {t}. ما المكتوب عنه؟"),
    "لا يتناول أي مقطع «{t}». المقاطع عن أمور أخرى: {o}.",
    "في أي مقطع توجد الجملة «{s}» وكيف تستمر؟", "توجد في المقطع {n}، وبعدها: «{s}»",
    "ضع عنواناً لكل مقطع، عنواناً في كل سطر.", 'أي مقطع يتحدث عن «{t}»؟ أجب بصيغة JSON فقط: {{"passage": الرقم, "quote": الجملة الأولى}}.',
)  # fmt: skip
H["ar"] = Words(
    "استعمل النصوص وحدها وأشر إلى مصدرك هكذا [1]، وأخبر المستخدم إذا لم توضح النصوص المسألة.", "[{n}]",
    ("هل تشرح لي «{t}»؟", "كيف يعمل هذا: {t}؟"), "لا توضح النصوص ذلك، فهي تشرح {o} ولا تشرح «{t}».",
    "أين أجد «{s}» وماذا يأتي بعدها؟", "في النص [{n}]، ويأتي بعدها: «{s}»", "اكتب ترويسة لكل نص من النصوص.",
    'ابحث عن النص الخاص بـ «{t}» وأعد كائناً واحداً فيه "source" (الرقم) و "text" (البداية) لا غير.',
)  # fmt: skip
C["vi"] = Words(
    "Hãy trả lời câu hỏi dựa vào các đoạn dưới đây và ghi số của đoạn trong ngoặc. Nếu các đoạn không có câu trả lời, hãy nói như vậy.",
    "Đoạn {n}", ("Các đoạn nói gì về “{t}”?", "Tôi cần biết điều này: {t}. Trong đó viết gì?"),
    "Không đoạn nào nói về “{t}”. Chúng nói về chuyện khác: {o}.",
    "Câu “{s}” nằm ở đoạn nào và tiếp theo là gì?", "Câu đó nằm ở đoạn {n}, tiếp theo là: “{s}”",
    "Hãy đặt tên cho mỗi đoạn, mỗi dòng một tên.", 'Đoạn nào nói về “{t}”? Chỉ trả lời bằng JSON: {{"passage": số, "quote": câu đầu tiên}}.',
)  # fmt: skip
H["vi"] = Words(
    "Chỉ dùng những trích dẫn này và dẫn nguồn theo kiểu [1]. Khi trích dẫn chưa làm rõ vấn đề, báo cho người dùng biết.", "[{n}]",
    ("Giải thích giúp tôi “{t}” được không?", "Việc này làm thế nào: {t}?"), "Trích dẫn chưa làm rõ điều đó: có phần về {o}, nhưng không có phần về “{t}”.",
    "Tìm “{s}” ở đâu và sau đó viết gì?", "Ở trích dẫn [{n}]. Sau đó viết: “{s}”", "Viết tiêu đề cho từng trích dẫn.",
    'Tìm trích dẫn về “{t}” rồi trả về đúng một đối tượng gồm "source" (số) và "text" (phần mở đầu).',
)  # fmt: skip
C["th"] = Words(
    "ตอบคำถามจากข้อความด้านล่างนี้ และบอกหมายเลขของข้อความไว้ในวงเล็บ ถ้าไม่มีคำตอบอยู่ในนั้นให้บอกตามตรง",
    "ข้อความที่ {n}", ("ข้อความเหล่านี้กล่าวถึง “{t}” ว่าอย่างไร", "อยากรู้เรื่อง{t} ในนั้นเขียนไว้ว่าอะไร"),
    "ไม่มีข้อความใดกล่าวถึง “{t}” เนื้อหาเป็นเรื่องอื่น ได้แก่ {o}",
    "ประโยค “{s}” อยู่ในข้อความที่เท่าไร และต่อจากนั้นเขียนว่าอะไร", "อยู่ในข้อความที่ {n} และต่อจากนั้นเขียนว่า “{s}”",
    "ตั้งชื่อเรื่องให้ข้อความทุกข้อ บรรทัดละหนึ่งชื่อ", 'ข้อความใดเป็นเรื่อง “{t}” ตอบเป็น JSON เท่านั้น: {{"passage": หมายเลข, "quote": ประโยคแรก}}',
)  # fmt: skip
H["th"] = Words(
    "ใช้เฉพาะเอกสารที่ให้มา อ้างอิงแบบ [1] หากเอกสารไม่ได้ให้ความกระจ่าง โปรดแจ้งผู้ใช้", "[{n}]",
    ("ช่วยอธิบาย “{t}” หน่อยได้ไหม", "{t} ทำอย่างไร"), "เอกสารไม่ได้ให้ความกระจ่าง มีแต่เรื่อง {o} ไม่มีเรื่อง “{t}”",
    "หา “{s}” ได้ที่ไหน แล้วถัดไปคืออะไร", "ในเอกสาร [{n}] ถัดไปคือ “{s}”", "เขียนหัวเรื่องของเอกสารแต่ละฉบับ",
    'ค้นหาเอกสารเรื่อง “{t}” แล้วส่งคืนออบเจกต์ที่มี "source" (เลขที่) และ "text" (ตอนต้น) เท่านั้น',
)  # fmt: skip
C["id"] = Words(
    "Jawab pertanyaan berdasarkan bacaan di bawah ini dan sebutkan nomor bacaannya dalam kurung. Jika jawabannya tidak ada, katakan begitu.",
    "Bacaan {n}", ("Apa kata bacaan tentang “{t}”?", "Saya perlu tahu tentang ini: {t}. Apa yang tertulis di sana?"),
    "Tidak ada bacaan tentang “{t}”. Isinya tentang hal lain: {o}.",
    "Bacaan mana yang memuat kalimat “{s}”, dan bagaimana lanjutannya?", "Kalimat itu ada di bacaan {n}, lanjutannya: “{s}”",
    "Beri judul untuk setiap bacaan, satu judul per baris.", 'Bacaan mana yang membahas “{t}”? Balas dengan JSON saja: {{"passage": nomor, "quote": kalimat pertama}}.',
)  # fmt: skip
H["id"] = Words(
    "Pakailah hanya kutipan yang tersedia dan cantumkan sumber seperti [1]. Bila kutipan belum menjelaskannya, beri tahu pengguna.", "[{n}]",
    ("Bisa jelaskan “{t}”?", "Bagaimana caranya: {t}?"), "Kutipan belum menjelaskannya: ada penjelasan {o}, tetapi bukan “{t}”.",
    "Di mana letak “{s}” dan apa sesudahnya?", "Di kutipan [{n}]. Sesudahnya: “{s}”", "Tuliskan kepala untuk masing-masing kutipan.",
    'Cari kutipan mengenai “{t}” lalu kembalikan satu objek saja berisi "source" (nomor) dan "text" (awalnya).',
)  # fmt: skip

DENSE = {"zh", "ja", "ko", "th"}  # a letter says more
KINDS = ("ask", "none", "ask", "follow", "quote", "ask", "titles", "none")
SENTENCES = re.compile(r"(?<=[.!?؟])\s+|(?<=[。！？])")


def passages(parts: list[Section], language: str) -> list[Section]:
    """The sections that can stand alone, cut to whole paragraphs; none whose title is another's."""
    least, most = (90, 420) if language in DENSE else (200, 950)
    found, titles = [], set()
    for part in parts:
        kept: list[str] = []
        for text in part.paragraphs:
            if sum(map(len, kept)) + len(text) > most:
                break
            kept.append(text)
        if not kept or kept[0].endswith((":", "：")):  # a list or a listing followed, which is not here
            continue
        short = part.title and len(part.title) <= (30 if language in DENSE else 70) and "“" not in part.title
        if short and sum(map(len, kept)) >= least and part.title not in titles:
            titles.add(part.title)
            found.append(Section(part.title, kept))
    return found


def opening(part: Section, size: int) -> str:
    """The first sentences of a passage, about `size` letters."""
    taken: list[str] = []
    for sentence in SENTENCES.split(part.paragraphs[0]):
        if taken and sum(map(len, taken)) + len(sentence) > size:
            break
        taken.append(sentence)
    return " ".join(taken) if re.search("[.!?؟]$", taken[0]) else "".join(taken)


def sentences(part: Section) -> list[str]:
    """The sentences of a passage that are not too long to repeat."""
    found = [sentence.strip() for text in part.paragraphs for sentence in SENTENCES.split(text)]
    return [sentence for sentence in found if sentence]


def _answer(kind: str, words: Words, shown: list[Section], other: Section, draw: random.Random) -> tuple[str, str]:
    """(question, answer); the passage asked for is any of `shown`, the one not there is `other`."""
    number = draw.randrange(len(shown))
    part = shown[number]
    label = words.label.format(n=number + 1)
    cite = label if label.startswith("[") else f"[{number + 1}]"
    lines = sentences(part)
    follows = [i for i in range(len(lines) - 1) if len(lines[i]) < 200 and lines.count(lines[i]) == 1]
    if kind == "follow" and follows:
        at = draw.choice(follows)
        return words.follow.format(s=lines[at]), words.followed.format(n=number + 1, s=lines[at + 1])
    if kind == "none":
        others = ", ".join(p.title for p in shown[:3])
        return draw.choice(words.ask).format(t=other.title), words.none.format(t=other.title, o=others)
    if kind == "titles":
        return words.titles, "\n".join(f"{i}. {p.title}" for i, p in enumerate(shown, 1))
    if kind == "quote":
        keys = ("passage", "quote") if "passage" in words.quote else ("source", "text")
        found = {keys[0]: number + 1, keys[1]: lines[0]}
        return words.quote.format(t=part.title), json.dumps(found, ensure_ascii=False)
    return draw.choice(words.ask).format(t=part.title), f"{opening(part, 400)} {cite}"


def chats(parts: list[Section], language: str, heldout: bool, count: int) -> list[dict]:
    """`count` chats of retrieval over `parts`, each passage shown under its number, without its title."""
    words = (H if heldout else C)[language]
    pool = passages(parts, language)
    draw = random.Random(f"{language} {heldout}")
    found = []
    first = draw.randrange(len(KINDS))
    for at in range(first, first + count):
        kind = KINDS[at % len(KINDS)]
        size = draw.choice((2, 3, 3, 4, 5) if at % 6 else (7, 9, 11))
        *shown, other = draw.sample(pool, min(size, len(pool) - 1) + 1)
        question, answer = _answer(kind, words, shown, other, draw)
        blocks = [f"{words.label.format(n=i)}\n{part.text}" for i, part in enumerate(shown, 1)]
        messages = []
        prompt = "\n\n".join([words.intro, *blocks, question])
        if draw.random() < 0.4:
            messages.append({"role": "system", "content": words.intro})
            prompt = "\n\n".join([*blocks, question])
        messages += [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        found.append({"messages": messages})
    return found
