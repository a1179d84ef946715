"""`bench c2c`: a pipeline of two causal models, in which the base receives the teacher's KV cache and then decodes.

Needs transformers. run.py times prompts, store.py writes their records, views.py shows them. The idea is
that of Fu et al. 2025, "Cache-to-Cache: Direct Semantic Communication Between Large Language Models". See docs/c2c.md.
"""
