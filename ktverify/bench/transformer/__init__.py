"""Times of a transformer's steps, and the commands `bench transformer` and `bench memory`.

Comes in: options, as sizes of ktverify/transformer. Goes out: lines (`record`), made in fresh processes (`measure`), as
tables and a picture (`views`).
"""
