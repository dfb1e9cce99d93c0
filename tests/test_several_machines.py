"""Two processes that train together over the loopback are one process with twice the batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import Done, losses, mostly_slow, weights
from tests.machines import ended, started

TRAINING = {
    "distill": ("--iters", 6, "--q-iters", 2, "--eval-windows", 1),
    "sft": ("--iters", 4, "--max-seq-length", 96, "--dtype", "float32", "--batch-size", 3),
}


@pytest.mark.parametrize("name", mostly_slow(list(TRAINING), thorough=["distill"]))
def test_two_machines_take_the_steps_of_one(
    name: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    own_home: dict[str, str],
    command: Callable[..., Done],
) -> None:
    """Each with half of a step's windows: every loss to 1e-4, and both write the same model. A
    machine that trains otherwise is refused.
    """
    if name == "distill":
        flags = [*request.getfixturevalue("flags"), *TRAINING[name]]
    else:
        model = request.getfixturevalue("llama").path
        flags = ["--model", model, "--data", request.getfixturevalue("answers"), *TRAINING[name]]
    env = {**own_home, "OPENBLAS_NUM_THREADS": "1"}  # else both may look at each other's load
    homes = [tmp_path / "a", tmp_path / "b"]
    for home in homes:
        home.mkdir()
    argv = ["-m", f"mis_mlx.{name}", *flags]
    with started(2, [*argv, "--out", "run"], env, homes) as made:
        first, second = ended(made)
    assert first.returncode == second.returncode == 0, (first.stderr, second.stderr)
    assert first.stdout
    assert not second.stdout
    alone = command(name, *flags, "--out", tmp_path / "run")
    assert alone.returncode == 0, alone.stderr
    of_two = np.array(losses(homes[0] / "run"))
    of_one = np.array(losses(tmp_path / "run"))
    np.testing.assert_allclose(of_two[:, :2], of_one[:, :2], rtol=1e-4)
    # sums in another order round moments of 8 bits otherwise, here and there
    np.testing.assert_allclose(of_two, of_one, rtol=5e-4)
    of_both = [weights(home / "run") for home in homes]
    assert of_both[0] == of_both[1]
    (homes[1] / "more.yaml").write_text("seed: 5\n")
    (homes[0] / "more.yaml").write_text("seed: 4\n")
    with started(2, [*argv, "-c", "more.yaml", "--out", "other"], env, homes) as made:
        done = ended(made)
    assert {d.returncode for d in done} == {1}
    assert "machine 1 of 2 has a " in done[1].stderr
