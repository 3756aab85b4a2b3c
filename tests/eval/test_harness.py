"""lm-evaluation-harness: log-likelihoods, the model's answers to lm_eval, and the whole command."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from helpers import message_of, run_module, write_json
from tiny import hf_config, make_model, random_weights, tiny_config, write_hf_checkpoint

from eval.harness.__main__ import main as run_lm_eval
from eval.report.__main__ import main as write_report
from eval.report.inputs import read_inputs
from eval.report.results import Model
from eval.run import main as evaluate_tasks
from eval.tasks import tasks_of
from olmoe_jax.generation.likelihood import log_likelihoods

CONFIG = tiny_config()
RANDOM = np.random.default_rng(0)


def tokens(count: int) -> list[int]:
    return RANDOM.integers(0, CONFIG.vocab_size, count).tolist()


@pytest.mark.slow
def test_log_likelihoods_are_those_of_the_logits():
    """The pairs have several lengths, shared rows, more positions than a chunk, no continuation."""
    model, context = make_model(CONFIG), tokens(40)
    pairs = [(tokens(n), tokens(m)) for n, m in ((1, 1), (3, 700), (33, 2), (5, 0))]
    pairs += [(context, [token]) for token in range(4)]

    @jax.jit
    def logits_of(padded):
        return model(padded)[0]

    def logits_after(before, after):
        padded = np.zeros((1, 720), int)  # causal: what follows changes nothing
        padded[0, : len(before) + len(after)] = [*before, *after]
        return logits_of(padded)[len(before) - 1 : len(before) - 1 + len(after)]

    best = []
    for _ in range(3):
        best.append(int(np.argmax(logits_after(context + best, [0]))))
    pairs += [(context, best), (context, [*best[:2], (best[2] + 1) % 61])]
    found = log_likelihoods(model, pairs)
    for (before, after), (value, greedy) in zip(pairs, found, strict=True):
        logits = logits_after(before, after)
        by_token = jax.nn.log_softmax(logits)[np.arange(len(after)), np.array(after, int)]
        assert value == pytest.approx(float(by_token.sum()), rel=1e-5)
        assert greedy == (np.argmax(logits, 1).tolist() == after)
    assert [greedy for _, greedy in found[-2:]] == [True, False]


@pytest.mark.parametrize("pair", [([61], [1]), ([1], [61])])
def test_a_token_that_the_model_does_not_have(pair):
    message = message_of(log_likelihoods, make_model(CONFIG), [([1], []), pair])
    assert message.startswith("the tokenizer gives token 61, but the model's vocabulary has 61;")


def requests(*arguments: tuple) -> list[SimpleNamespace]:
    return [SimpleNamespace(args=args) for args in arguments]


class Counting:
    """A backend that remembers its batches and whose answers say what was asked."""

    context = 16

    def __init__(self, tokenizer, batches_to_live: int = 100):
        self.tokenizer, self.batches, self.left = tokenizer, [], batches_to_live

    def encode(self, text):
        return self.tokenizer(text).input_ids

    def log_likelihoods(self, pairs):
        self._take(pairs)
        return [(-sum(after) - len(before) / 8, True) for before, after in pairs]

    def generate(self, prompts, sampling):
        self._take((prompts, sampling))
        return [f"{prompt}:{sampling.max_new_tokens}" for prompt in prompts]

    def _take(self, batch):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        self.batches.append(batch)


@pytest.fixture
def open_model(tokenizer, monkeypatch):
    """Returns a function that makes lm_eval's model over a `Counting` backend."""
    pytest.importorskip("lm_eval")
    from eval.harness import model

    def make(context: int = 16, **arguments):
        backend = Counting(tokenizer, **arguments)
        backend.context = context
        monkeypatch.setattr(model, "check_backend", lambda *_: None)
        monkeypatch.setattr(model, "JaxBackend", lambda *_: backend)
        return model.OlmoeLM("m", batch_size=2), backend

    return make


def test_a_killed_evaluation_continues_from_the_cache(tmp_path, open_model):
    from lm_eval.api.model import CachingLM

    asked = requests(*(("a" * n, "b" * n) for n in (1, 3, 2, 5, 4)))
    expected = open_model()[0].loglikelihood(asked, disable_tqdm=True)
    cache = str(tmp_path / "cache.db")
    killed, _ = open_model(batches_to_live=1)
    with pytest.raises(KeyboardInterrupt):
        CachingLM(killed, cache).loglikelihood(asked)
    again, backend = open_model()
    assert CachingLM(again, cache).loglikelihood(asked) == expected
    # The two longest were answered before, and are not asked again.
    assert [[len(before) for before, _ in batch] for batch in backend.batches] == [[3, 2], [1]]


def test_requests_that_do_not_fit(open_model):
    model, backend = open_model(context=8)
    model.loglikelihood(requests(("a" * 20, "bc")), disable_tqdm=True)
    (((before, after),),) = backend.batches
    assert (len(before), len(after)) == (7, 2)
    asked = requests(("a", "b" * 9))
    message = message_of(model.loglikelihood, asked)
    assert "asks for the probability of 9 tokens" in message
    asked = requests(("abcdefgh", {"max_gen_toks": 3}))
    assert model.generate_until(asked, disable_tqdm=True) == ["defgh:3"]
    # Of "é" the last byte alone would be kept: a replacement character, which has three bytes.
    asked = requests(("aéfghi", {"max_gen_toks": 3}))
    assert model.generate_until(asked, disable_tqdm=True) == ["fghi:3"]
    asked = requests(("a", {"max_gen_toks": 8}))
    assert "asks for 8 new tokens" in message_of(model.generate_until, asked)


@pytest.mark.parametrize("count", [1, 4, 5, 8, 11])
def test_rolling_windows(count, open_model):
    """The windows score every token once, and the last ones have full contexts."""
    model, backend = open_model(context=4)
    text = "abcdefghijk"[:count]
    model.loglikelihood_rolling(requests((text,)), disable_tqdm=True)
    windows = [pair for batch in backend.batches for pair in batch]
    tokens = backend.encode(text)
    assert sorted(token for _, after in windows for token in after) == sorted(tokens)
    for before, after in windows:
        assert len(before) + len(after) - 1 <= 4
        start = tokens.index(after[0])
        if start:
            assert before == tokens[start - len(before) : start]
            assert len(before) + len(after) - 1 == 4
        else:
            assert before == [backend.tokenizer.eos_token_id]


def test_texts_are_asked_by_their_options(open_model):
    model, backend = open_model(context=1000)
    short = {"until": ["\n", ""], "max_gen_toks": 4, "do_sample": False, "temperature": 0.7}
    drawn = {"until": "x", "do_sample": True, "temperature": 0.5}
    asked = requests(("a", short), ("b", drawn), ("cc", short), ("d", short))
    assert model.generate_until(asked, disable_tqdm=True) == ["a:4", "b:256", "cc:4", "d:4"]
    assert [prompts for prompts, _ in backend.batches] == [["cc", "a"], ["d"], ["b"]]
    found = [(sampling.temperature, sampling.stop) for _, sampling in backend.batches]
    assert found == [(0, ("\n",)), (0, ("\n",)), (0.5, ("x",))]
    assert len({sampling.seed for _, sampling in backend.batches}) == 3
    asked = requests(("a", {"num_beams": 4}))
    assert "num_beams=4" in message_of(model.generate_until, asked)


def test_model_args_that_are_not_there(open_model):
    from eval.harness.model import OlmoeLM

    message = message_of(lambda: OlmoeLM("m", max_length=4, revision="x"))
    assert message.startswith("--model_args max_length=: there is no such argument; write some of")
    assert message_of(OlmoeLM).startswith("--model_args pretrained= is missing")


@pytest.mark.slow
def test_what_lm_eval_refuses_is_one_line(monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setattr(sys, "argv", ["lm_eval", "--model", "olmoe_jax", "--tasks", "no_such_task"])
    message = message_of(run_lm_eval, [])
    assert message.startswith("lm_eval: ")
    assert "no_such_task" in message


def test_the_old_name_says_the_new_command():
    message = message_of(tasks_of, "gsm,lm_eval:arc_easy")
    assert "python -m eval.harness --model olmoe_jax" in message
    assert "--tasks arc_easy" in message


DATA = [
    {
        "question": f"{a} plus {b} is",
        "choices": [f"{a + b}", f"{a * b} or so", "no"],
        "answer": a % 3,
    }
    for a in range(3)
    for b in range(4)
]
COMMON = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
"""
TASKS = {
    "choice": """
task: choice
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "write": """
task: write
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["b"], max_gen_toks: 12, do_sample: false}
num_fewshot: 1
fewshot_config: {sampler: first_n, split: test}
metric_list: [{metric: exact_match}]
""",
    "perplexity": """
task: perplexity
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question * 120}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
}


@pytest.mark.slow
def test_the_scores_of_lm_eval_itself(tiny_model, tmp_path):
    """The command equals lm_eval's own model class, which runs transformers, on local tasks."""
    lm_eval = pytest.importorskip("lm_eval")
    pytest.importorskip("torch")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in DATA))
    (tmp_path / "tasks").mkdir()
    common = COMMON.format(file=tmp_path / "rows.jsonl")
    for name, text in TASKS.items():
        (tmp_path / f"tasks/{name}.yaml").write_text(text + common)
    (tmp_path / "tasks/both.yaml").write_text("group: both\ntask: [choice, write]\n")
    names, out = ["choice", "write", "perplexity"], tmp_path / "out"
    command = ["eval.harness", "run", "--model", "olmoe_jax", "--batch_size", "5", "--limit", "11"]
    command += ["--model_args", f"pretrained={tiny_model}", "--include_path", tmp_path / "tasks"]
    command += ["--output_path", out, "--log_samples", "--use_cache", tmp_path / "cache"]
    code, _, stderr = run_module(*command, "--tasks", "perplexity,both")
    assert code == 0, stderr
    model = HFLM(pretrained=str(tiny_model), dtype="float32", batch_size=4, device="cpu")
    expected = lm_eval.simple_evaluate(
        model,
        tasks=names,
        task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
        limit=11,
        bootstrap_iters=0,
    )
    # A group without metrics of its own: its tasks are the columns.
    inputs = read_inputs([f"mine={out}"])
    assert inputs.results.keys() == {f"lm_eval:{name}" for name in names}
    models = {evaluation.model for _, evaluation in inputs.evaluations}
    assert models == {Model(str(tiny_model), None, "jax", "float32")}
    for name in names:
        result = inputs.results[f"lm_eval:{name}"]["mine"]
        theirs = {
            key.removesuffix(",none"): value
            for key, value in expected["results"][name].items()
            if key.endswith(",none") and "_stderr" not in key
        }
        assert result.metrics.keys() == theirs.keys() != set()
        for metric, value in theirs.items():
            scale = 100 if name != "perplexity" else 1
            assert result.metrics[metric].value == pytest.approx(scale * value, rel=1e-4)
            assert result.metrics[metric].higher_is_better == (name != "perplexity")
        assert len(result.rows) == 11
        (file,) = out.glob(f"*/samples_{name}_*.jsonl")
        for line, sample in zip(
            file.read_text().splitlines(), expected["samples"][name], strict=True
        ):
            found = json.loads(line)
            assert found["doc_id"] == sample["doc_id"]
            row = result.rows[str(found["doc_id"])][0]
            theirs = sample["resps"]
            if name == "choice":
                values = [[float(value), greedy] for ((value, greedy),) in found["resps"]]
                assert [v for v, _ in values] == pytest.approx(
                    [v for ((v, _),) in theirs], rel=1e-4
                )
                assert [greedy for _, greedy in values] == [
                    str(greedy) for ((_, greedy),) in theirs
                ]
                assert row.reference == sample["doc"]["choices"][sample["target"]]
                assert row.scores["acc"] == sample["acc"]
            elif name == "write":
                assert found["resps"] == theirs
                assert row.output == theirs[0][0]
            else:
                assert float(found["resps"][0][0]) == pytest.approx(theirs[0][0], rel=1e-4)
    write_report([str(out), "--output", str(tmp_path / "report")])
    markdown = (tmp_path / "report/report.md").read_text()
    assert "word\\_perplexity ↓" in markdown


@pytest.fixture(scope="module")
def programmer(tmp_path_factory, tokenizer):
    """Returns a model that writes "1", "#", blanks and newlines: some of it is valid Python."""
    config = tiny_config(vocab_size=len(tokenizer))
    weights = random_weights(config)
    silent = np.setdiff1d(np.arange(len(tokenizer)), tokenizer("1# \n").input_ids)
    weights["lm_head"][silent] = 0
    path = tmp_path_factory.mktemp("programmer")
    write_hf_checkpoint(path, config, weights)
    fields = {"max_position_embeddings": 4096, "eos_token_id": tokenizer.eos_token_id}
    write_json(path / "config.json", hf_config(config, **fields))
    tokenizer.save_pretrained(path)
    return path


class CodeEval:
    """lm_eval's metric of programs, which it loads from the hub: runs them in processes."""

    def compute(self, references, predictions, k):
        passed = [
            subprocess.run([sys.executable, "-c", f"{program}\n{tests}"], check=False)
            for (program,), tests in zip(predictions, references, strict=True)
        ]
        return {"pass@1": np.mean([run.returncode == 0 for run in passed])}, {}


@pytest.mark.exhaustive
def test_programs_score_as_in_lm_eval(programmer, contained, tmp_path, monkeypatch):
    """lm_eval's own humaneval and mbpp, run by its command line, and --protocol reference."""
    lm_eval = pytest.importorskip("lm_eval")
    import evaluate

    monkeypatch.setattr(evaluate, "load", lambda name: CodeEval())
    from lm_eval.tasks.mbpp.utils import list_fewshot_samples

    words = "add even largest reverse unique sorted median primes"
    functions = [
        {
            "task_id": f"HumanEval/{number}",
            "prompt": f'def {word}(x):\n    """{word} of x."""\n    return x  ',
            "entry_point": word,
            "test": "def check(candidate):\n    assert candidate(3) == 3\n",
        }
        for number, word in enumerate(words.split())
    ]
    problems = [
        {
            "task_id": 11 + number,
            "text": f"Write a function for {word}.",
            "code": "",
            "test_list": [f"assert {number} == {number}"] * 3,
            "test_setup_code": "",
        }
        for number, word in enumerate(words.split())
    ]
    solved = [row | {"test_setup_code": ""} for row in list_fewshot_samples()]
    own, data = Path(lm_eval.__file__).parent / "tasks", tmp_path / "data"
    for name, file, rows, tested in (
        ("humaneval", "HumanEval", functions, functions),
        ("mbpp", "mbpp", solved + problems, problems),
    ):
        for path, some in ((data / f"{name}/{file}.jsonl", rows), (tmp_path / name, tested)):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in some))
        (tmp_path / f"{name}.yaml").write_text(
            f"include: {own}/{name}/{name}.yaml\ntask: local_{name}\ndataset_path: json\n"
            f"dataset_name: null\ndataset_kwargs: {{data_files: {{test: {tmp_path / name}}}}}\n"
        )
    command = ["--model", "olmoe_jax", "--batch_size", "8", "--confirm_run_unsafe_code"]
    command += ["--model_args", f"pretrained={programmer},dtype=bfloat16"]
    command += ["--include_path", str(tmp_path), "--tasks", "local_humaneval,local_mbpp"]
    command += ["--output_path", str(tmp_path / "theirs"), "--log_samples"]
    command += ["--gen_kwargs", "max_gen_toks=48"]  # of the tasks' own 1,024 and 256
    monkeypatch.setattr(sys, "argv", ["lm_eval", *command])
    run_lm_eval([])
    command = ["--model", str(programmer), "--tasks", "humaneval,mbpp", "--data", str(data)]
    command += ["--output", str(tmp_path / "ours"), "--batch_size", "8", "--max_new_tokens", "48"]
    evaluate_tasks([*command, "--protocol", "reference", "--allow_code_execution"])
    inputs = read_inputs([f"theirs={tmp_path / 'theirs'}", f"ours={tmp_path / 'ours'}"])
    for name in ("humaneval", "mbpp"):
        (theirs,) = inputs.results[f"lm_eval:local_{name}"].values()
        (ours,) = inputs.results[name].values()
        (metric,) = theirs.metrics.values()
        assert metric.value == ours.metrics["pass@1"].value
        assert 0 < metric.value < 100
        texts = [[row.output for (row,) in result.rows.values()] for result in (theirs, ours)]
        assert texts[0] == texts[1]
