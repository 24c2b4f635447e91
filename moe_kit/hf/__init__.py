"""The one place that knows Hugging Face: PEFT registration, model hooks, finding layers, saving several adapters."""
