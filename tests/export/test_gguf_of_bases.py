"""The chat template of a base for llama.cpp writes around a medium what the base's own processor does."""

import pytest
from families import ZOO, conversation, family_folder
from families.native import native_inputs, native_processor

from finetune.export._gguf.base_template import with_markers

# What llama.cpp puts itself before and after a medium.
ENDS = {
    "qwen2_5_vl": ("<|vision_start|>", "<|vision_end|>"),
    "idefics3": ("<fake_token_around_image>", "<fake_token_around_image>"),
    "gemma3": ("<start_of_image>", "<end_of_image>"),
    "qwen2_audio": ("<|audio_bos|>", "<|audio_eos|>"),
}


@pytest.mark.parametrize("name", ENDS)
def test_a_marker_stands_where_the_processor_puts_the_medium(tmp_path, name):
    processor = native_processor(family_folder(name, tmp_path))
    question = conversation(name)[:1]
    ids = native_inputs(processor, question, add_generation_prompt=True)["input_ids"][0]
    prompt = processor.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    template = with_markers(ZOO[name].chat_template, ZOO[name].architecture)
    begin, end = ENDS[name]
    for marker in ("<__media__>", "<__media_Zr4__>"):
        joined = f"{marker}What is this?"
        for content in (joined, [{"type": "text", "text": joined}]):  # llama.cpp has both
            messages = [{"role": "user", "content": content}]
            written = processor.tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt=True
            )
            before, after = written.split(marker)
            assert prompt.startswith(before + begin) and prompt.endswith(end + after)
            assert after.count("What is this?") == 1


def test_conversations_without_media_are_written_as_before(tmp_path):
    tokenizer = native_processor(family_folder("gemma3", tmp_path)).tokenizer
    plain, template = ZOO["gemma3"].chat_template, with_markers(ZOO["gemma3"].chat_template, ZOO["gemma3"].architecture)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Who are you?"}]},
        {"role": "assistant", "content": "A model."},
        {"role": "user", "content": "And I?"},
    ]
    for add in (False, True):
        options = {"tokenize": False, "add_generation_prompt": add}
        expected = tokenizer.apply_chat_template(messages, chat_template=plain, **options)
        assert tokenizer.apply_chat_template(messages, chat_template=template, **options) == expected
