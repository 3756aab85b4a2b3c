"""--protocol reference: the rules of the published evaluation, each beside what it is held against.

lm_eval is installed; the other rules are short, and written here a second time.
"""

import contextlib
import http.server
import json
import re
import string
import threading
from pathlib import Path

import numpy as np
import pytest
from helpers import message_of
from judge_server import KEY
from tiny_report import write_evaluation, write_json

from eval import sandbox
from eval.backends import Sampling, open_backend
from eval.evaluation import Decoding, settings_of
from eval.judge.client import Server
from eval.judge.judge import Judge
from eval.judge.prompts import REFERENCE_JUDGE, ReferenceQuestions
from eval.report.__main__ import main as report
from eval.run import parser
from eval.tasks import TASKS, tasks_of
from eval.tasks.reference import REFERENCE
from eval.tasks.task import Example, Prediction, Tools, read_examples


def predictions(task, outputs_and_references) -> list[Prediction]:
    return [
        Prediction(Example(str(i), "", reference), output, task.answer(output))
        for i, (output, reference) in enumerate(outputs_and_references)
    ]


def test_settings():
    """Decoding, limits and precision of every task; a flag overrides them."""
    found = {}
    for name, task in REFERENCE.items():
        s = settings_of(task, [], Decoding(), None)
        assert s["protocol"] == "reference"
        found[name] = tuple(s[n] for n in ("temperature", "top_p", "max_new_tokens"))
        assert task.name == name in TASKS
    esft = dict.fromkeys(("intent", "law", "summary", "translation"), (0.7, 0.9, 512))
    assert found == {
        "gsm": (0, 1, 512), "mbpp": (0, 1, 256), "humaneval": (0, 1, 1024), **esft,
    }  # fmt: skip
    dtypes = {settings_of(REFERENCE[name], [], Decoding(), None)["decode_dtype"] for name in esft}
    assert dtypes == {"float32"}
    asked = Decoding(temperature=0.0, decode_dtype="bfloat16")
    changed = settings_of(REFERENCE["law"], [], asked, None)
    assert (changed["temperature"], changed["decode_dtype"]) == (0, "bfloat16")
    ours = settings_of(TASKS["law"], [], Decoding(), None)
    assert (ours["protocol"], ours["temperature"]) == ("ours", 0)
    assert tasks_of("law", "reference") == [REFERENCE["law"]]
    assert parser().parse_args(["--model", "m", "--tasks", "law", "--output", "o"]).protocol == (
        "ours"
    )


@pytest.fixture(scope="module")
def lm_eval_prompts(shared, tmp_path_factory):
    """Returns {task: lm_eval's (prompt, options) for each problem}, of its own task files."""
    lm_eval = pytest.importorskip("lm_eval")
    import evaluate
    from lm_eval.tasks import TaskManager

    path = tmp_path_factory.mktemp("tasks")
    own = Path(lm_eval.__file__).parent / "tasks"
    problems = (shared / "data/mbpp/mbpp.jsonl").read_text().splitlines()
    test = [line for line in problems if 11 <= json.loads(line)["task_id"] <= 510]
    (path / "test.jsonl").write_text("\n".join(test))
    files = {
        "mbpp": path / "test.jsonl",
        "humaneval": shared / "data/humaneval/HumanEval.jsonl",
    }
    for name, file in files.items():
        (path / f"{name}.yaml").write_text(
            f"include: {own}/{name}/{name}.yaml\ntask: local_{name}\ndataset_path: json\n"
            f"dataset_name: null\ndataset_kwargs: {{data_files: {{test: {file}}}}}\n"
        )
    with pytest.MonkeyPatch.context() as patch:
        # Their files load the metric from the hub, to try it.
        metric = type("Metric", (), {"compute": lambda self, **_: ({"pass@1": 0.0}, {})})()
        patch.setattr(evaluate, "load", lambda name: metric)
        manager = TaskManager(include_path=str(path), include_defaults=False)
        found = {}
        for name in files:
            task = manager.load(f"local_{name}")["tasks"][f"local_{name}"]
            task.build_all_requests(rank=0, world_size=1, limit=None)
            found[name] = [request.args for request in task.instances]
    return found


@pytest.mark.slow
def test_prompts_are_those_of_lm_eval(lm_eval_prompts, shared):
    for name, count in {"mbpp": 500, "humaneval": 164}.items():
        task = REFERENCE[name]
        examples = read_examples(task, str(shared / "data"))
        assert len(examples) == count
        assert [e.prompt for e in examples] == [prompt for prompt, _ in lm_eval_prompts[name]]
        for _, options in lm_eval_prompts[name]:
            assert tuple(options["until"]) == task.stop
            assert options.get("max_gen_toks", 256) == task.max_new_tokens
            assert not options["do_sample"]
    assert "\r\n" in read_examples(REFERENCE["mbpp"], str(shared / "data"))[0].prompt


@pytest.mark.slow
def test_programs_have_three_seconds(contained):
    slow, task = "import time\ntime.sleep(5)", REFERENCE["mbpp"]
    made = [Prediction(Example(str(i), "", "assert 1"), p, p) for i, p in enumerate((slow, ""))]
    scores = task.score(made, Tools(run_programs=sandbox.run_all))
    assert [row["passed"] for row in scores.rows] == [0, 1]


def open_instruct_gsm(output: str, target: str) -> bool:
    """The rule of the published evaluation, written another way."""
    for prefix in ("Answer the following question", "Question:", "Comment:"):
        output = output.split(prefix)[0]
    output = re.sub(r"(\d),(\d)", r"\1\2", output)
    numbers = re.findall(r"[-+]?\d*\.\d+|\d+", output)
    clean = [
        "".join(c for c in text.lower() if c not in string.punctuation)
        for text in (numbers[-1] if numbers else output, target)
    ]
    return clean[0] == clean[1]


@pytest.mark.parametrize(
    ("output", "target", "right"),
    [
        (" 3 - 8 = -5", "5", True),  # whole numbers lose their sign
        (" so -5.5", "-5.5", True),
        (" $1,234.00", "123400", True),  # punctuation does not count
        (" 18.", "18", True),
        (" 18\n\nComment: 5", "18", True),
        (" 18 Question: 5", "18", True),
        (" eighteen", "18", False),
        ("", "18", False),
    ],
)
def test_gsm(output, target, right):
    from olmoe_jax.generation.stop_strings import cut_at

    task = REFERENCE["gsm"]
    (row,) = task.score(predictions(task, [(cut_at(output, task.stop), target)]), Tools()).rows
    assert row["exact_match"] == right == open_instruct_gsm(output, target)


@pytest.mark.parametrize(
    ("output", "right"),
    [
        ('{"intent": "A", "slots": {"x": "b c", "y": ["1", "2"]}}', True),
        (' {"intent": "A", "slots": {"x": "b c", "y": ["2", "1"]}}。\n\nUser:', True),
        ('```json\n{"intent": "A", "slots": {"x": "bc", "y": [2, 1]}}\n```', True),
        ('```json\n{"intent": "A", "slots": {"x": "bc", "y": ["1", "2"]}}', False),  # no end
        ('{"intent": "A", "slots": {"x": "bc"}}', False),
        ('{"intent": "B", "slots": {"x": "bc", "y": ["1", "2"]}}', False),
        ('{"intent": "A", "slots": {"x": "bc", "y": ["1", "2"], "z": 3}}', False),
        ('{"intent": "A", "slots": null}', False),
        ("[1]", False),
        ("", False),
        ("[" * 9999, False),
    ],
)
def test_intent(output, right):
    """Spaces count in the data and not in the prediction, as published."""
    task = REFERENCE["intent"]
    reference = '{"intent": "A", "slots": {"x": "bc", "y": ["1", "2"]}}'
    (row,) = task.score(predictions(task, [(output, reference)]), Tools()).rows
    assert row["exact_match"] == right


def test_free_texts():
    assert REFERENCE["law"].answer(" 一。\n\n二。 \n") == "一。\n\n二"
    assert REFERENCE["summary"].answer(" \n") == "None"
    assert REFERENCE["translation"].answer(" a.\n\nb") == "a."
    assert REFERENCE["translation"].answer("") == "None"
    rows = [("l", {"prompt": "p", "completion": "一。\n\n"})]
    assert REFERENCE["law"].examples(rows)[0].reference == "一。\n\n"


@contextlib.contextmanager
def recorder(*answers: str):
    """Yields (url, bodies) of a judge that gives the answers in turn and keeps the requests."""
    bodies, left = [], list(answers)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.reply({})

        def do_POST(self):
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.reply({"choices": [{"message": {"content": left.pop(0)}}]})

        def reply(self, content):
            text = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", bodies
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def words(tmp_path):
    """Returns a directory with the judge's messages."""
    path = tmp_path / "words"
    path.mkdir()
    (path / "system.txt").write_text("Be fair. \n")
    (path / "law.txt").write_text("\n{x} A: {prediction}\nB: {ground_truth}\n")
    (path / "translation.txt").write_text("{reference} / {prediction}")
    return path


def test_judge_field_by_field(tmp_path, words, capsys):
    """What is sent, and what the answers count; an unreadable verdict counts 0."""
    task = REFERENCE["law"]
    made = predictions(
        task, [("甲{ground_truth}。", "乙\n"), ("丙", "丁"), ("", "丁"), ("戊", "丁")]
    )
    answers = ("准确性扣3分，总分是：7.5分 总分是：1分", "很好，10 分", "总分是：99分", "")
    with recorder(*answers) as (url, bodies):
        questions = ReferenceQuestions(words, ["law"])
        judge = Judge(Server(url, REFERENCE_JUDGE, KEY), questions, tmp_path / "judge.jsonl", 1)
        scores, counts = judge("law", made)
    assert bodies[0] == {
        "model": "gpt-4o-mini-2024-07-18",
        "messages": [
            {"role": "system", "content": "Be fair. \n"},
            {"role": "user", "content": "\n{x} A: 甲{ground_truth}\nB: 乙\n\n"},
        ],
        "max_tokens": 80,
    }
    assert bodies[2]["messages"][1]["content"] == "\n{x} A: None\nB: 丁\n"
    assert scores == [0.75, 0.0, 1.0, 0.0]
    assert counts["judge_unparsable"] == 2
    assert len(counts["judge_prompts"]) == 16
    assert "judge: law: 2 of 4 rows count 0: unparsable\n" in capsys.readouterr().out
    result = task.score(made, Tools(judge=lambda *_: (scores, counts)))
    assert result.metrics["judge"].value == pytest.approx(100 * 1.75 / 4)


def test_verdicts_in_english(words):
    questions = ReferenceQuestions(words, ["translation"])
    assert questions.score("translation", "x 9 points, total score: 8 points") == 0.8
    assert questions.score("translation", "score:7.5point, score: 1 point") == 0.75
    assert questions.score("translation", "total: 8 points") is None
    assert questions.score("translation", "score: " + " " * 100_000 + "8 pints") is None


def test_messages_that_are_wrong(words):
    (words / "law.txt").write_text("{prediction} {prediction}")
    assert "law.txt: needs {prediction} and {ground_truth}" in message_of(
        ReferenceQuestions, words, ["law"]
    )
    assert "summary.txt" in message_of(ReferenceQuestions, words, ["summary"])


def test_the_report_marks_two_protocols(tmp_path):
    """They stand in one column only with a mark, and no test or bold number compares them."""
    for name, protocol, right in (("a", "ours", 1.0), ("b", "reference", 0.0), ("c", None, 0.0)):
        path = write_evaluation(tmp_path / name, gsm=[right, right])
        file = path / "gsm/result.json"
        stored = json.loads(file.read_text())
        if protocol:
            stored["settings"]["protocol"] = protocol
        write_json(file, stored)
    report([*(str(tmp_path / name) for name in "abc"), "--output", str(tmp_path / "report")])
    text = (tmp_path / "report/report.md").read_text()
    assert re.search(r"\| b \| 0\.00† \(", text)
    assert "have the mark †" in text
    assert re.search(r"\| a \| \*\*100\.00 \(", text)
    assert "| c − a |" in text
    assert "b − a" not in text
    assert "jax, float32, protocol reference" in text


def test_the_report_marks_chat_templates(tmp_path):
    for name, template, right in (
        ("a", None, 1.0),
        ("b", "0f", 0.0),
        ("c", "0f", 0.0),
        ("d", "1e", 1),
    ):
        path = write_evaluation(tmp_path / name, gsm=[right, right])
        file = path / "gsm/result.json"
        stored = json.loads(file.read_text())
        if template:
            stored["settings"]["chat_template"] = template
        write_json(file, stored)

    def text_of(*names):
        paths = [str(tmp_path / name) for name in names]
        report([*paths, "--output", str(tmp_path / "report")])
        return (tmp_path / "report/report.md").read_text()

    text = text_of(*"abcd")
    assert re.search(r"\| a \| 100\.00 \(", text)
    assert re.search(r"\| b \| \*\*0\.00‡ \(", text)
    assert re.search(r"\| d \| 100\.00‡‡ \(", text)
    assert "(a: none; b, c: chat template 0f; d: chat template 1e)" in text
    assert "jax, float32, chat template 0f" in text
    assert "c − b" in text
    assert "b − a" not in text
    assert "d − a" not in text
    text = text_of(*"bc")
    assert "‡" not in text
    assert "the prompts are user turns of the chat template 0f." in text


@pytest.mark.slow
def test_draws_are_those_of_transformers(tiny_model):
    """The next token of a prompt for each kind of draw, 20,000 draws (chi-squared)."""
    import jax
    import jax.numpy as jnp
    import torch
    from scipy.stats import chi2
    from transformers import AutoModelForCausalLM
    from transformers.generation.logits_process import (
        LogitsProcessorList,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    from olmoe_jax.data import load_tokenizer
    from olmoe_jax.generation.sampling import Sampling as Draws
    from olmoe_jax.generation.sampling import sample

    tokenizer = load_tokenizer(str(tiny_model))
    theirs = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    count, draw = 20_000, jax.jit(sample, static_argnums=0)
    kinds = {"a b": (0.9, 0), "the cat": (0.9, 5), "x y z": (1.0, 7)}
    for number, (prompt, (top_p, top_k)) in enumerate(kinds.items()):
        ids = torch.tensor([tokenizer(prompt, add_special_tokens=False).input_ids])
        with torch.no_grad():
            logits = 4 * theirs(ids).logits[:, -1]
        warpers = [TemperatureLogitsWarper(0.7)]
        warpers += [TopKLogitsWarper(top_k)] if top_k else []
        warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
        expected = LogitsProcessorList(warpers)(ids, logits.clone()).softmax(-1)[0].numpy()
        sampling = Draws(0.7, top_p, number, top_k)
        keys = jax.random.split(jax.random.key(number), count)
        rows = jnp.broadcast_to(logits[0].numpy(), (count, logits.shape[-1]))
        drawn = draw(sampling.kind, rows, keys, jnp.int32(0), sampling.numbers)
        observed = np.bincount(drawn, minlength=len(expected))
        assert not observed[expected == 0].any()
        common = expected * count >= 5
        kept, wanted = observed[common], expected[common] * count
        rest = count - kept.sum(), count - wanted.sum()
        statistic = ((kept - wanted) ** 2 / wanted).sum()
        statistic += (rest[0] - rest[1]) ** 2 / max(rest[1], 1)
        assert statistic < chi2.ppf(0.9999, max(1, common.sum() - 1 + (rest[1] > 1)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["jax", "hf"])
def test_the_same_seed_draws_the_same_texts(tiny_model, name):
    backend = open_backend(name, str(tiny_model), "float32")
    prompts, drawing = ["a b", "the cat", "a b"], {"top_p": 0.9, "top_k": 50}
    first, again, other = (
        backend.generate(prompts, Sampling(12, 0.7, seed, (), **drawing)) for seed in (1, 1, 2)
    )
    assert first == again != other
    # Two samples of a prompt in one batch are two draws.
    assert first[0] != first[2]
    greedy = [backend.generate(prompts, Sampling(12, 0.7, seed, (), top_k=1)) for seed in (1, 2)]
    assert greedy[0] == greedy[1] == backend.generate(prompts, Sampling(12, 0.0, 0, ()))
