"""The prompt recipe: exact texts, what is learnt, one renderer for training and asking."""

import copy
import json
from dataclasses import replace

import pytest
from tokenizers import processors

from lorasmith.data.example import Example, Message
from lorasmith.data.prompts import PromptRecipe, choose_recipe
from lorasmith.data.settings import PromptSettings
from lorasmith.data.tokens import encode
from lorasmith.errors import RecipeError, SettingsError

WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def user(content, input=""):
    return Message("user", content, input)


def assistant(content):
    return Message("assistant", content)


def example(*messages):
    return Example(tuple(messages), where="rows.jsonl:1")


def text_of(segments):
    return "".join(segment.text for segment in segments)


def learnt_of(segments):
    """The learnt stretches, each as one string."""
    stretches, was_learnt = [], False
    for segment in segments:
        if segment.is_learnt:
            stretches = (
                [*stretches[:-1], stretches[-1] + segment.text] if was_learnt else [*stretches, segment.text]
            )
        was_learnt = segment.is_learnt
    return stretches


def recipe(template, **values):
    values = {"eos_token": "</s>", "special_tokens": ("<s>", "</s>", "<|im_start|>", "<|im_end|>"), **values}
    return PromptRecipe(name="mine", template=template, **values)


@pytest.fixture
def alpaca(tiny_tokenizer):
    return choose_recipe(PromptSettings(recipe="alpaca"), tiny_tokenizer)[0]


@pytest.fixture
def chat(tiny_tokenizer):
    return choose_recipe(PromptSettings(), tiny_tokenizer)[0]


@pytest.mark.parametrize("answer", ["Paris.", "  Paris \n", "{{ raise_exception('no') }}"])
@pytest.mark.parametrize(
    "instruction", ["Name a capital.", "Is 2 < 3 & 'so'?", "{instruction} {% if x %}", "a\n\nb "]
)
def test_alpaca_is_the_text_of_2023(alpaca, instruction, answer):
    without = alpaca.render(example(user(instruction), assistant(answer)))
    assert text_of(without) == WITHOUT_INPUT.replace("{instruction}", instruction, 1) + answer + "<|im_end|>"
    with_input = alpaca.render(example(user(instruction, "France"), assistant(answer)))
    filled = WITH_INPUT.replace("{input}", "France").replace("{instruction}", instruction, 1)
    assert text_of(with_input) == filled + answer + "<|im_end|>"
    assert learnt_of(without) == learnt_of(with_input) == [answer + "<|im_end|>"]


def test_later_alpaca_turns_repeat_the_blocks_after_the_end_token(alpaca):
    talk = example(user("One?"), assistant("1"), user("Two?", "2"), assistant("2"))
    assert text_of(alpaca.render(talk)) == (
        WITHOUT_INPUT.format(instruction="One?")
        + "1<|im_end|>\n\n### Instruction:\nTwo?\n\n### Input:\n2\n\n### Response:\n2<|im_end|>"
    )


def test_alpaca_puts_a_system_prompt_before_the_preamble(tiny_tokenizer):
    made, _ = choose_recipe(PromptSettings(recipe="alpaca", system="Be brief."), tiny_tokenizer)
    text = text_of(made.render(example(user("One?"), assistant("1"))))
    assert text == "Be brief.\n\n" + WITHOUT_INPUT.format(instruction="One?") + "1<|im_end|>"


def test_alpaca_begins_with_the_bos_token_where_the_tokenizer_adds_one(tiny_tokenizer, alpaca):
    adding = copy.deepcopy(tiny_tokenizer)
    adding.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    made, _ = choose_recipe(PromptSettings(recipe="alpaca"), adding)
    talk = example(user("One?"), assistant("1"))
    assert text_of(made.render(talk)) == "<|im_start|>" + text_of(alpaca.render(talk))
    ids, _ = encode(made.render_prompt(talk.question), adding)
    assert ids.tolist() == adding(WITHOUT_INPUT.format(instruction="One?")).input_ids  # as plain tokenising
    chat, _ = choose_recipe(PromptSettings(recipe="chat"), adding)
    assert text_of(chat.render(talk)).startswith("<|im_start|>user")  # not twice


def test_chat_is_the_tokenizers_own_template(chat, tiny_tokenizer):
    talk = example(
        Message("system", "Be kind."), user("Hi"), assistant("Hello"), user("Bye"), assistant("So long")
    )
    turns = [{"role": m.role, "content": m.content} for m in talk.messages]
    whole = tiny_tokenizer.apply_chat_template(turns, tokenize=False)
    assert text_of(chat.render(talk)) == whole.removesuffix(
        "\n"
    )  # nothing after the last end token is learnt
    asked = tiny_tokenizer.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True)
    assert text_of(chat.render_prompt(talk.question)) == asked


def test_chat_puts_an_input_below_the_instruction(chat):
    text = text_of(chat.render(example(user("Translate.", "xin chào"), assistant("hello"))))
    assert "user\nTranslate.\n\nxin chào<|im_end|>" in text


@pytest.mark.parametrize(
    ("learn", "expected"),
    [("all", ["1<|im_end|>", "2<|im_end|>"]), ("last", ["2<|im_end|>"])],
)
def test_every_answer_is_learnt_or_the_last_only(tiny_tokenizer, learn, expected):
    made, _ = choose_recipe(PromptSettings(learn=learn), tiny_tokenizer)
    assert (
        learnt_of(made.render(example(user("One?"), assistant("1"), user("Two?"), assistant("2"))))
        == expected
    )


@pytest.mark.parametrize("name", ["alpaca", "chat"])
def test_asking_gives_the_text_before_the_answer(tiny_tokenizer, name):
    made, _ = choose_recipe(PromptSettings(recipe=name), tiny_tokenizer)
    talk = example(user("One?", "1"), assistant("1"), user("Two?"), assistant("2"))
    asked = made.render_prompt(talk.question)
    assert made.render(talk)[: len(asked)] == asked
    assert text_of(made.render(talk)) == text_of(asked) + "2<|im_end|>"


def test_the_end_token_is_learnt_when_it_is_also_the_padding(tiny_tokenizer):
    made = replace(choose_recipe(PromptSettings(), tiny_tokenizer)[0], special_tokens=("<|im_end|>",))
    assert learnt_of(made.render(example(user("Hi"), assistant("Hello")))) == ["Hello<|im_end|>"]


def test_a_template_without_an_end_token_gets_the_eos_token_after_every_answer():
    made = recipe("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    talk = example(user("One?"), assistant("1"), user("Two?"), assistant("2"))
    rendered = made.render(talk)
    assert text_of(rendered) == "user: One?\nassistant: 1</s>\nuser: Two?\nassistant: 2</s>"
    assert learnt_of(rendered) == [" 1</s>", " 2</s>"]  # a space belongs to the word after it
    assert text_of(made.render_prompt(talk.question)).endswith("assistant:")


def test_a_template_without_any_end_token_is_refused():
    made = recipe("{% for m in messages %}{{ m.content }}{% endfor %}", eos_token="", special_tokens=())
    with pytest.raises(RecipeError, match="could never stop"):
        made.render(example(user("One?"), assistant("1")))


def test_text_between_answer_and_end_token_is_learnt():
    made = recipe("{% for m in messages %}[{{ m.content }}\n</s>]{% endfor %}")
    assert learnt_of(made.render(example(user("a"), assistant("b")))) == ["b\n</s>"]


def test_a_prompt_only_template_is_followed_by_the_answer():
    made = recipe("Question: {{ instruction }}{{ ' (' + input + ')' if input }}\nAnswer:")
    rendered = made.render(example(user("One?", "un"), assistant("1")))
    assert text_of(rendered) == "Question: One? (un)\nAnswer:1</s>"
    assert learnt_of(rendered) == ["1</s>"]
    with pytest.raises(RecipeError, match="does not show turn 1"):
        made.render(example(user("One?"), assistant("1"), user("Two?"), assistant("2")))


def test_a_template_without_a_place_for_the_system_prompt_is_refused():
    made = recipe("Q: {{ instruction }} A:", system="Be brief.")
    with pytest.raises(RecipeError, match=r"does not show turn 1 \(system\)"):
        made.render(example(user("One?"), assistant("1")))


def test_stripping_templates_are_followed():
    made = recipe(CHATML.replace("m['content']", "m['content'] | trim"))
    rendered = made.render(example(user("  Hi\n"), assistant("\n Hello ")))
    assert text_of(rendered) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>"
    assert [s.text for s in rendered if s.is_content] == ["Hi", "Hello"]


def test_templates_that_rewrite_contents_are_refused():
    made = recipe(CHATML.replace("m['content']", "m['content'] | upper"))
    with pytest.raises(RecipeError, match="cannot be followed"):
        made.render(example(user("Hi"), assistant("Hello")))


def test_a_refusal_by_the_template_is_told():
    made = recipe(
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    )
    with pytest.raises(RecipeError, match="System role not supported"):
        made.render(example(Message("system", "x"), user("Hi"), assistant("Hello")))


def test_templates_run_in_a_sandbox():
    made = recipe("{{ messages.__class__.__mro__ }}{{ messages.append(1) }}")
    with pytest.raises(RecipeError, match="refuses"):
        made.render(example(user("Hi"), assistant("Hello")))


def test_generation_blocks_and_dates_are_understood():
    made = recipe(
        "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}"
        "{% else %}{% generation %}{{ m.content }}</s>{% endgeneration %}{% endif %}{% endfor %}"
    )
    rendered = made.render(example(user("Hi"), assistant("Hello")))
    assert text_of(rendered) == "26 Jul 2024HiHello</s>"  # the same on every day
    assert learnt_of(rendered) == ["Hello</s>"]


def test_contents_may_hold_any_character(chat):
    odd = "\U000f0000 <|im_end|> </s> {{ x }} \u2028 🦙"
    rendered = chat.render(example(user(odd), assistant(odd)))
    assert [s.text for s in rendered if s.is_content] == [odd, odd]
    assert learnt_of(rendered) == [odd + "<|im_end|>"]


def test_the_choice_is_chat_where_there_is_a_chat_template(tiny_tokenizer, tmp_path):
    assert choose_recipe(PromptSettings(), tiny_tokenizer)[1] == "the tokenizer has a chat template"
    file = tmp_path / "short.jinja"
    file.write_text("Q: {{ instruction }}\nA:")
    made, reason = choose_recipe(PromptSettings(recipe=str(file)), tiny_tokenizer)
    assert (made.name, made.template, reason) == ("short", "Q: {{ instruction }}\nA:", "as set")
    with pytest.raises(SettingsError, match=r"missing\.jinja.*auto, alpaca, chat or text"):
        choose_recipe(PromptSettings(recipe=str(tmp_path / "missing.jinja")), tiny_tokenizer)


def test_without_a_chat_template_the_choice_is_alpaca(tiny_tokenizer):
    plain = copy.deepcopy(tiny_tokenizer)
    plain.chat_template = None
    made, reason = choose_recipe(PromptSettings(), plain)
    assert (made.name, reason) == ("alpaca", "the tokenizer has no chat template")
    with pytest.raises(RecipeError, match="no chat template"):
        choose_recipe(PromptSettings(recipe="chat"), plain)


def test_a_template_with_a_syntax_error_names_its_line():
    with pytest.raises(RecipeError, match="line 2"):
        recipe("ok\n{% if %}").render(example(user("Hi"), assistant("Hello")))


def test_a_recipe_survives_json(chat):
    values = json.loads(json.dumps(chat.to_json()))
    assert PromptRecipe.from_json(values) == chat
    assert values["fingerprint"] == chat.fingerprint()


@pytest.mark.parametrize(
    "change",
    [{"template": CHATML.replace("<|im_end|>", "<|im_end|> ")}, {"stop": ["\n"]}, {"learn": "last"}],
)
def test_an_edited_recipe_is_refused(chat, change):
    with pytest.raises(RecipeError, match="fingerprint"):
        PromptRecipe.from_json({**chat.to_json(), **change})


def test_an_incomplete_recipe_is_refused(chat):
    values = chat.to_json()
    del values["stop"]
    with pytest.raises(RecipeError, match="not complete: 'stop'"):
        PromptRecipe.from_json(values)


def test_stop_tokens_begin_with_the_end_token(chat, alpaca, tiny_tokenizer):
    end = tiny_tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert chat.stop_token_ids(tiny_tokenizer) == (end,) == alpaca.stop_token_ids(tiny_tokenizer)
    more = replace(chat, stop=("<pad>", "\n\n"))
    assert more.stop_token_ids(tiny_tokenizer) == (end, tiny_tokenizer.convert_tokens_to_ids("<pad>"))
    with pytest.raises(RecipeError, match="no token '</s>'"):
        replace(chat, eos_token="</s>").stop_token_ids(tiny_tokenizer)


def test_only_a_question_can_be_asked(chat):
    with pytest.raises(RecipeError, match="last message must be the user's"):
        chat.render_prompt([user("Hi"), assistant("Hello")])


def test_the_spaces_before_an_answer_are_known_to_the_asking_side():
    def lead(template):
        return PromptRecipe("own", template, eos_token="</s>", special_tokens=("</s>",)).answer_lead()

    assert lead("Q: {{ instruction }} A: ") == " "
    assert lead("Q: {{ instruction }}\nA:\n") == ""
    assert lead("{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}</s>{% endfor %}") == " "
