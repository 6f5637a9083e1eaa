"""Archives of audio on Ray Data: `maxwhisper bulk`.

inputs: what is to be transcribed, and the id of each. rows: what is written of each. stages: what Ray's processes do.
parts: what is written while a job runs, and what is made of it at the end. job: one run of it.
"""
