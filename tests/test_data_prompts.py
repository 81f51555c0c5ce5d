"""Templates: literal texts, and format strings of the user's own."""

from __future__ import annotations

import pytest

from packloop.config import CustomTemplate
from packloop.data.prompts import get_template, needed_texts
from packloop.errors import ConfigError


def texts(template, row):
    template = get_template(template)
    return template.render_prompt(row), template.render_response(row)


def test_instruction_from_response():
    assert texts("instruction_from_response", {"instruction": "Say hello.", "response": "Hello {you}!\n"}) == (
        "### Instruction:\nUse the Input below to create an instruction, which could have been used to generate the "
        "input using an LLM.\n\n### Input:\nHello {you}!\n\n\n### Response:\n",
        "Say hello.\n",
    )


def test_alpaca_with_input():
    assert texts("alpaca", {"instruction": "Add.", "input": "1, 2", "output": "3"}) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n"
        "### Response:\n",
        "3",
    )


@pytest.mark.parametrize("given", [{}, {"input": ""}, {"input": " \n"}])
def test_alpaca_without_input(given):
    assert texts("alpaca", {"instruction": "Add.", "output": "3", **given}) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Response:\n",
        "3",
    )


def test_dolly_with_context():
    assert texts("dolly", {"instruction": "Who?", "context": "Ann came.", "response": "Ann"}) == (
        "### Instruction:\nWho?\n\n### Context:\nAnn came.\n\n### Response:\n",
        "Ann",
    )


@pytest.mark.parametrize("given", [{}, {"context": ""}])
def test_dolly_without_context(given):
    assert texts("dolly", {"instruction": "Who?", "response": "Ann", **given}) == (
        "### Instruction:\nWho?\n\n### Response:\n",
        "Ann",
    )


@pytest.mark.parametrize(
    ("name", "fields", "optional"),
    [
        ("instruction_from_response", ("instruction", "response"), ()),
        ("alpaca", ("instruction", "output"), ("input",)),
        ("dolly", ("instruction", "response"), ("context",)),
    ],
)
def test_fields(name, fields, optional):
    template = get_template(name)
    assert (template.name, template.fields, template.optional_fields) == (name, fields, optional)


def test_custom():
    template = get_template(CustomTemplate(prompt="Q: {question} {{x}} {question}\nA: ", response="{answer}{{}}"))
    assert template.fields == ("question", "answer")
    row = {"question": "{answer} {0} {{", "answer": "}{"}
    assert template.render_prompt(row) == "Q: {answer} {0} {{ {x} {answer} {0} {{\nA: "
    assert template.render_response(row) == "}{{}"


def test_custom_columns_may_have_spaces_and_other_scripts():
    template = get_template(CustomTemplate(prompt="{my question}", response="{回答}"))
    assert template.fields == ("my question", "回答")
    assert template.render_prompt({"my question": "x", "回答": "y"}) == "x"


def test_custom_prompt_may_be_empty():
    assert texts(CustomTemplate(prompt="", response="{text}"), {"text": "x"}) == ("", "x")


@pytest.mark.parametrize("setting", ["prompt", "response"])
@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{a.__class__}", "{a.__class__} is more than a column's name"),
        ("{a[0]}", "{a[0]} is more than a column's name"),
        ("{a.b[c]}", "more than a column's name"),
        ("{a!r}", "{a!r} is more than a column's name"),
        ("{a:>10}", "{a:>10} is more than a column's name"),
        ("{a:{b}}", "more than a column's name"),
        ("{}", "{} names no column"),
        ("{ }", "names no column"),
        ("{0}", "{0} names no column"),
        ("{a", "expected '}' before end of string"),
        ("a}", "Single '}' encountered"),
        ("{a}{", "Single '{' encountered"),
        ("{a}}", "Single '}' encountered"),
    ],
)
def test_custom_format_strings_are_text_and_columns_alone(setting, text, problem):
    parts = {"prompt": "{a}", "response": "{a}", setting: text}
    with pytest.raises(ConfigError) as caught:
        get_template(CustomTemplate(**parts))
    message = str(caught.value)
    assert message.startswith(f"data.template.{setting}={text!r}: ")
    assert problem in message
    assert "{{ or }}" in message
    assert "\n" not in message


@pytest.mark.parametrize("response", ["", "done", "{{answer}}"])
def test_custom_response_must_name_a_column(response):
    with pytest.raises(ConfigError, match=r"data\.template\.response=.*names no column.*\{answer\}"):
        get_template(CustomTemplate(prompt="{a}", response=response))


def test_unknown_template():
    with pytest.raises(ConfigError, match=r"data\.template='vicuna': no such template; allowed: instruction_from_resp"):
        get_template("vicuna")


@pytest.mark.parametrize(
    ("template", "loss_on", "needed"),
    [
        ("instruction_from_response", "all", [("response",)]),
        ("instruction_from_response", "response", [("response",), ("instruction",)]),
        ("alpaca", "response", [("instruction", "input"), ("output",)]),
        ("dolly", "all", [("instruction", "context")]),
        (CustomTemplate(prompt="", response="{a}"), "all", []),
        (CustomTemplate(prompt="{a} {b}", response="{c}"), "response", [("a", "b"), ("c",)]),
    ],
)
def test_texts_of_which_a_row_must_hold_one(template, loss_on, needed):
    """Of a prompt's fields any may be blank, such as Dolly's context, but not all."""
    assert needed_texts(get_template(template), loss_on) == needed
