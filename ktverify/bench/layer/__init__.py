"""Times and memory of the native engine's layer alone: the commands `bench layer` and `bench sweep`.

Comes in: a case, and what is varied. Goes out: lines (`record`), each spot made in a fresh process (`measure`), as
tables (`tables`) and pictures (`pictures`).
"""
