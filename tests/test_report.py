"""The report end to end: a whole run, half a run, somebody else's run, and what a browser makes of the page."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from mis_mlx import report
from mis_mlx.reporting import figures, run_reader
from mis_mlx.storage import run_folder
from mis_mlx.types import Checkpoint, MisError
from tests import browser, forks
from tests.conftest import SMALL, Done, last_line, mostly_slow, sentence

pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'matplotlib>=3.9'")
DATA = Path(__file__).parent / "data"
OURS = {
    *("html", "head", "meta", "link", "title", "style", "body", "script", "section", "div", "h1", "h2", "h3", "p", "b"),
    *("pre", "ul", "li", "details", "summary", "table", "thead", "tbody", "tr", "th", "td", "button"),
    *("figure", "figcaption", "svg", "desc", "defs", "clippath", "g", "path", "rect", "use", "text", "image"),
}


class Tags(HTMLParser):
    """Elements and attributes of a page, and its text."""

    def __init__(self, page: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Remember it."""
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        """Remember it."""
        self.text += data


def made(*folders: Path, **more: Any) -> tuple[str, dict[str, Any]]:
    """(page, the command's result)."""
    result = report.run(report.Settings(tuple(map(str, folders)), **more))
    return Path(result["report"]).read_text("utf-8"), result


@pytest.fixture
def copy(tmp_path: Path, finished: tuple[Path, Done]) -> Path:
    """A run folder to do harm to, without its weights."""
    heavy = shutil.ignore_patterns("*.safetensors", "tokenizer*")
    return shutil.copytree(finished[0], tmp_path / "run", ignore=heavy)


@pytest.fixture(scope="module")
def warm(
    tmp_path_factory: pytest.TempPathFactory, llama: Checkpoint, text_folder: Path, command: Callable[..., Done]
) -> Path:
    """A run on a recorded hot afternoon: tea breaks, air that warms, neurons and heads cut by AAIS."""
    out = tmp_path_factory.mktemp("warm") / "run"
    cut = ("--scenario", "none", "--layers", 2, "--ffn", 512, "--heads", 2, "--q-group-size", 32, "--iters", 40)
    flags = ("--teacher", llama.path, "--data", text_folder, *SMALL, *cut, "--num-samples", 24)
    air = ("--thermal-replay", DATA / "halny.jsonl", "--altitude-m", 832, "--governor", "steady")
    done = command("distill", *flags, *air, "--out", out)
    assert done.returncode == 0, done.stderr
    return out


def test_the_page_of_a_run(finished: tuple[Path, Done], copy: Path) -> None:
    """Every part is there, nothing is of another version, and the browser may load nothing."""
    page, result = made(copy)
    tags = Tags(page)
    assert result["bytes"] == len(page.encode()) < 2**20 and result["runs"] == 1
    heads = ("Recovery", "How it went", "What it cost", "What was kept", "Bits", "What they write", "To do it again")
    assert all(f"<h2>{head}</h2>" in page for head in heads)
    assert "another version" not in page
    values = last_line(finished[1])
    assert f"{values['nll_student']:.3f} nats a token" in page and f"{values['tokens']:,} tokens" in page
    policy = next(a["content"] for t, a in tags.found if t == "meta" and "http-equiv" in a)
    assert policy and policy.startswith("default-src 'none'") and "refresh" not in page
    assert not [a for _, a in tags.found if str(a.get("src") or a.get("href") or "#")[:5] not in ("#", "data:")
                and not str(a.get("href")).startswith("#")]  # fmt: skip
    assert re.search("python -m mis_mlx.distill .*--teacher", page)
    assert json.loads((copy / run_folder.ORIGIN).read_text())["data"] in page


def test_what_a_run_writes_down_for_it(finished: tuple[Path, Done], llama: Checkpoint) -> None:
    """The plan's phases and what each took, texts of four models in two languages, a profile of every layer."""
    told = run_reader.read(finished[0])
    planned = [p["phase"] for p in told.begun["planned"]]
    assert [p["phase"] for p in told.phases] == planned == ["prune", "repair", "distil", "quantize", "tune", "measure"]
    assert all(p["seconds"] > 0 and p["peak_bytes"] > 0 for p in told.phases)
    assert {(s["model"], s["language"]) for s in told.samples} == {
        (m, language) for m in ("teacher", "pruned", "distilled", "4-bit") for language in ("English", "Polish")
    }
    profile = told.keep["report"]["profile"]
    assert profile.keys() == {
        f"{i}/{axis}" for i in range(llama.config["num_hidden_layers"]) for axis in ("ffn", "heads")
    }
    kept = {int(k.split("/")[0]): v["kept"] for k, v in profile.items() if k.endswith("ffn")}
    removed = set(kept) - set(told.keep["layers"])
    assert removed and all(kept[i] == 0 for i in removed)
    # The best five sixths of the neurons hold more than five sixths of the importance.
    share = len(told.keep["kept"]["0/ffn"]) / profile["0/ffn"]["units"]
    assert all(share < kept[i] < 1 for i in told.keep["layers"])
    assert profile["0/ffn"]["values"] == sorted(profile["0/ffn"]["values"], reverse=True)
    assert told.begun["flags"].keys() >= {"iters", "teacher"} and "out" not in told.begun["flags"]


def test_weather_and_aais(warm: Path, tmp_path: Path) -> None:
    """Temperatures and tea breaks in the picture's words; how many channels AAIS keeps that the plain one does not."""
    page, _ = made(warm, out=str(tmp_path / "page.html"))
    account = json.loads((warm / run_folder.RESULT).read_text())
    assert account["tea_breaks"] > 0 and account["channels_differing_from_plain"] > 0
    assert f"Tea breaks: {account['tea_breaks']} (hot), shaded." in page and "Die from" in page and "Air from" in page
    differ = f"{account['channels_differing_from_plain']} of {account['channels_kept']} kept channels are others"
    assert differ in page and f"with plain importance {account['nll_plain']:.4f}" in page
    assert "removed heads are crossed" in page and "another version" not in page
    per_layer = json.loads((warm / "pruned" / "keep.json").read_text())["report"]["differing"]
    assert sum(per_layer.values()) == account["channels_differing_from_plain"]


def test_sensitivity(copy: Path) -> None:
    """What each block costs in 4 bits and as stored, where a mixed model says it: summed by pencil."""
    names = [f"model.layers.{i}.mlp.{part}" for i in (0, 1) for part in ("up_proj", "down_proj")]
    nats = {n: {"4": 0.5 + k, "8": 0.25} for k, n in enumerate(names)}
    (copy / "model" / "sensitivity.json").write_text(json.dumps({"nats": nats}))
    config = json.loads((copy / "model" / "config.json").read_text())
    group = {"group_size": 64, "mode": "affine"}
    config["quantization"] = {**group, "bits": 4, names[3]: {**group, "bits": 8}}
    (copy / "model" / "config.json").write_text(json.dumps(config))
    page, _ = made(copy)
    assert f"other widths: {names[3]} 8." in page
    assert "mathdefault" not in page
    assert "8.0000 nats all in 4 bits and 4.7500 nats as stored; most as stored, 2.7500, in block 1." in page


HOSTILE = "</td></svg><script>alert(1)</script><img src=x onerror=alert(2)><style>*{display:none}</style>$\\frac{"


def test_text_of_models_and_files_is_never_run(copy: Path, tmp_path: Path) -> None:
    """Whatever a file or a folder's name says is shown as text: no element, attribute or script of theirs."""
    before = Tags(made(copy)[0]).found
    said = run_folder.records(copy / run_folder.SAMPLES)
    lines = [json.dumps({name: str(value) + HOSTILE for name, value in sample.items()}) for sample in said]
    (copy / run_folder.SAMPLES).write_text("\n".join(lines) + "\n")
    (copy / "table.md").write_text(f"| | {HOSTILE} |\n|---|---:|\n| {HOSTILE} | 1 |\n\n{HOSTILE}\n")
    (copy / run_folder.CONFIG).write_text(json.dumps({HOSTILE: HOSTILE, "scenario": HOSTILE, "iters": HOSTILE}))
    (copy / run_folder.ORIGIN).write_text(json.dumps({HOSTILE: HOSTILE}))
    first, *rest = (copy / run_folder.PHASES).read_text().splitlines()
    begun = json.loads(first)
    begun["flags"], begun["rates"]["device"], begun["rates"]["source"] = {HOSTILE: HOSTILE}, HOSTILE, HOSTILE
    begun["planned"].append({"phase": HOSTILE, "seconds": 1.0, "peak_bytes": 1})
    (copy / run_folder.PHASES).write_text("\n".join([json.dumps(begun), *rest, ""]))
    (copy / "thermal.jsonl").write_text(
        json.dumps({"wall_s": begun["wall_s"], "action": "pause", "cause": HOSTILE}) + "\n"
    )
    named = copy.rename(copy.with_name("<img src=x onerror=alert(3)>"))
    tags = Tags(made(named, named, out=str(tmp_path / "page.html"))[0])
    assert {t for t, _ in tags.found} <= OURS | {"br"}
    assert [t for t, _ in tags.found].count("script") == 1 and [t for t, _ in tags.found].count("style") == 1
    assert not [name for _, attributes in tags.found for name in attributes if name.startswith("on")]
    assert HOSTILE in tags.text and "<img src=x onerror=alert(3)>" in tags.text and "another version" not in tags.text
    assert len([t for t, _ in tags.found if t == "svg"]) == 2 * len([t for t, _ in before if t == "svg"]) + 1


FILES = ("config.yaml", "origin.json", "result.json", "table.md", "metrics.jsonl", "phases.jsonl", "samples.jsonl")
ALL_FILES = (*FILES, "pruned/keep.json", "model/config.json")


@pytest.mark.parametrize(
    "name", mostly_slow(ALL_FILES, "config.yaml", "result.json", run_folder.METRICS, "pruned/keep.json")
)
def test_a_missing_file_is_a_sentence(name: str, copy: Path) -> None:
    """The page is made of the others, and says which one is missing."""
    (copy / name).unlink()
    if name.startswith("pruned"):
        (copy / "distilled" / "keep.json").unlink()
    page, result = made(copy)
    assert any(name in text for text in result["missing"])
    assert f"<li>{name} is missing" in page and page.count("<svg") >= 2


FOREIGN = {
    "layers": 7, "nll_student": "low", "report": {"profile": 3, "block_importance": [1]}, "planned": [{"phase": 1}],
    "phase": "x", "text": 1, "quantization": [], "wall_s": "?", "flags": 3, "rates": [], "iters": [],
}  # fmt: skip


@pytest.mark.parametrize(
    "name", mostly_slow(ALL_FILES, "origin.json", "result.json", run_folder.METRICS, "pruned/keep.json")
)
def test_another_version_gives_a_partial_page(name: str, copy: Path) -> None:
    """Our names with values of other kinds: a page all the same, with the parts that the other files give."""
    (copy / name).write_text(json.dumps(FOREIGN))
    page, _ = made(copy)
    assert page.endswith("</html>\n") and page.count("<section>") >= 4


@pytest.mark.parametrize("text", ["[1, 2, 3]", "\x00\xff{", "", "[" * 100_000])
def test_damaged_files_leave_a_page_of_the_steps(text: str, copy: Path) -> None:
    """All files but one hold what ours never do: the one that is whole is shown, the others are named."""
    damaged = [name for name in (*FILES, "pruned/keep.json", "model/config.json") if name != run_folder.METRICS]
    for name in damaged:
        (copy / name).write_text(text)
    page, result = made(copy)
    assert "steps logged" in page and "another version" not in page
    for name in ("config.yaml", "origin.json", "result.json", "pruned/keep.json", "model/config.json"):
        assert any(f"{name} is damaged" in said for said in result["missing"])


def test_a_run_that_goes_on(copy: Path) -> None:
    """No result yet, the last line cut off: where it stands, and what was passed over."""
    for name in ("result.json", "table.md", "samples.jsonl"):
        (copy / name).unlink()
    lines = (copy / run_folder.METRICS).read_text().splitlines()
    (copy / run_folder.METRICS).write_text("\n".join(lines[:20]) + "\n" + lines[20][:30])
    page, result = made(copy)
    assert "is being made" in page and "step 20 of 30" in page
    assert any("1 of 21 lines that are no records" in text for text in result["missing"])


def test_what_is_no_run_is_a_sentence(tmp_path: Path, command: Callable[..., Done]) -> None:
    """An empty folder, no runs at all, no time between looks, no matplotlib."""
    assert "holds nothing of a run" in sentence(command("report", tmp_path))
    assert "There is no run under runs/" in sentence(command("report", cwd=tmp_path))
    with pytest.raises(MisError, match="--every-s is 0: give 1 or more"):
        report.run(report.Settings((str(tmp_path),), every_s=0))


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence with what to install."""
    monkeypatch.setattr(figures, "find_spec", lambda name: None)
    with pytest.raises(MisError, match="need matplotlib, which is not installed: .* -m pip install"):
        report.run(report.Settings())


def test_several_runs_side_by_side(copy: Path, warm: Path, tmp_path: Path) -> None:
    """One picture of all losses, each number with its difference to the first run's, the settings that differ."""
    page, result = made(copy, warm, out=str(tmp_path / "both.html"))
    assert result["runs"] == 2 and "<h2>Side by side</h2>" in page
    first, second = (json.loads((f / run_folder.RESULT).read_text())["nll_student"] for f in (copy, warm))
    assert f"<td>nll_student</td><td>{first:,.4g}</td><td>{second:,.4g} ({second - first:+,.3g})</td>" in page
    assert (
        "<td>scenario</td><td>goral</td><td>none</td>" in page and "<td>batch_size</td><td>2</td><td>2</td>" not in page
    )
    ids = [a["id"] for _, a in Tags(page).found if "id" in a]
    assert len(ids) == len(set(ids)) and "<h1>run (1)</h1>" in page


def test_watch_ends_with_the_run(copy: Path, own_home: dict[str, str]) -> None:
    """While the run goes on the page asks the browser to come again; with the result it is written once more."""
    done = (copy / run_folder.RESULT).rename(copy / "later")
    line = ["-m", "mis_mlx.report", copy, "--watch", "--every-s", 1]
    with forks.start(line, own_home, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
        page = copy / "report.html"
        while not page.exists() and child.poll() is None:
            time.sleep(0.05)
        assert 'http-equiv="refresh" content="1"' in page.read_text()
        done.rename(copy / run_folder.RESULT)
        out, _ = child.communicate(timeout=60)
    assert child.returncode == 0 and json.loads(out.splitlines()[-1])["runs"] == 1
    assert "refresh" not in page.read_text() and "of the gap is closed" in page.read_text()
    assert not list(copy.glob(".tmp-*"))


def peak_of_child(code: str, *arguments: object) -> int:
    """Resident peak, in bytes, of a Python that runs this code."""
    line = [sys.executable, "-c", code + "\nimport resource\nprint(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"]
    done = subprocess.run([*line, *map(str, arguments)], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout.splitlines()[-1]) * (1 if sys.platform == "darwin" else 1024)


@pytest.mark.parametrize("count", [10**5, pytest.param(10**6, marks=pytest.mark.slow)])
def test_a_million_steps_in_bounded_memory(count: int, copy: Path) -> None:
    """A log of very many lines: a page that is no larger, a peak hardly higher than for ten, every extreme kept."""
    step = {"wall_s": 0.0, "number": 0, "loss": 1.0, "tokens": 512, "seconds": 2.0, "peak_bytes": 2**30}
    lines = [json.dumps({**step, "wall_s": 2.0 * i, "number": i, "loss": 2 + (i % 7) / 10}) for i in range(1, 11)]
    (copy / run_folder.METRICS).write_text("\n".join(lines) + "\n")
    code = "import sys\nfrom mis_mlx import report\nprint(report.run(report.Settings((sys.argv[1],))))"
    few = peak_of_child(code, copy)
    spikes = {1: 7.0, 44_444: 0.125, count - 2: 9.5}
    form = '{{"wall_s": {}, "number": {}, "loss": {}, "tokens": 512, "seconds": 2.0, "peak_bytes": 1073741824}}\n'
    with (copy / run_folder.METRICS).open("w") as file:
        file.writelines(form.format(2.0 * i, i, spikes.get(i, 2 + (i % 7) / 10)) for i in range(1, count + 1))
    many, size = peak_of_child(code, copy), (copy / run_folder.METRICS).stat().st_size
    assert size > 80 * count and many - few < 16 * 2**20
    page = (copy / "report.html").read_text()
    assert f"between 0.125 and 9.500, {count:,} steps logged" in page and len(page) < 2**20


@pytest.fixture(scope="module")
def chromium() -> Iterator[browser.Browser]:
    """A browser, where there is one."""
    if browser.found() is None:
        pytest.skip("no Chromium on PATH: scripts/install-chromium installs Debian's")
    with browser.Browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def shown(warm: Path, finished: tuple[Path, Done], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pages as files: of one run, and of two."""
    folder = tmp_path_factory.mktemp("pages")
    one, two = folder / "one.html", folder / "two.html"
    made(warm, out=str(one))
    made(finished[0], warm, out=str(two))
    return {"one": one, "two": two}


@pytest.mark.parametrize("name", ["one", "two"])
@pytest.mark.parametrize(("width", "dark"), [(390, False), (390, True), (1280, False)])
def test_in_a_browser(name: str, width: int, dark: bool, chromium: browser.Browser, shown: dict[str, Path]) -> None:
    """From disk: no request to any host, no error, no sideways scroll; every picture has a size and words."""
    chromium.open(shown[name], width, dark=dark)
    asked = [e["request"]["url"] for method, e in chromium.events if method == "Network.requestWillBeSent"]
    assert asked and all(url.startswith(("file:", "data:")) for url in asked)
    trouble = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded", "Network.loadingFailed")
    assert not [event for event in chromium.events if event[0] in trouble]
    assert chromium.ask("document.documentElement.scrollWidth") <= width
    pictures = chromium.ask("""[...document.querySelectorAll("svg")].map(s => {
        const box = s.getBoundingClientRect(), words = s.getAttribute("aria-labelledby").split(" ");
        return [s.getAttribute("role"), s.getAttribute("width"), s.getAttribute("height"), box.width, box.height,
                words.map(id => document.getElementById(id).textContent.length), box.right];})""")
    assert len(pictures) >= 8
    for role, *size, shown_width, shown_height, words, right in pictures:
        assert role == "img" and all(float(s) > 0 for s in size) and min(words) > 3
        assert shown_width > 200 and shown_height > 60 and right <= width
    light = chromium.ask("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert light is not dark


def test_tables_sort_in_a_browser(chromium: browser.Browser, shown: dict[str, Path]) -> None:
    """One press: rising; another: falling; numbers as numbers; what is no number comes last."""
    chromium.open(shown["two"], 1280)
    column = "[...document.querySelector('table').tBodies[0].rows].map(r => r.cells[1].textContent)"
    press = "document.querySelectorAll('table')[0].querySelectorAll('th button')[0].click()"
    before = chromium.ask(column)

    def numbers(cells: list[str]) -> list[float]:
        return [float(c.replace(",", "")) for c in cells if c != "–"]

    chromium.ask(press)
    rising = chromium.ask(column)
    chromium.ask(press)
    falling = chromium.ask(column)
    assert sorted(before) == sorted(rising) == sorted(falling) and len(before) > 10
    assert numbers(rising) == sorted(numbers(rising)) != numbers(before)
    assert numbers(falling) == sorted(numbers(falling), reverse=True)
    assert chromium.ask("document.querySelector('th[aria-sort]').ariaSort") == "descending"


def test_a_script_of_somebody_else_would_not_run(
    chromium: browser.Browser, shown: dict[str, Path], tmp_path: Path
) -> None:
    """Even if text got in as HTML, the page's policy holds: neither scripts nor handlers run, nothing is loaded."""
    page = shown["one"].read_text("utf-8")
    bad = "<script>document.title='run'</script><img src='https://example.invalid/x' onerror=\"document.title='run'\">"
    (tmp_path / "bad.html").write_text(page.replace("<body>", f"<body>{bad}"))
    chromium.open(tmp_path / "bad.html", 390)
    assert chromium.ask("document.title") != "run"
    asked = [e["requestId"] for method, e in chromium.events if method == "Network.requestWillBeSent"
             and "example.invalid" in e["request"]["url"]]  # fmt: skip
    stopped = {e["requestId"]: e.get("blockedReason") for m, e in chromium.events if m == "Network.loadingFailed"}
    assert [stopped[one] for one in asked] == ["csp"] * len(asked)
