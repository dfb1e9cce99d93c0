"""The answers on which a search measures what its students lose."""

from collections.abc import Sequence

from mis_mlx.data.rows import Row
from mis_mlx.judge.prompts import Answer, Prompt
from mis_mlx.maths import stats

FEWEST_ANSWERS = 8  # below which losses are measured on text
MOST_ANSWERS = 40
# of another model: the teacher's probabilities say more of a token than one draw does
MOST_ANSWERS_OF_OTHERS = 24


def last_answers(talks: Sequence[Row], most: int) -> list[tuple[Prompt, Answer]]:
    """The last answer of each conversation, up to `most` of them, evenly spread; [] of too few.

    The conversations stand in no training window. The final judge (judge/answers) has other
    prompts: the ones that chose a student do not judge it.
    """
    found = []
    for row in talks:
        messages = row.get("messages")
        if not isinstance(messages, list) or len(messages) < 2:
            continue
        *before, last = messages
        if last["role"] != "assistant" or not last["content"].strip():
            continue
        # Some were cut off at their longest: whether one ends here is not judged.
        answer = Answer(last["content"], ended=False)
        found.append((Prompt(tuple(before), kind="", language="en"), answer))
    if len(found) < FEWEST_ANSWERS:
        return []
    return [found[number] for number in stats.spread(len(found), most)]
