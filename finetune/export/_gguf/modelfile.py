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
    """A chat template that only concatenates turns: `begin` + turns + `ask`, which begins the answer.

    `around`: {role: text before and after its content}. `system`: the system turn's content if a conversation has none.
    """

    begin: str
    around: dict[str, tuple[str, str]]
    ask: str
    system: str


def modelfile(assistant: Assistant, files: Sequence[str]) -> tuple[str, str]:
    """(text of the Modelfile, a note for the user or '')."""
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
    note = " (its chat template does more than concatenate turns: Ollama uses the one in model.gguf if it knows it)"
    return "\n".join(lines) + "\n", "" if turns is not None else note


def go_template(turns: Turns) -> str:
    """The template in Go's language, for Ollama, which puts a message's media before its text."""
    cases = "".join(
        f'{{{{ {"else " * bool(number)}if eq .Role "{role}" }}}}{head}{{{{ .Content }}}}{tail}'
        for number, (role, (head, tail)) in enumerate(turns.around.items())
    )
    return f"{turns.begin}{{{{ range .Messages }}}}{cases}{{{{ end }}}}{{{{ end }}}}{turns.ask}"


def turns_of(tokenizer: Any) -> Turns | None:
    """The turns of a chat template; None if it renders some of CONVERSATIONS as more than turns."""

    def render(*roles: str, ask: bool = True) -> str:
        messages = [{"role": role, "content": f"<{number}>"} for number, role in enumerate(roles)]
        options = template_options(tokenizer)
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask, **options))

    try:
        rendered = {roles: render(*roles) for roles in CONVERSATIONS}
        closed = [render(*ROLES[: count + 1], ask=False) for count in range(len(ROLES))]
    except TemplateError:  # a role, or an order of roles, that the template refuses
        return None
    bos = tokenizer.bos_token or ""
    begin = bos if bos and all(text.startswith(bos) and text.count(bos) == 1 for text in rendered.values()) else ""
    around = {}
    for number, role in enumerate(ROLES):
        turn = closed[number].removeprefix(closed[number - 1] if number else begin)
        head, content, tail = turn.partition(f"<{number}>")
        if not content or '"""' in turn or "{{" in turn:
            return None
        around[role] = (head, tail)
    ask = rendered["system", "user"].removeprefix(closed[1])

    def join(*turns: tuple[str, str]) -> str:
        return begin + "".join(around[role][0] + content + around[role][1] for role, content in turns) + ask

    head, tail = around["system"]
    system = rendered["user",].removeprefix(begin).removesuffix(join(("user", "<0>")).removeprefix(begin))
    system = system.removeprefix(head).removesuffix(tail)
    default_turn = [("system", system)] if system else []
    for roles, text in rendered.items():
        turns = [(role, f"<{number}>") for number, role in enumerate(roles)]
        if join(*(turns if roles[0] == "system" else default_turn + turns)) != text:
            return None
    return Turns(begin, around, ask, system)
