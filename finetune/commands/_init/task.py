"""The task for a table's columns: which of them is the answer, and what is asked for it."""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from finetune.commands._init.columns import HAN, IDENTIFIERS, LABEL_NAMES, MEDIA, Column, Kind, called
from finetune.common.errors import RecipeError, given, option
from finetune.common.registry import nearest
from finetune.data.metrics.text import words
from finetune.data.tasks._columns import number_from, numbers_in

Yaml: TypeAlias = dict[str, object]  # a part of a recipe, as it is written

ANSWERS = (  # names of columns that hold answers, the surest first
    *("label", "labels", "class", "category", "标签", "类别", "分类"),
    *("answer", "answers", "reply", "response", "antwort", "réponse", "respuesta", "答案", "回答", "回复"),
    *("caption", "captions", "description", "描述", "说明"),
    *("transcript", "transcription", "transkript", "transkription", "transcripción", "转写", "转录"),
    *("text", "sentence", "文本", "文字"),
    *("boxes", "bbox", "box", "score", "rating", "price", "评分", "分数", "得分", "价格", "json", "target", "output"),
)
QUESTIONS = {
    *("question", "questions", "query", "prompt", "instruction", "enquiry", "inquiry", "问题", "提问", "指令"),
    *("frage", "fragen", "anfrage", "kundenfrage", "kundenanfrage", "demande", "requête", "pregunta", "consulta"),
}
REPLIES = {
    *("answer", "answers", "reply", "response", "output", "target", "答案", "回答", "回复"),
    *("antwort", "antworten", "réponse", "réponses", "respuesta", "respuestas"),
}
SUBJECTS = {  # words in the names of columns of labels
    *(*LABEL_NAMES, "reason", "topic", "intent", "sentiment", "grund", "thema", "kategorie", "klasse", "motif"),
    *("catégorie", "sujet", "categoría", "motivo", "tema", "tipo", "原因", "主题", "意图", "情感", "情绪", "倾向"),
    *("诉求", "诊断", "所见", "结论", "等级", "点击", "购买", "流失", "clicked", "purchased", "churned"),
}
RATINGS = {"score", "rating", "ratings", "stars", "bewertung", "sterne", "note", "calificación", "评分", "打分", "得分"}
STAFF = {"agent", "operator", "author", "employee", "mitarbeiter", "bearbeiter", "客服", "坐席", "员工", "作者"}
GROUPS = {
    *("patient", "speaker", "subject", "customer", "user", "client", "pat", "participant", "person", "member"),
    *("patienten", "kunde", "kunden", "klient", "klienten", "nutzer", "sprecher", "proband", "probanden"),
    *("locuteur", "utilisateur", "cliente", "paciente", "hablante", "usuario"),
    *("病人", "患者", "说话人", "客户", "用户", "顾客", "会员", "受试者", "住院号", "病案号", "病历号", "门诊号"),
}
BY_KIND: tuple[Kind, ...] = ("messages", "label", "labels", "boxes", "number", "json", "texts", "text")
NAMING = ("name", "code", "number", "num", "uid", "hash", "号", "号码", "姓名", "名称", "名", "昵称", "账号", "卡号")
NUMBERED = "|".join(sorted({*IDENTIFIERS, *NAMING}, key=len, reverse=True))
LONG = 6  # letters of a word that is looked for within others
FEWEST_GROUPS = 10  # of rows that are held out together
SENTENCE = 5  # words, at least
MOST_CHOICES = 20  # labels of which each is tried for every answer
FITTING: dict[str, tuple[Kind, ...]] = {  # kinds of answers of a task
    "answer": ("text", "label", "number"),
    "caption": ("text", "texts", "label"),
    "chat": ("messages",),
    "classify": ("label", "labels", "number"),
    "extract": ("json",),
    "ground": ("boxes",),
    "score": ("number",),
    "transcribe": ("text", "label"),
    "vqa": ("texts", "labels", "text", "label"),
}
FIELDS: dict[Kind, str] = {"number": "number", "labels": "list", "texts": "list"}  # kinds of fields; else text
ASKING = ("answer", "vqa")  # read a question from the rows
TEXTLESS = ("chat", "transcribe")  # put no column before the question
STRICT = ("chat", "extract", "ground", "score")  # no other kinds can be read
TASKS = tuple(FITTING)
DEFAULT_MEDIA = {"transcribe": ("audio",)}  # of the tasks that ask about no pictures
NAMES = {"image": ("picture", "图片"), "audio": ("recording", "录音"), "video": ("video", "视频")}


@dataclass(frozen=True)
class Task:
    """A task as a recipe has it. `options`: without `prompt`. `few_people`: a column that would be `group`
    if it had more values. `unused`: columns that it doesn't read. `alternatives`: those of them that could be the
    answer, where nobody chose it.
    """

    kind: str
    answer: Column
    media: tuple[str, ...]
    prompt: str
    options: Yaml
    head: str | Yaml = "language"
    columns: dict[str, str] = field(default_factory=dict)
    group: str | None = None
    few_people: str | None = None
    unused: tuple[str, ...] = ()
    alternatives: tuple[str, ...] = ()

    def written(self, prompt: str) -> Yaml:
        media: Yaml = {} if self.media == DEFAULT_MEDIA.get(self.kind, ("image",)) else {"media": [*self.media]}
        wording: Yaml = {"prompt": prompt} if self.kind != "chat" and prompt else {}
        return {"kind": self.kind, **media, **wording, **self.options}


@dataclass(frozen=True)
class Named:
    """What the user has named. `kind`: the task, None: by the column's values; `text`: columns that are put before the
    question, (): the longest text of rows without media; `question`, `group`: columns, None: by their names.
    """

    kind: str | None = None
    text: tuple[str, ...] = ()
    question: str | None = None
    group: str | None = None


def answers_in(columns: Sequence[Column], named: Named) -> list[Column]:
    """Columns that could be the answer, the likeliest first: those that fit the task of that kind, then by their names;
    of unknown names the last, people behind. Neither dates nor ids, questions or other columns that are named.
    """
    fitting = FITTING.get(named.kind or "", BY_KIND)
    asked = named.question is not None or any(map(_is_question, columns))
    with_media = any(column.kind in MEDIA for column in columns)
    heard = any(column.kind == "audio" for column in columns)

    def order(column: Column) -> tuple[int, int, int, int]:
        constant = column.kind in ("label", "text", "number") and len(column.texts) < 2
        name = column.name.lower()
        unknown = len(ANSWERS) + (0 if called(column.name, SUBJECTS) else 1 + called(column.name, STAFF | GROUPS))
        known = ANSWERS.index(name) if name in ANSWERS else unknown
        if column.kind in ("text", "texts") and with_media:
            known = min([known, *(n for n, word in enumerate(ANSWERS) if _contains(column.name, word))])
            if heard and known > len(ANSWERS):  # what was said is long; a label beside it is about the recording
                known = len(ANSWERS) + called(column.name, STAFF | GROUPS)
        if column.kind == "number" and called(column.name, RATINGS):
            known = min(known, ANSWERS.index("rating"))
        if called(column.name, REPLIES):
            known = -1 if asked else min(known, ANSWERS.index("answer"))
        elif column.kind == "text" and not with_media:
            known = unknown  # a description or transcript alone is what is asked about
        unsure = (column.kind != "messages") + 2 * constant + 4 * (column.kind not in fitting)
        return unsure, known, BY_KIND.index(column.kind), -columns.index(column)

    taken = (*named.text, named.question, named.group)
    fit = [c for c in columns if c.kind in BY_KIND and c.name not in taken and not _is_question(c)]
    return sorted(fit, key=order)


def _contains(name: str, word: str) -> bool:
    """As a word, or a longer one as a part of a compound."""
    return called(name, {word}) or (len(word) >= LONG and word in name.lower())


def _is_question(column: Column) -> bool:
    """By its name, or a word of it where it holds text: a 'question type' is none."""
    if column.name.lower() in QUESTIONS:
        return column.kind != "empty"
    return column.kind == "text" and called(column.name, QUESTIONS) and not called(column.name, REPLIES)


def fields_in(columns: Sequence[Column], named: Named) -> Column:
    """What stands for the JSON object of rows whose fields are in columns of their names: `texts` are these names."""
    asked = (*named.text, named.group)
    fields = [c for c in columns if c.kind not in (*MEDIA, "empty", "messages", "boxes") and c.name not in asked]
    return Column("", "json", tuple(column.name for column in fields), max((c.filled for c in fields), default=0))


def task_for(columns: Sequence[Column], answer: Column, named: Named, language: str) -> Task:
    """The task whose answers are in a column. Raises RecipeError."""
    kind = named.kind
    if kind is not None and kind not in TASKS:
        raise RecipeError(
            f"{given('task', kind)}: finetune init writes recipes for {', '.join(TASKS)}; see docs/parts.md"
        )
    if kind in STRICT and answer.kind not in FITTING[kind]:
        held = f"column {answer.name!r} holds {answer.kind}, not {FITTING[kind][0]}"
        raise RecipeError(f"{given('task', kind)}: {held}; name another with {option('--answer', 'answer=')}")
    if kind in (None, "classify") and answer.kind in ("label", "labels") and len(answer.texts) == 1:
        raise RecipeError(
            f"column {answer.name!r} holds only {answer.texts[0]!r}, so there is nothing to learn; name another with "
            f"{option('--answer', 'answer=')}, or another file or folder"
        )
    media = _media_of(columns, answer)
    others = [*(("text", name) for name in named.text), ("question", named.question), ("group", named.group)]
    for key, name in others:
        if name is not None and name == answer.name:
            raise RecipeError(
                f"{given(key, name)}: that is the answer; name another column with {option('--answer', 'answer=')}"
            )
        if name is not None and name not in {column.name for column in columns}:
            raise no_column(key, name, columns)
    subject = _question_of(columns, answer, named.question)
    kind = kind or _kind(answer, subject, bool(named.question), tuple(media))
    asked = subject if kind in ASKING else None
    _refuse_unread(kind, named, asked)
    if kind == "transcribe":
        media = {name: column for name, column in media.items() if name in ("audio", "video")}
    before = named.text or _text_before(columns, answer, subject, kind, bool(media))
    options = _options(kind, answer, asked.name if asked else "", before)
    if kind == "extract" and not answer.name:
        fields = [column for column in columns if column.name in answer.texts and column.name not in before]
        options["fields"] = {column.name: FIELDS.get(column.kind, "text") for column in fields}
    if not media and not before and not asked and kind != "chat":
        raise RecipeError(
            f"nothing to ask about: no column holds pictures, recordings, videos or text beside {answer.name!r} "
            f"(columns: {_names(columns)})"
        )
    if kind == "transcribe" and not media:
        raise RecipeError(f"{given('task', kind)}: no column holds recordings (columns: {_names(columns)})")
    group, few_people = (named.group, None) if named.group else _group(columns, answer, media)
    answers = (answer.name,) if answer.name else answer.texts
    read = media | ({"messages": answer.name} if kind == "chat" else {})
    used = {*answers, *before, asked.name if asked else "", *media.values()}
    return Task(
        kind,
        answer,
        tuple(media),
        _prompt(kind, answer.name, tuple(media), bool(asked), language),
        options,
        _head(kind, answer),
        {name: column for name, column in read.items() if name != column},
        group,
        few_people,
        tuple(c.name for c in columns if c.name not in used and c.kind != "empty"),
    )


def no_column(key: str, name: str, columns: Sequence[Column]) -> RecipeError:
    near = nearest(name, [column.name for column in columns])
    meant = f"Did you mean {near!r}? There are" if near else "there are"
    return RecipeError(f"{given(key, name)}: there is no such column{'.' if near else ';'} {meant}: {_names(columns)}")


def _question_of(columns: Sequence[Column], answer: Column, name: str | None) -> Column | None:
    """The column of that name; else the first that is called so exactly, else with a word of its name."""
    if name is not None:
        return next(column for column in columns if column.name == name)
    questions = [column for column in columns if _is_question(column) and column is not answer]
    return min(questions, key=lambda column: column.name.lower() not in QUESTIONS, default=None)


def _refuse_unread(kind: str, named: Named, asked: Column | None) -> None:
    """Raises RecipeError for named columns that the task doesn't read, and for a question that it lacks."""
    if named.text and kind in TEXTLESS:
        raise RecipeError(
            f"{given('text', named.text[0])}: the task {kind} reads no text; leave it out, or name another task"
        )
    if named.question and not asked:
        raise RecipeError(
            f"{given('question', named.question)}: the task {kind} reads no question from the rows; name the task "
            f"{' or '.join(ASKING)}, or put the column before a question of your own with {option('--text', 'text=')}"
        )
    if kind == "vqa" and not asked:
        raise RecipeError(
            f"{given('task', kind)}: no column is called question; name the column of it with "
            f"{option('--question COLUMN', 'question=')}"
        )


def _media_of(columns: Sequence[Column], answer: Column) -> dict[str, str]:
    """{kind of media: the column that holds it, for at least half of the rows}; the kinds alone where the media are in
    the conversations.
    """
    if answer.kind == "messages":
        return {kind: kind for kind in answer.media}
    media: dict[str, str] = {}
    for column in columns:
        if (
            column.kind in NAMES
            and 2 * column.filled >= answer.filled
            and (column.kind not in media or column.name == column.kind)
        ):
            media[column.kind] = column.name
    return media


def _kind(answer: Column, asked: Column | None, named: bool, media: tuple[str, ...]) -> str:
    """`named`: whether the user named the column of the questions. Without media, labels that aren't called answers are
    those of the questions themselves.
    """
    several = answer.kind in ("labels", "texts") or bool(answer.separator)
    if answer.kind in ("messages", "json") or (answer.kind == "boxes" and "image" in media):
        return {"messages": "chat", "json": "extract", "boxes": "ground"}[answer.kind]
    reply = called(answer.name, REPLIES)
    labels = answer.kind in ("label", "labels") and not reply
    if asked and (named or media or not labels):
        return "vqa" if several and "image" in media else "answer"
    if answer.kind == "number":
        return "classify" if answer.name.lower() in LABEL_NAMES or len(answer.texts) <= 2 else "score"
    if answer.kind in ("label", "labels") and not (reply and _are_sentences(answer.texts)):
        return "classify"
    if not media or reply:
        return "answer"
    return "transcribe" if media == ("audio",) else "caption"


def _are_sentences(texts: Sequence[str]) -> bool:
    """Whether most of them have more words than a label; each Chinese character counts as one."""
    return 2 * sum(len(words(text)) >= SENTENCE for text in texts) > len(texts)


def _text_before(
    columns: Sequence[Column], answer: Column, subject: Column | None, kind: str, with_media: bool
) -> tuple[str, ...]:
    """The column that is put before the question, if any. A row with media gets none but the phrase that boxes locate:
    other columns may give the answer away. `subject`: the rows' question, which tasks are about that don't ask it.
    """
    texts = [c for c in columns if c.kind in ("text", "label") and c is not answer]
    if kind == "ground":
        return (texts[0].name,) if texts else ()
    if with_media or kind in TEXTLESS or (subject and kind in ASKING):
        return ()
    longest = max(texts, key=lambda column: column.characters, default=None)
    return (chosen.name,) if (chosen := subject or longest) else ()


def _options(kind: str, answer: Column, asked: str, before: tuple[str, ...]) -> Yaml:
    text: Yaml = {"text": before[0] if len(before) == 1 else [*before]} if before else {}
    if kind == "classify":
        label = {} if answer.name == "label" else {"label": answer.name}
        return {**text, **label, **({"separator": answer.separator} if answer.separator else {})}
    if kind == "score":
        numbers = sorted(number for text in answer.texts if (number := number_from(text)) is not None)
        rating = len(numbers) <= 11 and all(number.is_integer() for number in numbers)
        bounds = {"minimum": numbers[0], "maximum": numbers[-1]} if rating and len(numbers) > 1 else {}
        return {**text, **({} if answer.name == "score" else {"number": answer.name}), **bounds}
    if kind == "ground":
        return {**text, **({} if answer.name == "boxes" else {"boxes": answer.name}), **_units(answer)}
    if kind == "answer":
        return {**text, **({} if asked == "question" else {"question": asked}), **_unless("answer", answer.name)}
    if kind == "vqa":
        separator = {} if answer.separator == ";" else {"separator": answer.separator}
        question = {} if asked == "question" else {"question": asked}
        return {**text, **question, **_unless("answers", answer.name), **separator}
    if kind == "extract":
        return {**text, "answer": answer.name}
    if kind == "transcribe":
        return _unless("text", answer.name)
    return {**text, **_unless("caption", answer.name)} if kind == "caption" else {}


def _unless(default: str, name: str) -> Yaml:
    return {} if name == default else {default: name}


def _units(answer: Column) -> Yaml:
    """Fractions where no number is above 1; a corner and a size where a right edge would be left of the left one."""
    boxes = []
    for text in answer.texts:
        numbers = numbers_in(text)
        boxes += [numbers[i : i + 4] for i in range(0, len(numbers), 4)]
    units: Yaml = {"units": "fractions"} if max(number for box in boxes for number in box) <= 1 else {}
    corners = all(box[0] < box[2] and box[1] < box[3] for box in boxes)
    return units | ({} if corners else {"order": "corner_and_size"})


def _head(kind: str, answer: Column) -> str | Yaml:
    """A number is read from a head of its own. Few labels are chosen by their probability, so that nothing else is ever
    answered; this needs no new weights, which suits few rows.
    """
    if kind == "score":
        return "score"
    if kind == "classify" and not answer.separator and len(answer.texts) <= MOST_CHOICES:
        return {"kind": "language", "answers": "labels"}
    return "language"


def _group(columns: Sequence[Column], answer: Column, media: Collection[str]) -> tuple[str | None, str | None]:
    """(the column of who or what several rows are about, filled in all rows with an answer; one of too few for that).
    Staff are heard or seen in recordings and videos only.
    """
    few = None
    for people in (GROUPS, STAFF) if {"audio", "video"} & set(media) else (GROUPS,):
        for column in sorted(columns, key=lambda column: column.name.lower() not in people):
            complete = column.filled >= answer.filled and column.filled > len(column.texts)
            fits = column.kind in ("label", "text", "id", "number") and complete and column is not answer
            if fits and _names_groups(column.name, people):
                if len(column.texts) >= FEWEST_GROUPS:
                    return column.name, None
                few = few or (column.name if len(column.texts) > 1 else None)
    return None, few


def _names_groups(name: str, people: Collection[str]) -> bool:
    """'Pat. No', customer_id, Kundennummer: somebody, and nothing else but the words for a number or a name."""
    somebody = "|".join(sorted(people, key=len, reverse=True))
    found = re.search(somebody, name.lower())
    return bool(found and re.fullmatch(rf"(?:{somebody}|{NUMBERED}|s\b|[\W\d_])+", name.lower()))


def _prompt(kind: str, answer: str, media: tuple[str, ...], asked: bool, language: str) -> str:
    """In Chinese for Chinese rows, else in English. The name of the answers' column is in it only where it is in the
    rows' language.
    """
    chinese = language == "zh"
    answer = answer.rstrip("?？:： ") or answer
    named = language in ("en", "zh") and bool(HAN.search(answer)) == chinese
    which, number, text = (f"Which {answer}?", f"{answer}是什么？"), (answer, answer), (answer, answer)
    if not named:
        which = ("Which category does this belong to?", "这属于哪一类？")
        number, text = ("number", "数值"), ("answer", "答案")
    medium = NAMES[media[0]][chinese] if media else ("text", "文字")[chinese]
    wordings = {
        "classify": ("What is this?", "这是什么？"),
        "caption": (f"Describe the {medium}.", f"描述这{'段' if media != ('image',) else '张'}{medium}。"),
        "transcribe": ("Transcribe.", "写下录音的内容。"),
        "score": (f"Estimate the {number[0]}.", f"估计{number[1]}。"),
        "ground": ("Where is it? [x1, y1, x2, y2], 0 to 1000", "它在哪里？[x1, y1, x2, y2]，0 到 1000"),
        "extract": ("Fill this in as JSON.", "填写这个 JSON。"),
        "answer": ("", "") if asked else (f"Write the {text[0]}.", f"写出{text[1]}。"),
    }
    if kind == "classify" and answer.lower() not in LABEL_NAMES:
        wordings["classify"] = which
    return wordings.get(kind, ("", ""))[chinese]


def _names(columns: Sequence[Column]) -> str:
    return ", ".join(repr(column.name) for column in columns)
