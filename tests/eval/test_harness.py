"""Tasks of lm-evaluation-harness: the answers' mathematics without it, and with it if installed."""

import json

import jax
import numpy as np
import pytest
from helpers import make_model, message_of, tiny_config

from eval import run
from eval.backends import Prompts
from eval.harness.answers import Answers, sampling_of
from eval.report.inputs import read_inputs
from eval.tasks import split_names
from olmoe_jax.generation.likelihood import log_likelihoods, rolling_windows

CONFIG = tiny_config()
RANDOM = np.random.default_rng(0)


def tokens(count: int) -> list[int]:
    return RANDOM.integers(0, CONFIG.vocab_size, count).tolist()


def test_log_likelihoods_are_those_of_the_logits():
    """Rows of several lengths, shared rows, more positions than a chunk, an empty continuation."""
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


@pytest.mark.parametrize(("count", "last"), [(1, 0), (4, 0), (5, 3), (8, 1), (11, 1)])
def test_rolling_windows(count, last):
    """Every token once, full contexts at the end, as lm_eval documents it."""
    text = list(range(count))
    windows = list(rolling_windows(text, 99, 4))
    assert [token for _, after in windows for token in after] == text
    assert all(len(before) + len(after) - 1 <= 4 for before, after in windows)
    assert windows[0][0] == [99]
    for before, after in windows[1:]:
        assert before == text[after[0] - len(before) : after[0]]
        assert len(before) + len(after) - 1 == 4
    assert len(windows[-1][0]) >= last


class Counting:
    """A backend whose answers say what was asked; it can be killed."""

    def __init__(self, batches_to_live: int = 100):
        self.batches, self.left = [], batches_to_live

    def _one_more(self, batch):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        self.batches.append(batch)

    def log_likelihoods(self, pairs):
        self._one_more(pairs)
        return [(-sum(after) - len(before) / 8, True) for before, after in pairs]

    def generate(self, prompts, sampling):
        self._one_more((prompts, sampling))
        return [f"{prompt}:{sampling.max_new_tokens}" for prompt in prompts]


def answers(path, tokenizer, backend, context=16) -> Answers:
    path.mkdir(exist_ok=True)
    return Answers(path, Prompts(tokenizer), context, lambda: backend, batch_size=2)


def test_answers_continue_where_they_were_killed(tmp_path, tokenizer):
    pairs = [([1] * n, [n]) for n in (1, 3, 2, 5, 4)]
    expected = [(-n - n / 8, True) for n in (1, 3, 2, 5, 4)]
    with pytest.raises(KeyboardInterrupt):
        answers(tmp_path, tokenizer, Counting(1)).log_likelihoods(pairs)
    backend = Counting()
    assert answers(tmp_path, tokenizer, backend).log_likelihoods(pairs) == expected
    assert [[len(before) for before, _ in batch] for batch in backend.batches] == [[3, 2], [1]]
    assert answers(tmp_path, tokenizer, Counting(0)).log_likelihoods(pairs) == expected
    other = [([1], [7]), *pairs[1:]]
    message = message_of(answers(tmp_path, tokenizer, Counting()).log_likelihoods, other)
    assert "answers to other requests" in message


def test_answers_that_do_not_fit(tmp_path, tokenizer):
    asked = answers(tmp_path, tokenizer, backend := Counting(), context=8)
    asked.log_likelihoods([(list(range(20)), [1, 2])])
    assert backend.batches == [[(list(range(13, 20)), [1, 2])]]
    assert asked.shortened == 1
    assert "asks for the probability of 9 tokens" in message_of(
        asked.log_likelihoods, [([1], [1] * 9)]
    )
    assert asked.texts([("abcdefgh", {"max_gen_toks": 3})]) == ["defgh:3"]
    assert "asks for 8 new tokens" in message_of(asked.texts, [("a", {"max_gen_toks": 8})])
    # A text of 20 tokens: windows of 8, and the last one reaches back.
    asked.rolling_log_likelihoods([[1] * 20], prefix=9)
    windows = [pair for batch in backend.batches[2:] for pair in batch]
    assert sorted((len(b), len(a)) for b, a in windows) == [(1, 8), (1, 8), (5, 4)]


def test_texts_are_asked_by_their_options(tmp_path, tokenizer):
    backend = Counting()
    short = {"until": ["\n", ""], "max_gen_toks": 4, "do_sample": False, "temperature": 0.7}
    drawn = {"until": "x", "do_sample": True, "temperature": 0.5}
    requests = [("a", short), ("b", drawn), ("cc", short), ("d", short)]
    asked = answers(tmp_path, tokenizer, backend, context=1000)
    assert asked.texts(requests) == ["a:4", "b:256", "cc:4", "d:4"]
    assert [prompts for prompts, _ in backend.batches] == [("cc", "a"), ("d",), ("b",)]
    found = [(sampling.temperature, sampling.stop) for _, sampling in backend.batches]
    assert found == [(0, ("\n",)), (0, ("\n",)), (0.5, ("x",))]
    assert "num_beams=4" in message_of(sampling_of, {"num_beams": 4})


def test_names_and_what_is_missing(tmp_path, monkeypatch):
    assert split_names("lm_eval:b, gsm,lm_eval:a,lm_eval:b") == ("gsm", ["b", "a"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    command = ["--model", "m", "--output", str(tmp_path / "o"), "--tasks", "lm_eval:arc_easy"]
    assert "pip install lm_eval" in message_of(run.main, command)


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
def test_the_scores_of_lm_eval_itself(tiny_model, data_dir, tmp_path, capsys):
    """Against lm_eval's own model class, which runs transformers, on tasks in local files."""
    lm_eval = pytest.importorskip("lm_eval")
    pytest.importorskip("torch")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in DATA))
    (tmp_path / "tasks").mkdir()
    common = COMMON.format(file=tmp_path / "rows.jsonl")
    for name, text in TASKS.items():
        (tmp_path / f"tasks/{name}.yaml").write_text(text + common)
    group = "group: both\ntask: [choice, write]\n"
    (tmp_path / "tasks/both.yaml").write_text(group)
    names = ["choice", "write", "perplexity"]
    command = ["--model", str(tiny_model), "--output", str(tmp_path / "out"), "--batch_size", "5"]
    command += ["--lm_eval_tasks", str(tmp_path / "tasks"), "--data", str(data_dir)]
    asked = ",".join(f"lm_eval:{name}" for name in [*names, "both"])
    run.main([*command, "--tasks", f"{asked},gsm", "--limit", "11", "--max_new_tokens", "4"])
    printed = capsys.readouterr().out
    model = HFLM(pretrained=str(tiny_model), dtype="float32", batch_size=4, device="cpu")
    expected = lm_eval.simple_evaluate(
        model,
        tasks=names,
        task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
        limit=11,
        bootstrap_iters=0,
    )
    for name in names:
        path = tmp_path / f"out/lm_eval_{name}"
        metrics = json.loads((path / "result.json").read_text())["metrics"]
        theirs = {
            key.removesuffix(",none"): value
            for key, value in expected["results"][name].items()
            if key.endswith(",none") and "_stderr" not in key
        }
        assert metrics.keys() == theirs.keys() != set()
        for metric, value in theirs.items():
            scale = 100 if name != "perplexity" else 1
            assert metrics[metric]["value"] == pytest.approx(scale * value, rel=1e-4)
            assert metrics[metric]["rows"] == 11
            assert metrics[metric]["higher_is_better"] == (name != "perplexity")
        rows = [json.loads(line) for line in (path / "rows.jsonl").read_text().splitlines()]
        for row, sample in zip(rows, expected["samples"][name], strict=True):
            assert row["id"] == str(sample["doc_id"])
            answer = [resp[0] for resp in sample["resps"]]
            if name == "choice":
                assert row["answer"] == pytest.approx([value for value, _ in answer], rel=1e-4)
                assert row["reference"] == sample["doc"]["choices"][sample["target"]]
                assert row["acc"] == sample["acc"]
            elif name == "write":
                assert row["output"] == answer[0]
            else:
                assert row["answer"] == pytest.approx(answer[0], rel=1e-4)
    assert "lm_eval_choice" in printed
    # A column of the report as any other; the group has those of its members.
    results = read_inputs([str(tmp_path / "out")]).results
    assert list(results) == ["gsm", *sorted(f"lm_eval_{name}" for name in [*names, "both"])]
    assert results["lm_eval_both"]["out"].metrics.keys() == {
        "choice/acc",
        "choice/acc_norm",
        "write/exact_match",
    }
    # Nothing is left to compute, and other settings are refused.
    again = (tmp_path / "out/lm_eval_choice/result.json").read_bytes()
    run.main([*command, "--tasks", "lm_eval:choice", "--limit", "11"])
    assert (tmp_path / "out/lm_eval_choice/result.json").read_bytes() == again
    message = message_of(run.main, [*command, "--tasks", "lm_eval:choice", "--limit", "10"])
    assert "limit=11, now it is 10" in message
    for name, culprit in [("choise", "did you mean choice?"), ("humaneval", "code from the hub")]:
        message = message_of(run.main, [*command, "--tasks", f"lm_eval:{name}"])
        assert culprit in message
    hf = [*command, "--tasks", "lm_eval:choice", "--backend", "hf"]
    assert "with jax only" in message_of(run.main, hf)
