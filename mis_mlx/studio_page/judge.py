"""Judge: a talk with teacher and student side by side."""

import asyncio
import time
from pathlib import Path
from typing import Any

from mis_mlx.reporting import run_reader
from mis_mlx.reporting.run_reader import RunRecord
from mis_mlx.studio_page import places, runs, wishes
from mis_mlx.studio_page.conversation import Asked, Conversation, figure_words
from mis_mlx.studio_page.runs import FINISHED, Listed
from mis_mlx.studio_page.studio_state import Alert, Studio
from mis_mlx.studio_page.wishes import Wishes
from mis_mlx.types import MisError, evenly

SHORT = 44  # characters of a prompt on its button
PROMPTS = 6  # held-out ones to click
PROMPT_CHARACTERS = 8000
PROCESS_BYTES = 200 * 2**20  # of a process that generates, beside the weights
MOST_TOKENS = 512
FORGOTTEN = (
    "This turn is not remembered, as not both have answered: change the prompt or Tokens, or begin "
    "anew."
)


def build(studio: Studio, chosen: Wishes, tabs: Any) -> None:
    """The panel."""
    _Judge(studio, chosen, tabs)


class _Judge:
    """One finished run at a time."""

    def __init__(self, studio: Studio, chosen: Wishes, tabs: Any) -> None:
        self.studio = studio
        self.chosen = chosen
        self.task: asyncio.Task[None] | None = None
        self.conversation = Conversation()
        self.talked_with = ""  # the run whose models the conversation is with
        ui = studio.ui
        ui.label("Is it good?").classes("text-h6")
        self.run = ui.select([], label="Run").classes("w-full")
        self.run.on_value_change(self._of_run)
        self._chat()
        self.alert = Alert(studio)
        tabs.on_value_change(lambda event: self._shown(event.value))
        ui.context.client.on_delete(self._stop)

    def _chat(self) -> None:
        ui = self.studio.ui
        self.prompts = ui.row().classes("gap-1")
        self.prompts.props('role=group aria-label="Held-out prompts"')
        self.prompt = ui.textarea("Ask both").classes("w-full").props("autogrow rows=2")
        self.prompt.props(f"maxlength={PROMPT_CHARACTERS}")
        with ui.row().classes("items-center"):
            self.send = ui.button("Ask both", icon="send", on_click=self._ask)
            self.halt = ui.button("Stop", on_click=self._stop).props("flat")
            self.halt.disable()
            self.anew = ui.button("Begin anew", icon="restart_alt", on_click=self._begin_anew)
            self.anew.props("flat")
            tokens = ui.number("Tokens", min=1, max=MOST_TOKENS, precision=0)
            tokens.bind_value(self.chosen, "max_tokens").classes("w-24")
        ui.label(
            "Both answer the same prompt greedily, the teacher first, one after the other, so "
            "that their speeds compare. Each remembers your prompts and its own answers, until you "
            "begin anew."
        ).classes("text-caption")
        self.talk = ui.column().classes("w-full").props('role=log aria-label="Answers"')

    def _shown(self, tab: str) -> None:
        if tab != "Judge" or self._busy():
            return
        names = []
        for run in runs.listed():
            if run.state == FINISHED and run.model_bytes:
                names.append(run.name)
        value = self.run.value
        if self.chosen.run in names:
            value = self.chosen.run
        elif value not in names:
            value = names[0] if names else None
        self.run.set_options(names, value=value)
        self._of_run()
        if not names:
            self.alert.say("No run is finished yet.")

    def _of_run(self, *_: object) -> None:
        self.alert.clear()
        if not self.run.value:
            return
        run = runs.named(self.run.value)
        self.chosen.run = run.name
        if run.name != self.talked_with:
            self._begin_anew()
            self.talked_with = run.name
        self.prompts.clear()
        with self.prompts:
            for prompt in held_out(run):
                button = self.studio.ui.button(shortened(prompt))
                button.props("outline no-caps padding='4px 10px'")
                button.on_click(lambda text=prompt: self.prompt.set_value(text))

    def _stop(self) -> None:
        if self.task:
            self.task.cancel()

    def _busy(self) -> bool:
        return self.task is not None and not self.task.done()

    def _begin_anew(self) -> None:
        self.conversation.begin_anew()
        self.talk.clear()
        self.alert.clear()

    def _ask(self) -> None:
        if not self._busy():
            self.task = asyncio.create_task(self._both())

    async def _both(self) -> None:
        """Ask both models; what they answer becomes a turn that they remember."""
        self.alert.clear()
        while_idle = (self.send, self.anew, self.run)
        for element in while_idle:
            element.disable()
        self.halt.enable()
        try:
            prompt = prompt_of(self.prompt.value)
            tokens = tokens_of(self.chosen.max_tokens)
            teacher, student = pair(runs.named(self.run.value), self.studio.more)
            both = {"teacher": teacher, "student": student}
            for name, model in both.items():
                need = model.nbytes + PROCESS_BYTES
                runs.check_fits(f"The {name}", need)
            await self._turn(prompt, tokens, both)
        except MisError as error:
            self.alert.say(error)
        finally:
            for element in while_idle:
                element.enable()
            self.halt.disable()

    async def _turn(self, prompt: str, tokens: int, both: dict[str, places.Place]) -> None:
        """Show the prompt and each answer as it comes; remember them when all are there."""
        labels = {}
        with self.talk:
            self.studio.ui.chat_message(prompt, name="you", sent=True).classes("self-end")
            with self.studio.ui.element("div").classes("w-full row"):
                for name, model in both.items():
                    labels[name] = self._place(name, model)
            forgotten = self.studio.ui.label().classes("text-caption")
        answers = {}
        try:
            for name, model in both.items():
                text, figures = labels[name]
                asked = Asked(name, model, prompt=prompt, max_tokens=tokens)
                answer = await self._answer(asked, text=text, figures=figures)
                if answer is not None:
                    answers[name] = answer
        finally:
            if len(answers) < len(both):
                forgotten.set_text(FORGOTTEN)
        if len(answers) == len(both):
            self.conversation.add(prompt, answers)
            self.prompt.set_value("")

    def _place(self, name: str, model: places.Place) -> tuple[Any, Any]:
        """(label of the answer, label of its figures)."""
        ui = self.studio.ui
        with ui.column().classes("col-12 col-sm-6 q-pa-sm gap-1"):
            ui.label(f"{name}, {model.nbytes / 1e6:,.1f} MB").classes("text-weight-bold")
            text = ui.label("…").classes("said")
            figures = ui.label().classes("text-caption")
        return text, figures

    async def _answer(self, asked: Asked, text: Any, figures: Any) -> str | None:
        """An answer, shown as it comes; None where the model refuses, which is shown, too."""
        said = ""
        first_s = 0.0

        def show(piece: str) -> None:
            nonlocal said, first_s
            first_s = first_s or time.monotonic()
            said += piece
            text.set_text(said)

        try:
            answer = await self.conversation.answer(asked, show)
        except MisError as error:
            text.set_text(str(error))
            text.classes("text-negative").props("role=alert")
            return None
        answered = str(answer.result.get("text", said)).strip()
        text.set_text(answered or "(nothing)")
        seconds = 0.0  # unknown where nothing was shown as it came, as of an answer in JSON
        if first_s:
            seconds = time.monotonic() - first_s
        figures.set_text(figure_words(answer.result, seconds))
        return answered


def story_of(run: Listed) -> RunRecord | None:
    """What its folder tells; None where there is nothing yet."""
    try:
        return run_reader.read(run.folder)
    except (MisError, OSError):
        return None


def held_out(run: Listed) -> list[str]:
    """Some of the prompts that a run was judged by."""
    story = story_of(run)
    prompts: dict[str, None] = {}  # in their order
    for row in story.answers if story else ():
        prompts[str(row.get("prompt", ""))] = None
    return list(evenly(list(prompts), PROMPTS))


def shortened(prompt: str) -> str:
    """As much of it as a button shows."""
    if len(prompt) < SHORT:
        return prompt
    return f"{prompt[: SHORT - 3]}…"


def prompt_of(value: object) -> str:
    """What is asked. MisError where that is nothing, or too much."""
    whole = str(value or "").encode("utf-8", "replace").decode()  # without half a surrogate pair
    text = whole.replace("\0", "").strip()
    if not text:
        raise MisError("There is no prompt: write one, or click one")
    if len(text) > PROMPT_CHARACTERS:
        why = f"The prompt has {len(text)} characters, {PROMPT_CHARACTERS} are taken"
        raise MisError(f"{why}: shorten it")
    return text


def tokens_of(value: object) -> int:
    """How many tokens an answer may have. MisError for no whole number from 1 to MOST_TOKENS."""
    tokens = wishes.number(value, 1, MOST_TOKENS, "the number of tokens")
    if tokens != int(tokens):
        raise MisError(f"the number of tokens is {tokens:g}: give a whole number")
    return int(tokens)


def pair(run: Listed, more: tuple[Path, ...]) -> tuple[places.Place, places.Place]:
    """(teacher, student) of a finished run. MisError where one is not among the models found."""
    found = {place.path: place for place in places.models(more)}
    story = story_of(run)
    named = Path(str(story.result.get("teacher", ""))) if story else Path()
    teacher = found.get(named.absolute())
    if teacher is None:
        why = f"The teacher {named} is not among the models found here"
        raise MisError(f"{why}: start `mis_mlx studio --models FOLDER` with the folder it is in")
    student = found.get((run.folder / "model").absolute())
    if student is None:
        raise MisError(f"{run.name} has no model any more: choose another run")
    return teacher, student
