"""Asks llama.cpp's server for benchmarks.serving, in an environment that has xllamacpp.

Reads the job on standard input and prints one line of JSON, the last one. Models and adapters
become GGUF files by llama.cpp's own scripts, which need torch and transformers.
"""

import importlib.metadata
import json
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import xllamacpp


def main() -> None:
    job = json.load(sys.stdin)
    files = Path(job["output"]) / "gguf"
    files.mkdir(exist_ok=True)
    source = Path(job["llama_cpp_source"])
    cases = []
    for case in job["cases"]:
        try:
            cases.append(decode(case, convert(case, files, source), job["new_tokens"]))
        except RuntimeError as error:
            cases.append({"error": str(error)})
    version = f"llama.cpp (xllamacpp {importlib.metadata.version('xllamacpp')})"
    print(json.dumps({"version": version, "cases": cases}))


def convert(case: dict[str, Any], files: Path, source: Path) -> list[Path]:
    """Returns the GGUF files of the model and, if there is one, its adapter; makes the missing."""
    gguf = Path(__file__).with_name("serving_gguf.py")
    model = files / f"{'-'.join(Path(case['model']).parts[-2:])}.gguf"
    commands = {model: [gguf, source, case["model"]]}
    if case["adapter"]:
        adapter = files / f"{Path(case['adapter']).parent.name}-adapter.gguf"
        script = source / "convert_lora_to_gguf.py"
        commands[adapter] = [script, case["adapter"], "--base", case["model"]]
    for file, command in commands.items():
        if file.exists():
            continue
        flags = ["--outtype", "f32", "--outfile", file]
        words = [str(word) for word in (sys.executable, *command, *flags)]
        result = subprocess.run(words, capture_output=True, text=True, check=False)
        if result.returncode:
            raise RuntimeError((result.stderr.strip().splitlines() or ["no output"])[-1])
    return list(commands)


def decode(case: dict[str, Any], files: list[Path], new_tokens: int) -> dict[str, Any]:
    """Returns {"answers": [{"prompt": ids, "tokens": ids}, …]}, greedy."""
    params = xllamacpp.CommonParams()
    params.model.path = str(files[0])
    params.n_ctx, params.n_parallel, params.cpuparams.n_threads = 256, 1, 1
    # Keys, values and attention in float32, as the other servers have them.
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.use_jinja, params.port = True, 0
    if case["adapter"]:
        template = Path(case["tokenizer"]) / "chat_template.jinja"
        if template.exists():
            params.chat_template = template.read_text()
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(files[1]), 1.0)]
    server = xllamacpp.Server(params)

    def ask(path: str, **body: Any) -> dict[str, Any]:
        request = urllib.request.Request(
            server.listening_address + path,
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=300) as response:
            return json.load(response)

    asked = {"temperature": 0, "max_tokens": new_tokens, "logprobs": True}
    answers = []
    for prompt in case["prompts"]:
        if case["chat"]:
            text = ask("/apply-template", messages=prompt)["prompt"]
            answer = ask("/v1/chat/completions", messages=prompt, **asked)
        else:
            text = prompt
            answer = ask("/v1/completions", prompt=prompt, **asked)
        ids = ask("/tokenize", content=text, add_special=True, parse_special=True)["tokens"]
        tokens = [token["id"] for token in answer["choices"][0]["logprobs"]["content"]]
        answers.append({"prompt": ids, "tokens": tokens})
    return {"answers": answers}


if __name__ == "__main__":
    main()
