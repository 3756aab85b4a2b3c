"""An LLM judge for the tasks whose answers are free text."""
