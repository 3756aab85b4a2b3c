"""Writes a report that compares evaluated methods, as Markdown and as one HTML page."""

from collections.abc import Sequence
from pathlib import Path

from eval.report.contents import report
from eval.report.document import Pictures, to_html, to_markdown
from eval.report.inputs import read_inputs
from olmoe_jax.checkpoints import directory
from olmoe_jax.errors import ArgumentParser, run_command, whole_number
from olmoe_jax.files import user_path

MARKDOWN, HTML = "report.md", "report.html"
EXAMPLE = """example:
  python -m eval.report runs/frozen_gsm runs/densemixer_gsm base=results_base --output report

RUNS are directories that eval.run wrote (--output), lm_eval (--output_path) or train.py
(train.output_dir, with the evaluations in it). A row of the tables is a method: the one of the
training run that made an evaluation's model, "base" for the model that the runs started from, else
the directory's name; NAME=DIR names it. Evaluations of one method on several tasks are one row.
"""


def main(arguments: Sequence[str]) -> None:
    """Runs the command line."""
    parser = ArgumentParser(prog="python -m eval.report", description=__doc__, epilog=EXAMPLE)
    parser.add_argument("runs", nargs="+", metavar="RUNS", help="DIR or NAME=DIR")
    parser.add_argument("--output", required=True, type=user_path, metavar="DIR")
    parser.add_argument(
        "--samples",
        type=whole_number(0),
        default=3,
        metavar="N",
        help="rows of each task to show (3)",
    )
    args = parser.parse_args(arguments)
    directory.check_writable(args.output)
    blocks = report(read_inputs(args.runs), args.samples)
    args.output.mkdir(parents=True, exist_ok=True)
    for block in blocks:
        for picture in block.pictures if isinstance(block, Pictures) else ():
            _write(args.output / picture.name, picture.content)
    _write(args.output / MARKDOWN, to_markdown(blocks).encode())
    _write(args.output / HTML, to_html(blocks).encode())
    print(f"wrote {args.output / MARKDOWN} and {args.output / HTML}")


def _write(file: Path, content: bytes) -> None:
    with directory.new_file(file) as partial:
        partial.write_bytes(content)


if __name__ == "__main__":
    run_command(main)
