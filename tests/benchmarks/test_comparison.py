"""The comparison's tasks, runs, intervals and report, on made-up results."""

import dataclasses
import json
import re
from datetime import date
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import ROOT
from tiny import make_model, tiny_config

from benchmarks.comparison import base, cells, intervals, measures, report, runs, tasks
from benchmarks.comparison.__main__ import main
from benchmarks.comparison.cells import Cell, Result, Study
from olmoe_jax.errors import UserError
from olmoe_jax.parallel.batch import DeviceBatch

ALL = tasks.TASKS | tasks.TARGETS


def numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def words(text: str, after: str) -> list[str]:
    return text.removeprefix(after).rstrip(":").split()


def translated(english: str) -> str:
    the, how, who, verb, the_, which, whom = english.split()
    dictionary = tasks.NOUNS | tasks.ADJECTIVES | tasks.VERBS
    assert the == the_ == "the"
    return " ".join(dictionary[word] for word in (who, how, whom, which, verb))


def looked_up(question: str) -> str:
    entries, wanted = re.fullmatch(r"in (.*) find (\w+):", question).groups()
    return dict(entry.split() for entry in entries.split(", "))[wanted]


def counted(question: str) -> str:
    wanted, letters = re.fullmatch(r"count (\w) in (.*):", question).groups()
    return str(letters.count(wanted))


def right(task: str, question: str, answer: str) -> bool:
    """Returns whether the answer is right, found in another way than the task finds it."""
    n = numbers(question)
    if task == "add":
        return int(answer) == sum(n)
    if task == "subtract":
        return int(answer) + n[0] == n[1]
    if task == "largest":
        return int(answer) == sorted(n)[-1]
    if task == "story":
        signed = n[0] - n[1] if "lost" in question else sum(n)
        return answer == f"{signed} {re.search('many ([a-z]+)', question)[1]}"
    if task in ("sort", "descend"):
        letters = question.partition(" ")[2].removeprefix("down ").rstrip(":").split()
        return answer.split() == sorted(letters, reverse=task == "descend")
    if task == "count":
        return answer == counted(question)
    if task == "convert":
        units = re.sub(r"convert \d+ (\w+) to (\w+):", r"\1 \2", question)
        return answer == f"{n[0] * tasks.UNITS[units]} {units.split()[1]}"
    if task == "look_up":
        return answer == looked_up(question)
    if task == "date":
        day = date.fromisoformat(question.removeprefix("write ").rstrip(":"))
        return answer == f"{day.day} {day:%B} {day.year}"
    if task == "translate":
        return answer == translated(question.removeprefix("translate ").rstrip(":"))
    if task == "back":
        return translated(answer) == question.removeprefix("translate back ").rstrip(":")
    if task == "extract":
        fields = question.removeprefix("extract ").rstrip(":").split(", ")
        return list(map(str, json.loads(answer).values())) == fields
    if task == "order":
        order, name = json.loads(answer), question.split()[0]
        things = question.rstrip(":").split()[-1]
        intent = "return" if "sends back" in question else "buy"
        slots = {"who": name, "number": n[0], "what": things}
        return order == {"intent": intent, "slots": slots}
    if task == "cipher":
        pairs = zip(words(question, "encode "), answer.split(), strict=True)
        return all((ord(b) - ord(a)) % 26 == 3 for a, b in pairs)
    assert task == "close"
    text = "".join(words(question, "close ")) + answer.replace(" ", "")
    while (shorter := re.sub(r"\(\)|\[\]|\{\}|<>", "", text)) != text:
        text = shorter
    return not text


@pytest.mark.parametrize("task", ALL)
def test_the_answers_are_right(task):
    rows = tasks.rows(ALL[task], 50, seed=0)
    assert len({row["prompt"] for row in rows}) == 50
    assert all(right(task, row["prompt"], row["completion"]) for row in rows)


def test_no_row_has_a_question_that_is_left_out():
    task = tasks.TASKS["convert"]
    test = {row["prompt"] for row in tasks.rows(task, 500, seed=0)}
    assert not test & {row["prompt"] for row in tasks.stream(task, 300, 1, test)}
    assert tasks.stream(task, 5, 1) == tasks.stream(task, 5, 1) != tasks.stream(task, 5, 2)


def test_every_run_comes_after_what_it_needs():
    study, done = Study(), {}
    for groups in study.stages():
        before = dict(done)
        for group in groups:
            assert len({(cell.experts_per_token, cell.method) for cell in group}) == 1
            for cell in group:
                assert cells.chosen_rate(before, study, cell) in study.rates
                done[cell] = result_of(cell, loss=cell.rate or 0.0)
    assert list(done) == study.cells()  # no run twice
    assert cells.chosen_rate(done, study, next(reversed(done))) == min(study.rates)


def result_of(cell: Cell, correct: float = 0.5, **values) -> Result:
    """Returns a made-up result: of ten answers the share `correct` is right."""
    answers = ("1" * round(10 * correct)).ljust(10, "0")
    fields = {"loss": 1.0, "cpu_seconds": 1.0, "rate": cell.rate or 1e-3} | values
    fields["known"] = dict.fromkeys(tasks.TASKS, answers)
    if cell.rate is None:
        fields |= {
            "changed_routing": 0.1,
            "trained": 10_000_000,
            "step_seconds": 0.5,
            "peak_memory": 2**30,
        }
    return Result(**cell._asdict() | fields, chooses_rate=cell.rate is not None, right=answers)


def test_results_are_read_as_they_were_written(tmp_path):
    first = result_of(Cell(4, "frozen", "back", 0))
    second = result_of(Cell(4, "frozen", "back", cells.RATE_SEED, 1e-3))
    for result in (first, second):
        cells.append(tmp_path, result)
    assert cells.read(tmp_path) == {first.cell: first, second.cell: second}
    group = [first.cell, Cell(4, "frozen", "back", 1)]
    assert cells.missing(group, cells.read(tmp_path)) == group[1:]


def test_an_interval_holds_the_spread_of_seeds_and_of_rows():
    seeds = np.repeat([[0.2], [0.4], [0.6]], 50, axis=1)  # rows all alike
    found = intervals.interval([seeds])
    assert found.value == pytest.approx(0.4)
    assert (found.low, found.high) == pytest.approx((0.2, 0.6), abs=0.07)
    rows = np.tile(np.arange(100) % 2, (3, 1))  # seeds all alike
    found = intervals.interval([rows])
    # 1.96 standard errors of a share of 1/2 in 100 rows.
    assert (found.low, found.high) == pytest.approx((0.402, 0.598), abs=0.02)
    apart, shared = intervals.interval([rows, rows]), intervals.interval([rows, rows], tasks=1)
    assert shared.high - shared.low == pytest.approx(2**0.5 * (apart.high - apart.low), rel=0.1)


def test_one_seed_has_no_interval():
    found = intervals.interval([np.ones((3, 10)), np.zeros((1, 10))])
    assert found.value == 0.5
    assert np.isnan(found.low)


def test_tasks_are_not_drawn():
    rows = np.tile(np.repeat([0, 1], 50), (3, 1))  # one task all wrong, one all right
    found = intervals.interval([rows], tasks=2)
    assert (found.low, found.high) == pytest.approx((0.5, 0.5))
    assert intervals.interval([rows], tasks=1).low < 0.45


def test_answers_that_are_all_wrong_have_an_interval():
    runs_ = report.Runs(
        {c: result_of(c, 0) for c in (Cell(4, "frozen", "back", s) for s in (0, 1))}, "frozen"
    )
    found = report.accuracy(runs_, report.target_right)
    assert (found.value, found.low) == (0, 0)
    assert found.high == pytest.approx(0.278, abs=1e-3)  # Wilson, 10 rows


def test_another_study_does_not_continue(tmp_path):
    inputs = tmp_path / "inputs"
    runs.keep_study(tmp_path, cells.QUICK)
    inputs.mkdir()
    runs.keep_study(tmp_path, cells.QUICK)
    with pytest.raises(UserError, match="was begun with pretrain_steps=250, now it is 2000"):
        runs.keep_study(tmp_path, Study())


def test_signs_test_the_runs_not_the_rows():
    better = np.full((5, 100), 0.01)
    assert intervals.paired_p([better] * 4) < 0.001
    assert intervals.paired_p([better[:2]]) > 0.4  # two runs alone tell nothing
    assert intervals.paired_p([better, -better]) > 0.5


def made_up(path) -> None:
    """Writes results in which densemixer has one more right answer than the others."""
    for cell in Study(seeds=2).cells():
        cells.append(path, result_of(cell, 0.6 if cell.method == "densemixer" else 0.5))
    facts = {
        "wall_seconds": 900.0,
        "known": dict.fromkeys(tasks.TASKS, "1" * 9 + "0"),
        "targets": {name: {"loss": 2.0, "right": "0" * 10} for name in tasks.TARGETS},
        "router_cosines": {name: {"4": 0.9, "32": 1.0} for name in tasks.TARGETS},
        "load": dict.fromkeys(tasks.TASKS, [[1 / 32] * 32] * 3),
        "without": dict.fromkeys(tasks.TASKS, dict.fromkeys(tasks.TASKS, 0.25)),
    }
    for k in (1, 2, 4, 8):
        text = json.dumps(facts | {"experts_per_token": k})
        runs.base_file(path, k).write_text(text, encoding="utf-8")


def test_report(tmp_path):
    made_up(tmp_path)
    report_path = tmp_path / "report"
    main([f"--output={tmp_path}", f"--report={report_path}"])
    table = (report_path / "table.md").read_text(encoding="utf-8")
    assert re.search(r"\| `densemixer` \| 60\.0 \([\d.]+ to [\d.]+\) \| 0\.\d+ \| 60\.0 ", table)
    count = len(Study(seeds=2).cells())
    assert (
        f"{count} of {len(Study().cells())} runs, 0.1 hours of CPU time; the bases took 1.0 hours."
        in table
    )
    assert " Missing at K = 1: 6 of frozen, 6 of conventional, 6 of densemixer. Missing" in table
    effects = (report_path / "effects.md").read_text(encoding="utf-8")
    assert "| K = 8, descend and back | `densemixer` − `conventional` | +10.0 (" in effects
    # Four pairs give no p.
    row = "| m = 16, descend and back | `densemixer` − `conventional` | +0.0 (+0.0 to +0.0) |"
    assert f"{row}  | +0.000 (+0.000 to +0.000) |  | 4 |" in effects
    base = (report_path / "base.md").read_text(encoding="utf-8")
    assert "| add | 90 | 90 | 90 | 90 | 12 12 12 | 25 | 25 |" in base
    drawn = (report_path / "comparison.svg").read_text(encoding="utf-8")
    assert ">esft_token<" in drawn


def test_the_document_shows_the_committed_results(tmp_path):
    report.write_report(ROOT / "benchmarks/comparison/results", tmp_path, Study())
    document = (ROOT / "docs/comparison.md").read_text(encoding="utf-8")
    for file in tmp_path.glob("*.md"):
        assert file.read_text(encoding="utf-8").strip() in document, file.name


def test_nothing_to_report(tmp_path):
    with pytest.raises(UserError, match="no result to report"):
        main([f"--output={tmp_path}", f"--report={tmp_path}"])


def test_cells_of_the_same_base_differ_in_their_method_alone(tmp_path):
    found = {
        method: runs.cell_config(tmp_path, tmp_path / "run", Cell(4, method, "back", 1), 1e-3, 5)
        for method in ("densemixer_m8", "router_only", "frozen_lora", "conventional")
    }
    assert [c.method.router_gradient_experts for c in found.values()] == [8, None, None, None]
    assert [c.method.lora_rank for c in found.values()] == [None, None, 8, None]
    names = ["densemixer", "router_only", "frozen", "conventional"]
    assert [c.method.name for c in found.values()] == names
    alike = {dataclasses.replace(c, method=found["conventional"].method) for c in found.values()}
    assert len(alike) == 1


def test_nothing_is_measured_of_a_run_that_was_stopped(monkeypatch):
    stopped = SimpleNamespace(output_dir="run", finished=False)
    monkeypatch.setattr(runs.olmoe_jax, "train", lambda config: stopped, raising=False)
    with pytest.raises(UserError, match="the same command continues"):
        runs.trained(None)


@pytest.mark.exhaustive
def test_a_base_and_a_run(tmp_path, monkeypatch):
    # Eight programs, which `test_cosines_grow_…` compiles too.
    monkeypatch.setattr(runs, "router_cosines", lambda model, batch: {"4": 0.9, "32": 1.0})
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    monkeypatch.setattr(base, "MODEL", base.MODEL | small)
    study = Study(pretrain_steps=2, epochs=1, targets=("order",), rates=(1e-2,))
    inputs = base.write_inputs(tmp_path / "inputs", rows_per_task=40)
    known = {json.loads(line)["prompt"] for line in (inputs / "known.jsonl").open()}
    trained = {json.loads(line)["prompt"] for line in (inputs / "pretrain.jsonl").open()}
    assert len(known) == 12 * 40
    assert not known & trained
    runs.pretrain(tmp_path, 4, study)
    facts = report.read_bases(tmp_path)[4]
    assert np.sum(facts["load"]["add"]) == pytest.approx(1, abs=1e-2)
    runs.run_cells(tmp_path, "0", [cell := Cell(4, "conventional_lora", "order", 0)], study)
    result = cells.read(tmp_path)[cell]
    assert result.loss < facts["targets"]["order"]["loss"]
    assert 0 < result.changed_routing < 1
    assert 0 < result.router_cosine <= 1
    assert {task: len(bits) for task, bits in result.known.items()} == dict.fromkeys(
        tasks.TASKS, 40
    )


@pytest.mark.slow
def test_an_answer_is_right_if_greedy_decoding_gives_it():
    model, prompt, length = make_model(tiny_config()), 3, 8
    decoded = np.zeros((1, length), np.int32)
    decoded[0, :prompt] = 5, 6, 7
    for place in range(prompt, length):
        decoded[0, place] = np.asarray(model(decoded))[0, place - 1].argmax()
    tokens = np.repeat(decoded, 3, axis=0)
    tokens[1, prompt] = (tokens[1, prompt] + 1) % 16  # another answer
    tokens[2, 0] = 8  # another question
    targets = np.roll(tokens, -1, axis=1)
    weights = np.zeros(tokens.shape, np.float32)
    weights[:, prompt - 1 : -1] = 1
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
    batch = DeviceBatch(tokens, targets, np.ones_like(tokens), positions, weights)
    found = measures.measure(model, [batch])
    assert found.right[:2].tolist() == [True, False]
    assert found.targets.tolist() == [length - prompt] * 3
    assert found.load.sum() == tokens.size * model.config.num_layers * 2
    assert measures.changed_routing(found, found, [batch]) == 0
    every = [range(model.config.num_experts)] * model.config.num_layers
    silent = measures.measure(measures.without_experts(model, every), [batch])
    assert not np.allclose(silent.losses, found.losses)
