"""The prompt about each file, and the rows made from an answer."""

import re
from dataclasses import dataclass

from finetune.common.errors import DataError, RecipeError, given, option
from finetune.common.run_folder import JsonObject

ANSWER = {"caption": "caption", "transcribe": "text", "answer": "answer", "vqa": "answers"}  # task -> its column
NOUNS = {"image": "picture", "audio": "recording", "video": "video"}
TRANSCRIBE = "Write down what is said in the recording, and nothing else."
QUESTIONS = (
    "Write {count} different questions about the {noun} that can be answered from it alone, each with a short answer."
)
FORM = "Put each on two lines: the first begins with Q:, the second with A:."
MARK = r"^[\W\d]*{}[\W\d]*?[:：]"  # also "1. Q:" and "**Q1:**"
PAIR = re.compile(
    rf"{MARK.format('Q')}(?P<question>.+?){MARK.format('A')}(?P<answer>.+?)(?={MARK.format('Q')}|\Z)",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Assignment:
    """`task`: whose columns the rows get. `prompt`: None: the usual one of the task. `questions`: how many the model
    writes and answers about each file; None: it answers the prompt. `language`: of the answers, '' for the model's
    choice.
    """

    task: str = "caption"
    prompt: str | None = None
    questions: int | None = None
    language: str = ""

    def refuse_unusable(self) -> None:
        """Raises RecipeError."""
        has_questions = self.task in ("answer", "vqa")
        if self.task not in ANSWER:
            raise RecipeError(f"{given('task', self.task)}: one of {', '.join(ANSWER)} can be described")
        if self.questions is not None and (self.questions < 1 or not has_questions):
            problem = (
                "write 1 or more" if has_questions else f"the task {self.task} has no questions: answer and vqa have"
            )
            raise RecipeError(f"{given('questions', self.questions)}: {problem}")
        if has_questions and self.questions is None and not self.prompt:
            questions, prompt = option("--questions N", "questions="), option("--prompt TEXT", "prompt=")
            raise RecipeError(
                f"{given('task', self.task)}: set with {questions} how many the model writes about each file, "
                f"or with {prompt} which one it answers"
            )

    def wording(self, kind: str) -> str:
        """The prompt about a medium of this kind."""
        noun = NOUNS[kind]
        if self.questions is not None:
            usual = QUESTIONS.format(count=self.questions, noun=noun)
        else:
            usual = TRANSCRIBE if self.task == "transcribe" else f"Describe the {noun}."
        lines = [self.prompt or usual]
        lines += [FORM] if self.questions is not None else []
        lines += [f"Write in {self.language}."] if self.language else []
        return "\n".join(lines)

    def rows(self, kind: str, name: str, answer: str) -> list[JsonObject]:
        """Columns that the task reads, for each row. Raises DataError for an answer of which no row can be made."""
        medium: JsonObject = {kind: name}
        if not answer:
            raise DataError("an empty answer")
        if self.questions is None:
            return [medium | self._answered(self.prompt or "", answer)]
        pairs = {match["question"].strip(" *\n"): match["answer"].strip(" *\n") for match in PAIR.finditer(answer)}
        rows = [medium | self._answered(question, text) for question, text in pairs.items() if question and text]
        if not rows:
            raise DataError(f"no question and answer in the output: {answer[:80]!r}")
        return rows[: self.questions]

    def _answered(self, question: str, answer: str) -> JsonObject:
        if self.task == "vqa":
            return {"question": question, "answers": [answer]}
        columns: JsonObject = {ANSWER[self.task]: answer}
        return {"question": question, **columns} if self.task == "answer" else columns
