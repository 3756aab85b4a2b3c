"""Which experts to train: ESFT, expert-specialised fine-tuning (arxiv.org/abs/2407.01906)."""
