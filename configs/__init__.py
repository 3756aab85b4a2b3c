"""One file per experiment, METHOD_DATASET.py, over the table of hyperparameters in table.py."""
