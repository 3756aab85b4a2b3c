"""A model that decodes in no time, and data files in the layout of --data."""

import json

import pytest

from eval import sandbox
from olmoe_jax.errors import UserError

SENTENCES = ("打开空调", "明天有雨吗", "播放一首歌", "附近的餐厅", "设一个闹钟", "今天星期几")


@pytest.fixture(scope="session")
def contained():
    """Skips the test if this machine cannot contain programs (docs/evaluation.md)."""
    try:
        sandbox.check()
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """Returns a directory with rows for gsm, intent, law, summary, translation and humaneval."""
    path = tmp_path_factory.mktemp("data")

    def write(file: str, rows: list[dict]) -> None:
        (path / file).parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (path / file).write_text("".join(lines))

    numbers = range(1, 13)
    write(
        "gsm8k/test.jsonl",
        [{"question": f"{n} + {n * n}?", "answer": f"#### {n}"} for n in numbers],
    )
    intent = json.dumps({"intent": "A", "slots": {}})
    for name, answer in {
        "intent": intent,
        "law": "驳回。",
        "summary": "好",
        "translation": "a",
    }.items():
        prompts = [f"User: 例子\n答案：{answer}\n\n{s}\n答案：\n\nAssistant:" for s in SENTENCES]
        rows = [{"idx": i, "prompt": p, "answers": [answer]} for i, p in enumerate(prompts)]
        write(f"esft/eval/{name}.jsonl", rows)
    problem = {"task_id": "HumanEval/0", "prompt": "def f():\n", "entry_point": "f"}
    write("humaneval/HumanEval.jsonl", [problem | {"test": "def check(c):\n    assert c() == 1\n"}])
    return path
