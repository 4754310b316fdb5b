"""What the written folders share: the LLM's weights by their new names, its config, and the tokenizer."""

import copy
from typing import Any

import torch
from torch import Tensor

from finetune.model.assistant import Assistant
from finetune.model.chat_template import with_media_parts

NAME = "model.language_model"


def language_model_state(causal_lm: Any, rows: int) -> tuple[dict[str, Tensor], bool]:
    """({name: weight}, whether the output head is the embedding table).

    The head is `lm_head.weight` and, if it has a bias, `lm_head.bias`; everything else is below `model.language_model`.
    Table and head get at least `rows` rows, so that each placeholder has one.
    """
    table, head = causal_lm.get_input_embeddings().weight, causal_lm.get_output_embeddings()
    state = {f"{NAME}.{name}": tensor.detach() for name, tensor in causal_lm.base_model.state_dict().items()}
    (table_name,) = {name for name, tensor in state.items() if tensor.data_ptr() == table.data_ptr()}
    tied = head.weight.data_ptr() == table.data_ptr()
    state[table_name] = lengthened(table.detach(), rows)
    state["lm_head.weight"] = state[table_name] if tied else lengthened(head.weight.detach(), rows)
    if head.bias is not None:
        state["lm_head.bias"] = lengthened(head.bias.detach()[:, None], rows)[:, 0]
    return state, tied


def lengthened(table: Tensor, rows: int) -> Tensor:
    """A table (V, D) with the mean of its rows appended until it has `rows`. As outputs, their logit is the mean of all
    others, which is never the largest: none is ever generated.
    """
    if rows <= len(table):
        return table
    mean = table.float().mean(0, keepdim=True).to(table.dtype)
    return torch.cat([table, mean.expand(rows - len(table), -1)])


def text_config(assistant: Assistant) -> Any:
    """A copy of the LLM's config for a table with a row for each placeholder, without the path of its weights."""
    config = copy.deepcopy(assistant.model.config.text_config)
    config.vocab_size = max(config.vocab_size, len(assistant.tokenizer))
    config.architectures = [type(assistant.model.causal_lm).__name__]
    config.name_or_path = ""
    return config


def media_tokenizer(assistant: Assistant) -> Any:
    """A copy of the tokenizer whose chat template takes media as parts of a message."""
    tokenizer = copy.deepcopy(assistant.tokenizer)
    tokenizer.chat_template = with_media_parts(tokenizer, assistant.placeholders)
    return tokenizer
