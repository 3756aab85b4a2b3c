"""A report that sets methods side by side: `python -m eval.report --help`.

results.py   the evaluations of eval.run
harness.py   the evaluations of lm_eval
inputs.py    evaluations and training runs, by method
comparison.py  one metric per task, differences between methods
contents.py  the report's parts
figures.py   its plots
document.py  Markdown and HTML
"""
