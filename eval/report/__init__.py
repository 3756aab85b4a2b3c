"""Sets methods side by side: `python -m eval.report --help`.

inputs.py reads what evaluations and training runs left, comparison.py makes numbers of it,
contents.py the report's parts, figures.py its plots; document.py writes them as Markdown and HTML.
"""
