"""Cutting hidden by a rotation: what stays the same function, what does not and by how much, and
what opens it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mis_mlx.models.architectures.families import shape_of
from mis_mlx.models.opening import load
from mis_mlx.models.passing import stream
from mis_mlx.models.writing import model_writer
from mis_mlx.pruning import reconstruct, select, slicing
from mis_mlx.types import Air, Checkpoint, KeptUnits, MisError
from tests import tiny
from tests.conftest import Done, last_line, near
from tests.pruning.test_reconstruct import mended_model, stream_error

ALL = (0, 1, 2)
NORMS = list[str]()
for number in ALL:
    NORMS.append(f"model.layers.{number}.input_layernorm.weight")
    NORMS.append(f"model.layers.{number}.post_attention_layernorm.weight")
NORMS.append("model.norm.weight")


@pytest.fixture(scope="module")
def windows() -> list[mx.array]:
    """Four windows of 64 tokens."""
    return [mx.random.randint(0, 512, (1, 64), key=mx.random.key(k)) for k in range(4)]


def orthogonal(size: int, seed: int = 0) -> np.ndarray:
    """Any rotation of `size` numbers."""
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))
    return q


def whole(basis: np.ndarray) -> slicing.Rotation:
    """A rotation that cuts nothing: every norm sees everything."""
    return slicing.Rotation(basis, dict.fromkeys(NORMS, 1.0))


def student_of(
    teacher: Checkpoint, rotation: slicing.Rotation, out: Path, dtype: str = "float32"
) -> Checkpoint:
    """The teacher cut by nothing but `rotation`."""
    shape = replace(shape_of(teacher.config), hidden=rotation.basis.shape[1])
    kept = {(-1, "hidden"): tuple(range(shape.hidden))}
    layers = tuple(range(shape.layers))
    keep = KeptUnits(layers, kept, "", basis=rotation.basis.astype(np.float32))
    slicing.write_student(
        teacher,
        shape,
        keep=keep,
        out=out,
        dtype=dtype,
        tensor=slicing.rotated_teacher(teacher, rotation),
    )
    return load.open_checkpoint(out)


def stock(checkpoint: Checkpoint, tokens: mx.array) -> np.ndarray:
    """Logits (T, V) of stock mlx_lm.load."""
    model, _ = load.mlx_lm("utils").load(str(checkpoint.path))
    return np.array(model(tokens)[0].astype(mx.float32), np.float64)


def entering(checkpoint: Checkpoint, windows: list[mx.array]) -> dict[str, np.ndarray]:
    """What enters each norm, by mlx-lm's own submodules called by hand: {norm: tokens of rms 1,
    float64}.
    """
    model = load.resident_model(checkpoint, mx.float32)
    seen = dict[str, list[np.ndarray]]()

    def note(name: str, x: mx.array) -> None:
        flat = np.array(x, np.float64).reshape(-1, x.shape[-1])
        seen.setdefault(name, []).append(flat / np.sqrt(np.square(flat).mean(-1, keepdims=True)))

    for tokens in windows:
        h = model.model.embed_tokens(tokens)
        for i, layer in enumerate(model.layers):
            note(NORMS[2 * i], h)
            h = h + layer.self_attn(layer.input_layernorm(h), load.mask(model.args, layer, h))
            note(NORMS[2 * i + 1], h)
            h = h + layer.mlp(layer.post_attention_layernorm(h))
        note(NORMS[-1], h)
    return {name: np.concatenate(rows) for name, rows in seen.items()}


@pytest.mark.parametrize("kind", ["untied", "llama"])
def test_what_is_measured_is_what_enters_the_norms(
    models: Callable[[str], Checkpoint], windows: list[mx.array], kind: str
) -> None:
    """Against float64 numpy over mlx-lm's own modules: the leading subspace, and the energy it
    holds at each norm.

    1e-4: the stream itself is float32; 2e-3: float16. With a tied head the columns are turned, the
    subspace is the same.
    """
    teacher = models(kind)
    found = slicing.principal_directions(teacher, windows)(48)
    seen = entering(teacher, windows)
    np.testing.assert_allclose(found.basis.T @ found.basis, np.eye(48), atol=1e-12)
    values, vectors = np.linalg.eigh(sum(x.T @ x for x in seen.values()))
    assert (values[16] - values[15]) / values[16] > 1e-3  # else which 48 is a matter of rounding
    lead = vectors[:, 16:]
    np.testing.assert_allclose(found.basis @ found.basis.T, lead @ lead.T, atol=1e-3)
    assert sorted(found.energy) == sorted(NORMS)
    for name, x in seen.items():
        share = np.square(x @ lead).sum() / np.square(x).sum()
        assert found.energy[name] == pytest.approx(share, abs=near(1e-4, 2e-3))
        assert 0.75 < share < 1


@pytest.mark.usefixtures("cpu_policy")
@pytest.mark.parametrize("kind", ["untied", "qwen3", "biased", "lfm2"])
def test_rotated_but_not_cut_it_is_the_same_function(
    tmp_path: Path, windows: list[mx.array], kind: str
) -> None:
    """Any orthogonal basis, gains folded away: the same logits to float32 rounding, from other
    weights. The head is untied or, where it cannot be, the last gain is 1.
    """
    changes = {**tiny.KINDS, **tiny.FAMILIES}[kind]
    if kind == "lfm2":
        folder = tiny.make(tmp_path / "t", **changes)
        tiny.change(folder, {"model.embedding_norm.weight": mx.ones(64)})
    else:
        folder = tiny.make(tmp_path / "t", **{**changes, "tie_word_embeddings": False})
    teacher = load.open_checkpoint(folder)
    ends = tuple(f".{name}.weight" for name in slicing.NORMS.values())
    norms = [name for name in teacher.tensors if name.endswith(ends)] + [slicing.FINAL]
    rotation = slicing.Rotation(orthogonal(64), dict.fromkeys(norms, 1.0))
    student = student_of(teacher, rotation, tmp_path / "s")
    assert all(mx.allclose(load.dense(student, name), mx.ones(64)).item() for name in norms)
    before = stock(teacher, windows[0])
    after = stock(student, windows[0])
    assert np.abs(after - before).max() <= 2e-5 * np.abs(before).max()
    embedding = "model.embed_tokens.weight"
    assert not mx.allclose(
        load.dense(student, embedding), load.dense(teacher, embedding), atol=0.05
    )


def test_a_tied_head_deviates_by_its_last_gain_and_by_nothing_else(
    tmp_path: Path, llama: Checkpoint, windows: list[mx.array]
) -> None:
    """Rotated any way, the logits are those of the teacher with Q diag(Q^T g Q) Q^T in the place of
    its last gain g.

    The deviation is bounded by the spread of the gains (here 10 %). Turned for g, nothing is cut
    and nothing is lost.
    """
    basis = orthogonal(64)
    gain = np.array(load.dense(llama, slicing.FINAL), np.float64)
    table = np.array(load.dense(llama, "model.embed_tokens.weight"), np.float64)
    (normed,) = stream.Stream(llama, mx.float32).forward([windows[0]])
    even = np.array(normed[0], np.float64) / gain
    nearest = basis @ np.diag(np.diag(basis.T @ np.diag(gain) @ basis)) @ basis.T
    before = stock(llama, windows[0])
    after = stock(student_of(llama, whole(basis), tmp_path / "any"), windows[0])
    rounding = 2e-5 * np.abs(before).max()
    assert np.abs(after - even @ nearest @ table.T).max() <= rounding
    off = np.linalg.norm(after - before) / np.linalg.norm(before)
    assert 0.03 < off < 2 * gain.std() / gain.mean()
    turned = stock(
        student_of(llama, whole(slicing.rotated_basis(basis, gain)), tmp_path / "turned"),
        windows[0],
    )
    assert np.abs(turned - before).max() <= rounding


def test_the_rms_gain_by_pencil(tmp_path: Path, models: Callable[[str], Checkpoint]) -> None:
    """48 of 64 numbers with 3/4 of the energy have the same rms: gain 1; with all of it sqrt(64 /
    48).
    """
    energy = dict.fromkeys(NORMS, 0.75) | {NORMS[1]: 1.0}
    tensor = slicing.rotated_teacher(
        models("untied"), slicing.Rotation(orthogonal(64)[:, :48], energy)
    )
    for name in NORMS:
        want = (64 / 48) ** 0.5 if name == NORMS[1] else 1.0
        np.testing.assert_allclose(np.array(tensor(name)), np.full(48, want), rtol=1e-6)


def low_rank(folder: Path, rank: int) -> Checkpoint:
    """An untied tiny llama whose stream stays in a `rank`-dimensional subspace that no channel is
    along.
    """
    plain = load.open_checkpoint(
        tiny.make(folder / "plain", tie_word_embeddings=False, rms_norm_eps=1e-9)
    )
    inside = orthogonal(64, 3)[:, :rank]
    onto = mx.array((inside @ inside.T).astype(np.float32))
    arrays = {name: load.dense(plain, name) for name in plain.tensors}
    for name, a in arrays.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            arrays[name] = onto @ a
    arrays["model.embed_tokens.weight"] = arrays["model.embed_tokens.weight"] @ onto
    model_writer.write_model(
        plain.config,
        arrays.__getitem__,
        source=plain.path,
        out=folder / "low",
        dtype="float32",
    )
    return load.open_checkpoint(folder / "low")


def test_on_a_low_rank_stream_the_rotation_loses_nothing(
    tmp_path: Path, windows: list[mx.array]
) -> None:
    """Rank 32 of 64, cut to 32: PCA is exact to 1e-4 of the logits (float16: 1e-2)."""
    teacher = low_rank(tmp_path, 32)
    cut = select.PruningConfig(scenario="none", hidden=32, importance="rms")
    before = stock(teacher, windows[0])
    select.prune(teacher, windows, out=tmp_path / "s", cut=cut, dtype="float32", air=Air)
    after = stock(load.open_checkpoint(tmp_path / "s"), windows[0])
    assert np.linalg.norm(after - before) < near(1e-4, 1e-2) * np.linalg.norm(before)


def test_spooled_hidden_states_and_a_changing_wind_make_the_same_student(
    tmp_path: Path, llama: Checkpoint, windows: list[mx.array]
) -> None:
    """One batch in memory or all: the same bytes, also where AAIS keeps other neurons."""
    made = {}
    for name, held in (("spooled", 1), ("held", None)):
        celsius = iter([-20.0, 45.0, -20.0, 45.0])
        made[name] = select.prune(
            llama,
            windows,
            out=tmp_path / name,
            cut=select.PruningConfig(scenario="none", ffn=256, hidden=48),
            dtype="float32",
            air=lambda celsius=celsius: Air(next(celsius), altitude_m=832.0),
            held=held,
        )
    for file in ("model.safetensors", "rotation.npy"):
        assert (tmp_path / "spooled" / file).read_bytes() == (tmp_path / "held" / file).read_bytes()
    report = made["held"]
    assert report["importance"] == "aais"
    assert report["channels_differing_from_plain"] > 0
    assert report["channels_kept"] == 3 * 256  # hidden was not ranked
    assert "hidden_energy" in report


def test_repair_brings_every_block_nearer_to_the_rotated_stream(
    tmp_path: Path, llama: Checkpoint, windows: list[mx.array]
) -> None:
    """On a bfloat16 student read back from disk; measured apart, in float64, against Q^T times the
    teacher's stream.
    """
    rotation = slicing.principal_directions(llama, windows)(32)
    student = student_of(llama, rotation, tmp_path / "s", "bfloat16")
    keep = model_writer.read_keep(student.path)
    assert keep is not None
    repaired, _ = reconstruct.reconstruct(llama, student, keep, windows)
    after = stream_error(llama, mended_model(student, repaired), rotation.basis, windows)
    assert all(
        a < b
        for a, b in zip(after, stream_error(llama, student, rotation.basis, windows), strict=True)
    )


def test_a_rotation_that_does_not_fit_is_a_sentence(tmp_path: Path, llama: Checkpoint) -> None:
    """Missing, cut short, of another model, of another kind of file: one sentence each, with the
    path.
    """
    rotation = slicing.Rotation(orthogonal(64)[:, :48], dict.fromkeys(NORMS, 0.75))
    student = student_of(llama, rotation, tmp_path / "s")
    path = student.path / "rotation.npy"
    keep = model_writer.read_keep(student.path)
    assert keep is not None
    assert keep.basis.shape == (64, 48)
    for content in (path.read_bytes()[:-8], b"", b"PK", b"\x80\x04N.", None):
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(MisError, match="rotation.npy"):
            model_writer.read_keep(student.path)
    np.save(path, np.zeros((64, 47), np.float32))
    with pytest.raises(MisError, match=r"64, 47.* 48 "):
        model_writer.read_keep(student.path)


@pytest.mark.thorough
def test_the_whole_way_with_a_rotated_student(
    tmp_path: Path, flags: tuple[object, ...], command: Callable[..., Done]
) -> None:
    """Each folder opens, and has the basis beside it, the parts of a student that is taught block
    by block too.
    """
    few = ("--hidden", 32, "--iters", 2, "--keep-steps", "--q-group-size", 32, "--q-iters", 2)
    done = command("distill", *flags, "--out", tmp_path, "--train", "sharded", *few)
    assert done.returncode == 0, done.stderr
    assert last_line(done)["kl_student"] < last_line(done)["kl_pruned"]
    basis = (tmp_path / "pruned" / "rotation.npy").read_bytes()
    for name in ("parts", "distilled"):
        assert (tmp_path / name / "rotation.npy").read_bytes() == basis
    for name in ("pruned", "distilled", "model"):
        made = load.open_checkpoint(tmp_path / name)
        assert np.isfinite(stock(made, mx.array([[1, 2, 3]]))).all()
