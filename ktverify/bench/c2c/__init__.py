"""A pipeline of two models, timed prompt by prompt: a base model receives a teacher's KV cache. docs/c2c.md.

Comes in: two causal models of transformers with their tokenizers, projectors, prompts. Goes out: the base's responses,
and a record of where the time of each went. The idea is that of cache-to-cache communication (Fu et al. 2025,
"Cache-to-Cache: Direct Semantic Communication Between Large Language Models"). Light until a command is called.
"""
