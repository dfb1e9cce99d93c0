"""The report end to end: a whole run, half a run, somebody else's run, and what a browser makes of
the page.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from mis_mlx import cli, distill, report
from mis_mlx.reporting import html, run_reader
from mis_mlx.storage import run_folder
from mis_mlx.types import Checkpoint
from tests.conftest import Done, last_line, mostly_slow, sentence

DATA = Path(__file__).parent / "data"
OURS = set(
    re.findall(
        r"\w+",
        """html head meta link title style body script section div h1 h2 h3 p b pre ul li details
        summary table thead tbody tr th td button figure figcaption svg desc defs clippath g path
        circle rect text""",
    )
)
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


class Tags(HTMLParser):
    """Elements and attributes of a page, and its text."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def written(folder: Path, **more: Any) -> tuple[str, dict[str, Any]]:
    """(page, the command's result)."""
    result = report.run(report.Settings(str(folder), **more))
    return Path(result["report"]).read_text("utf-8"), result


@pytest.fixture
def copy(tmp_path: Path, finished: tuple[Path, Done]) -> Path:
    """A run folder to do harm to, without its weights."""
    heavy = shutil.ignore_patterns("*.safetensors", "tokenizer*")
    return shutil.copytree(finished[0], tmp_path / "run", ignore=heavy)


@pytest.fixture(scope="module")
def uncut(
    tmp_path_factory: pytest.TempPathFactory,
    llama: Checkpoint,
    text_folder: Path,
    command: Callable[..., Done],
) -> Path:
    """A run that rounds its teacher whole, in whose file is a setting that is no flag."""
    out = tmp_path_factory.mktemp("uncut") / "a run"
    (extra := out.with_name("extra.yaml")).write_text("q_group_size: 32\nexpected_loss: 0.1\n")
    flags = ("--teacher", llama.path, "--data", text_folder, "--num-samples", 2, "--q-iters", 3)
    small = ("--max-seq-length", 32, "--eval-windows", 2, "--eval-prompts", 0)
    where = ("--scenario", "none", "-c", extra, "--out", out)
    done = command("distill", *flags, *small, *where)
    assert done.returncode == 0, done.stderr
    return out


def test_the_page_of_a_run(finished: tuple[Path, Done], copy: Path) -> None:
    """Every part is there, nothing is of another version, and the browser may load nothing."""
    page, result = written(copy)
    tags = Tags(page)
    assert result["bytes"] == len(page.encode()) < 2**20
    assert page.count("<h2>") >= 6
    assert "another version" not in page
    values = last_line(finished[1])
    assert f"{values['nll_student']:.3f} nats" in page
    assert f"{values['tokens']:,} tokens" in page
    policy = next(a["content"] for t, a in tags.tags if t == "meta" and "http-equiv" in a)
    assert policy
    assert policy.startswith("default-src 'none'")
    links = []
    for _, attributes in tags.tags:
        links += [str(attributes[name]) for name in ("src", "href") if name in attributes]
    assert links
    assert all(link.startswith(("#", "data:")) for link in links)
    assert json.loads((copy / run_folder.ORIGIN).read_text())["data"] in page
    phase = run_reader.read(copy).phases[0]
    assert f"<td>prune</td><td>{report.duration(phase['seconds'])}</td><td>" in page


def test_a_run_that_cut_nothing(uncut: Path) -> None:
    """It was not pruned, and its weights did not learn; its scales did, and their steps are drawn.
    What it never had to write is not missing.
    """
    page, result = written(uncut)
    text = " ".join(Tags(page).text.split())
    assert "million parameters" not in text
    assert "in 3 steps" in text
    assert page.count('<circle class="fill') == 3
    assert not re.search(r"metrics\.jsonl|keep\.json|tune\.jsonl", " ".join(result["missing"]))
    assert "another version" not in page


def test_to_do_it_again(uncut: Path, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line on the page, pasted, asks for what the run was asked for, YAML's settings too."""
    monkeypatch.chdir(uncut.parent)
    for run in (uncut, copy):
        page, _ = written(run)
        (line,) = re.findall(r"<pre>(.*?)</pre>", page, re.DOTALL)
        python, *words = shlex.split(unescape(line))
        assert Path(python).exists()
        assert words[:3] == ["-m", "mis_mlx", "distill"]
        again = cli.parse(distill.Settings, words[3:])
        asked = run_folder.stored_settings(run, run_folder.ASKED)
        assert asked
        given = {name: value for name, value in again.given.items() if name != "config"}
        assert json.loads(json.dumps(given)) == asked


def test_the_verdict_comes_first(copy: Path) -> None:
    """Size, loss on answers and loops, from the result; the loss that was allowed and expected.
    Further down temperatures, and how often the run took a break.
    """
    put_answers(copy, rows_of_answers("Fine."))
    readings = [{"wall_s": 60.0 * n, "die_c": 70 + n, "ambient_c": 30} for n in range(3)]
    (copy / "thermal.jsonl").write_text("".join(json.dumps(r) + "\n" for r in readings))
    result = json.loads((copy / run_folder.RESULT).read_text())
    figures = {
        "bytes_teacher": 100.04,
        "bytes_4-bit": 25.06,
        "answers_excess_4-bit": 0.1234,
        "loops_4-bit": 8.3333,
        "loops_teacher": 0.0,
        "expected_loss": 0.1,
        "reached_loss": 0.1234,
        "loss_of": "answers",
        "tea_breaks": 2,
        "tea_reasons": {"hot": 2},
    }
    (copy / run_folder.RESULT).write_text(json.dumps({**result, **figures}))

    page, _ = written(copy)

    text = " ".join(page[page.index("<h1>") : page.index("<h2>")].split())
    assert text.index("25.1 MB") < text.index("100.0 MB")
    assert text.count("0.123 bits per byte") == 2
    assert "12 held-out prompts" in text
    assert text.index("8 %") < text.index("0 %.")
    assert all(said in page for said in ("70.0 to 72.0", "30.0 to 30.0", "2 (hot)"))


def test_what_a_run_writes_down_for_it(finished: tuple[Path, Done], llama: Checkpoint) -> None:
    """What each phase took, and how much of every layer's importance is kept: the best five sixths
    of the neurons hold more than five sixths of it.
    """
    story = run_reader.read(finished[0])
    assert all(p["seconds"] > 0 and p["peak_bytes"] > 0 for p in story.phases)
    share = len(story.keep["kept"]["0/ffn"]) / llama.config["intermediate_size"]
    profile = story.keep["report"]["profile"]
    for number in range(llama.config["num_hidden_layers"]):
        kept = profile[f"{number}/ffn"]["kept"]
        assert share < kept < 1 if number in story.keep["layers"] else kept == 0
        assert f"{number}/heads" in profile


def rows_of_answers(student: str) -> list[dict[str, object]]:
    """As a run writes them: half of 12 prompts in Polish, each with the teacher's answer and then
    the student's.
    """
    rows = list[dict[str, object]]()
    for number in range(12):
        language = ("en", "pl")[number % 2]
        prompt = {"prompt": f"Prompt {number}?", "language": language, "kind": "explain"}
        rows.append({**prompt, "model": "teacher", "text": f"Teacher's {number}.", "ended": True})
        rows.append({**prompt, "model": "4-bit", "text": student, "ended": False})
    return rows


def put_answers(run: Path, rows: list[dict[str, object]]) -> None:
    """Into a run, whose result then says so."""
    (run / run_folder.ANSWERS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = json.loads((run / run_folder.RESULT).read_text())
    (run / run_folder.RESULT).write_text(json.dumps({**result, "answers_prompts": 12}))


def test_answers_come_first(copy: Path) -> None:
    """Three prompts of each language, side by side; nothing is missing. A prompt of a second turn
    says little by itself: another one takes its place.
    """
    rows = rows_of_answers("Well, it depends")
    rows[0]["text"] = " "
    rows[4]["kind"] = "second turn"
    put_answers(copy, rows)

    page, result = written(copy)

    begin = page.index("<h2>Answers")
    assert begin < page.index("<h2>Recovery")
    section = page[begin : page.index("<h2>", begin + 1)]
    shown = re.findall(r"<h3>Prompt (\d+)\?</h3>", section)
    assert shown == ["0", "4", "6", "1", "5", "9"]
    assert "<b>teacher</b><p>Teacher&#39;s 4.</p>" in section
    assert "<b>teacher</b><p>(nothing)</p>" in section
    assert section.count("<b>4-bit</b><p>Well, it depends …</p>") == 6
    assert "answers.jsonl" not in " ".join(result["missing"])


def test_a_student_that_loops_is_named_first(copy: Path) -> None:
    """From more than one answer in ten above the teacher's on: both counts before the first
    answer.
    """
    rows = rows_of_answers("Fine.")
    named = []
    for number in (1, 3):
        rows[number]["text"] = "I'm not sure. " * 30
        put_answers(copy, rows)
        before, _, _ = written(copy)[0].partition("<h3>Prompt 0?")
        named.append(bool(re.search(r"\b[12] [a-z ]+ 12 [a-z ;]+ 0\b", before)))
    assert named == [False, True]


def test_answers_that_are_not_there(copy: Path) -> None:
    """A run that asked nobody shows nothing; one whose result says that it did names the file; torn
    lines are passed over; another version is told.
    """
    page, result = written(copy)
    assert "Answers" not in page
    assert "answers.jsonl" not in " ".join(result["missing"])
    put_answers(copy, rows_of_answers("Fine."))
    whole = (copy / run_folder.ANSWERS).read_text()
    for text, shown, said in (
        (whole[: len(whole) // 2], True, ""),
        ("[1, 2]\n" + whole[:30], False, "answers.jsonl is damaged"),
        (json.dumps({"text": 1}), False, "another version"),
        (None, False, "answers.jsonl is missing"),
    ):
        if text is None:
            (copy / run_folder.ANSWERS).unlink()
        else:
            (copy / run_folder.ANSWERS).write_text(text)
        page, result = written(copy)
        assert ("<h3>Prompt 0?</h3>" in page) == shown
        assert said in page + " ".join(result["missing"])
        assert ("another version" in page) == (said == "another version")


HOSTILE = (
    "</td></svg><script>alert(1)</script><img src=x "
    "onerror=alert(2)><style>*{display:none}</style>$\\frac{{{"
)


def test_text_of_models_and_files_is_never_run(copy: Path, tmp_path: Path) -> None:
    """Whatever a file or a folder's name says is shown as text: no element, attribute or script of
    theirs.
    """
    put_answers(copy, rows_of_answers("loop " * 60))
    before = Tags(written(copy)[0])
    answers = []
    for row in rows_of_answers("loop " * 60):
        spoilt = {name: f"{value}{HOSTILE}" for name, value in row.items()}
        answers.append({**spoilt, "ended": row["ended"]})
    put_answers(copy, answers)
    (copy / "table.md").write_text(f"| | {HOSTILE} |\n|---|---:|\n| {HOSTILE} | 1 |\n\n{HOSTILE}\n")
    config = {HOSTILE: HOSTILE, "scenario": HOSTILE, "iters": HOSTILE}
    (copy / run_folder.CONFIG).write_text(json.dumps(config))
    (copy / run_folder.ORIGIN).write_text(json.dumps({HOSTILE: HOSTILE}))
    first, *rest = (copy / run_folder.PHASES).read_text().splitlines()
    begun = json.loads(first)
    begun["flags"] = {HOSTILE: HOSTILE}
    begun["rates"] |= {"device": HOSTILE, "source": HOSTILE}
    begun["planned"].append({"phase": HOSTILE, "seconds": 1.0, "peak_bytes": 1})
    (copy / run_folder.PHASES).write_text("\n".join([json.dumps(begun), *rest, ""]))
    paused = {"wall_s": begun["wall_s"], "action": "pause", "cause": HOSTILE}
    (copy / "thermal.jsonl").write_text(json.dumps(paused) + "\n")
    named = copy.rename(copy.with_name("<img src=x onerror=alert(3)>"))
    tags = Tags(written(named, out=str(tmp_path / "page.html"))[0])
    assert {t for t, _ in tags.tags} <= OURS
    assert tags.count("script") == tags.count("style") == 1
    for _, attributes in tags.tags:
        assert not [name for name in attributes if name.startswith("on")]
    assert HOSTILE in tags.text
    assert "<img src=x onerror=alert(3)>" in tags.text
    assert "another version" not in tags.text
    assert tags.count("svg") == before.count("svg")


ALL_FILES = ("config.yaml", "origin.json", "result.json", "table.md", "metrics.jsonl")
ALL_FILES += ("phases.jsonl", "pruned/keep.json")
FOREIGN = {
    "layers": 7,
    "nll_student": "low",
    "report": {"profile": 3, "block_importance": [1]},
    "planned": [{"phase": 1}],
    "phase": "x",
    "text": 1,
    "quantization": [],
    "wall_s": "?",
    "flags": 3,
    "rates": [],
    "iters": [],
}


@pytest.mark.parametrize(
    "name", mostly_slow(ALL_FILES, "result.json", run_folder.METRICS, "pruned/keep.json")
)
def test_one_file_missing_or_of_another_version(name: str, copy: Path) -> None:
    """Our names with values of other kinds: a page with the parts that the other files give.
    Missing: it says so.
    """
    (copy / name).write_text(json.dumps(FOREIGN))
    page, _ = written(copy)
    assert page.endswith("</html>\n")
    assert page.count("<section>") >= 4
    (copy / name).unlink()
    if name.startswith("pruned"):
        (copy / "distilled" / "keep.json").unlink()
    page, result = written(copy)
    assert any(name in text for text in result["missing"])
    assert f"<li>{name} is missing" in page
    assert page.count("<h2>") >= 6
    assert "<svg" in page


@pytest.mark.parametrize("text", ["[1, 2, 3]", "[" * 10_000])
def test_damaged_files_leave_a_page_of_the_steps(text: str, copy: Path) -> None:
    """All files but one hold what ours never do: the one that is whole is shown, the others are
    named.
    """
    for name in ALL_FILES:
        if name != run_folder.METRICS:
            (copy / name).write_text(text)
    page, result = written(copy)
    assert "each of 18 steps" in page
    assert "another version" not in page
    for name in ("config.yaml", "origin.json", "result.json", "pruned/keep.json"):
        assert any(f"{name} is damaged" in line for line in result["missing"])


def test_what_is_no_run_is_a_sentence(tmp_path: Path, command: Callable[..., Done]) -> None:
    """An empty folder, no runs at all."""
    assert str(tmp_path) in sentence(command("report", tmp_path))
    assert "runs/" in sentence(command("report", cwd=tmp_path))


ASK = """
const rows = () => [...document.querySelector("table").tBodies[0].rows];
const cells = () => rows().map(row => row.cells[1].textContent);
const button = document.querySelector("th button"), found = [cells()];
for (const turn of [1, 2]) { button.click(); found.push(cells()); }
const boxes = [...document.querySelectorAll("svg")].map(svg => svg.getBoundingClientRect());
document.title = JSON.stringify({
  found,
  sort: document.querySelector("th[aria-sort]").ariaSort,
  wide: document.documentElement.scrollWidth,
  boxes: boxes.map(b => [b.width, b.height, b.right]),
  loaded: performance.getEntriesByType("resource").map(entry => entry.name),
  foreign: window.foreign ?? null,
});
"""


@pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on PATH: scripts/install-chromium installs Debian's"
)
@pytest.mark.parametrize("width", [500, 1280])
def test_in_a_browser(width: int, copy: Path, tmp_path: Path) -> None:
    """From disk: tables sort (numbers as numbers, what is none last), nothing scrolls sideways or
    loads anything, and even if a text got in as HTML, its scripts and handlers would not run.
    """
    numbers = ["5", "–", "1,200", *(str(number % 7 + number / 100) for number in range(10))]
    rows = "".join(f"| row | {number} |\n" for number in numbers)
    (copy / "table.md").write_text(f"| | column |\n|---|---:|\n{rows}")
    page, _ = written(copy)
    script = (Path(html.__file__).parent / "templates" / "page.js").read_text().rstrip("\n")
    ours, asking = (
        base64.b64encode(hashlib.sha256(t.encode()).digest()).decode()
        for t in (script, script + ASK)
    )
    assert script in page
    assert ours in page
    bad = (
        "<script>window.foreign = 1</script><img src='https://example.invalid/' "
        "onerror='window.foreign = 2'>"
    )
    page = page.replace(ours, asking).replace(script, script + ASK)
    (tmp_path / "page.html").write_text(page.replace("<body>", f"<body>{bad}"))
    line = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    line += [f"--window-size={width},900", f"--user-data-dir={tmp_path / 'profile'}"]
    line.append((tmp_path / "page.html").as_uri())
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    title = re.search("<title>(.*?)</title>", done.stdout)
    assert title, done.stderr
    answer = json.loads(title[1])
    columns = []
    for column in answer["found"]:
        columns.append([float(cell.replace(",", "")) for cell in column if cell != "–"])
    before, rising, falling = columns
    assert len(before) > 10
    assert rising == sorted(before) != before
    assert falling == rising[::-1]
    assert answer["sort"] == "descending"
    assert answer["wide"] <= width
    assert answer["foreign"] is None
    # refused by the policy
    assert answer["loaded"] == ["https://example.invalid/"]
    assert len(answer["boxes"]) == 3
    assert all(wide > 200 and high > 60 and right <= width for wide, high, right in answer["boxes"])
