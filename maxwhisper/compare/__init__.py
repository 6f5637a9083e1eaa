"""`maxwhisper compare`: the same checkpoint, audio and options in maxwhisper and in other engines.

Every engine has a process of its own (`worker`), which an adapter in `engines` runs in. `run` asks them one after the
other, round by round, and makes `results` of the answers; `table` and `plot` show these.
"""
