"""The Modelfile of an exported model, for Ollama (https://docs.ollama.com/modelfile)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from finetune.model.assistant import Assistant
from finetune.model.language_model import context_length
from finetune.model.tokenize import answer_tokens, template_options

ROLES = ("system", "user", "assistant")
CONVERSATIONS = (("user",), ("system", "user"), ("user", "assistant", "user"), ("system", "user", "assistant", "user"))


@dataclass(frozen=True)
class Turns:
    """A chat template that is turns one behind the other: what text begins with, what stands around what each role
    says, what asks for an answer, and what the system says where nobody sets it.
    """

    begin: str
    around: dict[str, tuple[str, str]]
    ask: str
    system: str


def modelfile(assistant: Assistant, files: Sequence[str]) -> tuple[str, str]:
    """Its text, and what a person should know of it, or ''."""
    tokenizer = assistant.tokenizer
    turns = turns_of(tokenizer)
    lines = [f"FROM ./{name}" for name in files]
    if turns is not None:
        lines.append(f'TEMPLATE """{go_template(turns)}"""')
        lines += [f'SYSTEM """{turns.system}"""'] if turns.system else []
    end = tokenizer.convert_ids_to_tokens(answer_tokens("b", tokenizer)[-1])
    lines += ["PARAMETER temperature 0", f'PARAMETER stop "{end}"']
    if context := context_length(assistant.model.causal_lm):
        lines.append(f"PARAMETER num_ctx {context}")
    note = " (its chat template isn't turns alone: Ollama takes the one in model.gguf, if it knows it)"
    return "\n".join(lines) + "\n", "" if turns is not None else note


def go_template(turns: Turns) -> str:
    """In Go's language, as Ollama reads it: media stand in front of what their message says."""
    cases = "".join(
        f'{{{{ {"else " * bool(number)}if eq .Role "{role}" }}}}{head}{{{{ .Content }}}}{tail}'
        for number, (role, (head, tail)) in enumerate(turns.around.items())
    )
    return f"{turns.begin}{{{{ range .Messages }}}}{cases}{{{{ end }}}}{{{{ end }}}}{turns.ask}"


def turns_of(tokenizer: Any) -> Turns | None:
    """Whether a chat template is no more than turns, rendering tells; None where it is more."""

    def rendered(*roles: str, ask: bool = True) -> str:
        said = [{"role": role, "content": f"<{number}>"} for number, role in enumerate(roles)]
        options = template_options(tokenizer)
        return str(tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=ask, **options))

    try:
        told = {roles: rendered(*roles) for roles in CONVERSATIONS}
        closed = [rendered(*ROLES[: count + 1], ask=False) for count in range(len(ROLES))]
    except TemplateError:  # a role, or an order of them, that it doesn't take
        return None
    bos = tokenizer.bos_token or ""
    begin = bos if bos and all(whole.startswith(bos) and whole.count(bos) == 1 for whole in told.values()) else ""
    around = {}
    for number, role in enumerate(ROLES):
        turn = closed[number].removeprefix(closed[number - 1] if number else begin)
        head, found, tail = turn.partition(f"<{number}>")
        if not found or '"""' in turn or "{{" in turn:
            return None
        around[role] = (head, tail)
    ask = told["system", "user"].removeprefix(closed[1])

    def joined(*turns: tuple[str, str]) -> str:
        return begin + "".join(around[role][0] + said + around[role][1] for role, said in turns) + ask

    head, tail = around["system"]
    system = told["user",].removeprefix(begin).removesuffix(joined(("user", "<0>")).removeprefix(begin))
    system = system.removeprefix(head).removesuffix(tail)
    unset = [("system", system)] if system else []
    for roles, whole in told.items():
        said = [(role, f"<{number}>") for number, role in enumerate(roles)]
        if joined(*(said if roles[0] == "system" else unset + said)) != whole:
            return None
    return Turns(begin, around, ask, system)
