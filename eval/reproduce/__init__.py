"""The paper's table: every method on every data set, `python -m eval.reproduce --help`.

cells.py    the commands of each cell of the table, run as processes
small.py    the small model and the data of --small

OUTPUT/reproduce.json   what was asked
OUTPUT/base/eval/       the results of the model from which all start
OUTPUT/METHOD_DATASET/  the training run, in it hf/ (the export) and eval/ (the results)
OUTPUT/report/          report.md and report.html
OUTPUT/small/           with --small: the model and the data
"""
