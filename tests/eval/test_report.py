"""The report: numbers from hand-made predictions, joins, escapes and refusals."""

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from helpers import message_of
from tiny_report import report, write_evaluation, write_harness, write_json, write_result, write_run

from eval.published import EVALUATIONS, is_published_data, published
from eval.report.comparison import pairs, remarks
from eval.report.document import Heading, Output, Strong, Table, to_html, to_markdown
from eval.report.harness import _metric
from eval.report.inputs import data_name, read_inputs
from eval.report.results import Metric, Row
from eval.statistics import (
    holm,
    mcnemar,
    mean_metric,
    paired_difference,
    permutation_test,
    wilson,
)

RIGHT = {
    "base": [0, 0, 0, 1, 0, 0, 0, 0, 0, 0],
    "frozen": [1, 0, 0, 1, 0, 0, 0, 0, 0, 0],
    "densemixer": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0],
}
NASTY = '<script>alert("1")</script>\n```\n| a | & </pre> $x$ <img src=x onerror=alert(2)>'


@pytest.fixture
def runs(tmp_path):
    """Returns two training runs with their evaluations, and the base's evaluation."""
    paths = []
    for method in ("densemixer", "frozen"):
        path = write_run(tmp_path / f"{method}_gsm", method)
        evaluation = write_evaluation(path / "eval", str(path / "hf"))
        write_result(evaluation, "gsm", "exact_match", RIGHT[method], data=EVALUATIONS["gsm"].data)
        paths.append(path)
    base = write_evaluation(tmp_path / "first", "allenai/OLMoE-1B-7B-0125")
    write_result(base, "gsm", "exact_match", RIGHT["base"], data=EVALUATIONS["gsm"].data)
    return [str(base), *map(str, paths)]


class Page(HTMLParser):
    """A page's tables, and every tag with its attributes."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.tables, self.open = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "wbr"):
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another"

    def handle_data(self, data):
        if self.open and {"td", "th"} & {*self.open}:
            self.tables[-1][-1][-1] += data


def test_results_of_lm_eval(tmp_path):
    """A group with metrics stands for its tasks, and the latest result of a task counts."""
    path = tmp_path / "run/lm_eval/m"
    groups = {"all": ["inner", "c"], "inner": ["a", "b"], "a": [], "b": []}
    write_harness(path, groups, "1", all=[0.5], inner=[0.5], a=[1.0, 0.0], b=[1.0], c=[0.0])
    write_harness(path, {}, "2", limit=2, d=[0.0, 0.0])
    write_harness(path, {}, "3", limit=2, d=[1.0, 0.0])
    inputs = read_inputs([f"x={path.parent}"])
    assert list(inputs.results) == ["lm_eval:all", "lm_eval:d"]
    group, task = (column["x"] for column in inputs.results.values())
    assert list(group.rows) == ["a/0", "a/1", "b/0", "c/0"]
    assert task.metrics["acc"] == Metric(50.0, *wilson(1, 2), higher_is_better=True)
    # Standard errors stay within the shares, and none is no interval.
    assert _metric(0.1, [0.2, 0.0], 0.2, True) == Metric(10, 0, pytest.approx(49.2))
    assert _metric(7, [], 2.0, False) == Metric(7, 7 - 3.92, 7 + 3.92, False, is_share=False)
    assert _metric(0.5, [0.5, 0.5], 0.0, True) == Metric(50, None, None)
    assert task.settings["limit"] == 2
    assert task.rows["0"] == [Row("0?", "no", "yes", {"acc": 1.0})]
    (path / "samples_d_3.jsonl").unlink()
    assert "run lm_eval again with --log_samples" in message_of(read_inputs, [str(path)])


def test_equal_values_share_the_bold(tmp_path):
    """The lowest are bold in a column that says so."""
    scores = {"a": 9.5, "b": 12, "c": 9.5}
    paths = [write_harness(tmp_path / name, {}, t=score) for name, score in scores.items()]
    markdown, _ = report(tmp_path / "report", *map(str, paths))
    assert "lm\\_eval:t (m ↓)" in markdown
    assert markdown.count("**9.50**") == 2
    assert "**12.00**" not in markdown


def test_scores_that_are_no_shares(tmp_path):
    """Differences and rows have the metric's unit. Few points of a hundred are no share."""
    scores = {"a": [20.0, 30.0, 25.0], "b": [30.0, 31.0, 25.0], "c": [0.5, 0.25, 0.0]}
    paths = [str(write_harness(tmp_path / n, {}, t=values)) for n, values in scores.items()]
    markdown, text = report(tmp_path / "two", *paths[:2])
    assert [row[1] for row in Page(text).tables[1]] == ["difference", "+3.67"]
    assert "a (acc 20.00)" in markdown
    _, text = report(tmp_path / "three", *paths)
    shown, tests, *_ = Page(text).tables
    assert [row[1] for row in shown[1:]] == ["25.00 (24.8 to 25.2)", "28.67 (28.5 to 28.9)", "0.25"]
    assert {row[0]: row[1] for row in tests}["c − a"] == "-24.75"


def test_limits_of_some_methods(tmp_path):
    """Whichever is named first."""
    for name, limit in (("a", 2), ("b", None), ("c", 2)):
        path = write_evaluation(tmp_path / name, gsm=[1.0, 0.0])
        result = json.loads((path / "gsm/result.json").read_text())
        result["settings"]["limit"] = limit
        write_json(path / "gsm/result.json", result)
    for names, groups in (("ab", "a: the first 2; b: all"), ("ba", "b: all; a: the first 2")):
        notes = list(remarks(read_inputs([str(tmp_path / name) for name in names])))
        assert notes == [f"gsm: not all rows were evaluated with every method ({groups})."]
    notes = list(remarks(read_inputs([str(tmp_path / name) for name in "ac"])))
    assert notes == ["gsm: only the first 2 rows were evaluated."]


def test_a_remark_names_a_method_once(tmp_path):
    for name, task, dtype in (("a", "gsm", "float32"), ("b", "law", "float32"), ("c", "gsm", "x")):
        path = write_evaluation(tmp_path / name, **{task: [1.0]})
        write_json(path / "model.json", {"model": "m", "compute_dtype": dtype})
    arguments = [f"x={tmp_path}/a", f"x={tmp_path}/b", f"y={tmp_path}/c"]
    (note,) = remarks(read_inputs(arguments))
    assert note == "Not all were decoded with the same compute_dtype: x: float32; y: x."


def test_other_data_is_not_compared_with_the_published_scores(tmp_path, runs):
    """A toy's score beside the paper's means nothing."""
    toy = write_evaluation(tmp_path / "toy")
    write_result(toy, "gsm", "exact_match", [1.0] * 60, data="generated")
    markdown, _ = report(tmp_path / "mixed", *runs[:2], f"frozen={toy}")
    assert "| frozen | other data |" in markdown
    assert "| densemixer | +41.00 (49.00) |" in markdown
    assert "gsm: frozen not compared, evaluated on other data" in markdown
    markdown, _ = report(tmp_path / "alone", f"frozen={toy}")
    assert "| frozen | other data |" not in markdown
    # The hub's rows, all of them.
    hub = {"source": "RoxanneWsyw/ESFT-law:test.jsonl", "data": "x"}
    assert is_published_data("law", hub | {"examples": 100})
    assert not is_published_data("law", hub | {"examples": 20})
    assert not is_published_data("law", {"data": "x", "examples": 100})


def test_every_row_names_models_and_directories(tmp_path, runs):
    *_, models = Page(report(tmp_path / "report", *runs)[1]).tables
    assert models[0] == ["method", "tasks", "model", "evaluation", "decoded with"]
    run = tmp_path / "frozen_gsm"
    assert models[2] == ["frozen", "gsm", f"{run}/hf", f"{run}/eval", "jax, float32"]


def test_numbers_of_the_tables(tmp_path, runs):
    markdown, text = report(tmp_path / "report", *runs)
    page = Page(text)
    assert not page.open
    scores, known, tests, _ = page.tables
    interval = {name: mean_metric(values) for name, values in RIGHT.items()}
    assert scores == [
        ["method", "gsm (exact_match)"],
        *([n, f"{m.value:.2f} ({m.low:.1f} to {m.high:.1f})"] for n, m in interval.items()),
    ]
    assert known == [
        ["method", "gsm (exact_match)"],
        ["base", "-5.85 (15.85)"],
        ["frozen", "-24.88 (44.88)"],
        ["densemixer", "+41.00 (49.00)"],
    ]
    # 8 rows only densemixer gets right and none only base: 2 / 2^8; 7 and none: 2 / 2^7.
    assert [(row[0], row[1], *row[3:]) for row in tests[1:]] == [
        ("densemixer − base", "+80.00", "0.0078", "0.0234", "McNemar", "10"),
        ("densemixer − frozen", "+70.00", "0.0156", "0.0312", "McNemar", "10"),
        ("frozen − base", "+10.00", "1.0000", "1.0000", "McNemar", "10"),
    ]
    assert markdown.count("**90.00 (") == 1
    assert "↓" not in markdown
    assert "| densemixer − frozen | **+70.00** |" in markdown
    assert "**+10.00**" not in markdown


def test_page_is_one_file_and_the_markdown_links_exist(tmp_path, runs):
    markdown, text = report(tmp_path / "report", *runs)
    for tag, attributes in Page(text).tags:
        assert tag not in ("script", "link", "iframe", "object")
        assert not {"href", "onclick", "onerror"} & attributes.keys()
        assert attributes.get("src", "data:").startswith("data:")
    assert "url(" not in text
    assert "http" not in re.sub(r"data:[^\"]*", "", text.replace("http-equiv", ""))
    links = re.findall(r"!\[.*?\]\((.*?)\)", markdown)
    assert links == ["loss_gsm.svg", "right_answers_gsm.svg"]
    for link in links:
        assert b"densemixer" in (tmp_path / "report" / link).read_bytes()
    again = report(tmp_path / "again", *runs)
    assert again == (markdown, text)


def test_what_a_model_wrote_stays_text(tmp_path):
    path = write_evaluation(tmp_path / "a|<b>")
    write_result(path, "gsm", "exact_match", [1.0, 0.0], output=NASTY)
    markdown, text = report(tmp_path / "report", str(path))
    tags = {tag for tag, _ in Page(text).tags}
    assert not {"script", "img"} & tags
    assert html.escape(NASTY) in text
    assert f"````text\n{NASTY}\n````" in markdown
    assert r"| a\|\<b\> |" in markdown


def test_html_and_markdown_of_every_block():
    blocks = [Heading(1, "a < b"), Table(["x|", "y"], [["*", Strong("<1>")]]), Output("l", "")]
    assert "<b>&lt;1&gt;</b>" in to_html(blocks)
    assert to_markdown(blocks) == (
        "# a \\< b\n\n| x\\| | y |\n| --- | --- |\n| \\* | **\\<1\\>** |\n\nl\n\n```text\n\n```\n"
    )


def test_evaluations_find_their_training_runs(tmp_path, runs):
    """Directory, model path or name tell the run; one method over several tasks is a row."""
    lora = write_run(tmp_path / "x", "densemixer_lora", "some/esft/train/law.jsonl")
    by_model = write_evaluation(tmp_path / "y", str(lora), law=[0.5, 0.25, None])
    other = write_evaluation(tmp_path / "z", "elsewhere", law=[0.5, 0.5, 0.0])
    more = write_evaluation(tmp_path / "w", str(tmp_path / "densemixer_gsm"), law=[1.0, 1.0, 1.0])
    inputs = read_inputs([*runs, str(by_model), f"mine={other}", str(more)])
    assert inputs.methods == ["base", "frozen", "densemixer", "densemixer_lora", "mine"]
    assert list(inputs.results["law"]) == ["densemixer_lora", "mine", "densemixer"]
    assert [(name, run.data) for name, run in inputs.runs] == [
        ("densemixer", "gsm"),
        ("frozen", "gsm"),
        ("densemixer_lora", "law"),
    ]
    found = {(p.first, p.second): p.difference for p in pairs(inputs, "law", "judge")}
    assert found["densemixer_lora", "densemixer"].rows == 2
    assert found["mine", "densemixer"].test == "permutation"
    assert found["mine", "densemixer"].value == pytest.approx(100 * (1 / 3 - 1))


def test_an_adapter_names_its_run(tmp_path, runs):
    """The adapter counts and not its model; an adapter of no run is not the base."""
    lora = write_run(tmp_path / "x", "conventional_lora")
    base = "allenai/OLMoE-1B-7B-0125"
    (tmp_path / "foreign").mkdir()
    paths = [
        write_evaluation(tmp_path / name, base, str(adapter), gsm=[1.0])
        for name, adapter in [("y", lora / "adapter"), ("z", tmp_path / "foreign")]
    ]
    (lora / "adapter").mkdir()
    inputs = read_inputs([*runs, *map(str, paths)])
    assert inputs.methods == ["base", "frozen", "densemixer", "conventional_lora", "z"]


def test_where_the_model_lies_counts_before_where_the_evaluation_lies(tmp_path):
    """A run's directory tells the method of an evaluation whose model was moved, but no base's."""
    run, other = write_run(tmp_path / "r", "frozen"), write_run(tmp_path / "o", "densemixer")
    write_evaluation(run / "moved", "/former/r/hf", gsm=[1.0])
    write_evaluation(run / "theirs", str(other), law=[1.0])
    write_evaluation(run / "before", "allenai/OLMoE-1B-7B-0125", gsm=[0.0])
    found = {evaluation.path.name: name for name, evaluation in read_inputs([str(run)]).evaluations}
    assert found == {"moved": "frozen", "theirs": "densemixer", "before": "base"}


def test_a_method_has_one_color_in_every_plot(tmp_path):
    """Also a method that the table does not have, beside others that have no curve."""
    runs = [write_run(tmp_path / name, "frozen") for name in "abc"]
    (runs[0] / "metrics.jsonl").write_text("")
    (runs[1] / "metrics.jsonl").write_text('{"step": 1, "loss": 1}\n{"step": 2, "loss": 2}\n')
    arguments = [f"{run.name}={run}" for run in runs]
    report(tmp_path / "report", *arguments)
    colors = [
        {
            name: color
            for color, name in re.findall(
                r"stroke: (#\w+)[^#]*?<text[^>]*>\u200b(\w)</text>", picture.read_text(), re.DOTALL
            )
        }
        for picture in (tmp_path / "report").glob("*.svg")
    ]
    assert {len(found) for found in colors} == {1, 2}
    assert len({found["c"] for found in colors}) == 1


def test_other_rows_are_not_compared(tmp_path):
    for name, data in (("a", "1"), ("b", "1"), ("c", "2")):
        path = write_evaluation(tmp_path / name)
        write_result(path, "gsm", "exact_match", [1.0, 0.0], data=data)
    (tmp_path / "a/intent").mkdir()
    (tmp_path / "a/intent/settings.json").write_text("{}")
    arguments = [str(tmp_path / name) for name in "abc"]
    assert [(p.first, p.second) for p in pairs(read_inputs(arguments), "gsm", "exact_match")] == [
        ("b", "a")
    ]
    markdown, _ = report(tmp_path / "report", *arguments)
    assert "not all methods were evaluated on the same rows (a, b: 1; c: 2)" in markdown
    assert "intent was begun and has no result yet" in markdown


def test_errors_are_one_line(tmp_path, runs):
    (tmp_path / "empty").mkdir()
    write_json(tmp_path / "hf/config.json", {"model_type": "olmoe"})
    for name in ("empty", "hf"):
        message = message_of(read_inputs, [str(tmp_path / name)])
        assert message.startswith(f"{tmp_path / name}: neither an evaluation")
    assert "no such directory" in message_of(read_inputs, ["nowhere"])
    assert "name before = is empty" in message_of(read_inputs, ["=x"])
    twice = write_evaluation(tmp_path / "twice", str(tmp_path / "frozen_gsm"), gsm=[1.0])
    message = message_of(read_inputs, [*runs, str(twice)])
    assert f"frozen_2={twice}" in message
    assert read_inputs([*runs, f"frozen_2={twice}"]).methods[-1] == "frozen_2"


def test_groups_of_lm_eval_in_a_circle(tmp_path):
    groups = {"a": ["b"], "b": ["c"], "c": ["b"]}
    write_harness(tmp_path, groups, a=0.5)
    (result,) = [column["x"] for column in read_inputs([f"x={tmp_path}"]).results.values()]
    assert result.rows == {}
    report(tmp_path / "report", str(tmp_path))


def test_names_of_data():
    assert data_name("RoxanneWsyw/ESFT-law:train.jsonl") == "law"
    assert data_name("train.jsonl") == "train"


def test_published_numbers():
    assert published("densemixer", "humaneval", "pass@1") == 20.73
    assert published("densemixer_lora", "translation", "judge") == 29.43
    assert published("esft_gate", "gsm", "exact_match") is None


def test_paired_tests_by_hand():
    assert mcnemar(0, 0) == mcnemar(3, 3) == 1
    assert mcnemar(1, 4) == pytest.approx(2 * (1 + 5) / 2**5)
    found = paired_difference([1, 1, 0, 1], [0, 1, 1, 0])
    assert (found.value, found.test, found.rows, found.p) == (25, "McNemar", 4, 1)
    # Of the 2^5 signs of five equal differences, two give one as large.
    equal = np.full(5, 0.25)
    assert permutation_test(equal) == pytest.approx(2 / 32, abs=0.01)
    assert permutation_test(equal) == permutation_test(equal)
    assert permutation_test(0 * equal) == 1
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([]) == []


@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 1400])
def test_page_fits_its_window(tmp_path, runs, width):
    """The page is no wider than a browser's window, and wide tables scroll in their box."""
    browser = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    if not browser:
        pytest.skip("needs chromium")
    wide = {t: [0.5] for t in ("law", "summary", "translation", "intent", "mbpp", "humaneval")}
    others = [str(write_evaluation(tmp_path / f"a_method_{i}", **wide)) for i in range(3)]
    report(tmp_path / "report", *runs, *others)
    page = (tmp_path / "report/report.html").read_text()
    # In a frame, since the browser's own window has a least width.
    (tmp_path / "frame.html").write_text(
        f'<iframe width="{width}" height="900" style="border: 0" srcdoc="{html.escape(page)}">'
        "</iframe><script>onload = () => { const root = frames[0].document.documentElement;"
        "document.title = root.scrollWidth + ' ' + frames[0].innerWidth }</script>"
    )
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command.append(f"file://{tmp_path}/frame.html")
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    content, window = map(int, re.search(r"<title>(\d+) (\d+)</title>", dom).groups())
    assert content <= window == width
