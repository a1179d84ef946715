"""Stock LLaMA-Factory on the engine, in this process and with nothing edited on disk. docs/llamafactory.md."""
