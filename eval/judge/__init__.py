"""An LLM judge for tasks whose answers are free text."""
