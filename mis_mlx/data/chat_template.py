"""Conversations through a model's chat template: everything that renders one does it here.

What a template says must be the same on every day and in every command, or a run that goes on
would have other windows, and kept answers would be answers to other prompts. So:

- `strftime_now`, by which templates ask for today's date, gives DATE, unless a person chats.
- Models that can think aloud first do not (`enable_thinking`): an answer of a hundred tokens would
  end in the middle of a thought. Where a template has no such switch but writes something of its
  own between the prompt and an answer, as gpt-oss names the channel, the answer begins behind that.

A conversation whose own answers show thoughts is rendered with them.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any

DATE = date(2026, 1, 1)  # what templates are told is today
CLOCK = "strftime_now"
# Directives of strftime that have the same meaning on all platforms, longest first.
DIRECTIVES = ("%-d", "%-m", *(f"%{letter}" for letter in "aAbBdejmyYFDxUuwGVHIMSpTRcX"))
THINKING = "<think>"
THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # keys of a message, beside its content
# gpt-oss cannot be asked not to think, only to think little; its templates name channels.
EFFORT = "reasoning_effort"
CHANNEL = "<|channel|>"
LEAST_EFFORT = "low"
# Stands in for an answer, to find out where a template puts it: of a private plane, no word.
ANSWER = "\U000ffffd"
PROBE = [{"role": "user", "content": "Who are you?"}]
# A tool that no model knows, to find out whether a template says anything of tools.
UNKNOWN = "polish_the_barometer"
UNKNOWN_TOOL = {
    "type": "function",
    "function": {
        "name": UNKNOWN,
        "description": "Polishes it.",
        "parameters": {"type": "object", "properties": {}, "required": []},
    },
}

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]]  # as OpenAI's API and transformers write them


def text(
    messages: Messages,
    tokenizer: Any,
    *,
    prompt: bool = False,
    thinking: bool = False,
    today: bool = False,
    tools: Tools = (),
) -> str:
    """The conversation as the template writes it.

    prompt: up to where the next answer begins. thinking: with the switch for thoughts on. today:
    dated today instead of DATE. tools: that the model may call. Errors of the template pass
    through: it is a program of the model's, and can raise anything.
    """
    day = date.today() if today else DATE
    options = _options(tokenizer, day, thinking=thinking)
    if tools:
        options["tools"] = [dict(tool) for tool in tools]
    if not prompt:
        return str(_applied(messages, tokenizer, options))
    asked = str(_applied(messages, tokenizer, {**options, "add_generation_prompt": True}))
    if thinking:
        return asked
    return asked + _opening(asked, messages, tokenizer, options)


def thinks(messages: Messages, tokenizer: Any) -> bool:
    """Whether answers of a conversation show thoughts of their own."""
    mark = getattr(tokenizer, "think_start", None) or THINKING
    for message in messages:
        if message["role"] != "assistant":
            continue
        if mark in message["content"] or any(message.get(key) for key in THOUGHTS):
            return True
    return False


def knows_tools(tokenizer: Any) -> bool:
    """Whether the template tells the model which tools it may call."""
    if not getattr(tokenizer, "has_chat_template", False):
        return False
    try:
        said = text(PROBE, tokenizer, prompt=True, tools=[UNKNOWN_TOOL])
    except Exception:  # as in `text`
        return False
    return UNKNOWN in said


def identity(tokenizer: Any) -> str:
    """sha256, in hex, of the template and of what is told to it: others give other answers."""
    told = str(tokenizer.chat_template) + changes(tokenizer)
    return hashlib.sha256(told.encode()).hexdigest()


def changes(tokenizer: Any) -> str:
    """A prompt as it is written here; '' where mlx-lm writes the same one, on every day."""
    try:
        here = text(PROBE, tokenizer, prompt=True)
        elsewhere = _applied(PROBE, tokenizer, {"add_generation_prompt": True})
    except Exception:  # as in `text`: a template that refuses this may take other prompts
        return ""
    if here == elsewhere and CLOCK not in _source(tokenizer):
        return ""
    return here


def _applied(messages: Messages, tokenizer: Any, options: Mapping[str, Any]) -> Any:
    """The conversation as transformers renders it, or a program of mlx-lm's."""
    given = [dict(message) for message in messages]
    return tokenizer.apply_chat_template(given, tokenize=False, **options)


def _source(tokenizer: Any) -> str:
    """The template's text; '' where there is none, or a program in its place."""
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, Mapping):  # several, by name
        template = template.get("default")
    return template if isinstance(template, str) else ""


def _options(tokenizer: Any, day: date, *, thinking: bool) -> dict[str, Any]:
    """What the template is told beside the messages."""
    source = _source(tokenizer)
    # mlx-lm passes this to every template, as True for all models that can think.
    options: dict[str, Any] = {"enable_thinking": thinking}
    if EFFORT in source and CHANNEL in source and not thinking:
        options[EFFORT] = LEAST_EFFORT
    if CLOCK in source:
        options["chat_template"] = dated(source, day)
    return options


def dated(template: str, day: date) -> str:
    """The template with a clock of its own, which stands at the beginning of `day`.

    A macro hides Jinja's global function of its name. Jinja drops the line break behind it, so that
    the template begins as it did.
    """
    steps = []
    for directive in DIRECTIVES:
        if directive in template:
            said = day.strftime(directive)
            steps.append(f'| replace("{directive}", "{said}")')
    chain = " ".join(steps)
    return f"{{% macro {CLOCK}(form) %}}{{{{ form {chain} }}}}{{% endmacro %}}\n{template}"


def _opening(
    asked: str,
    messages: Messages,
    tokenizer: Any,
    options: Mapping[str, Any],
) -> str:
    """What the template writes between the prompt `asked` and an answer, if that is a token of its
    own: the name of a channel, the end of a thought. '' for blanks and words.
    """
    try:
        answer = {"role": "assistant", "content": ANSWER}
        whole = str(_applied([*messages, answer], tokenizer, options))
    except Exception:  # as in `text`; the prompt itself was accepted
        return ""
    before, found, _ = whole.partition(ANSWER)
    if not found or not before.startswith(asked):
        return ""
    opening = before[len(asked) :]
    marks = re.findall(r"<[^<>]+>", opening)
    known = tokenizer.get_vocab() if marks else {}
    return opening if any(mark in known for mark in marks) else ""
