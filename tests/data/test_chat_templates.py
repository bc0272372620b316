"""The templates of well-known model families: what is learnt, where it ends, what is asked."""

import pytest

from lorasmith.data.example import Example, Message
from lorasmith.data.prompts import PromptRecipe
from lorasmith.errors import RecipeError

LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA_3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
    "{{ '<|user|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'system' %}\n"
    "{{ '<|system|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'assistant' %}\n"
    "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
THINKING = (  # as Qwen 3: earlier thoughts are cut out, the last answer gets an empty one
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.role == 'assistant' %}{% set content = message.content.split('</think>')[-1].lstrip('\n') %}"
    "{% if loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ content }}"
    "{% else %}{{ message.content }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

USER, ANSWER = Message("user", "Hi "), Message("assistant", "Hello")
TALK = Example((USER, ANSWER, Message("user", "Bye"), Message("assistant", "So long")), where="rows.jsonl:1")


def recipe(template, eos_token, *more):
    return PromptRecipe(
        name="chat",
        template=template,
        bos_token="<s>",
        eos_token=eos_token,
        special_tokens=("<s>", eos_token, *more),
    )


FAMILIES = {
    "llama 2": (
        recipe(LLAMA_2, "</s>"),
        "<s>[INST] Hi [/INST] Hello </s><s>[INST] Bye [/INST] So long </s>",
        [" Hello </s>", " So long </s>"],
        "<s>[INST] Hi [/INST] Hello </s><s>[INST] Bye [/INST]",
        ("</s>",),
    ),
    "llama 3": (
        recipe(LLAMA_3, "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
        "<s><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nSo long<|eot_id|>",
        ["Hello<|eot_id|>", "So long<|eot_id|>"],
        "<s><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ("<|eot_id|>", "<|end_of_text|>"),
    ),
    "gemma": (
        recipe(GEMMA, "<eos>", "<start_of_turn>", "<end_of_turn>"),
        "<s><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHello<end_of_turn>\n"
        "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\nSo long<end_of_turn>",
        ["Hello<end_of_turn>", "So long<end_of_turn>"],
        "<s><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHello<end_of_turn>\n"
        "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n",
        ("<end_of_turn>", "<eos>"),
    ),
    "zephyr": (
        recipe(ZEPHYR, "</s>"),
        "<|user|>\nHi </s>\n<|assistant|>\nHello</s>\n<|user|>\nBye</s>\n<|assistant|>\nSo long</s>",
        ["Hello</s>", "So long</s>"],
        "<|user|>\nHi </s>\n<|assistant|>\nHello</s>\n<|user|>\nBye</s>\n<|assistant|>\n",
        ("</s>",),
    ),
    "thinking": (
        recipe(THINKING, "<|im_end|>", "<|im_start|>"),
        "<|im_start|>user\nHi <|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nSo long<|im_end|>",
        ["Hello<|im_end|>", "So long<|im_end|>"],
        "<|im_start|>user\nHi <|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        ("<|im_end|>",),
    ),
}


@pytest.mark.parametrize("family", list(FAMILIES))
def test_families(family):
    made, text, learnt, asked, ends = FAMILIES[family]
    segments = made.render(TALK)
    assert "".join(s.text for s in segments) == text
    stretches = "".join(f"\0{s.text}" if s.is_learnt else "\1" for s in segments).split("\1")
    assert [stretch.replace("\0", "") for stretch in stretches if stretch] == learnt
    prompt = made.render_prompt(TALK.question)
    assert "".join(s.text for s in prompt) == asked
    assert segments[: len(prompt)] == prompt
    assert made.end_tokens() == ends


def test_thoughts_that_the_template_cuts_out_are_refused():
    made = FAMILIES["thinking"][0]
    with pytest.raises(RecipeError, match="cannot be followed"):
        made.render(Example((USER, Message("assistant", "<think>hm</think>Hello")), where="rows.jsonl:1"))


def test_a_family_without_system_turns_says_so():
    with pytest.raises(RecipeError, match="System role not supported"):
        FAMILIES["gemma"][0].render(
            Example((Message("system", "Be kind."), USER, ANSWER), where="rows.jsonl:1")
        )
