"""Where the time of the native engine's layer goes: `python -m ktverify profile`.

Comes in: a case. Goes out: calls and their stages as JSON lines (`record`), tables (`tables`), a Chrome trace
(`trace`), a picture (`picture`). `measure` calls the engine, the others know only the lines. docs/profile.md says how
to read them.
"""
