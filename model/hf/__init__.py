"""To and from the published models of Hugging Face (`registry.py` says what lies where)."""
