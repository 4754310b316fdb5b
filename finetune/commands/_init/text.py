"""The text of a recipe, with comments: what `finetune init` writes."""

from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import Environment, StrictUndefined

from finetune.commands._init.cards import InitCard, MediumParts
from finetune.commands._init.measure import Schedule
from finetune.commands._init.task import Yaml

TEMPLATE = """\
# {{ title }}; written by finetune init for {{ card.title }}
name: {{ name | flow }}
seed: {{ seed }}
model:
  {{ "base" if is_base else "llm" }}: {{ llm | flow }}  # stays frozen
{% if media and not is_base %}
  encoders:  # frozen too
{% for medium, parts in media.items() %}
    {{ medium }}: {{ parts.encoder | flow }}
{% endfor %}
  projectors:
{% for medium, parts in media.items() %}
    {{ medium }}: {{ parts.projector | flow }}  # {{ parts.tokens | round(1) }} tokens a {{
        "second" if medium == "audio" else "video" if medium == "video" else "picture" }}
{% endfor %}
{% endif %}
adapter: {rank: 16, alpha: 32, dropout: 0.05}
data:
  - path: {{ sources[0].path | flow }}
{% for key, value in sources[0].keys.items() %}
    {{ key }}: {{ value | flow }}{{ comments.get(key, "") }}
{% endfor %}
{% for source in sources[1:] %}
  - {{ source.whole() | flow }}
{% endfor %}
train:
{% if is_base %}
  tokens_per_batch: auto  # the tokens of a picture or recording depend on its processor
{% else %}
  tokens_per_batch: {{ schedule.tokens_per_batch }}  # the longest row has about {{ schedule.longest }}
{% endif %}
{% if card.checkpoints %}
  checkpoint_every_n_layers: 1  # less memory, more time
{% endif %}
{% if validates %}
  validation: {every_n_steps: 25}  # the best weights are kept
{% endif %}
  stages:  # about {{ "{:,}".format(schedule.steps) }} steps in all
{% if schedule.align %}
    - {name: align, trains: [{{ align }}], learning_rate: 1.0e-3, epochs: {{ schedule.align }}}
{% endif %}
    - {name: tune, trains: [{{ tune }}], learning_rate: {{ card.learning_rate }}, epochs: {{ schedule.tune }}}
evaluate: {max_new_tokens: {{ schedule.answer_tokens }}}  # length of the longest answer, with a margin
"""
COMMENTS = {
    "hold_out": "  # share of test rows, never trained on",
    "group": "  # its rows are all in training or all in the test",
}


@dataclass(frozen=True)
class WrittenSource:
    """`path`: as it is written; `keys`: the others of the source."""

    path: str
    keys: Yaml

    def whole(self) -> Yaml:
        return {"path": self.path, **self.keys}


@dataclass(frozen=True)
class Draft:
    """All that the text is made of. `trained_head`: whether the head has weights of its own; `validates`:
    whether there are validation rows; `is_base`: whether the LLM is an existing model that takes these media.
    """

    title: str
    name: str
    seed: int
    card: InitCard
    llm: Yaml
    media: dict[str, MediumParts]
    sources: Sequence[WrittenSource]
    schedule: Schedule
    trained_head: bool
    validates: bool
    is_base: bool = False

    def text(self) -> str:
        environment = Environment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, autoescape=False)
        environment.filters["flow"] = flow
        heads = ["heads"] if self.trained_head else []
        projectors = ["projectors"] if self.media and not self.is_base else []
        return (
            environment.from_string(TEMPLATE, globals={"comments": COMMENTS}).render(
                **vars(self),
                align=", ".join([*projectors, *heads]),
                tune=", ".join([*projectors, "adapter", *heads]),
            )
            + "\n"
        )


def flow(value: object) -> str:
    """A value as YAML writes it on one line."""
    import yaml

    text: str = yaml.safe_dump([value], default_flow_style=True, allow_unicode=True, width=10**9, sort_keys=False)
    return text.strip()[1:-1]
