"""The command `grpo`: it learns what is rewarded, skips what teaches nothing, resumes bit for bit,
says no in time.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mis_mlx import dpo, grpo
from mis_mlx.alignment import alignment_run
from mis_mlx.alignment import grpo_rollout as training
from mis_mlx.compute import precision
from mis_mlx.data import token_windows
from mis_mlx.hardware import memory
from mis_mlx.judge.speed import rounds
from mis_mlx.maths import rl_losses
from mis_mlx.models.opening import compute_type, load
from mis_mlx.models.passing import stream
from mis_mlx.models.writing.text_writer import Room
from mis_mlx.storage import run_folder
from mis_mlx.types import Checkpoint, MisError
from tests.conftest import Done, last_line, mostly_thorough, settings_of

# A reward that a model of random weights gets now and then: the share of letters that are small
# vowels.
VOWELS = """
def vowels(prompts, completions, answer):
    return [sum(c in "aeiouy" for c in text) / max(1, len(text)) for text in completions]
"""
QUESTIONS = ["what is", "how many", "where is the with statement", "name one", "who was"]
QUESTIONS += ["when will it be", "why", "how"]


@pytest.fixture(scope="module", name="folder")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("questions")
    rows = [json.dumps({"prompt": q, "answer": str(n)}) for n, q in enumerate(QUESTIONS)]
    (folder / "train.jsonl").write_text("\n".join(rows) + "\n")
    (folder / "valid.jsonl").write_text("\n".join(rows[:3]) + "\n")
    (folder / "vowels.py").write_text(VOWELS)
    return folder


@pytest.fixture(scope="module", name="small")
def _small(folder: Path, llama: Checkpoint) -> tuple[object, ...]:
    """Flags of a run of seconds."""
    flags = ("--model", llama.path, "--data", folder, "--iters", 8, "--save-every", 4)
    flags += ("--grad-accumulation-steps", 2, "--group-size", 8, "--batch-size", 4)
    flags += ("--max-completion-length", 10, "--max-seq-length", 48, "--dtype", "float32")
    return (*flags, "--learning-rate", "4e-2", "--reward-functions-file", folder / "vowels.py")


def test_end_to_end(undisturbed: tuple[Path, Done]) -> None:
    """The reward rises; samples and metrics are in the run folder; the result is a folder that
    mlx-lm opens.
    """
    out, done = undisturbed
    result = last_line(done)
    assert result["held_out_best"]["reward"] > result["held_out_start"]["reward"] + 0.2
    metrics = run_folder.metrics(out)
    rewards = [m["reward"] for m in metrics]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.1
    for m in metrics:
        assert m["groups"] == 2 and 0 <= m["kept"] <= 2 and 0 < m["answer_tokens"] <= 10
    samples = run_folder.records(out / training.SAMPLES)
    assert len(samples) == 16
    assert {s["number"] for s in samples} == set(range(1, 9))
    for m in metrics:
        of_step = [sample["answers"] for sample in samples if sample["number"] == m["number"]]
        mine = [answer["reward"] for answer in chain.from_iterable(of_step)]
        assert len(mine) == 16
        assert np.mean(mine) == pytest.approx(m["reward"])
    first = samples[0]["answers"][0]
    assert first["vowels"] == first["reward"]
    assert samples[0]["prompt"] in QUESTIONS
    model, tokenizer = rounds.open_model(compute_type.open_to_compute(out / "model"))
    assert len(list(rounds.greedy(model, tokenizer.encode("how many"), 4))) == 4


def test_equal_rewards_leave_the_model_as_it_was(
    small: tuple[object, ...], tmp_path: Path, llama: Checkpoint
) -> None:
    """Nobody is ever right: every group is skipped and counted, no weight moves, not by weight
    decay either.
    """
    out = tmp_path / "run"
    flags = {"reward_functions": "correct", "reward_functions_file": None, "iters": 2}
    result = grpo.run(settings_of(grpo, small, out, **flags))
    found = [(m["kept"], m["groups"], m["loss"]) for m in run_folder.metrics(out)]
    assert found == [(0, 2, 0.0)] * 2
    last = mx.load(str(out / "steps/step-00000002/model.safetensors"))
    model = load.resident_model(llama, mx.float32)
    flat: list[tuple[str, mx.array]] = tree_flatten(model.parameters())
    assert all(mx.array_equal(last[name], weight) for name, weight in flat)
    assert result["tokens"] == 0


def table_of(*groups: list[float]) -> np.ndarray:
    """(N, G)."""
    return np.array(groups, np.float64)


def test_advantages_by_pencil() -> None:
    """Two right of four: mean 1/2, deviation sqrt(1/3) with Bessel's correction."""
    made = rl_losses.advantages(table_of([1, 0, 0, 1]))
    assert made == pytest.approx(np.array([[1, -1, -1, 1]]) * 0.5 / (math.sqrt(1 / 3) + 1e-4))
    assert rl_losses.advantages(table_of([8, 7, 7, 8])) == pytest.approx(made)


def test_equal_rewards_teach_nothing_and_are_numbers() -> None:
    """All right, all wrong, equal but for rounding in their mean, one scored: exactly 0; unscored
    ones are left out.
    """
    nan = math.nan
    table = table_of(
        [1, 1, 1], [0, 0, 0], [0.1, 0.1, 0.1], [1, nan, nan], [nan, nan, nan], [1, 0, nan]
    )
    assert rl_losses.teaches(table).tolist() == [False] * 5 + [True]
    made = rl_losses.advantages(table)
    assert not made[:5].any()
    half = 0.5 / (math.sqrt(1 / 2) + 1e-4)
    assert made[5] == pytest.approx([half, -half, 0.0])


def test_on_policy_the_gradient_is_reinforce(llama: Checkpoint) -> None:
    """The model that sampled is the model itself: minus advantage times grad log pi."""
    model = load.resident_model(llama, mx.float32)
    mx.eval(model.parameters())
    answers = [[11, 12, 13, 0], [21, 22], [31, 32, 33, 34, 35], [41]]
    tokens, mask = training.filled_up([5, 6, 7, 8], answers)
    advantage = mx.array([1.0, -0.5, 0.7, -1.2])
    objective = training.Settings(max_completion_length=8)
    _, found = nn.value_and_grad(model, objective.loss)(model, tokens, mask, advantage)

    def plain(m: nn.Module) -> mx.array:
        logps = objective.logps(
            m.model(tokens), load.head_weight(m), tokens, mask.shape[1], frozen_head=False
        )
        return -(logps * mask * advantage[:, None]).sum()

    _, expected = nn.value_and_grad(model, plain)(model)
    for (name, a), (_, e) in zip(tree_flatten(found), tree_flatten(expected), strict=True):
        assert mx.allclose(a, e, rtol=1e-5, atol=1e-7), name


def sampler(
    checkpoint: Checkpoint, folder: Path, dtype: mx.Dtype = mx.float32, **changes: Any
) -> training.Sampler:
    """One that rewards vowels."""
    model = load.resident_model(checkpoint, dtype)
    mx.eval(model.parameters())
    functions = training.rewards.functions(None, str(folder / "vowels.py"))
    settings = training.Settings(
        beta=0.1,
        max_completion_length=8,
        temp=0.8,
        group_size=4,
        grad_accumulation_steps=3,
        batch_size=4,
        seed=1,
    )
    tokenizer = load.tokenizer(checkpoint.path)
    prompts = [token_windows.encode_prompt(q, tokenizer) for q in QUESTIONS]
    rows = [{"prompt": q, "answer": "1"} for q in QUESTIONS]
    made = training.Sampler(
        settings=settings,
        model=model,
        rows=rows,
        prompts=prompts,
        tokenizer=tokenizer,
        functions=functions,
    )
    own = {name: changes.pop(name) for name in list(changes) if name in vars(made)}
    return replace(made, settings=replace(settings, **changes), **own)


def logps_of(made: training.Sampler, tokens: mx.array, mask: mx.array) -> mx.array:
    """The model's own log-probabilities of answers, as it samples."""
    hidden = made.model.model(tokens)
    return made.settings.logps(hidden, load.head_weight(made.model), tokens, mask.shape[1])


@pytest.mark.parametrize("word", mostly_thorough(["cpu", "metal"], "cpu"))
def test_learning_begins_at_exactly_zero(
    word: str,
    llama: Checkpoint,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    brief_look: None,
) -> None:
    """Every KL is 0, though the reference was computed another way and is as far from the model as
    rounding is: the loss is minus the sum of the advantages.
    """
    monkeypatch.setenv(precision.POLICY, word)
    dtype = precision.dtype_of(llama)
    made = sampler(llama, folder, reference=stream.Stream(llama, dtype), dtype=dtype)
    sampled, _ = made(0)
    assert sampled
    for tokens, mask, advantage, reference in sampled:
        apart = reference - rl_losses.NOISE[dtype] / 2
        total, *_ = made.settings.loss(made.model, tokens, mask, advantage, apart)
        assert total.item() == pytest.approx(-float((mask * advantage[:, None]).sum()), abs=1e-6)


def test_an_answer_that_ends_at_the_limit_is_not_truncated(llama: Checkpoint, folder: Path) -> None:
    """Of four answers of 8 tokens at most, one is cut off."""
    made = sampler(llama, folder)
    (end, *_) = made.tokenizer.eos_token_ids
    answers = [[[9] * 8, [9] * 7 + [end], [9, end], [end]]]
    scores = [training.rewards.Scores([0.0] * 4, {}, [])]
    facts = made._facts(answers, scores, np.zeros((1, 4)))
    assert facts["truncated"] == 0.25


def test_a_rollout_is_what_was_said(llama: Checkpoint, folder: Path) -> None:
    """Micro-batches hold the sampled tokens, log-probabilities at the sampling temperature,
    advantages of sum 0. The held-out measure draws nothing: two agree.
    """
    lines = list[str]()
    made = sampler(llama, folder, log=lines.append, batch_size=3)
    (sampled, facts) = made(4)
    (again, _) = made(4)
    texts = []
    for line in lines:
        texts.append([answer["text"] for answer in json.loads(line)["answers"]])
    ends = made.tokenizer.eos_token_ids
    assert texts[:3] == texts[3:]
    assert len(sampled) == 2 * facts["kept"]
    for (tokens, mask, advantage), (_, _, second) in zip(sampled, again, strict=True):
        assert mx.array_equal(advantage, second)
        own = logps_of(made, tokens, mask)
        start = tokens.shape[1] - mask.shape[1]
        for row in range(len(tokens)):
            answer = tokens[row, start : start + int(mask[row].sum())].tolist()
            text = made.tokenizer.decode([token for token in answer if token not in ends])
            assert any(text in group for group in texts)
            prompt = tokens[row, :start].tolist()
            z = made.model(mx.array([[*prompt, *answer]]))[0, len(prompt) - 1 : -1] / 0.8
            of_answer = mx.take_along_axis(z, mx.array(answer)[:, None], axis=-1)[:, 0]
            expected = of_answer - mx.logsumexp(z, axis=-1)
            assert mx.allclose(own[row, : len(answer)], expected, rtol=1e-4, atol=1e-4)
    for start in range(0, len(sampled), 2):
        advantages = [part[2] for part in sampled[start : start + 2]]
        assert abs(sum(float(advantage.sum()) for advantage in advantages)) < 1e-4
    one, other = (training.measure(made, made.rows, made.prompts) for _ in range(2))
    assert one == other
    assert one["loss"] == -one["reward"]


@pytest.mark.thorough
def test_nothing_scored_is_a_sentence(llama: Checkpoint, folder: Path, tmp_path: Path) -> None:
    """A function that fails on everything stops the run with its reason; on some groups, these are
    skipped.
    """
    path = tmp_path / "broken.py"
    path.write_text("def f(prompts, completions, answer):\n    raise RuntimeError('no ruler')\n")
    made = sampler(llama, folder, functions=training.rewards.functions(None, str(path)))
    with pytest.raises(MisError, match=r"12 .*f: RuntimeError: no ruler"):
        made(0)
    odd = "if any(p == 'why' or 'with' in p for p in prompts): 1 / 0\n    return"
    path.write_text(VOWELS.replace("return", odd))
    functions = training.rewards.functions(None, str(path))
    made = sampler(llama, folder, functions=functions, grad_accumulation_steps=8)
    _, facts = made(0)
    assert facts["unscored"] == 8
    assert facts["kept"] <= 6


def test_the_plan_holds(small: tuple[object, ...], tmp_path: Path) -> None:
    """KL costs memory, and MLX's peak in a run with KL stays under what was planned."""
    out = tmp_path / "run"
    plain, planned = (
        grpo.run(settings_of(grpo, small, out, dry_run=True, beta=beta)) for beta in (0.0, 0.1)
    )
    assert planned["peak_bytes"] > plain["peak_bytes"] > 0
    mx.clear_cache()
    before = mx.get_active_memory()
    grpo.run(settings_of(grpo, small, out, beta=0.1, iters=2))
    assert max(m["peak_bytes"] for m in run_folder.metrics(out)) - before < planned["peak_bytes"]


def test_answers_that_nothing_could_match_are_named_in_time(
    tmp_path: Path, small: tuple[object, ...]
) -> None:
    """Where our verifier is asked for, a row whose own answer it cannot read is refused; the user's
    may read it. A row without an answer is named; numbers are taken as answers.
    """
    rows = [
        {"prompt": "a", "answer": "5"},
        {"prompt": "b", "answer": "see figure 3", "language": "de"},
    ]
    for name in ("train", "valid"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    settings = settings_of(grpo, small, tmp_path / "run", data=str(tmp_path), dry_run=True)
    assert grpo.run(settings)["questions"] == 2
    with pytest.raises(MisError, match="train.jsonl line 2: .*'see figure 3'"):
        grpo.run(replace(settings, reward_functions="vowels,correct"))
    (tmp_path / "train.jsonl").write_text('{"prompt": "a", "answer": 5}\n{"prompt": "b"}\n')
    with pytest.raises(MisError, match="1 rows .* train.jsonl line 2: .*'answer'"):
        grpo.run(settings)


def test_other_rewards_are_another_run(
    small: tuple[object, ...], folder: Path, tmp_path: Path
) -> None:
    """--resume with another file of the same name: refused."""
    data = tmp_path / "data"
    shutil.copytree(folder, data)
    file = data / "vowels.py"
    given: dict[str, Any] = {"data": str(data), "reward_functions_file": str(file), "iters": 1}
    settings = settings_of(grpo, small, tmp_path / "run", **given)
    grpo.run(settings)
    again = replace(settings, resume=True)
    file.write_text(VOWELS + "\n# counted anew\n")
    with pytest.raises(MisError, match="reward functions"):
        grpo.run(again)


@pytest.mark.parametrize(("kind", "item"), [("full", 4), ("lora", 2)])
def test_the_reference_is_planned_in_the_type_of_training(
    llama: Checkpoint, monkeypatch: pytest.MonkeyPatch, kind: Any, item: int
) -> None:
    """Where models compute in float16, one that is trained whole, and the reference beside it, are
    float32 all the same: in DPO's plan and in GRPO's.
    """
    monkeypatch.setenv(precision.POLICY, "metal")
    for settings in (dpo.Settings(fine_tune_type=kind), grpo.Settings(fine_tune_type=kind)):
        assert alignment_run.model_size(settings, llama).item == item
        assert alignment_run.dtype_of(settings, llama).size == item


def test_a_small_budget_writes_fewer_answers_together(
    small: tuple[object, ...], llama: Checkpoint, folder: Path
) -> None:
    """As many as fit beside the training's state, and one in any case; the answers stay."""
    s = settings_of(grpo, small, folder)
    longest = 40
    costs = [grpo._phases(s, llama, longest, size)[0] for size in training.AT_ONCE]
    peaks = [cost.peak_bytes for cost in costs]
    assert peaks == sorted(peaks, reverse=True)
    for size, need in zip(training.AT_ONCE, peaks, strict=True):
        whole = replace(s, budget=str(memory.needed_bytes(need)))
        assert grpo._together(whole, llama, longest) == size
    assert grpo._together(replace(s, budget="1MiB"), llama, longest) == 1
    said = []
    for at_once in (32, 3):
        made = replace(sampler(llama, folder), room=Room(at_once))
        seeds = [[1, 2, 3], [4, 5, 6]]
        answers, *_ = made.scored(made.rows[:2], made.prompts[:2], seeds)
        said.append(answers)
    assert said[0] == said[1]
    assert len({tuple(ids) for ids in chain.from_iterable(said[0])}) == 6
