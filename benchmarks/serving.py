"""Compares greedy tokens of the servers that people use with ours: python -m benchmarks.serving

Trains a small model by every method, with and without a chat template, and decodes the same prompts
in float32 from the exports and adapters: with `olmoe_jax.generate`, and with each server whose
Python the flags name. docs/serving.md says how to make these environments. The results of a server
are kept in the output directory, so that servers can be run one at a time.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.generation import Ids
from benchmarks.serving_models import NEW_TOKENS, PROMPTS, Case, make_cases, read_prompts
from olmoe_jax.checkpoints import directory
from olmoe_jax.checkpoints.peft import router_file
from olmoe_jax.errors import ArgumentParser, UserError, run_command
from olmoe_jax.files import expand

HERE = Path(__file__).parent
OURS = "ours"


@dataclass(frozen=True)
class Server:
    """A program that decodes."""

    flag: str  # names its Python
    script: str  # here, asks it
    help: str  # what its environment has
    takes_router: bool = False  # the script can give it a router that trained beside an adapter


SERVERS = (
    Server("transformers4", "serving_hf.py", "transformers 4 and PEFT", True),
    Server("transformers5", "serving_hf.py", "transformers 5 and PEFT", True),
    Server("vllm", "serving_vllm.py", "vLLM"),
    Server("llama_cpp", "serving_llama_cpp.py", "xllamacpp (llama.cpp), torch and transformers"),
)


def main(arguments: Sequence[str]) -> None:
    parser = ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.add_argument("--output", type=expand, default="runs/serving", metavar="DIR")
    for server in SERVERS:
        text = f"the Python of an environment with {server.help}"
        parser.add_argument(f"--{server.flag}", type=expand, metavar="PYTHON", help=text)
    text = "llama.cpp's source, for its two scripts convert_….py"
    parser.add_argument("--llama_cpp_source", type=expand, metavar="DIR", help=text)
    text = "only cases whose names have this text, as in 'frozen, LoRA, adapter, chats'"
    parser.add_argument("--only", default="", metavar="TEXT", help=text)
    args = parser.parse_args(arguments)
    if bool(args.llama_cpp) != bool(args.llama_cpp_source):
        raise UserError("--llama_cpp and --llama_cpp_source: write both, or neither")
    output = Path(args.output).absolute()
    cases = make_cases(output)
    results = output / "results"
    results.mkdir(exist_ok=True)
    file = results / f"{OURS}.json"
    answers = json.loads(file.read_text()) if file.exists() else {}
    answers |= {case.name: decode(case) for case in cases if case.name not in answers}
    directory.write_json(file, answers)
    ours = [answers[case.name] for case in cases]
    found = {}
    for server in SERVERS:
        file = results / f"{server.flag}.json"
        known = json.loads(file.read_text()) if file.exists() else {"version": "", "cases": {}}
        if python := getattr(args, server.flag):
            jobs = {
                case.name: job(case, own)
                for case, own in zip(cases, ours, strict=True)
                if args.only in case.name and not _must_merge(case, server)
            }
            whole = {"cases": list(jobs.values()), "new_tokens": NEW_TOKENS}
            paths = {"output": str(output), "llama_cpp_source": args.llama_cpp_source}
            new = run_server(server, python, whole | paths)
            if new["version"] != known["version"]:
                known = {"version": new["version"], "cases": {}}
            known["cases"] |= dict(zip(jobs, new["cases"], strict=True))
            directory.write_json(file, known)
        found[server] = known
    print(table(cases, ours, found))
    differ = {
        server.flag
        for server, known in found.items()
        for case, own in zip(cases, ours, strict=True)
        if verdict(own, known["cases"].get(case.name)) not in ("not run", f"{PROMPTS}/{PROMPTS}")
    }
    if differ:
        print(f"other tokens than ours: {', '.join(sorted(differ))}", file=sys.stderr)
        sys.exit(1)


def _must_merge(case: Case, server: Server) -> bool:
    """Returns whether a router trained beside an adapter, which the server cannot be given."""
    return bool(case.adapter and router_file(case.adapter) and not server.takes_router)


def decode(case: Case) -> dict[str, Any]:
    """Returns our greedy tokens: {"ends": ids, "answers": [{"prompt": ids, "tokens": ids}, …]}."""
    import olmoe_jax
    from olmoe_jax.generation.chat import open_format

    spec = "auto" if case.chat else "none"
    format = open_format(spec, case.model, tokenizer=str(case.tokenizer))
    tokenizer = format.tokenizer
    prompts = read_prompts(case)
    if case.chat:  # as `generate --chat` does
        prompts = [format.prompt(messages) for messages in prompts]
    texts = olmoe_jax.generate(
        olmoe_jax.from_pretrained(case.model, adapter=case.adapter),
        Ids(tokenizer),
        prompts,
        max_new_tokens=NEW_TOKENS,
        ends=format.ends,
    )
    answers = [
        {"prompt": tokenizer(prompt).input_ids, "tokens": [int(word) for word in text.split()]}
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    return {"ends": format.ends, "answers": answers}


def job(case: Case, ours: dict[str, Any]) -> dict[str, Any]:
    """Returns what a server's script reads of a case.

    An adapter's base does not know what ends a turn of the adapter's chats: `ends` says it.
    """
    router = case.adapter and router_file(case.adapter)
    return {
        "model": str(case.model),
        "adapter": case.adapter and str(case.adapter),
        "router": router and str(router),
        "tokenizer": str(case.tokenizer),
        "ends": ours["ends"] if case.adapter else None,
        "chat": case.chat,
        "prompts": read_prompts(case),
    }


def run_server(server: Server, python: str, job: dict[str, Any]) -> dict[str, Any]:
    """Runs a server's script; returns {"version": …, "cases": [{"answers" or "error": …}, …]}."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    result = subprocess.run(
        [python, str(HERE / server.script)],
        input=json.dumps(job),
        env=environment | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if result.returncode:
        raise UserError(f"--{server.flag}: {server.script} failed: its last lines say why")
    return json.loads(result.stdout.splitlines()[-1])


def table(
    cases: Sequence[Case], ours: Sequence[dict], found: Mapping[Server, dict[str, Any]]
) -> str:
    """Returns how many prompts have our tokens, by case and server, in Markdown."""
    columns = [known["version"] or server.flag for server, known in found.items()]
    lines = [f"| method | | prompts | {' | '.join(columns)} |"]
    lines.append("| --- " * (3 + len(columns)) + "|")
    errors = []
    for case, own in zip(cases, ours, strict=True):
        cells = [*case.name.rsplit(", ", 2)]
        for server, known in found.items():
            theirs = known["cases"].get(case.name)
            cells.append("merge" if _must_merge(case, server) else verdict(own, theirs))
            if theirs and "error" in theirs:
                errors.append(f"{known['version']}: {case.name}: {theirs['error']}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *errors])


def verdict(ours: dict[str, Any], theirs: dict[str, Any] | None) -> str:
    """Returns "20/20": of how many prompts a server made our tokens, of how many."""
    if theirs is None:
        return "not run"
    if "error" in theirs:
        return "fails"
    pairs = list(zip(ours["answers"], theirs["answers"], strict=True))
    if any(own["prompt"] != other["prompt"] for own, other in pairs):
        return "other prompts"
    ends = set(ours["ends"])
    same = [own["tokens"] == _before_end(other["tokens"], ends) for own, other in pairs]
    return f"{sum(same)}/{len(same)}"


def _before_end(tokens: Sequence[int], ends: set[int]) -> list[int]:
    first = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return list(tokens[:first])


if __name__ == "__main__":
    run_command(main)
