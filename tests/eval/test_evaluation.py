"""The evaluation: predictions on disk, continuing, refusing, the command, the backends."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from echo import GSM, Echo, evaluate_gsm
from helpers import ROOT, assert_user_error, message_of, run_module, write_json

from eval import run
from eval.backends import Prompts, Sampling, check_backend, open_backend
from eval.evaluation import MODEL, SETTINGS, Decoding, evaluate, settings_of
from eval.outputs import open_output
from eval.predictions import Output, PredictionFile
from eval.tasks import TASKS
from eval.tasks.task import Example, Task, Tools, read_examples
from olmoe_jax.checkpoints.fingerprint import model_fingerprint

SUFFIXES = ("predictions.jsonl", "rows.jsonl", "result.json", "settings.json")


def contents(output: Path, task: str = "gsm") -> dict[str, bytes]:
    return {name: (output / task / name).read_bytes() for name in SUFFIXES}


def test_predictions_and_result(tmp_path, data_dir):
    backend = Echo()
    result = evaluate_gsm(tmp_path / "out", data_dir, backend)
    assert [len(prompts) for prompts, _ in backend.calls] == [5, 5, 2]
    lengths = [len(prompt) for prompts, _ in backend.calls for prompt in prompts]
    assert lengths == sorted(lengths, reverse=True)
    assert backend.calls[0][1] == Sampling(512, 0.0, 0, ("Question:",))
    rows = [json.loads(line) for line in contents(tmp_path / "out")["rows.jsonl"].splitlines()]
    assert [row["id"] for row in rows] == [str(i) for i in range(12)]
    assert rows[0]["output"].endswith("1 + 1?\nAnswer: 4,2 ")
    assert rows[0]["answer"] == "42"
    assert rows[0]["exact_match"] == 0
    none_right = {"value": 0, "low": 0, "high": pytest.approx(24.25, abs=0.01), "rows": 12}
    assert result["metrics"]["exact_match"] == none_right
    assert result == json.loads(contents(tmp_path / "out")["result.json"])


@pytest.mark.parametrize("batches", [0, 1, 2])
def test_continues_where_it_was_killed(tmp_path, data_dir, batches):
    evaluate_gsm(tmp_path / "whole", data_dir, Echo())
    with pytest.raises(KeyboardInterrupt):
        evaluate_gsm(tmp_path / "killed", data_dir, Echo(batches))
    # A kill in the middle of the next write leaves some of a batch's lines, the last one torn.
    whole = contents(tmp_path / "whole")["predictions.jsonl"].splitlines(keepends=True)
    part = b"".join(whole[: 5 * batches + 1]) + whole[5 * batches + 1][:9]
    (tmp_path / "killed/gsm/predictions.jsonl").write_bytes(part)
    backend = Echo()
    evaluate_gsm(tmp_path / "killed", data_dir, backend)
    assert len(backend.calls) == 3 - batches
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_finished_task_needs_no_model(tmp_path, data_dir):
    evaluate_gsm(tmp_path, data_dir, Echo())
    before = contents(tmp_path)
    evaluate_gsm(tmp_path, data_dir, Echo(0))
    assert contents(tmp_path) == before


def test_other_settings_where_nothing_was_decoded(tmp_path, data_dir):
    """A batch that is too large for the memory must not bind the output to its size."""
    larger = Decoding(batch_size=9)
    with pytest.raises(KeyboardInterrupt):
        evaluate_gsm(tmp_path, data_dir, Echo(0), larger)
    with PredictionFile(tmp_path / "gsm/predictions.jsonl", []):  # of another evaluation
        assert "batch_size=9, now it is 5" in message_of(evaluate_gsm, tmp_path, data_dir, Echo())
    evaluate_gsm(tmp_path, data_dir, Echo())
    assert json.loads((tmp_path / "gsm/settings.json").read_text())["batch_size"] == 5
    evaluate_gsm(tmp_path / "whole", data_dir, Echo())
    assert contents(tmp_path) == contents(tmp_path / "whole")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "model.json").write_text('{"model": "theirs"}')
    asked = dict.fromkeys(("model", "fingerprint", "adapter", "tokenizer"))
    arguments = (open_output, foreign, MODEL, asked, (), False)
    assert "was begun with model=theirs, now it is None" in message_of(*arguments)


def test_samples_draw_different_numbers(tmp_path):
    task = TASKS["humaneval"]
    examples = [Example(str(i), "x" * i, "tests") for i in range(3)]
    settings = settings_of(task, examples, Decoding(2, samples=3, temperature=0.5, seed=7), None)
    open_output(tmp_path, MODEL, {"model": "m"})
    open_output(tmp_path / task.name, SETTINGS, settings)
    backend = Echo()
    tools = Tools(run_programs=lambda programs: ["wrong"] * len(programs))
    evaluate(task, examples, settings, tmp_path, lambda: backend, tools)
    assert [len(prompts) for prompts, _ in backend.calls] == [2, 2, 2, 2, 1]
    assert len({sampling.seed for _, sampling in backend.calls}) == 5
    rows = (tmp_path / "humaneval/rows.jsonl").read_text().splitlines()
    assert [json.loads(row)["id"] for row in rows] == [*"000111222"]


def test_long_prompts_lose_examples(tmp_path):
    task, backend = TASKS["law"], Echo()
    backend.context = task.max_new_tokens + 27
    long = Example("0", "User: aaaaaaaaaaaa\n\nbbbb\n\ncccc\n\nAssistant:", "c")
    short = Example("1", "User: c\n\nAssistant:", "c")
    settings = settings_of(task, [long, short], Decoding(), None)
    open_output(tmp_path, MODEL, {"model": "m"})
    open_output(tmp_path / task.name, SETTINGS, settings)
    result = evaluate(task, [long, short], settings, tmp_path, lambda: backend, Tools())
    assert backend.calls[0][0] == ["User: cccc\n\nAssistant:", "User: c\n\nAssistant:"]
    assert result["counts"]["shortened_prompts"] == 1
    backend.context = task.max_new_tokens + 3
    (tmp_path / "law/predictions.jsonl").unlink()
    arguments = (task, [long], settings | {"examples": 1}, tmp_path, lambda: backend, Tools())
    assert "context of 771 leaves 3 beside 768 new tokens" in message_of(evaluate, *arguments)
    asked = settings_of(task, [long, short], Decoding(allow_extrapolation=True), None)
    assert "allow_extrapolation=None, now it is True" in message_of(
        open_output, tmp_path / "law", SETTINGS, asked
    )
    open_output(tmp_path / "other", SETTINGS, asked)
    assert "allow_extrapolation=True, now it is None" in message_of(
        open_output, tmp_path / "other", SETTINGS, settings
    )
    evaluate(task, [long], asked | {"examples": 1}, tmp_path, lambda: backend, Tools())
    assert backend.calls[-1][0] == [long.prompt]


def test_other_settings_are_refused_by_name(tmp_path, data_dir):
    evaluate_gsm(tmp_path, data_dir, Echo())
    for decoding, limit, name in [
        (Decoding(batch_size=4), None, "batch_size=5, now it is 4"),
        (Decoding(batch_size=5, max_new_tokens=9), None, "max_new_tokens=512, now it is 9"),
        (Decoding(batch_size=5, seed=1), None, "seed=0, now it is 1"),
        (Decoding(batch_size=5), 12, "limit=None, now it is 12"),
    ]:
        arguments = (tmp_path, data_dir, Echo(), decoding, limit)
        assert name in message_of(evaluate_gsm, *arguments)
    other = {"model": "m", "fingerprint": "g"}
    assert "fingerprint=f, now it is g" in message_of(open_output, tmp_path, MODEL, other)
    open_output(tmp_path, MODEL, {"model": "moved", "fingerprint": "f"}, free=["model"])
    assert "and no model.json" in message_of(open_output, tmp_path / "gsm", MODEL, other)
    assert "not a directory" in message_of(open_output, tmp_path / "model.json", MODEL, other)


def test_fingerprint_is_the_content(tmp_path):
    """Every file that a model depends on counts, in each kind of directory; results do not."""
    kinds = {
        "hf": ("model.safetensors", "config.json"),
        "converted": ("parameters/layer.0/d/x", "model/tokenizer.json"),
        "run": ("checkpoints/20/state/d/x", "checkpoints/20/metadata"),
    }
    for kind, files in kinds.items():
        for file in (*files, "checkpoints/3/state/x") if kind == "run" else files:
            (tmp_path / kind / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / kind / file).write_bytes(bytes(1_200_000))
        original = model_fingerprint(str(tmp_path / kind))
        (tmp_path / kind / "results").mkdir()
        (tmp_path / kind / "results/x").write_text("x")
        (tmp_path / kind / "README.md").write_text("x")
        shutil.copytree(tmp_path / kind, tmp_path / "copy" / kind)
        assert model_fingerprint(str(tmp_path / "copy" / kind)) == original
        for file in files:
            content = bytearray(1_200_000)
            content[-600_000:-400_000] = b"x" * 200_000
            (tmp_path / kind / file).write_bytes(content)
            changed = model_fingerprint(str(tmp_path / kind))
            assert changed != original
            original = changed


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda lines: [lines[1], lines[0], *lines[2:]], "line 1 is sample 0 of row"),
        (lambda lines: [b"", *lines], "line 1: not JSON"),
        (lambda lines: [b"[]", *lines[1:]], "line 1: the content is []; it must be an object"),
        (lambda lines: [lines[0].replace(b"false", b"0"), *lines[1:]], "shortened is 0; it must"),
        (lambda lines: [*lines[:-1], b"\xff"], "line 12: not JSON"),
        (lambda lines: [b'{"output": ' + b"[" * 100_000, *lines], "line 1: not JSON (recursion"),
    ],
)
def test_damaged_predictions(tmp_path, data_dir, damage, words):
    evaluate_gsm(tmp_path, data_dir, Echo())
    file = tmp_path / "gsm/predictions.jsonl"
    damaged = b"".join(line + b"\n" for line in damage(file.read_bytes().splitlines()))
    file.write_bytes(damaged)
    message = message_of(evaluate_gsm, tmp_path, data_dir, Echo())
    assert words in message
    assert "remove the file, and the task is decoded again" in message
    assert file.read_bytes() == damaged


def test_predictions_and_settings_that_are_no_files(tmp_path, data_dir):
    evaluate_gsm(tmp_path, data_dir, Echo())
    for name in ("predictions.jsonl", "settings.json"):
        (tmp_path / "gsm" / name).unlink()
        os.mkfifo(tmp_path / "gsm" / name)
        assert f"{name}: a FIFO" in message_of(evaluate_gsm, tmp_path, data_dir, Echo())
    (tmp_path / "model.json").write_text('{"model": "m", "fingerprint": ' + "[" * 999)
    assert "model.json: not JSON" in message_of(evaluate_gsm, tmp_path, data_dir, Echo())
    (tmp_path / "model.json").write_text(f'{{"model": "m", "fingerprint": "{"x" * 999}"}}')
    assert len(message_of(evaluate_gsm, tmp_path, data_dir, Echo())) < 500


def test_one_process_at_a_time(tmp_path):
    file = PredictionFile(tmp_path / "p", [1])
    with file:
        other = PredictionFile(tmp_path / "p", [1])
        assert "another evaluation is writing" in message_of(other.__enter__)
    with PredictionFile(tmp_path / "p", [1]) as free:
        free.append([Output("0", 0, shortened=False, output="x")])


COMMON = ["--model", "nowhere", "--output", "out", "--tasks"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([*COMMON, "gms"], "did you mean gsm?"),
        (
            [*COMMON, "gsm", "--limit", "0"],
            "argument --limit: 0: expected a whole number, 1 or more",
        ),
        ([*COMMON, "gsm", "--batch_size", "0"], "--batch_size: 0: expected"),
        (
            [*COMMON, "law", "--protocol", "reference", "--judge_prompts", "words"],
            "--judge_prompts: name a judge too",
        ),
        ([*COMMON, "gsm", "--temperature", "-1"], "--temperature=-1.0"),
        ([*COMMON, "gsm", "--samples", "3"], "add e.g. --temperature 0.8"),
        ([*COMMON, "gsm,law", "--top_p", "0.9"], "--top_p=0.9: greedy decoding draws no token"),
        ([*COMMON, "gsm", "--backend", "tf"], "invalid choice: 'tf'"),
        ([*COMMON, "gsm,mbpp"], "--tasks mbpp: runs programs that the model wrote; add --allow"),
        ([*COMMON, "gsm", "--data", "missing"], "no gsm8k/test.jsonl there"),
        ([*COMMON, "law", "--judge_url", "http://x/v1"], "with --judge_model"),
        ([*COMMON, "law", "--judge_model", "m"], "add --judge_url"),
        ([*COMMON, "law", "--judge_model", "m", "--judge_url", "x"], "write http://"),
        ([*COMMON, "law", "--judge_model", "m", "--judge_url", "http://a:b@x/v1"], "JUDGE_API_KEY"),
        ([*COMMON, "gsm"], "nowhere: no such directory"),
        ([*COMMON, "gsm", "--chat_template", "auto"], "nowhere: no such directory"),
        (["--tasks", "gsm"], "--model, --output"),
    ],
)
def test_mistakes(arguments, expected, data_dir, monkeypatch):
    monkeypatch.delenv("JUDGE_MODEL", raising=False)
    monkeypatch.delenv("JUDGE_BASE_URL", raising=False)
    if "--data" not in arguments:
        arguments = [*arguments, "--data", str(data_dir)]
    assert expected in message_of(run.main, arguments)
    assert not Path("out").exists()


def test_backends_that_cannot_load(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert "pip install torch" in message_of(check_backend, "hf", str(tmp_path))
    assert "pip install vllm" in message_of(check_backend, "vllm", str(tmp_path))
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "torch", type(sys)("torch"))  # the real one takes long
    assert "reads Hugging Face checkpoints" in message_of(check_backend, "hf", str(tmp_path))


CHATML = ROOT / "tests/data/chat_templates/chatml.jinja"


def test_prompts_by_a_chat_template(tiny_model, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    plain = Prompts(model)
    assert (plain.text("x\n"), plain.template, plain.ends) == ("x\n", None, [0])
    assert "has no chat template; write" in message_of(Prompts, model, None, None, "auto")
    write_json(model / "generation_config.json", {"eos_token_id": [0, 70]})
    (model / "chat_template.jinja").write_text(CHATML.read_text())
    own, from_file = Prompts(model, None, None, "auto"), Prompts(model, None, None, str(CHATML))
    turn = [{"role": "user", "content": "x\n"}]
    wanted = own.tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
    assert own.encode("x\n") == from_file.encode("x\n") == wanted
    assert own.template == from_file.template
    assert own.ends == [0, 70]
    notes = [prompts.note for prompts in (plain, own, from_file, Prompts(model))]
    assert notes[0] is None
    assert notes[1] == "prompts: a user's turn each, by the tokenizer's chat template"
    assert notes[2].endswith("chatml.jinja")
    assert notes[3].endswith("add --chat_template auto")
    assert own.decode([69, 71, 70, 69, 0]) == own.tokenizer.decode([69, 71])
    # An adapter has the template and the ends that it was trained with.
    adapter = shutil.copytree(tiny_model, tmp_path / "adapter")
    (adapter / "adapter_config.json").write_text("{}")
    write_json(adapter / "generation_config.json", {"eos_token_id": [5]})
    assert Prompts(model, str(adapter)).ends == [0, 5, 70]
    assert "has no chat template" in message_of(Prompts, model, str(adapter), None, "auto")


def test_the_chat_template_is_a_setting(tmp_path, data_dir):
    evaluate_gsm(tmp_path, data_dir, Echo(), Decoding(batch_size=5, chat_template="ab"))
    stored = json.loads((tmp_path / "gsm/result.json").read_text())
    assert stored["settings"]["chat_template"] == "ab"
    message = message_of(evaluate_gsm, tmp_path, data_dir, Echo())
    assert "was begun with chat_template=ab, now it is None" in message


@pytest.mark.slow
def test_vllm_gets_the_same_prompts(tiny_model, monkeypatch):
    """A stand-in for vLLM, which needs a GPU, shows the requests."""
    asked = {}

    class Vllm:
        def __init__(self, **arguments):
            asked["load"] = arguments

        def generate(self, requests, parameters, use_tqdm):
            asked["generate"] = (requests, parameters)
            tokens = tokenizer("ab").input_ids
            output = type("Output", (), {"token_ids": [*tokens, tokenizer.eos_token_id]})
            return [type("Request", (), {"outputs": [output]}) for _ in requests]

    module = type(sys)("vllm")
    module.LLM, module.SamplingParams = Vllm, dict
    monkeypatch.setitem(sys.modules, "vllm", module)
    backend = open_backend("vllm", str(tiny_model), "bfloat16")
    tokenizer = backend.tokenizer
    texts = backend.generate(["x", "你"], Sampling(3, 0.5, 1, ("\n#",), top_p=0.9, top_k=7))
    assert texts == ["ab", "ab"]
    requests, parameters = asked["generate"]
    assert [r["prompt_token_ids"] for r in requests] == [
        tokenizer(p).input_ids for p in ("x", "你")
    ]
    for one in parameters:
        assert (one["max_tokens"], one["stop"]) == (3, ["\n#"])
        assert one["stop_token_ids"] == [tokenizer.eos_token_id]
        assert (one["temperature"], one["top_p"], one["top_k"]) == (0.5, 0.9, 7)
    # Samples of one prompt must not draw alike.
    assert parameters[0]["seed"] != parameters[1]["seed"]
    assert asked["load"] == {"model": str(tiny_model), "dtype": "bfloat16"}
    assert backend.context == 1024


@pytest.mark.slow
def test_jax_and_transformers_write_the_same(tiny_model, data_dir):
    pytest.importorskip("torch")
    jax, hf = (open_backend(name, str(tiny_model), "float32") for name in ("jax", "hf"))
    assert jax.context == hf.context == 1024
    for task in (GSM, TASKS["translation"]):
        prompts = [example.prompt for example in read_examples(task, str(data_dir))]
        greedy = Sampling(24, 0.0, 0, task.stop)
        assert [jax.encode(p) for p in prompts] == [hf.encode(p) for p in prompts]
        texts = jax.generate(prompts, greedy)
        assert texts == hf.generate(prompts, greedy)
    # A second token that ends a text, as a config.json may name one.
    end = next(character for text in texts for character in text if character.isascii())
    jax.ends = hf.ends = [0, *jax.encode(end)]
    ended = [text.partition(end)[0] for text in texts]
    assert jax.generate(prompts, greedy) == hf.generate(prompts, greedy) == ended


@pytest.mark.slow
@pytest.mark.usefixtures("contained")
def test_the_command_on_code(tiny_model, data_dir, tmp_path):
    out = tmp_path / "out"
    common = ["eval.run", "--model", tiny_model, "--data", data_dir, "--output", out]
    assert_user_error(run_module(*common, "--tasks", "humaneval"), "--allow_code_execution")
    assert not out.exists()
    sampled = ["--tasks", "humaneval", "--samples", 5, "--temperature", 1, "--max_new_tokens", 8]
    code, stdout, stderr = run_module(*common, *sampled, "--allow_code_execution")
    assert code == 0, stderr
    assert "pass@5" in stdout


# A process of its own that is worth killing; without jax, so that ten of them start quickly.
WORKER = """
import sys, time
from pathlib import Path
from echo import Echo, evaluate_gsm
from eval.evaluation import Decoding
class Slow(Echo):
    def generate(self, prompts, sampling):
        time.sleep(0.05)
        return super().generate(prompts, sampling)
evaluate_gsm(Path(sys.argv[1]), Path(sys.argv[2]), Slow(), Decoding(batch_size=3))
"""


@pytest.mark.slow
def test_killed_ten_times_gives_the_same_files(data_dir, tmp_path):
    (tmp_path / "data/gsm8k").mkdir(parents=True)
    rows = (data_dir / "gsm8k/test.jsonl").read_text() * 8
    (tmp_path / "data/gsm8k/test.jsonl").write_text(rows)

    def command(output: Path) -> list[str]:
        return [sys.executable, "-c", WORKER, str(output), str(tmp_path / "data")]

    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    arguments = {"cwd": Path(__file__).parent, "env": environment}
    subprocess.run(command(tmp_path / "whole"), check=True, **arguments)
    killed, moments = tmp_path / "killed", random.Random(0)
    file = killed / "gsm/predictions.jsonl"

    def size() -> int:
        return file.stat().st_size if file.exists() else 0

    for _ in range(10):
        # 32 batches in all: one or two in each life, until a random moment of the next one.
        start = size()
        process = subprocess.Popen(command(killed), stderr=subprocess.DEVNULL, **arguments)
        while size() <= start and process.poll() is None:
            time.sleep(0.001)
        time.sleep(moments.random() * 0.06)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    subprocess.run(command(killed), check=True, **arguments)
    assert contents(killed) == contents(tmp_path / "whole")


def test_every_task_declares_what_it_needs():
    for task in TASKS.values():
        assert isinstance(task, Task)
        assert task.max_new_tokens > 0
        assert task.hub
        assert task.local_file.endswith(".jsonl")
