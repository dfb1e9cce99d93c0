"""Chat templates of all families: no thoughts, one date on every day, and every answer learned.

The templates are short ones of our own that do what the families' templates do with thoughts,
dates and channels; those are longer because of tools and pictures.
"""

from __future__ import annotations

import datetime
from typing import Any

import pytest

from mis_mlx.data import chat_template, token_windows
from tests import tiny

# Thoughts of the last answer are shown, if empty; earlier answers stand without.
QWEN3 = """
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}
{%- if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' %}
{%- set thought = '' %}
{%- set content = m.content %}
{%- if '</think>' in content %}
{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{%- if loop.index0 > ns.last and (loop.last or thought) %}
{{- '<think>\\n' + thought + '\\n</think>\\n\\n' }}
{%- endif %}
{{- content }}
{%- else %}
{{- m.content }}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
PROMPT
{%- endif %}
"""
EMPTY = "{{- '<think>\\n\\n</think>\\n\\n' }}"
# Of Qwen 3.5's small models: they think only if asked to.
QWEN3_5_SMALL = QWEN3.replace(
    "PROMPT",
    "{%- if enable_thinking is defined and enable_thinking is true %}"
    "{{- '<think>\\n' }}{%- else %}" + EMPTY + "{%- endif %}",
)
ALWAYS = QWEN3.replace("PROMPT", "{{- '<think>\\n' }}")  # no switch at all
QWEN3 = QWEN3.replace(
    "PROMPT",
    "{%- if enable_thinking is defined and enable_thinking is false %}" + EMPTY + "{%- endif %}",
)
SMOLLM3 = """
{%- if enable_thinking is not defined -%}{%- set enable_thinking = true -%}{%- endif -%}
{%- set mode = '/think' if enable_thinking else '/no_think' -%}
{{- '<|im_start|>system\\n' -}}
{{- 'Today Date: ' ~ strftime_now('%d %B %Y') ~ '\\nReasoning Mode: ' ~ mode ~ '<|im_end|>\\n' -}}
{%- for m in messages -%}
{%- if m.role == 'assistant' and mode == '/no_think' -%}
{{- '<|im_start|>assistant\\n<think>\\n\\n</think>\\n' -}}
{{- m.content.lstrip('\\n') + '<|im_end|>\\n' -}}
{%- else -%}
{{- '<|im_start|>' + m.role + '\\n' + m.content.lstrip('\\n') + '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if mode == '/no_think' -%}{{- '<think>\\n\\n</think>\\n' -}}{%- endif -%}
{%- endif -%}
"""
GPT_OSS = """
{%- macro system_message() -%}
{%- if reasoning_effort is not defined %}{%- set reasoning_effort = 'medium' %}{%- endif %}
{{- 'Current date: ' + strftime_now('%Y-%m-%d') + '\\n\\n' }}
{{- 'Reasoning: ' + reasoning_effort + '\\n\\n' }}
{%- endmacro -%}
{{- '<|start|>system<|message|>' + system_message() + '<|end|>' }}
{%- for m in messages %}
{%- if m.role == 'assistant' and loop.last and not add_generation_prompt %}
{%- if 'thinking' in m %}
{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}
{%- endif %}
{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|return|>' }}
{%- elif m.role == 'assistant' %}
{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}
{%- else %}
{{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|start|>assistant{% endif %}
"""
GEMMA4 = """
{{- '<bos>' -}}
{%- if enable_thinking is defined and enable_thinking -%}
{{- '<|turn>system\\n<|think|>\\n<turn|>\\n' -}}
{%- endif -%}
{%- for m in messages -%}
{%- set role = 'model' if m.role == 'assistant' else m.role -%}
{{- '<|turn>' + role + '\\n' + m.content | trim + '<turn|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|turn>model\\n' -}}
{%- if not enable_thinking | default(false) -%}{{- '<|channel>thought\\n<channel|>' -}}{%- endif -%}
{%- endif -%}
"""
MISTRAL = """{{- '<s>' }}{%- for m in messages %}
{%- if m.role == 'user' %}{{- '[INST] ' + m.content + '[/INST]' }}
{%- else %}{{- ' ' + m.content + '</s>' }}{%- endif %}
{%- endfor %}"""
CHATML = """{% for m in messages %}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
TURN = "<|im_start|>assistant\n"
# {family: its template, what a prompt ends with}
FAMILIES = {
    "qwen3": (QWEN3, f"{TURN}<think>\n\n</think>\n\n"),
    "qwen3.5-small": (QWEN3_5_SMALL, f"{TURN}<think>\n\n</think>\n\n"),
    "qwen3-thinking": (ALWAYS, f"{TURN}<think>\n\n</think>\n\n"),
    "smollm3": (SMOLLM3, f"{TURN}<think>\n\n</think>\n"),
    "gpt-oss": (GPT_OSS, "<|start|>assistant<|channel|>final<|message|>"),
    "gemma4": (GEMMA4, "<|turn>model\n<|channel>thought\n<channel|>"),
    "mistral": (MISTRAL, "[/INST]"),
    "chatml": (CHATML, TURN),
}
# What a prompt ends with where thoughts are asked for.
THINKING = {
    "qwen3": TURN,
    "qwen3.5-small": f"{TURN}<think>\n",
    "qwen3-thinking": f"{TURN}<think>\n",
    "smollm3": TURN,
    "gpt-oss": "<|start|>assistant",
    "gemma4": "<|turn>model\n",
}
DATED = {"smollm3": "01 January 2026", "gpt-oss": "2026-01-01"}
MARKS = [
    *("<s>", "</s>", "<bos>", "<|im_start|>", "<|im_end|>", "[INST]"),
    *("[/INST]", "<|start|>", "<|end|>", "<|return|>", "<|message|>", "<|channel|>", "<|turn>"),
    *("<turn|>", "<|channel>", "<channel|>"),
]
QUESTION = {"role": "user", "content": "Co pije Miś?"}
TALK = [
    QUESTION,
    {"role": "assistant", "content": "Herbatę."},
    {"role": "user", "content": "A baca?"},
    {"role": "assistant", "content": "Baca też."},
]


@pytest.fixture(scope="module")
def plain() -> Any:
    """A byte-level BPE tokenizer of transformers with the marks of all templates."""
    made = tiny.byte_level(MARKS)
    made.add_tokens(["<think>", "</think>"])  # of Qwen's tokens these are not special
    return made


def of_family(plain: Any, family: str) -> Any:
    """mlx-lm's wrapper of the tokenizer with a family's template, as a model folder's is opened."""
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    plain.chat_template = FAMILIES[family][0]
    return TokenizerWrapper(plain)


def learned(tokenizer: Any, messages: list[dict[str, str]]) -> list[str]:
    """The pieces of a conversation that are learned, decoded."""
    ids, loss_mask = token_windows.conversation({"messages": messages}, tokenizer, True)
    pieces = list[list[int]]()
    before = 0
    for token, counts in zip(ids, loss_mask, strict=True):
        if counts and not before:
            pieces.append([])
        if counts:
            pieces[-1].append(token)
        before = counts
    return [tokenizer.decode(piece) for piece in pieces]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_ends_where_the_answer_begins(plain: Any, family: str) -> None:
    """Behind an empty thought, in the last channel; nothing else is added to it. Where thoughts are
    asked for it leaves room for them, and chooses no channel and no effort.
    """
    tokenizer = of_family(plain, family)
    prompt = tokenizer.decode(token_windows.prompt_ids([QUESTION], tokenizer))
    assert prompt.endswith(FAMILIES[family][1])
    asked = tokenizer.apply_chat_template(
        [QUESTION], add_generation_prompt=True, tokenize=False, enable_thinking=False
    )
    if family not in DATED and family != "qwen3-thinking":
        assert prompt == asked
    assert ("Reasoning: low\n" in prompt) == (family == "gpt-oss")
    thoughtful = chat_template.text([QUESTION], tokenizer, prompt=True, thinking=True)
    assert thoughtful.endswith(THINKING.get(family, FAMILIES[family][1]))
    assert "Reasoning: low" not in thoughtful


@pytest.mark.parametrize("family", FAMILIES)
def test_every_answer_is_learned_and_nothing_before_it(plain: Any, family: str) -> None:
    """Both turns, though some templates rewrite the first one when a second one follows."""
    tokenizer = of_family(plain, family)
    first, second = learned(tokenizer, TALK)
    assert first.strip().startswith("Herbatę.")
    assert second.strip().startswith("Baca też.")
    assert "think" not in first + second
    assert "user" not in first


def test_own_thoughts_in_an_answer_are_learned(plain: Any) -> None:
    """A row with thoughts is rendered with them: the answer begins at their beginning."""
    thoughtful = [QUESTION, {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nRum."}]
    for family in ("qwen3", "smollm3"):
        tokenizer = of_family(plain, family)
        (answer,) = learned(tokenizer, thoughtful)
        assert answer.startswith("<think>\nHm.\n</think>\n\nRum.")
    spoken = [QUESTION, {"role": "assistant", "content": "Rum.", "thinking": "Hm."}]
    (answer,) = learned(of_family(plain, "gpt-oss"), spoken)
    assert answer.startswith("<|channel|>analysis<|message|>Hm.<|end|>")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_template_says_the_same_on_every_day(
    plain: Any, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its windows and its identity, whatever the clock of transformers says; a chat has today."""

    class Fixed(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            """Noon of the day."""
            return cls(2030, 5, days[len(found)], 12)

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Fixed)
    tokenizer = of_family(plain, family)
    days = [1, 2]
    found = list[Any]()
    for _ in days:
        windows = token_windows.conversation({"messages": TALK}, tokenizer, True)
        prompt = token_windows.prompt_ids([QUESTION], tokenizer)
        found.append((windows, prompt, chat_template.identity(tokenizer)))
    assert found[0] == found[1]
    text = tokenizer.decode(found[0][1])
    if family in DATED:
        assert DATED[family] in text
        chat = tokenizer.decode(token_windows.prompt_ids([QUESTION], tokenizer, today=True))
        assert str(datetime.date.today().year) in chat
        assert DATED[family] not in chat


def test_a_clock_of_its_own_changes_nothing_else(plain: Any) -> None:
    """Every directive as Python has it, and blanks at the template's beginning stay."""
    day = datetime.date(2026, 3, 7)
    for form in ("%d %b %Y", "%Y-%m-%d", "%B %-d, %Y", "%A %H:%M:%S, %j %y"):
        for begin in ("", "\n", "  \n", "  {% if true %}x{% endif %}\n "):
            template = f"{begin}{{{{ strftime_now('{form}') }}}}|{{{{ messages[0].content }}}}"
            plain.chat_template = chat_template.dated(template, day)
            mine = plain.apply_chat_template([QUESTION], tokenize=False)
            plain.chat_template = template.replace("strftime_now('" + form + "')", "'@'")
            assert mine == plain.apply_chat_template([QUESTION], tokenize=False).replace(
                "@", day.strftime(form)
            )


def test_identity_is_the_templates_where_nothing_is_told(plain: Any) -> None:
    """So answers that are kept for such a template stay known; others differ from before."""
    import hashlib

    for family, (template, _) in FAMILIES.items():
        tokenizer = of_family(plain, family)
        before = hashlib.sha256(template.encode()).hexdigest()
        same = family in ("chatml", "mistral")
        assert (chat_template.identity(tokenizer) == before) is same, family
